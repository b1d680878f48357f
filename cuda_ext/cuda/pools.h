// The device's rows as the host keeps them: a pool for each width, each in address space of its own. What a pool takes is counted by
// granules, as on the CPU; below 2 MiB, the device's page, a granule is only counted.
#pragma once

#include <memory>
#include <vector>

#include "core/layout.h"
#include "cpu/memory.h"
#include "cuda/platform.h"
#include "cuda/view.h"

namespace fiited::device {

class DevicePools {
 public:
  DevicePools(Memory& ledger, RowLayout layout, size_t granule)
      : ledger_(ledger), layout_(layout), granule_(granule), addresses_(addresses_of(layout.chunks)), pools_(layout.chunks) {
    constexpr size_t kAligned = size_t{2} << 20;
    const auto widest = static_cast<size_t>(layout.stride(layout.chunks));
    const size_t most = std::min((size_t{1} << addresses_.position_bits) * widest, Reservation::device_bytes());
    for (Pool& pool : pools_) pool.memory = std::make_unique<Reservation>((most + kAligned - 1) / kAligned * kAligned);
  }
  ~DevicePools() {
    for (Pool& pool : pools_) ledger_.charge(-static_cast<int64_t>(pool.taken));
  }
  DevicePools(const DevicePools&) = delete;
  DevicePools& operator=(const DevicePools&) = delete;

  uint32_t count(int width) const { return pools_[width - 1].count; }
  void set_count(int width, uint32_t count) { pools_[width - 1].count = count; }
  std::byte* begin(int width) const { return pools_[width - 1].memory->begin(); }
  Addresses addresses() const { return addresses_; }
  // Whether a row stands at this address now.
  bool holds(uint32_t address) const {
    const int width = addresses_.width(address);
    return width <= layout_.chunks && addresses_.position(address) < count(width);
  }

  // Memory for `rows` rows of a width in all; false, and nothing taken, when the limit, the addresses or the device do not allow it.
  bool reserve(int width, uint64_t rows) {
    if (rows > addresses_.mask()) return false;
    Pool& pool = pools_[width - 1];
    const size_t bytes = rounded(rows * layout_.stride(width));
    if (bytes <= pool.taken) return true;
    if (!ledger_.charge(static_cast<int64_t>(bytes - pool.taken))) return false;
    if (!pool.memory->resize(bytes)) {
      ledger_.charge(-static_cast<int64_t>(bytes - pool.taken));
      return false;
    }
    pool.taken = bytes;
    return true;
  }

  // Gives back the granules that hold no row. The device must be done with them.
  void give_back() {
    for (int width = 1; width <= layout_.chunks; ++width) {
      Pool& pool = pools_[width - 1];
      const size_t bytes = rounded(size_t{pool.count} * layout_.stride(width));
      if (bytes >= pool.taken) continue;
      pool.memory->resize(bytes);
      ledger_.charge(-static_cast<int64_t>(pool.taken - bytes));
      pool.taken = bytes;
    }
  }

 private:
  struct Pool {
    std::unique_ptr<Reservation> memory;
    size_t taken = 0;  // bytes, whole granules
    uint32_t count = 0;
  };
  size_t rounded(size_t bytes) const { return (bytes + granule_ - 1) / granule_ * granule_; }

  Memory& ledger_;
  RowLayout layout_;
  size_t granule_;
  Addresses addresses_;
  std::vector<Pool> pools_;
};

}  // namespace fiited::device
