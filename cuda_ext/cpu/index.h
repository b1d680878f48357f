// The index: from key to row address. Open addressing in the lines of core/line.h. Growth is by partition, a small share at a time: no
// pause, no second copy of the index.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/line.h"
#include "cpu/memory.h"

namespace fiited {

class Index {
  static constexpr uint32_t kPartsPerTask = 64;

 public:
  Index(Memory& memory, int partitions_log2) : memory_(memory), shift_(10 - partitions_log2), parts_(size_t{1} << partitions_log2) {}
  ~Index() {
    for (Part& part : parts_) release(part);
  }
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  // What the index needs with no row in it: the parts' directory and one spare line for each part.
  static int64_t fixed_bytes(int partitions_log2) { return (int64_t{1} << partitions_log2) * (sizeof(Part) + sizeof(Line)); }
  // An upper bound of the bytes for each row beyond that, rebuilding included.
  static constexpr int64_t kBytesPerRow = 7;

  int64_t bytes() const { return line_bytes_ + static_cast<int64_t>(parts_.size() * sizeof(Part)); }
  static int64_t directory_bytes(int partitions_log2) { return (int64_t{1} << partitions_log2) * sizeof(Part); }

  [[gnu::always_inline]] void prefetch(uint64_t key) const {
    const Part& part = part_of(key);
    if (part.lines != nullptr) __builtin_prefetch(part.lines + home_line(part.size, key));
  }

  // The first address whose tag fits; the caller compares the row's key. kAbsent: the key is not here.
  uint32_t candidate(uint64_t key) const {
    return find(key, [](uint32_t) { return true; });
  }

  // `same(address)` says whether that row has the key (and table) looked for.
  template <class Same>
  uint32_t find(uint64_t key, Same&& same) const {
    return find_in(part_of(key), key, same);
  }

  // Threads may insert side by side, in at most so many tasks: as many parts are then rebuilt at a time.
  uint32_t most_tasks() const { return std::max(1u, static_cast<uint32_t>(parts_.size()) / kPartsPerTask); }
  // Which of so many tasks, each with partitions of its own, has this key.
  uint32_t task_of(uint64_t key, uint32_t tasks) const { return (partition_bits(key) >> shift_) * tasks >> (10 - shift_); }

  // The key must not be in the index. False when there is no memory for it. `key_at(address)` reads a row's key.
  template <class KeyAt>
  bool insert(uint64_t key, uint32_t address, KeyAt&& key_at) {
    Part& part = part_of(key);
    if (part.count + 1 > line_capacity(part.size)) {
      if (!rebuild(part, grown_lines(part.size, part.count + 1, parts_.size()), key_at)) return false;
    }
    place(part, key, address);
    ++part.count;
    return true;
  }

  void erase(uint64_t key, uint32_t address) {
    Part& part = part_of(key);
    const uint32_t first = home_line(part.size, key);
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
          if (&part_of(key) != &part || line_tag(key) != part.lines[at].tag[slot])
            throw std::runtime_error("check: the index's entry for " + name(address) + " is not that of its key");
          for (uint32_t on = home_line(part.size, key); on != at; on = on + 1 == part.size ? 0 : on + 1) ++passed[on];
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
      const uint32_t wanted = shrunk_lines(part.size, part.count, parts_.size());
      if (wanted == 0) {
        release(part);
      } else if (wanted < part.size) {
        rebuild(part, wanted, key_at);
      }
    }
  }

 private:
  Part& part_of(uint64_t key) { return parts_[partition_bits(key) >> shift_]; }
  const Part& part_of(uint64_t key) const { return parts_[partition_bits(key) >> shift_]; }

  static void place(Part& part, uint64_t key, uint32_t address) {
    uint32_t at = home_line(part.size, key);
    while (true) {
      Line& line = part.lines[at];
      if (const uint32_t open = matching_slots(line, 0)) {
        const int slot = std::countr_zero(open);
        line.tag[slot] = line_tag(key);
        line.address[slot] = address;
        return;
      }
      ++line.passed;
      if (++at == part.size) at = 0;
    }
  }

  template <class KeyAt>
  bool rebuild(Part& part, uint32_t lines, KeyAt&& key_at) {
    Part larger{take(lines), lines, part.count};
    if (larger.lines == nullptr) return false;
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
    release(part);
    part = larger;
    return true;
  }

  Line* take(uint32_t lines) {
    const std::lock_guard lock(memory_lock_);
    auto* const taken = static_cast<Line*>(memory_.take(lines * sizeof(Line)));
    if (taken != nullptr) line_bytes_ += static_cast<int64_t>(Memory::rounded(lines * sizeof(Line)));
    return taken;
  }

  void release(Part& part) {
    if (part.lines == nullptr) return;
    const std::lock_guard lock(memory_lock_);
    line_bytes_ -= static_cast<int64_t>(Memory::rounded(part.size * sizeof(Line)));
    memory_.give(part.lines, part.size * sizeof(Line));
    part = Part{};
  }

  Memory& memory_;
  int shift_;
  std::vector<Part> parts_;
  std::mutex memory_lock_;  // of the memory and its count, while threads insert
  int64_t line_bytes_ = 0;
};

}  // namespace fiited
