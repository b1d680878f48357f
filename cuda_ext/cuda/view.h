// A shard as kernels see it: passed to them by value.
#pragma once

#include "core/layout.h"
#include "core/line.h"
#include "core/numeric.h"
#include "core/sketch.h"
#include "cuda/platform.h"

namespace fiited::device {

constexpr int kMostChunks = 64;

struct View {
  RowLayout layout;
  Addresses addresses;
  std::byte* pools[kMostChunks];  // of width 1..k
  uint32_t counts[kMostChunks];   // rows of width 1..k
  const Part* parts;              // [partitions]
  int part_shift;
  uint16_t* cells;  // of the sketch
  LevelScale levels;
  uint32_t first_bucket, end_bucket, sets_per_bucket;
  int tables;
  int64_t* rows_by;  // [tables, chunks]
  float cuts[kMostChunks];
  float scale, unscale;
  float init_scale, restore_scale;

  FIITED_DEVICE std::byte* row(uint32_t address) const {
    const int width = addresses.width(address);
    return pools[width - 1] + size_t{addresses.position(address)} * static_cast<size_t>(layout.stride(width));
  }
  FIITED_DEVICE RowHeader& header(uint32_t address) const { return *reinterpret_cast<RowHeader*>(row(address)); }
  FIITED_DEVICE float* state(uint32_t address) const {
    return reinterpret_cast<float*>(row(address) + layout.state_offset(addresses.width(address)));
  }
  FIITED_DEVICE bool is_row(uint32_t address, uint64_t key, int32_t table) const {
    const RowHeader& at = header(address);
    return at.key == key && at.table == table;
  }
  // Whether a row of this width stands at the address now, or none where the address is kAbsent.
  FIITED_DEVICE bool fits(uint32_t address, int width) const {
    if (address == kAbsent) return width == 0;
    return width > 0 && width <= layout.chunks && addresses.width(address) == width && addresses.position(address) < counts[width - 1];
  }
  FIITED_DEVICE bool belongs(uint64_t key) const { return bucket_of(key) >= first_bucket && bucket_of(key) < end_bucket; }

  FIITED_DEVICE int part_number(uint64_t key) const { return static_cast<int>(partition_bits(key) >> part_shift); }
  FIITED_DEVICE uint32_t find(uint64_t key, int32_t table) const {
    return find_in(parts[part_number(key)], key, [&](uint32_t address) { return is_row(address, key, table); });
  }
  // Several threads may put, move or take entries side by side, all of them the same of the three; no key twice.
  FIITED_DEVICE void put(uint64_t key, uint32_t address) const;
  FIITED_DEVICE void move(uint64_t key, uint32_t from, uint32_t to) const {
    const Part part = parts[part_number(key)];
    const Slot slot = slot_of(part, key, from);
    part.lines[slot.line].address[slot.slot] = to;
  }
  FIITED_DEVICE void erase(uint64_t key, uint32_t address) const;

  FIITED_DEVICE int wanted_width(float scaled_importance) const { return width_of(scaled_importance * unscale, cuts, layout.chunks); }
  FIITED_DEVICE uint16_t* sketch_set(uint64_t key) const {
    return cells + size_t{sketch_set_of(key, first_bucket, sets_per_bucket)} * kSketchEntries;
  }
};

// Claims a free slot by its tag, four of which are one word; goes on to the next line where there is none.
FIITED_DEVICE void put_in_part(const Part& part, uint64_t key, uint32_t address) {
  for (uint32_t at = home_line(part.size, key);; at = at + 1 == part.size ? 0 : at + 1) {
    Line& line = part.lines[at];
    for (int four = 0; four < kSlots; four += 4) {
      auto* const word = reinterpret_cast<uint32_t*>(line.tag + four);
      uint32_t now = read_shared(word);
      for (uint32_t open = equal_bytes(now, 0); open; open = equal_bytes(now, 0)) {
        const int byte = lowest_bit(open) / 8;
        const uint32_t before = atomic_cas(word, now, now | uint32_t{line_tag(key)} << (8 * byte));
        if (before == now) {
          line.address[four + byte] = address;
          return;
        }
        now = before;
      }
    }
    atomic_add(&line.passed, 1u);
  }
}

FIITED_DEVICE void View::put(uint64_t key, uint32_t address) const { put_in_part(parts[part_number(key)], key, address); }

FIITED_DEVICE void View::erase(uint64_t key, uint32_t address) const {
  const Part part = parts[part_number(key)];
  const Slot slot = slot_of(part, key, address);
  for (uint32_t at = home_line(part.size, key); at != slot.line; at = at + 1 == part.size ? 0 : at + 1) {
    atomic_add(&part.lines[at].passed, 0xFFFFFFFFu);
  }
  atomic_and(reinterpret_cast<uint32_t*>(part.lines[slot.line].tag + (slot.slot & ~3)), ~(0xFFu << (8 * (slot.slot & 3))));
}

// Initial values of the dimensions from..width*chunk-1 of a row.
template <class Stored>
FIITED_DEVICE void initialise(const Tile& tile, const View& view, std::byte* row, int from, int width, uint64_t key, int32_t table,
                              float scale) {
  auto* const vector = reinterpret_cast<typename Stored::Bits*>(row + sizeof(RowHeader));
  tile.each(width * view.layout.chunk - from, [&](int i) {
    const int dim = from + i;
    vector[dim] = Stored::from_float(initial_value(key, static_cast<uint32_t>(table), static_cast<uint32_t>(dim), scale), 0);
  });
}

}  // namespace fiited::device
