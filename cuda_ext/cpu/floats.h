// Loops over a row's numbers, in groups of eight so that the compiler makes vector code of them. The result does not depend on the
// vector width, so a run is the same on every machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fiited {

// visit(i) for i in [0, n): eight at a time, then the rest. What a visit writes, no other one reads. Indices have 64 bits:
// an int might wrap, for all that the compiler knows, and would keep loads and stores apart.
template <class Visit>
[[gnu::always_inline]] inline void for_each_dim(int64_t n, Visit&& visit) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
#pragma omp simd
    for (int64_t lane = 0; lane < 8; ++lane) visit(i + lane);
  }
  for (; i < n; ++i) visit(i);
}

template <class Real>
inline void copy(int n, const Real* __restrict from, Real* __restrict to) {
  for_each_dim(n, [&](int64_t i) { to[i] = from[i]; });
}

template <class Real>
inline void add(int n, const Real* __restrict from, Real* __restrict to) {
  for_each_dim(n, [&](int64_t i) { to[i] += from[i]; });
}

template <class Real>
inline void add_scaled(int n, Real factor, const Real* __restrict from, Real* __restrict to) {
  for_each_dim(n, [&](int64_t i) { to[i] += factor * from[i]; });
}

// Writes value(i) for i in [0, n), a multiple of four, past the caches, where that can be done; `to` begins at a multiple of 16 bytes.
template <class Value>
inline void stream(int64_t n, float* to, Value&& value) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < n; i += 4) _mm_stream_ps(to + i, _mm_setr_ps(value(i), value(i + 1), value(i + 2), value(i + 3)));
#else
  for_each_dim(n, [&](int64_t i) { to[i] = value(i); });
#endif
}

// Behind it, and before others read what was written.
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline float sum_of_squares(int n, const float* x) {
  using Eight = float __attribute__((vector_size(32)));
  Eight lanes{};
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    Eight eight;
    std::memcpy(&eight, x + i, sizeof(eight));
    lanes += eight * eight;
  }
  float sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// How many rows or keys are fetched ahead, all in one short loop: their page walks then run side by side, which they do not where
// each prefetch stands between the work on two rows. More than a core can have under way at a time make it wait.
constexpr int64_t kInFlight = 16;

// The same for rows of many bytes; a power of two, too.
constexpr int32_t ahead_of(size_t row_bytes) {
  int32_t rows = kInFlight;
  while (rows > 2 && rows * row_bytes > 8192) rows /= 2;
  return rows;
}

// Asks for the cache lines of a range ahead of their use, which is once in a step: they are to leave the caches first. This and all that
// call it are always inlined: GCC takes a function that only prefetches for one without effect, and drops calls of it.
[[gnu::always_inline]] inline void prefetch(const void* at, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t line = begin & ~uintptr_t{63}; line < begin + bytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 0);
  }
}

}  // namespace fiited
