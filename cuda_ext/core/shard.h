// One worker's store: index, pools, sketch and the fused update, within a byte limit that holds at every moment.
#pragma once

#include <cstdint>
#include <vector>

#include "core/importance.h"
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
  // Small fixed parts that do not come from the shard's memory.
  int64_t uncounted_bytes() const;
};

struct Counts {
  int64_t lookups = 0, hits = 0;  // since the store was made, with repeats
  int64_t admitted = 0, refused = 0, resized = 0, evicted = 0, admitted_bytes = 0;
  int64_t asked_bytes = 0;  // of rows worth having, let in or not, since the store was made
};

struct ShardStats {
  int64_t payload, optimizer, index, sketch, slack, total;  // bytes; total is their sum
  int64_t planned, fixed, limit, peak;                      // bytes; peak since the last time it was asked for
  int64_t rows, distinct;
  Counts counted;
};

// Rows ordered by key, and by table where keys are equal.
struct ExportedRows {
  std::vector<int64_t> raw_ids;
  std::vector<int32_t> tables;
  std::vector<uint8_t> widths;
  std::vector<float> importance;
  std::vector<float> values;  // width*chunk for each row
  std::vector<float> state;   // optimizer state for each row
};

// Rows outside the store, as it holds them; the columns lie one behind the other, in the host's memory.
struct HeldRows {
  int64_t* raw_ids;
  int32_t* tables;
  uint8_t* widths;
  float* importance;  // scaled
  void* values;       // in the storage type
  float* state;

  // The rows behind the first `rows`, whose vectors take `value_bytes` and whose states are `state_numbers`.
  HeldRows behind(int64_t rows, int64_t value_bytes, int64_t state_numbers) const {
    return {raw_ids + rows,       tables + rows, widths + rows, importance + rows, static_cast<char*>(values) + value_bytes,
            state + state_numbers};
  }
};

// How many numbers the vectors of some rows are, and how many their states.
struct Numbers {
  int64_t values = 0;
  int64_t state = 0;

  void add(const RowLayout& layout, int width) {
    values += width * layout.chunk;
    state += layout.state_bytes(width) / 4;
  }
};

inline Numbers numbers_of(const RowLayout& layout, int64_t n, const uint8_t* widths) {
  Numbers sum;
  for (int64_t i = 0; i < n; ++i) sum.add(layout, widths[i]);
  return sum;
}

// Where each of some rows begins in a list of their vectors and one of their states: [n + 1]. The last is the size.
struct Begins {
  std::vector<int64_t> values{0};
  std::vector<int64_t> state{0};

  Begins(const RowLayout& layout, int64_t n, const uint8_t* widths) {
    Numbers sum;
    for (int64_t i = 0; i < n; ++i) {
      sum.add(layout, widths[i]);
      values.push_back(sum.values);
      state.push_back(sum.state);
    }
  }
};

// What a shard knows beside its rows, its sketch and its limit.
struct ShardState {
  int64_t step;     // of the last update
  int64_t lowered;  // octaves that importances have been scaled down
  int64_t base;     // of the sketch's levels
  Counts counted;
};

// Rows in the order in which they stand, and the virtual bucket of each.
struct Listed {
  std::vector<uint32_t> addresses;
  std::vector<uint16_t> buckets;
};

// Rows in pieces of consecutive virtual buckets, those of a piece as they stand: counts[i] of them, whose buckets end before ends[i].
struct Pieces {
  std::vector<uint32_t> addresses;
  std::vector<int64_t> ends;
  std::vector<int64_t> counts;
};

// As many buckets in a piece as have no more than `most` rows together; a single one may have more.
inline Pieces pieces_of(const Listed& rows, uint32_t first_bucket, uint32_t end_bucket, int64_t most) {
  std::vector<int64_t> in_bucket(kBuckets, 0);
  for (const uint16_t bucket : rows.buckets) ++in_bucket[bucket];
  Pieces pieces{std::vector<uint32_t>(rows.addresses.size()), {end_bucket}, {0}};
  std::vector<uint16_t> piece_of(kBuckets, 0);
  std::vector<int64_t> next{0};  // place for the next row of each piece
  for (uint32_t bucket = first_bucket; bucket < end_bucket; ++bucket) {
    if (in_bucket[bucket] > 0 && pieces.counts.back() > 0 && pieces.counts.back() + in_bucket[bucket] > most) {
      next.push_back(next.back() + pieces.counts.back());
      pieces.ends.insert(pieces.ends.end() - 1, bucket);
      pieces.counts.push_back(0);
    }
    pieces.counts.back() += in_bucket[bucket];
    piece_of[bucket] = static_cast<uint16_t>(pieces.counts.size() - 1);
  }
  for (size_t i = 0; i < rows.addresses.size(); ++i) pieces.addresses[next[piece_of[rows.buckets[i]]]++] = rows.addresses[i];
  return pieces;
}

// What a store does on every device. Arrays of a step (`lookup`, `update`) are in that device's memory, all others in the host's.
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
  void reset_round_counters() { counted_ = {.lookups = counted_.lookups, .hits = counted_.hits, .asked_bytes = counted_.asked_bytes}; }

  ExportedRows export_rows(uint32_t first_bucket, uint32_t end_bucket) const;
  virtual void check() const = 0;

  // Addresses of all rows of these buckets.
  virtual std::vector<uint32_t> addresses_in(uint32_t first_bucket, uint32_t end_bucket) const = 0;

  // Saving. The rows that were written or moved since the last call, or all rows; from now on they count as saved.
  virtual Listed changed(bool all) = 0;
  // Rows at addresses, exactly as they are held: importance scaled, vectors in the storage type.
  virtual void widths_at(int64_t n, const uint32_t* addresses, uint8_t* widths) const = 0;
  virtual void take(int64_t n, const uint32_t* addresses, const HeldRows& out) const = 0;
  virtual ShardState state() const = 0;
  // Of all buckets: [buckets, sets * kSketchEntries], and the distinct counter's, [buckets, kRegistersPerBucket].
  virtual void sketch(uint16_t* cells, uint8_t* registers) const = 0;

  // Loading, into a shard without rows. First the state; then sketch and rows; `seal` last. Rows go to the end of their pools or,
  // after `reserve`, to the addresses they had.
  virtual void restore(const ShardState& state, double threshold) = 0;
  virtual void reserve(const std::vector<int64_t>& rows_by_width) = 0;
  virtual void put(int64_t n, const HeldRows& rows, const uint32_t* addresses) = 0;
  virtual void put_sketch(uint32_t first_bucket, uint32_t buckets, const uint16_t* cells, int base, const uint8_t* registers) = 0;
  virtual void seal() = 0;

  const ShardConfig& config() const { return config_; }
  double threshold() const { return threshold_; }

 protected:
  explicit Shard(const ShardConfig& config)
      : config_(config), layout_(config.layout()), decay_(config.decay), planned_(config.fixed_bytes()) {
    for (int width = 0; width <= config.chunks; ++width) row_bytes_.push_back(width ? config.row_bytes(width) : 0);
  }

  // What is counted in the same way on every device: all but `distinct`, and the lookups where the device counts them.
  template <class Pools, class Index, class Memory>
  ShardStats stats_of(const Pools& pools, const Index& index, Memory& memory) const {
    ShardStats s{};
    for (int width = 1; width <= layout_.chunks; ++width) {
      const int64_t rows = pools.count(width);
      s.rows += rows;
      s.payload += rows * layout_.vector_bytes(width);
      s.optimizer += rows * layout_.state_bytes(width);
      s.index += rows * static_cast<int64_t>(sizeof(RowHeader));
    }
    s.index += index.bytes();
    s.sketch = static_cast<int64_t>(Memory::rounded(config_.sketch_bytes())) + config_.counter_bytes();
    s.total = memory.used() + config_.uncounted_bytes();
    s.slack = s.total - s.payload - s.optimizer - s.index - s.sketch;
    s.planned = planned_;
    s.fixed = config_.fixed_bytes();
    s.limit = limit_ == Memory::kUnlimited ? 0 : limit_;
    s.peak = memory.take_peak() + config_.uncounted_bytes();
    s.counted = counted_;
    return s;
  }

  ShardConfig config_;
  RowLayout layout_;
  Decay decay_;
  double threshold_ = 0.0;
  std::vector<int64_t> row_bytes_;  // by width
  std::vector<float> cuts_;
  int64_t limit_ = 0;
  int64_t planned_;
  int64_t step_ = 0;  // of the last update
  Counts counted_;
};

}  // namespace fiited
