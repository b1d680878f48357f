// The rows: one pool for each width, each a dense array in a region of its own. A row that leaves is replaced by the pool's
// last row, so a pool has no holes: no free lists, no compaction, and free space in the last granule only. Growing takes a
// granule and copies nothing; the last one is given back when it empties. Beside each pool is a bit for every row, set where the row has
// changed since it was saved, so that saving need not look at all rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "core/layout.h"
#include "cpu/floats.h"
#include "cpu/memory.h"

namespace fiited {

class Pools {
 public:
  Pools(Memory& memory, RowLayout layout, size_t granule) : addresses_(addresses_of(layout.chunks)) {
    for (int width = 1; width <= layout.chunks; ++width) {
      const auto stride = static_cast<size_t>(layout.stride(width));
      const size_t most = std::min((size_t{1} << addresses_.position_bits) * stride, Region::physical_bytes());
      regions_.push_back(std::make_unique<Region>(memory, most, granule));
      bits_.push_back(std::make_unique<Region>(memory, bit_bytes(most / stride + 1), Memory::kPage));
      const auto vector_end = static_cast<uint32_t>(sizeof(RowHeader) + layout.vector_bytes(width));
      pools_.push_back({regions_.back()->begin(), static_cast<uint32_t>(stride), vector_end, 0});
    }
  }

  // Whether a row stands at this address now.
  bool holds(uint32_t address) const {
    const uint64_t number = uint64_t{address} >> addresses_.position_bits;
    return number < pools_.size() && (addresses_.position(address)) < pools_[number].count;
  }
  int width(uint32_t address) const { return addresses_.width(address); }
  // Whether a row of this width stands at the address now, or none where the address is kAbsent.
  bool fits(uint32_t address, int width) const { return address == kAbsent ? width == 0 : holds(address) && this->width(address) == width; }

  std::byte* row(uint32_t address) const {
    const Pool& pool = pools_[uint64_t{address} >> addresses_.position_bits];
    return pool.rows + size_t{addresses_.position(address)} * pool.stride;
  }
  RowHeader& header(uint32_t address) const { return *reinterpret_cast<RowHeader*>(row(address)); }

  // These take kAbsent too, and do nothing then.
  [[gnu::always_inline]] void prefetch_header(uint32_t address) const {
    if (address != kAbsent) prefetch(row(address), sizeof(RowHeader));
  }
  [[gnu::always_inline]] void prefetch_vector(uint32_t address) const {
    if (address != kAbsent) prefetch(row(address), pools_[uint64_t{address} >> addresses_.position_bits].vector_end);
  }
  [[gnu::always_inline]] void prefetch_row(uint32_t address) const {
    if (address != kAbsent) prefetch(row(address), pools_[uint64_t{address} >> addresses_.position_bits].stride);
  }

  // Address of a new row of this width, contents undefined; kAbsent when there is no memory.
  uint32_t append(int width) {
    Pool& pool = pools_[width - 1];
    if (pool.count >= addresses_.mask() || !make_room(width, size_t{pool.count} + 1)) return kAbsent;
    return address_of(width, pool.count++);
  }

  // Marks a row as changed since it was saved, or as standing elsewhere than then. Threads may mark rows side by side, each its own.
  void mark_changed(uint32_t address) {
    header(address).mark = Mark::kChanged;
    const uint32_t at = addresses_.position(address);
    std::atomic_ref(words(addresses_.width(address))[at / 64]).fetch_or(uint64_t{1} << (at % 64), std::memory_order_relaxed);
  }
  bool has_bit(uint32_t address) const {
    const uint32_t at = addresses_.position(address);
    return (words(addresses_.width(address))[at / 64] >> (at % 64) & 1) != 0;
  }
  // Bit i of word w is that of the row at position 64 * w + i.
  uint64_t* words(int width) const { return reinterpret_cast<uint64_t*>(bits_[width - 1]->begin()); }

  // Takes a row out; the pool's last row moves into its place. Returns the address that moved, or kAbsent if it was the last.
  uint32_t remove(uint32_t address) {
    const int width = this->width(address);
    Pool& pool = pools_[width - 1];
    const uint32_t last = address_of(width, pool.count - 1);
    if (last != address) std::memcpy(row(address), row(last), pool.stride);
    --pool.count;
    regions_[width - 1]->shrink(size_t{pool.count} * pool.stride);
    bits_[width - 1]->shrink(bit_bytes(pool.count));
    return last == address ? kAbsent : last;
  }

  // Makes `rows` rows of this width, contents undefined; false when there is no memory. The pool must be empty.
  bool reserve(int width, int64_t rows) {
    Pool& pool = pools_[width - 1];
    if (rows > addresses_.mask() || !make_room(width, static_cast<size_t>(rows))) return false;
    pool.count = static_cast<uint32_t>(rows);
    for (int64_t at = 0; at < rows; ++at) header(address_of(width, static_cast<uint32_t>(at))) = RowHeader{};
    return true;
  }

  // That the bits take.
  int64_t bits_bytes() const {
    int64_t bytes = 0;
    for (const auto& bits : bits_) bytes += static_cast<int64_t>(bits->taken());
    return bytes;
  }

  uint32_t count(int width) const { return pools_[width - 1].count; }
  uint32_t address_of(int width, uint32_t position) const { return addresses_.of(width, position); }

  // Bytes of partly filled granules at worst: one for each width, one more while a row moves between pools, and that row; of the bits'
  // pages as many.
  static int64_t partial_bytes(const RowLayout& layout, size_t granule) {
    return (layout.chunks + 1) * static_cast<int64_t>(granule) + layout.stride(layout.chunks) +
           (layout.chunks + 1) * static_cast<int64_t>(Memory::kPage);
  }
  static size_t bit_bytes(size_t rows) { return (rows + 63) / 64 * sizeof(uint64_t); }

 private:
  bool make_room(int width, size_t rows) {
    Region& region = *regions_[width - 1];
    while (rows * pools_[width - 1].stride > region.taken()) {
      if (!region.grow()) return false;
    }
    Region& bits = *bits_[width - 1];
    while (bit_bytes(rows) > bits.taken()) {
      if (!bits.grow()) return false;
    }
    return true;
  }

  struct Pool {
    std::byte* rows;
    uint32_t stride;
    uint32_t vector_end;  // bytes up to the optimizer state
    uint32_t count;
  };
  Addresses addresses_;
  std::vector<std::unique_ptr<Region>> regions_;
  std::vector<std::unique_ptr<Region>> bits_;
  std::vector<Pool> pools_;
};

}  // namespace fiited
