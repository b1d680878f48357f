// The rows: one pool for each width, each a dense array in a region of its own. A row that leaves is replaced by the pool's
// last row, so a pool has no holes: no free lists, no compaction, and free space in the last granule only. Growing takes a
// granule and copies nothing; the last one is given back when it empties.
//
// Row:  key 8 | importance 4 | table 2 | mark 2 | vector width*chunk*value_bytes, padded to 4 | optimizer state
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/floats.h"
#include "cpu/index.h"
#include "cpu/memory.h"

namespace fiited {

enum class Optimizer : int { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2, kAdam = 3 };

enum class Mark : uint16_t { kSaved = 0, kChanged = 1, kPlaced = 2 };  // since the last save; kPlaced: by a load that is not over

struct __attribute__((packed, aligned(4))) RowHeader {
  uint64_t key;
  float importance;  // scaled: true importance times the shard's present scale
  uint16_t table;
  Mark mark;
};
static_assert(sizeof(RowHeader) == 16, "The header is counted as 16 bytes of metadata.");

// Sizes in bytes that follow from the configuration alone; the planner uses the same ones.
struct RowLayout {
  int chunk;
  int chunks;
  int value_bytes;
  Optimizer optimizer;

  int vector_bytes(int width) const { return width * chunk * value_bytes; }
  int state_offset(int width) const { return static_cast<int>(sizeof(RowHeader)) + ((vector_bytes(width) + 3) & ~3); }
  int state_bytes(int width) const {
    switch (optimizer) {
      case Optimizer::kSgd: return 0;
      case Optimizer::kRowwiseAdagrad: return 4;
      case Optimizer::kAdagrad: return width * chunk * 4;
      case Optimizer::kAdam: return width * chunk * 8;
    }
    return 0;
  }
  int stride(int width) const { return state_offset(width) + state_bytes(width); }
};

class Pools {
 public:
  Pools(Memory& memory, RowLayout layout, size_t granule) : layout_(layout) {
    int width_bits = 0;
    while ((1 << width_bits) < layout.chunks) ++width_bits;
    position_bits_ = 32 - width_bits;
    for (int width = 1; width <= layout.chunks; ++width) {
      const auto stride = static_cast<size_t>(layout.stride(width));
      const size_t most = std::min((size_t{1} << position_bits_) * stride, Region::physical_bytes());
      regions_.push_back(std::make_unique<Region>(memory, most, granule));
      pools_.push_back({regions_.back()->begin(), static_cast<uint32_t>(stride), 0});
    }
  }

  // Whether a row stands at this address now.
  bool holds(uint32_t address) const {
    const uint64_t number = uint64_t{address} >> position_bits_;
    return number < pools_.size() && (address & position_mask()) < pools_[number].count;
  }
  int width(uint32_t address) const { return static_cast<int>(uint64_t{address} >> position_bits_) + 1; }

  std::byte* row(uint32_t address) const {
    const Pool& pool = pools_[uint64_t{address} >> position_bits_];
    return pool.rows + size_t{address & position_mask()} * pool.stride;
  }
  RowHeader& header(uint32_t address) const { return *reinterpret_cast<RowHeader*>(row(address)); }

  // Both take kAbsent too, and do nothing then.
  [[gnu::always_inline]] void prefetch_header(uint32_t address) const {
    if (address != kAbsent) prefetch(row(address), sizeof(RowHeader));
  }
  [[gnu::always_inline]] void prefetch_row(uint32_t address) const {
    if (address != kAbsent) prefetch(row(address), pools_[uint64_t{address} >> position_bits_].stride);
  }

  // Address of a new row of this width, contents undefined; kAbsent when there is no memory.
  uint32_t append(int width) {
    Pool& pool = pools_[width - 1];
    Region& region = *regions_[width - 1];
    if (pool.count >= position_mask()) return kAbsent;
    while ((size_t{pool.count} + 1) * pool.stride > region.taken()) {
      if (!region.grow()) return kAbsent;
    }
    return address_of(width, pool.count++);
  }

  // Takes a row out; the pool's last row moves into its place. Returns the address that moved, or kAbsent if it was the last.
  uint32_t remove(uint32_t address) {
    const int width = this->width(address);
    Pool& pool = pools_[width - 1];
    const uint32_t last = address_of(width, pool.count - 1);
    if (last != address) std::memcpy(row(address), row(last), pool.stride);
    --pool.count;
    regions_[width - 1]->shrink(size_t{pool.count} * pool.stride);
    return last == address ? kAbsent : last;
  }

  // Makes `rows` rows of this width, contents undefined; false when there is no memory. The pool must be empty.
  bool reserve(int width, int64_t rows) {
    Pool& pool = pools_[width - 1];
    if (rows > position_mask()) return false;
    while (static_cast<size_t>(rows) * pool.stride > regions_[width - 1]->taken()) {
      if (!regions_[width - 1]->grow()) return false;
    }
    pool.count = static_cast<uint32_t>(rows);
    for (int64_t at = 0; at < rows; ++at) header(address_of(width, static_cast<uint32_t>(at))) = RowHeader{};
    return true;
  }

  uint32_t count(int width) const { return pools_[width - 1].count; }
  uint32_t address_of(int width, uint32_t position) const {
    return static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(width - 1)} << position_bits_) | position;
  }

  // Bytes of partly filled granules at worst: one for each width, one more while a row moves between pools, and that row.
  static int64_t partial_bytes(const RowLayout& layout, size_t granule) {
    return (layout.chunks + 1) * static_cast<int64_t>(granule) + layout.stride(layout.chunks);
  }

 private:
  struct Pool {
    std::byte* rows;
    uint32_t stride;
    uint32_t count;
  };
  uint32_t position_mask() const { return static_cast<uint32_t>((uint64_t{1} << position_bits_) - 1); }

  RowLayout layout_;
  int position_bits_;
  std::vector<std::unique_ptr<Region>> regions_;
  std::vector<Pool> pools_;
};

}  // namespace fiited
