// The index: from key to row address. Open addressing in cache lines of twelve slots, each a one-byte tag and a four-byte
// address; the key itself stands in the row. A line counts the entries that had to go past it, so a miss ends at the first
// line nobody passed (as in F14). Growth is by partition, a sixteenth at a time: no pause, no second copy of the index.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/hash.h"
#include "cpu/memory.h"

namespace fiited {

constexpr uint32_t kAbsent = 0xFFFFFFFFu;

class Index {
 public:
  static constexpr int kSlots = 12;
  static constexpr double kFullest = 0.875;

  struct alignas(64) Line {
    uint8_t tag[kSlots];  // 0: free
    uint32_t passed;      // entries that found this line full and went on
    uint32_t address[kSlots];
  };
  static_assert(sizeof(Line) == 64, "A line must be one cache line.");

  Index(Memory& memory, int partitions_log2) : memory_(memory), shift_(10 - partitions_log2) {
    parts_.resize(size_t{1} << partitions_log2);
  }
  ~Index() {
    for (Part& part : parts_) release(part);
  }
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  // What the index needs with no row in it: the parts' directory and one spare line for each part.
  static int64_t fixed_bytes(int partitions_log2) { return (int64_t{1} << partitions_log2) * (sizeof(Part) + sizeof(Line)); }
  // An upper bound of the bytes for each row beyond that, a part's rebuilding included.
  static constexpr int64_t kBytesPerRow = 7;

  int64_t bytes() const { return line_bytes_ + static_cast<int64_t>(parts_.size() * sizeof(Part)); }
  static int64_t directory_bytes(int partitions_log2) { return (int64_t{1} << partitions_log2) * sizeof(Part); }

  [[gnu::always_inline]] void prefetch(uint64_t key) const {
    const Part& part = part_of(key);
    if (part.lines != nullptr) __builtin_prefetch(part.lines + home(part, key));
  }

  // The first address whose tag fits; the caller compares the row's key. kAbsent: the key is not here.
  uint32_t candidate(uint64_t key) const {
    return find(key, [](uint32_t) { return true; });
  }

  // `same(address)` says whether that row has the key (and table) looked for.
  template <class Same>
  uint32_t find(uint64_t key, Same&& same) const {
    const Part& part = part_of(key);
    if (part.count == 0) return kAbsent;
    const uint8_t tag = tag_of(key);
    uint32_t at = home(part, key);
    for (uint32_t tried = 0; tried < part.size; ++tried) {
      const Line& line = part.lines[at];
      for (uint32_t found = matches(line, tag); found; found &= found - 1) {
        const uint32_t address = line.address[std::countr_zero(found)];
        if (same(address)) return address;
      }
      if (line.passed == 0) return kAbsent;
      if (++at == part.size) at = 0;
    }
    return kAbsent;
  }

  // The key must not be in the index. False when there is no memory for it. `key_at(address)` reads a row's key.
  template <class KeyAt>
  bool insert(uint64_t key, uint32_t address, KeyAt&& key_at) {
    Part& part = part_of(key);
    if (part.count + 1 > capacity(part.size)) {
      if (!rebuild(part, part.size + std::max<uint32_t>(1, part.size / 16), key_at)) return false;
    }
    place(part, key, address);
    ++part.count;
    return true;
  }

  void erase(uint64_t key, uint32_t address) {
    Part& part = part_of(key);
    const uint32_t first = home(part, key);
    const Slot slot = slot_of(part, key, address);
    for (uint32_t at = first; at != slot.line; at = at + 1 == part.size ? 0 : at + 1) --part.lines[at].passed;
    part.lines[slot.line].tag[slot.slot] = 0;
    --part.count;
  }

  void move(uint64_t key, uint32_t from, uint32_t to) {
    Part& part = part_of(key);
    const Slot slot = slot_of(part, key, from);
    part.lines[slot.line].address[slot.slot] = to;
  }

  // Verifies tags, counts and the numbers of entries that passed each line; returns the number of entries. `row(address)` names a row,
  // `holds(address)` says whether there is one. Throws std::runtime_error naming what does not hold.
  template <class KeyAt, class Holds, class Name>
  int64_t check(KeyAt&& key_at, Holds&& holds, Name&& name) const {
    int64_t entries = 0;
    for (const Part& part : parts_) {
      std::vector<uint32_t> passed(part.size, 0);
      uint32_t count = 0;
      for (uint32_t at = 0; at < part.size; ++at) {
        for (int slot = 0; slot < kSlots; ++slot) {
          if (part.lines[at].tag[slot] == 0) continue;
          const uint32_t address = part.lines[at].address[slot];
          if (!holds(address))
            throw std::runtime_error("check: an entry of the index leads to address " + std::to_string(address) + ", where no row is");
          const uint64_t key = key_at(address);
          if (&part_of(key) != &part || tag_of(key) != part.lines[at].tag[slot])
            throw std::runtime_error("check: the index's entry for " + name(address) + " is not that of its key");
          for (uint32_t on = home(part, key); on != at; on = on + 1 == part.size ? 0 : on + 1) ++passed[on];
          ++count;
        }
      }
      const auto part_number = [&] { return std::to_string(&part - parts_.data()); };
      if (count != part.count)
        throw std::runtime_error("check: partition " + part_number() + " of the index has " + std::to_string(count) + " entries, not the " +
                                 std::to_string(part.count) + " that are counted");
      for (uint32_t at = 0; at < part.size; ++at) {
        if (passed[at] != part.lines[at].passed)
          throw std::runtime_error("check: line " + std::to_string(at) + " of the index's partition " + part_number() + " was passed by " +
                                   std::to_string(passed[at]) + " entries, not by the " + std::to_string(part.lines[at].passed) +
                                   " that are counted");
      }
      entries += count;
    }
    return entries;
  }

  // Gives back the lines that erased rows have left over.
  template <class KeyAt>
  void shrink(KeyAt&& key_at) {
    for (Part& part : parts_) {
      const auto wanted = static_cast<uint32_t>(static_cast<double>(part.count) / (kSlots * kFullest)) + (part.count ? 1 : 0);
      if (part.count == 0) {
        release(part);
      } else if (wanted + std::max<uint32_t>(1, wanted / 16) < part.size) {
        rebuild(part, wanted, key_at);
      }
    }
  }

 private:
  struct Part {
    Line* lines = nullptr;
    uint32_t size = 0;   // lines
    uint32_t count = 0;  // entries
  };
  struct Slot {
    uint32_t line;
    int slot;
  };

  Part& part_of(uint64_t key) { return parts_[partition_bits(key) >> shift_]; }
  const Part& part_of(uint64_t key) const { return parts_[partition_bits(key) >> shift_]; }
  static uint32_t home(const Part& part, uint64_t key) { return reduce_range(static_cast<uint32_t>(key), part.size); }
  static uint8_t tag_of(uint64_t key) {
    const auto tag = static_cast<uint8_t>(key >> 36);
    return tag ? tag : 1;
  }
  static uint32_t capacity(uint32_t lines) { return static_cast<uint32_t>(lines * (kSlots * kFullest)); }

  static uint32_t matches(const Line& line, uint8_t tag) {
#if defined(__SSE2__)
    const __m128i tags = _mm_load_si128(reinterpret_cast<const __m128i*>(line.tag));
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8(static_cast<char>(tag))))) & 0xFFFu;
#else
    uint32_t found = 0;
    for (int slot = 0; slot < kSlots; ++slot) found |= static_cast<uint32_t>(line.tag[slot] == tag) << slot;
    return found;
#endif
  }

  static void place(Part& part, uint64_t key, uint32_t address) {
    uint32_t at = home(part, key);
    while (true) {
      Line& line = part.lines[at];
      if (const uint32_t open = matches(line, 0)) {
        const int slot = std::countr_zero(open);
        line.tag[slot] = tag_of(key);
        line.address[slot] = address;
        return;
      }
      ++line.passed;
      if (++at == part.size) at = 0;
    }
  }

  static Slot slot_of(const Part& part, uint64_t key, uint32_t address) {
    const uint8_t tag = tag_of(key);
    uint32_t at = home(part, key);
    while (true) {
      const Line& line = part.lines[at];
      for (uint32_t found = matches(line, tag); found; found &= found - 1) {
        const int slot = std::countr_zero(found);
        if (line.address[slot] == address) return {at, slot};
      }
      if (++at == part.size) at = 0;
    }
  }

  template <class KeyAt>
  bool rebuild(Part& part, uint32_t lines, KeyAt&& key_at) {
    auto* fresh = static_cast<Line*>(memory_.take(lines * sizeof(Line)));
    if (fresh == nullptr) return false;
    Part larger{fresh, lines, part.count};
    constexpr int kAhead = 16;  // keys stand in the rows: fetch them before they are needed
    const uint32_t slots = part.size * kSlots;
    for (uint32_t at = 0; at < slots + kAhead; ++at) {
      if (at < slots) {
        const Line& line = part.lines[at / kSlots];
        if (line.tag[at % kSlots]) key_at.prefetch(line.address[at % kSlots]);
      }
      if (at >= kAhead) {
        const uint32_t late = at - kAhead;
        const Line& line = part.lines[late / kSlots];
        if (line.tag[late % kSlots]) place(larger, key_at(line.address[late % kSlots]), line.address[late % kSlots]);
      }
    }
    line_bytes_ += static_cast<int64_t>(Memory::rounded(lines * sizeof(Line)));
    release(part);
    part = larger;
    return true;
  }

  void release(Part& part) {
    if (part.lines == nullptr) return;
    line_bytes_ -= static_cast<int64_t>(Memory::rounded(part.size * sizeof(Line)));
    memory_.give(part.lines, part.size * sizeof(Line));
    part = Part{};
  }

  Memory& memory_;
  int shift_;
  std::vector<Part> parts_;
  int64_t line_bytes_ = 0;
};

}  // namespace fiited
