// The rows: one pool for each width, each a dense array cut into slabs. A row that leaves is replaced by the pool's last row,
// so a pool has no holes: no free lists, no compaction, and free space in the last slab only. Growing adds a slab and copies
// nothing; the last slab is given back when it empties.
//
// Row:  key 8 | importance 4 | table 2 | spare 2 | vector width*chunk*value_bytes, padded to 4 | optimizer state
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/index.h"
#include "cpu/memory.h"

namespace fiited {

enum class Optimizer : int { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2, kAdam = 3 };

struct __attribute__((packed, aligned(4))) RowHeader {
  uint64_t key;
  float importance;  // scaled: true importance times the shard's present scale
  uint16_t table;
  uint16_t spare;
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
  Pools(Memory& memory, RowLayout layout, int slab_rows_log2) : memory_(memory), layout_(layout), slab_log2_(slab_rows_log2) {
    int width_bits = 0;
    while ((1 << width_bits) < layout.chunks) ++width_bits;
    position_bits_ = 32 - width_bits;
    pools_.resize(layout.chunks);
    for (int width = 1; width <= layout.chunks; ++width) pools_[width - 1].stride = layout.stride(width);
  }
  ~Pools() {
    for (Pool& pool : pools_) {
      for (uint32_t slab = 0; slab < pool.slab_count; ++slab) memory_.give(pool.slabs[slab], slab_bytes(pool));
      memory_.give(pool.slabs, pool.slab_room * sizeof(std::byte*));
    }
  }
  Pools(const Pools&) = delete;
  Pools& operator=(const Pools&) = delete;

  // Whether a row stands at this address now.
  bool holds(uint32_t address) const {
    const uint64_t number = uint64_t{address} >> position_bits_;
    return number < pools_.size() && (address & position_mask()) < pools_[number].count;
  }
  int width(uint32_t address) const { return static_cast<int>(uint64_t{address} >> position_bits_) + 1; }

  std::byte* row(uint32_t address) const {
    const Pool& pool = pools_[uint64_t{address} >> position_bits_];
    const uint32_t position = address & position_mask();
    return pool.slabs[position >> slab_log2_] + size_t{position & ((1u << slab_log2_) - 1)} * pool.stride;
  }
  RowHeader& header(uint32_t address) const { return *reinterpret_cast<RowHeader*>(row(address)); }

  void prefetch_header(uint32_t address) const { __builtin_prefetch(row(address)); }
  void prefetch_row(uint32_t address) const {
    const std::byte* at = row(address);
    const std::byte* end = at + pools_[uint64_t{address} >> position_bits_].stride;
    for (; at < end; at += 64) __builtin_prefetch(at);
    __builtin_prefetch(end - 1);
  }

  // Address of a new row of this width, contents undefined; kAbsent when there is no memory.
  uint32_t append(int width) {
    Pool& pool = pools_[width - 1];
    if (pool.count == (uint64_t{pool.slab_count} << slab_log2_)) {
      if (pool.count >= position_mask() || !make_room(pool)) return kAbsent;
      auto* slab = static_cast<std::byte*>(memory_.take(slab_bytes(pool)));
      if (slab == nullptr) return kAbsent;
      pool.slabs[pool.slab_count++] = slab;
    }
    return (uint64_t{static_cast<uint32_t>(width - 1)} << position_bits_) | pool.count++;
  }

  // Takes a row out; the pool's last row moves into its place. Returns the address that moved, or kAbsent if it was the last.
  uint32_t remove(uint32_t address) {
    const uint32_t number = static_cast<uint32_t>(uint64_t{address} >> position_bits_);
    Pool& pool = pools_[number];
    const uint32_t last = static_cast<uint32_t>(uint64_t{number} << position_bits_) | (pool.count - 1);
    if (last != address) std::memcpy(row(address), row(last), pool.stride);
    --pool.count;
    if ((pool.count & ((1u << slab_log2_) - 1)) == 0) {
      memory_.give(pool.slabs[--pool.slab_count], slab_bytes(pool));
    }
    return last == address ? kAbsent : last;
  }

  uint32_t count(int width) const { return pools_[width - 1].count; }
  uint32_t address_of(int width, uint32_t position) const {
    return static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(width - 1)} << position_bits_) | position;
  }

  // Bytes of partly filled slabs at worst: one for each width, and one more while a row moves between pools.
  static int64_t partial_slab_bytes(const RowLayout& layout, int slab_rows_log2) {
    const auto slab = [&](int width) {
      return static_cast<int64_t>(Memory::rounded((size_t{1} << slab_rows_log2) * layout.stride(width)));
    };
    int64_t bytes = slab(layout.chunks);
    for (int width = 1; width <= layout.chunks; ++width) bytes += slab(width);
    return bytes;
  }
  // Bytes of slab pointers at most while rows take no more than `bytes`, one directory's growing included.
  static int64_t directory_bytes(const RowLayout& layout, int slab_rows_log2, int64_t bytes) {
    const int64_t slabs = bytes / ((int64_t{1} << slab_rows_log2) * layout.stride(1)) + 1;
    return slabs * static_cast<int64_t>(sizeof(std::byte*)) * 17 / 8 + layout.chunks * 2 * 64;
  }
  const RowLayout& layout() const { return layout_; }

 private:
  struct Pool {
    std::byte** slabs = nullptr;
    uint32_t slab_count = 0;
    uint32_t slab_room = 0;
    uint32_t count = 0;
    int stride = 0;
  };
  uint32_t position_mask() const { return static_cast<uint32_t>((uint64_t{1} << position_bits_) - 1); }
  // Room for one more slab pointer; the directory grows by an eighth.
  bool make_room(Pool& pool) {
    if (pool.slab_count < pool.slab_room) return true;
    const uint32_t room = (pool.slab_room + pool.slab_room / 8 + 8) & ~7u;
    auto* fresh = static_cast<std::byte**>(memory_.take(room * sizeof(std::byte*)));
    if (fresh == nullptr) return false;
    std::copy_n(pool.slabs, pool.slab_count, fresh);
    memory_.give(pool.slabs, pool.slab_room * sizeof(std::byte*));
    pool.slabs = fresh;
    pool.slab_room = room;
    return true;
  }
  size_t slab_bytes(const Pool& pool) const { return (size_t{1} << slab_log2_) * pool.stride; }

  Memory& memory_;
  RowLayout layout_;
  int slab_log2_;
  int position_bits_;
  std::vector<Pool> pools_;
};

}  // namespace fiited
