// Numbers that CPU and CUDA must agree on: initial values, storage rounding, importance bins, the folded gradient.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/hash.h"
#include "core/layout.h"

namespace fiited {

FIITED_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FIITED_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Value of dimension `dim` of a new row, uniform in [-scale, scale): a hash, so that it depends on neither worker, order nor device.
FIITED_HD float initial_value(uint64_t key, uint32_t table, uint32_t dim, float scale) {
  const uint64_t word = mix64((key ^ (static_cast<uint64_t>(table) << 32)) + kGolden * ((dim >> 1) + 1));
  const uint32_t half = (dim & 1) ? static_cast<uint32_t>(word >> 32) : static_cast<uint32_t>(word);
  return (static_cast<float>(half >> 8) * 0x1p-23f - 1.0f) * scale;
}

// 32 random bits for the stochastic rounding of one value at one step.
FIITED_HD uint32_t rounding_bits(uint64_t key, uint64_t step, uint32_t dim) {
  return static_cast<uint32_t>(mix64(key + kGolden * (step * 4096 + dim + 1)) >> 16);
}

// Storage types. `from_float` adds random bits below the kept mantissa and truncates: unbiased rounding.
struct Float32 {
  using Bits = uint32_t;
  static constexpr bool kRounds = false;
  static FIITED_HD float to_float(Bits bits) { return float_of(bits); }
  static FIITED_HD Bits from_float(float x, uint32_t) { return bits_of(x); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr bool kRounds = true;
  static FIITED_HD float to_float(Bits bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  static FIITED_HD Bits from_float(float x, uint32_t random) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7F800000u) == 0x7F800000u) return static_cast<Bits>(bits >> 16);  // inf and NaN stay what they are
    return static_cast<Bits>((bits + (random & 0xFFFFu)) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr bool kRounds = true;
  static FIITED_HD float to_float(Bits half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 31u;
    const uint32_t mantissa = half & 0x3FFu;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
      const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
      return sign ? -tiny : tiny;
    }
    const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
    return float_of(sign | (wide << 23) | (mantissa << 13));
  }
  static FIITED_HD Bits from_float(float x, uint32_t random) {
    const uint32_t bits = bits_of(x);
    const Bits sign = static_cast<Bits>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return sign | 0x7E00u;
    if (magnitude >= 0x47800000u) return sign | 0x7C00u;  // 65536 and above
    const float size = float_of(magnitude);
    if (size < 0x1p-14f) {  // subnormal: multiples of 2^-24
      const float units = size * 0x1p24f + static_cast<float>(random & 0xFFFFFFu) * 0x1p-24f;
      return sign | static_cast<Bits>(units);
    }
    const uint32_t rounded = magnitude + (random & 0x1FFFu);
    if (rounded >= 0x477FF000u) return sign | 0x7BFFu;  // never rounds a finite value up to infinity
    return sign | static_cast<Bits>((rounded - 0x38000000u) >> 13);
  }
};

// Calls visit(Stored{}) with the type that rows are stored in.
template <class Visit>
auto with_storage(Storage storage, Visit&& visit) {
  switch (storage) {
    case Storage::kBFloat16: return visit(BFloat16{});
    case Storage::kFloat16: return visit(Float16{});
    default: return visit(Float32{});
  }
}

// Importance histogram: 32 bins an octave from 2^-44 to 2^20, straight from the float's bits.
constexpr int kImportanceBins = 2048;

FIITED_HD int importance_bin(float importance) {
  const int bin = static_cast<int>(bits_of(importance) >> 18) - ((127 - 44) << 5);
  return bin < 0 ? 0 : bin >= kImportanceBins ? kImportanceBins - 1 : bin;
}

// A row's width: how many of its chunks have importance > threshold * level. `cuts` are those products, not decreasing.
FIITED_HD int width_of(float importance, const float* cuts, int chunks) {
  int width = 0;
  while (width < chunks && importance > cuts[width]) ++width;
  return width;
}

// What a row's lookups of one step add to its importance: `count` of them, `norm` of their summed gradient.
FIITED_HD float gain_of(Importance kind, int32_t count, float norm, float lookup_norm) {
  switch (kind) {
    case Importance::kFrequencyTimesNorm: return static_cast<float>(count) * norm;
    case Importance::kNorm: return norm;
    case Importance::kLookupNormSum: return lookup_norm;
    case Importance::kFrequency: return static_cast<float>(count);
  }
  return 0;
}

// Whether a key that is worth a row is among the share `quota` (of 2^32) that is let in at this step.
FIITED_HD bool let_in(uint64_t key, int64_t step, uint64_t quota) {
  return (mix64(key + kGolden * static_cast<uint64_t>(step)) >> 32) < quota;
}

// Sign with which dimension `dim` of a gradient is added into the folded form of the missing dimensions.
FIITED_HD float fold_sign(uint32_t dim) { return (mix64(kGolden * (dim + 1)) >> 63) ? -1.0f : 1.0f; }

}  // namespace fiited
