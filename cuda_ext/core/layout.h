// What a row looks like and how it is addressed, on every device.
//
// Row:  key 8 | importance 4 | table 2 | mark 2 | vector width*chunk*value_bytes, padded to 4 | optimizer state
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/hash.h"

namespace fiited {

enum class Storage : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Optimizer : int { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2, kAdam = 3 };
enum class Importance : int { kFrequencyTimesNorm = 0, kNorm = 1, kLookupNormSum = 2, kFrequency = 3 };

constexpr uint32_t kAbsent = 0xFFFFFFFFu;

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

  FIITED_HD int dim() const { return chunk * chunks; }
  FIITED_HD int vector_bytes(int width) const { return width * chunk * value_bytes; }
  FIITED_HD int state_offset(int width) const { return static_cast<int>(sizeof(RowHeader)) + ((vector_bytes(width) + 3) & ~3); }
  FIITED_HD int state_bytes(int width) const {
    switch (optimizer) {
      case Optimizer::kSgd: return 0;
      case Optimizer::kRowwiseAdagrad: return 4;
      case Optimizer::kAdagrad: return width * chunk * 4;
      case Optimizer::kAdam: return width * chunk * 8;
    }
    return 0;
  }
  // State numbers for each value of the vector; row-wise Adagrad has one for the row instead.
  FIITED_HD int moments() const { return optimizer == Optimizer::kAdam ? 2 : optimizer == Optimizer::kAdagrad ? 1 : 0; }
  FIITED_HD int stride(int width) const { return state_offset(width) + state_bytes(width); }
};

// A row's address is the number of its pool, one for each width, above its position there.
struct Addresses {
  int position_bits;

  FIITED_HD int width(uint32_t address) const { return static_cast<int>(uint64_t{address} >> position_bits) + 1; }
  FIITED_HD uint32_t mask() const { return static_cast<uint32_t>((uint64_t{1} << position_bits) - 1); }
  FIITED_HD uint32_t position(uint32_t address) const { return address & mask(); }
  FIITED_HD uint32_t of(int width, uint32_t position) const {
    return static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(width - 1)} << position_bits) | position;
  }
};

inline Addresses addresses_of(int chunks) {
  int width_bits = 0;
  while ((1 << width_bits) < chunks) ++width_bits;
  return {32 - width_bits};
}

// Wire layout of a gradient at width w of k chunks: w*chunk values, and behind them, while w < k, the missing chunks folded
// into one with fixed random signs (additive over workers; its norm estimates theirs, exactly when one chunk is missing).
// That of a key without a row is the first chunk's, as it is: it teaches the row that the key may win by it.
FIITED_HD int whole_chunks(int width) { return width > 0 ? width : 1; }
FIITED_HD bool has_folded_chunk(int width, int chunks) { return width > 0 && width < chunks; }
FIITED_HD int64_t gradient_size(int width, int chunk, int chunks) {
  const int whole = whole_chunks(width < chunks ? width : chunks);
  return static_cast<int64_t>(whole + has_folded_chunk(width, chunks)) * chunk;
}

}  // namespace fiited
