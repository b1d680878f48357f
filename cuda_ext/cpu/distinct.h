// How many distinct ids a shard has met: HyperLogLog (Flajolet et al. 2007) with four one-byte registers for each virtual bucket, 2^12 in
// all: error about 1.6 %. A bucket's registers go where the bucket goes.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/hash.h"

namespace fiited {

class DistinctCounter {
 public:
  static constexpr int kPerBucket = 4;

  DistinctCounter(uint32_t first_bucket, uint32_t buckets) : first_bucket_(first_bucket), registers_(size_t{kPerBucket} * buckets) {}

  // May be called from several threads.
  void add(uint64_t key, uint32_t table) {
    const uint64_t word = mix64(key + kGolden * (table + 1));
    const std::atomic_ref<uint8_t> reg(registers_[size_t{kPerBucket} * (bucket_of(key) - first_bucket_) + (word & (kPerBucket - 1))]);
    const auto rank = static_cast<uint8_t>(std::countl_zero(word | kPerBucket) + 1);
    for (uint8_t now = reg.load(std::memory_order_relaxed); now < rank && !reg.compare_exchange_weak(now, rank);) {
    }
  }

  int64_t estimate() const {
    double sum = 0;
    int zeros = 0;
    for (const uint8_t reg : registers_) {
      sum += std::ldexp(1.0, -reg);
      zeros += reg == 0;
    }
    const auto m = static_cast<double>(registers_.size());
    const double raw = 0.7213 / (1 + 1.079 / m) * m * m / sum;
    return std::llround(raw <= 2.5 * m && zeros ? m * std::log(m / zeros) : raw);
  }

  std::vector<uint8_t>& registers() { return registers_; }

 private:
  uint32_t first_bucket_;
  std::vector<uint8_t> registers_;
};

}  // namespace fiited
