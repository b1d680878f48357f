// One worker's store in the CPU's memory.
#pragma once

#include <memory>

#include "core/shard.h"
#include "cpu/batch.h"

namespace fiited {

class CpuShard : public Shard {
 public:
  // The first of a lookup's rows that is no longer there in the width it had; n where all are.
  virtual int64_t first_moved(int64_t n, const uint32_t* addresses, const uint8_t* widths) const = 0;

  // The vectors of the rows take[0..n-1] of a lookup (or of its rows 0..n-1), at their width, one behind the other.
  virtual void read(int64_t n, const int32_t* take, const uint32_t* addresses, const uint8_t* widths, float* values) const = 0;

  // The vectors of a lookup's rows, pooled: out [batch, features, chunks * chunk].
  virtual void pool(const Bags& bags, const uint32_t* addresses, float* out) const = 0;

  // The vectors of ids' rows, pooled, for reading alone: without a list of the distinct ones. Feature f's ids are of table
  // feature_tables[f]; `bags.inverse` is not looked at.
  virtual void pool_ids(const Bags& bags, const int64_t* ids, const int32_t* feature_tables, float* out) const = 0;

  // The gradient of what `pool` gave: [batch, features, chunks * chunk].
  virtual void update_pooled(const Update& rows, const Bags& bags, const float* grad_out) = 0;

  static std::shared_ptr<CpuShard> make(const ShardConfig& config);

 protected:
  using Shard::Shard;
};

}  // namespace fiited
