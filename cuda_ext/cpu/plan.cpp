// The bytes that a shard plans with: the same on every device.
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "core/distinct.h"
#include "core/shard.h"
#include "cpu/index.h"
#include "cpu/memory.h"
#include "cpu/pools.h"
#include "cpu/sketch.h"

namespace fiited {

int ShardConfig::partitions_log2() const {
  const int64_t rows = limit_bytes ? limit_bytes / (row_bytes(1)) : (int64_t{1} << 24);
  int log2 = 4;
  while (log2 < 10 && (rows >> (log2 + 1)) > 1024) ++log2;
  return log2;
}

// Free space in all pools together is at most a hundredth of the limit.
size_t ShardConfig::granule() const {
  if (limit_bytes == 0) return Region::kHuge;
  const auto most = static_cast<uint64_t>(limit_bytes / (100 * (chunks + 1)));
  return std::clamp<size_t>(std::bit_floor(most), Memory::kPage, Region::kHuge);
}

int64_t ShardConfig::counter_bytes() const { return int64_t{kRegistersPerBucket} * buckets() + int64_t{8} * tables * chunks; }

int64_t ShardConfig::uncounted_bytes() const { return Index::directory_bytes(partitions_log2()) + counter_bytes(); }

int64_t ShardConfig::sketch_bytes() const { return Sketch::kSetBytes * sketch_sets * buckets(); }

int64_t ShardConfig::row_bytes(int width) const { return layout().stride(width) + Index::kBytesPerRow; }

void ShardConfig::check_limit() const {
  const int64_t least = fixed_bytes() + row_bytes(chunks);
  if (limit_bytes != 0 && limit_bytes < least) throw std::runtime_error("a shard needs at least " + std::to_string(least) + " bytes");
}

int64_t ShardConfig::fixed_bytes() const {
  const auto bits = static_cast<int64_t>(Pools::bit_bytes(static_cast<size_t>(limit_bytes / row_bytes(1))));
  const int64_t structure = Index::fixed_bytes(partitions_log2()) + Pools::partial_bytes(layout(), granule()) + bits + counter_bytes();
  // A share of the limit, not what this shard's structure happens to need: the sum over shards is then the same for any number of them.
  return std::max(structure, limit_bytes / 40) + static_cast<int64_t>(Memory::rounded(sketch_bytes()));
}

}  // namespace fiited
