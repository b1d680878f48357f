// One cache line of the index: twelve slots, each a one-byte tag and a four-byte address; the key itself stands in the row. A line
// counts the entries that had to go past it, so a miss ends at the first line nobody passed (as in F14).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__) && !defined(__CUDACC__) && !defined(FIITED_EMULATED)
#include <emmintrin.h>
#endif

#include "core/layout.h"

namespace fiited {

constexpr int kSlots = 12;
constexpr double kFullest = 0.875;

struct alignas(64) Line {
  uint8_t tag[kSlots];  // 0: free
  uint32_t passed;      // entries that found this line full and went on
  uint32_t address[kSlots];
};
static_assert(sizeof(Line) == 64, "A line must be one cache line.");

// One partition of the index.
struct Part {
  Line* lines = nullptr;
  uint32_t size = 0;   // lines
  uint32_t count = 0;  // entries
};

FIITED_HD uint32_t line_capacity(uint32_t lines) { return static_cast<uint32_t>(lines * (kSlots * kFullest)); }

// By how many lines a part, one of so many, grows. Each time all of its entries are placed anew, so long steps are cheaper. But
// `Index::kBytesPerRow` holds the spare lines and the old ones of a part that is rebuilt, which weigh more where there are few parts.
FIITED_HD uint32_t step_of(uint32_t lines, size_t parts) {
  const uint32_t step = lines / (parts < 64 ? 16 : 9);
  return step > 1 ? step : 1;
}

// Lines that a part has for so many entries.
FIITED_HD uint32_t grown_lines(uint32_t lines, uint64_t entries, size_t parts) {
  while (entries > line_capacity(lines)) lines += step_of(lines, parts);
  return lines;
}

// Lines that a part, one of so many, is cut down to after erasing; its present number where it would grow to that soon.
FIITED_HD uint32_t shrunk_lines(uint32_t lines, uint32_t entries, size_t parts) {
  if (entries == 0) return 0;
  const uint32_t wanted = static_cast<uint32_t>(static_cast<double>(entries) / (kSlots * kFullest)) + 1;
  return wanted + step_of(wanted, parts) < lines ? wanted : lines;
}

FIITED_HD uint32_t home_line(uint32_t lines, uint64_t key) { return reduce_range(static_cast<uint32_t>(key), lines); }

FIITED_HD uint8_t line_tag(uint64_t key) {
  const auto tag = static_cast<uint8_t>(key >> 36);
  return tag ? tag : 1;
}

// 0x80 in each byte of `word` that equals `tag`.
FIITED_HD uint32_t equal_bytes(uint32_t word, uint8_t tag) {
  const uint32_t apart = word ^ (tag * 0x01010101u);
  return ~(((apart & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | apart | 0x7F7F7F7Fu);
}

FIITED_HD int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Bit s for each slot s whose tag is `tag`.
FIITED_HD uint32_t matching_slots(const Line& line, uint8_t tag) {
#if defined(__SSE2__) && !defined(__CUDACC__) && !defined(FIITED_EMULATED)
  const __m128i tags = _mm_load_si128(reinterpret_cast<const __m128i*>(line.tag));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8(static_cast<char>(tag))))) & 0xFFFu;
#else
  uint32_t words[4];  // the tags and what follows, in one load where there are such loads
  memcpy(words, __builtin_assume_aligned(&line, sizeof(Line)), sizeof(words));
  uint32_t found = 0;
  for (int word = 0; word < kSlots / 4; ++word) {
    // The four high bits, gathered into one nibble.
    found |= ((equal_bytes(words[word], tag) >> 7) * 0x00204081u >> 21 & 0xFu) << (4 * word);
  }
  return found;
#endif
}

// The address under this key for which `same(address)` holds: whether that row has the key (and table) looked for.
template <class Same>
FIITED_HD uint32_t find_in(const Part& part, uint64_t key, const Same& same) {
  if (part.size == 0) return kAbsent;
  const uint8_t tag = line_tag(key);
  uint32_t at = home_line(part.size, key);
  for (uint32_t tried = 0; tried < part.size; ++tried) {
    const Line& line = part.lines[at];
    for (uint32_t found = matching_slots(line, tag); found; found &= found - 1) {
      const uint32_t address = line.address[lowest_bit(found)];
      if (same(address)) return address;
    }
    if (line.passed == 0) return kAbsent;
    if (++at == part.size) at = 0;
  }
  return kAbsent;
}

struct Slot {
  uint32_t line;
  int slot;
};

// Where the entry with this key and address stands; it must be there.
FIITED_HD Slot slot_of(const Part& part, uint64_t key, uint32_t address) {
  const uint8_t tag = line_tag(key);
  uint32_t at = home_line(part.size, key);
  while (true) {
    const Line& line = part.lines[at];
    for (uint32_t found = matching_slots(line, tag); found; found &= found - 1) {
      const int slot = lowest_bit(found);
      if (line.address[slot] == address) return {at, slot};
    }
    if (++at == part.size) at = 0;
  }
}

}  // namespace fiited
