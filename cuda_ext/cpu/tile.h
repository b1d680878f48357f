// Vectors as wide as the processor's, and squares of them.
#pragma once

#include <cstdint>
#include <utility>

namespace fiited {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Numbers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float Anywhere __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef std::make_integer_sequence<int, kLanes> EachLane;

inline Lanes load(const float* at) { return *reinterpret_cast<const Anywhere*>(at); }
inline void store(float* at, Lanes x) { *reinterpret_cast<Anywhere*>(at) = x; }

// A square of kLanes x kLanes numbers, a row in each vector.
struct Tile {
  Lanes rows[kLanes];

  // Swaps rows and columns: in squares of 2 first, then of 4, up to the whole.
  template <int half = 1>
  void transpose() {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
      if ((row & half) == 0) exchange<half>(rows[row], rows[row + half], EachLane());
    }
    if constexpr (2 * half < kLanes) transpose<2 * half>();
  }

 private:
  template <int half, int... lane>
  static void exchange(Lanes& upper, Lanes& lower, std::integer_sequence<int, lane...>) {
    const Lanes above = upper;
    upper = __builtin_shufflevector(above, lower, (lane & half ? kLanes + lane - half : lane)...);
    lower = __builtin_shufflevector(above, lower, (lane & half ? kLanes + lane : lane + half)...);
  }
};

}  // namespace fiited
