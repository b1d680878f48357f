// One worker's store: index, pools, sketch and the fused update, within a byte limit that holds at every moment.
#pragma once

#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "core/numeric.h"

namespace fiited {

struct ShardConfig {
  uint64_t seed;
  int chunk;
  int chunks;
  Storage storage;
  Optimizer optimizer;
  Importance importance;
  int tables;
  uint32_t first_bucket;
  uint32_t end_bucket;
  uint32_t sketch_sets;  // per virtual bucket
  int64_t limit_bytes;   // 0: no limit
  double eps;
  double beta1;
  double beta2;
  double init_scale;
  double restore_scale;
  double decay;
  double admission;            // a key without a row must beat the threshold by this factor
  std::vector<double> levels;  // threshold multiples of the chunks, not decreasing

  RowLayout layout() const { return {chunk, chunks, storage == Storage::kFloat32 ? 4 : 2, optimizer}; }
  int partitions_log2() const;
  size_t granule() const;
  uint32_t buckets() const { return end_bucket - first_bucket; }
  // Bytes the shard takes, at most, with no row in it; and for one row of a width, its part of the index included.
  int64_t fixed_bytes() const;
  int64_t row_bytes(int width) const;
  // Throws when the limit does not hold the fixed parts and one row.
  void check_limit() const;
  // The distinct counter and the rows by table and width; the sketch.
  int64_t counter_bytes() const;
  int64_t sketch_bytes() const;
};

struct ShardStats {
  int64_t payload, optimizer, index, sketch, slack, total;  // bytes; total is their sum
  int64_t planned, fixed, limit, peak;                      // bytes; peak since the last time it was asked for
  int64_t rows, distinct;
  int64_t lookups, hits;  // since the store was made, counted with repeats
  int64_t admitted, refused, resized, evicted, admitted_bytes;
  int64_t asked_bytes;  // of rows worth having, let in or not, since the store was made
};

// What rows of widths 1, 2, ... take: `index` is their headers alone, and what does not follow from the rows is 0.
template <class CountOf>
ShardStats stats_of_rows(const RowLayout& layout, CountOf&& count_of) {
  ShardStats stats{};
  for (int width = 1; width <= layout.chunks; ++width) {
    const int64_t count = count_of(width);
    stats.rows += count;
    stats.payload += count * layout.vector_bytes(width);
    stats.optimizer += count * layout.state_bytes(width);
    stats.index += count * static_cast<int64_t>(sizeof(RowHeader));
  }
  return stats;
}

struct ExportedRows {
  std::vector<int64_t> raw_ids;
  std::vector<int32_t> tables;
  std::vector<uint8_t> widths;
  std::vector<float> importance;
  std::vector<float> values;  // width*chunk for each row
  std::vector<float> state;   // optimizer state for each row
};

// What a store does on every device. Arrays are in that device's memory, but for those of `histogram`, `rows_by_width`, export and import.
class Shard {
 public:
  virtual ~Shard() = default;

  // Addresses (kAbsent if there is no row) and widths. While training and as long as the threshold is 0, absent keys whose hash
  // falls below `quota` (of 2^32) get a row of full width if there is room.
  virtual void lookup(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, bool training, int64_t step,
                      uint64_t quota, uint32_t* addresses, uint8_t* widths) = 0;

  // Importance and optimizer for the keys of one lookup. `lookup_norms` may be null unless importance needs it. An absent key's
  // importance goes to the sketch; once its estimate passes the cut it gets a row, if it is among the share `quota` and there is
  // room.
  struct Update {
    int64_t n;
    const int64_t* keys;
    const int32_t* tables;
    const uint32_t* addresses;
    const uint8_t* widths;
    const int32_t* counts;
    const float* lookup_norms;
    int64_t numbers;  // in `gradients`; what calls `update` has checked it, where it can see the widths
    double lr;
    int64_t step;
    uint64_t quota;
  };
  // Gradients in wire layout, `arrivals` of them, each for row target[i], or one for each row where `target` is null.
  virtual void update(const Update& rows, const float* gradients, int64_t arrivals, const int32_t* target) = 0;
  // rows and planned bytes by importance bin: [2 * kImportanceBins].
  virtual void histogram(int64_t* out) const = 0;
  // A round: rows whose importance earns them less at this threshold are narrowed or leave; returns the planned bytes that
  // growing will take. Then the others grow to what they earn, as far as the limit, which may be set in between, allows.
  virtual int64_t shrink(double threshold) = 0;
  virtual void grow() = 0;
  virtual void set_limit(int64_t bytes) = 0;

  virtual ShardStats stats() = 0;
  virtual void rows_by_width(int64_t* out) const = 0;  // [tables, chunks]
  virtual void reset_round_counters() = 0;

  virtual ExportedRows export_rows(uint32_t first_bucket, uint32_t end_bucket) const = 0;
  virtual void check() const = 0;

  const ShardConfig& config() const { return config_; }
  double threshold() const { return threshold_; }

 protected:
  explicit Shard(const ShardConfig& config) : config_(config) {}
  ShardConfig config_;
  double threshold_ = 0.0;
};

}  // namespace fiited
