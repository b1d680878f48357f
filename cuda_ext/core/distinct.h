// How many distinct ids a shard has met: HyperLogLog (Flajolet et al. 2007) with four one-byte registers for each virtual bucket, 2^12 in
// all: error about 1.6 %. A bucket's registers go where the bucket goes.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/hash.h"

namespace fiited {

constexpr int kRegistersPerBucket = 4;

struct DistinctMark {
  int place;     // the register it belongs to, from the shard's first bucket on
  uint8_t rank;  // which the register must hold at least
};

FIITED_HD int leading_zeros(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __clzll(static_cast<long long>(word));
#else
  return std::countl_zero(word);
#endif
}

FIITED_HD DistinctMark distinct_mark(uint64_t key, uint32_t table, uint32_t first_bucket) {
  const uint64_t word = mix64(key + kGolden * (table + 1));
  const uint32_t bucket = bucket_of(key) - first_bucket;
  return {static_cast<int>(kRegistersPerBucket * bucket + (word & (kRegistersPerBucket - 1))),
          static_cast<uint8_t>(leading_zeros(word | kRegistersPerBucket) + 1)};
}

inline int64_t distinct_estimate(const uint8_t* registers, int64_t count) {
  int of_rank[256] = {};
  for (int64_t at = 0; at < count; ++at) ++of_rank[registers[at]];
  double sum = 0;
  for (int rank = 0; rank < 256; ++rank) sum += std::ldexp(of_rank[rank], -rank);
  const auto m = static_cast<double>(count);
  const double raw = 0.7213 / (1 + 1.079 / m) * m * m / sum;
  return std::llround(raw <= 2.5 * m && of_rank[0] ? m * std::log(m / of_rank[0]) : raw);
}

}  // namespace fiited
