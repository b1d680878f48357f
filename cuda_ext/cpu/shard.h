// One worker's store in the CPU's memory.
#pragma once

#include <memory>

#include "core/shard.h"
#include "cpu/batch.h"

namespace fiited {

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

class CpuShard : public Shard {
 public:
  // Whether a row of this width stands at the address now, or none where the address is kAbsent.
  virtual bool fits(uint32_t address, uint8_t width) const = 0;

  // The vectors of the rows take[0..n-1] of a lookup (or of its rows 0..n-1), at their width, one behind the other.
  virtual void read(int64_t n, const int32_t* take, const uint32_t* addresses, const uint8_t* widths, float* values) const = 0;

  // The vectors of a lookup's rows, pooled: out [batch, features, chunks * chunk].
  virtual void pool(const Bags& bags, const uint32_t* addresses, float* out) const = 0;

  // The gradient of what `pool` gave: [batch, features, chunks * chunk].
  virtual void update_pooled(const Update& rows, const Bags& bags, const float* grad_out) = 0;

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

  static std::shared_ptr<CpuShard> make(const ShardConfig& config);

 protected:
  using Shard::Shard;
};

}  // namespace fiited
