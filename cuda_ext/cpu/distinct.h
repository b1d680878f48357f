// The distinct counter of core/distinct.h, shared by threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/distinct.h"

namespace fiited {

class DistinctCounter {
 public:
  DistinctCounter(uint32_t first_bucket, uint32_t buckets)
      : first_bucket_(first_bucket), registers_(size_t{kRegistersPerBucket} * buckets) {}

  void add(uint64_t key, uint32_t table) {
    const DistinctMark mark = distinct_mark(key, table, first_bucket_);
    const std::atomic_ref<uint8_t> reg(registers_[mark.place]);
    for (uint8_t now = reg.load(std::memory_order_relaxed); now < mark.rank && !reg.compare_exchange_weak(now, mark.rank);) {
    }
  }

  int64_t estimate() const { return distinct_estimate(registers_.data(), static_cast<int64_t>(registers_.size())); }

  std::vector<uint8_t>& registers() { return registers_; }
  const std::vector<uint8_t>& registers() const { return registers_; }

 private:
  uint32_t first_bucket_;
  std::vector<uint8_t> registers_;
};

}  // namespace fiited
