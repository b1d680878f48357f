// How many distinct ids a shard has met: HyperLogLog (Flajolet et al. 2007) with 2^12 one-byte registers, error about 1.6 %.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/hash.h"

namespace fiited {

class DistinctCounter {
 public:
  static constexpr int kRegisters = 1 << 12;

  // May be called from several threads.
  void add(uint64_t key, uint32_t table) {
    const uint64_t word = mix64(key + kGolden * (table + 1));
    const std::atomic_ref<uint8_t> reg(registers_[word & (kRegisters - 1)]);
    const auto rank = static_cast<uint8_t>(std::countl_zero(word | kRegisters) + 1);
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
    const double m = kRegisters;
    const double raw = 0.7213 / (1 + 1.079 / m) * m * m / sum;
    return std::llround(raw <= 2.5 * m && zeros ? m * std::log(m / zeros) : raw);
  }

 private:
  std::array<uint8_t, kRegisters> registers_{};
};

}  // namespace fiited
