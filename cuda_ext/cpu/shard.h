// One worker's store: index, pools, sketch and the fused update, within a byte limit that holds at every moment.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/numeric.h"
#include "cpu/batch.h"
#include "cpu/index.h"
#include "cpu/memory.h"
#include "cpu/pools.h"
#include "cpu/sketch.h"

namespace fiited {

enum class Storage : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Importance : int { kFrequencyTimesNorm = 0, kNorm = 1, kLookupNormSum = 2, kFrequency = 3 };

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
  int64_t row_bytes(int width) const { return layout().stride(width) + Index::kBytesPerRow; }
};

struct ShardStats {
  int64_t payload, optimizer, index, sketch, slack, total;  // bytes; total is their sum
  int64_t planned, fixed, limit, peak;                      // bytes; peak since the last time it was asked for
  int64_t rows, distinct;
  int64_t lookups, hits;  // since the store was made, counted with repeats
  int64_t admitted, refused, resized, evicted, admitted_bytes;
  int64_t asked_bytes;  // of rows worth having, let in or not, since the store was made
};

struct ExportedRows {
  std::vector<int64_t> raw_ids;
  std::vector<int32_t> tables;
  std::vector<uint8_t> widths;
  std::vector<float> importance;
  std::vector<float> values;  // width*chunk for each row
  std::vector<float> state;   // optimizer state for each row
};

// Rows outside the store, as it holds them; the columns lie one behind the other.
struct HeldRows {
  int64_t* raw_ids;
  int32_t* tables;
  uint8_t* widths;
  float* importance;  // scaled
  void* values;       // in the storage type
  float* state;
};

// What a shard knows beside its rows, its sketch and its limit.
struct ShardState {
  int64_t step;     // of the last update
  int64_t lowered;  // octaves that importances have been scaled down
  int64_t base;     // of the sketch's levels
  int64_t lookups, hits, admitted, refused, resized, evicted, admitted_bytes, asked_bytes;
};

class Shard {
 public:
  virtual ~Shard() = default;

  // Addresses (kAbsent if there is no row) and widths. While training and as long as the threshold is 0, absent keys whose hash
  // falls below `quota` (of 2^32) get a row of full width if there is room.
  virtual void lookup(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, bool training, int64_t step,
                      uint64_t quota, uint32_t* addresses, uint8_t* widths) = 0;

  // Whether a row of this width stands at the address now, or none where the address is kAbsent.
  virtual bool fits(uint32_t address, uint8_t width) const = 0;

  // The vectors of the rows take[0..n-1] of a lookup (or of its rows 0..n-1), at their width, one behind the other.
  virtual void read(int64_t n, const int32_t* take, const uint32_t* addresses, const uint8_t* widths, float* values) const = 0;

  // The vectors of a lookup's rows, pooled: out [batch, features, chunks * chunk].
  virtual void pool(const Bags& bags, const uint32_t* addresses, float* out) const = 0;

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
    double lr;
    int64_t step;
    uint64_t quota;
  };
  // Gradients in wire layout, `arrivals` of them, each for row target[i], or one for each row where `target` is null.
  virtual void update(const Update& rows, const float* gradients, int64_t arrivals, const int32_t* target) = 0;
  // The gradient of what `pool` gave: [batch, features, chunks * chunk].
  virtual void update_pooled(const Update& rows, const Bags& bags, const float* grad_out) = 0;

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

  // Saving. Addresses of the rows that were written or moved since the last call (or of all rows), those of each range of buckets
  // together: range i ends before ends[i]. From now on these rows count as saved.
  virtual std::vector<uint32_t> changed(bool all, const std::vector<uint32_t>& ends, std::vector<int64_t>& counts) = 0;
  // Rows at addresses, exactly as they are held: importance scaled, vectors in the storage type.
  virtual void widths_at(int64_t n, const uint32_t* addresses, uint8_t* widths) const = 0;
  virtual void take(int64_t n, const uint32_t* addresses, const HeldRows& out) const = 0;
  virtual ShardState state() const = 0;
  virtual uint16_t* sketch_cells() = 0;  // of all buckets
  virtual uint8_t* distinct_registers() = 0;

  // Loading, into a shard without rows. First the state; then sketch and rows; `seal` last. Rows go to the end of their pools or,
  // after `reserve`, to the addresses they had.
  virtual void restore(const ShardState& state, double threshold) = 0;
  virtual void reserve(const std::vector<int64_t>& rows_by_width) = 0;
  virtual void put(int64_t n, const HeldRows& rows, const uint32_t* addresses) = 0;
  virtual void put_bucket(uint32_t bucket, const uint16_t* cells, int base, const uint8_t* registers) = 0;
  virtual void seal() = 0;
  virtual void check() const = 0;

  const ShardConfig& config() const { return config_; }
  double threshold() const { return threshold_; }

  static std::shared_ptr<Shard> make(const ShardConfig& config);

 protected:
  explicit Shard(const ShardConfig& config) : config_(config) {}
  ShardConfig config_;
  double threshold_ = 0.0;
};

}  // namespace fiited
