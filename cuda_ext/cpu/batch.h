// Kernels on one batch, before and after the store: keys and dedup, pooling, and the way of the gradient back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "core/batch.h"
#include "cpu/parallel.h"

namespace fiited {

constexpr int64_t kGroupedPerTask = 16384;

// Raw ids, feature by feature, to unique keys ordered by owner, table and first occurrence.
// `splits` [workers] receives how many belong to each. Throws when there are 2^31 ids or more.
void dedup_ids(const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features, uint64_t seed, int workers,
               Deduped& out, int64_t* splits);

// The same for keys that came from several workers: their counts are summed. Order of first occurrence.
void dedup_keys(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out);

// Positions 0..n-1 by the row that `inverse` names: row u has those at starts[u] up to starts[u + 1], in rising order.
// `place(position, at)` is called once for each, from several threads.
template <class Place>
std::unique_ptr<int32_t[]> group_by_row(int64_t n, const int32_t* inverse, int64_t rows, Place&& place) {
  std::unique_ptr<int32_t[]> starts(new int32_t[rows + 1]);
  const int parts = static_cast<int>(std::clamp<int64_t>(n / kGroupedPerTask, 1, threads.count()));
  // Each part of the rows by itself. It passes over all positions, which is quick beside putting its own in order.
  for_each_task(parts, [&](int64_t part) {
    const auto first = static_cast<int32_t>(rows * part / parts);
    const auto end = static_cast<int32_t>(rows * (part + 1) / parts);
    int32_t* const next = starts.get() + 1;  // next[u]: where the next position of row u goes; in the end, where row u + 1 starts
    std::fill(next + first, next + end, 0);
    int32_t before = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t row = inverse[i];
      before += row < first;
      if (row >= first && row < end) ++next[row];
    }
    for (int32_t row = first; row < end; ++row) before += std::exchange(next[row], before);
    for (int64_t i = 0; i < n; ++i) {
      const int32_t row = inverse[i];
      if (row >= first && row < end) place(i, next[row]++);
    }
  });
  starts[0] = 0;
  return starts;
}

// values: rows of widths[u] * chunk floats one behind the other, starting at starts[u]; out [batch, features, chunks * chunk].
template <class Real>
void pool(const Bags& bags, const Real* values, const int64_t* starts, const uint8_t* widths, Real* out);

// Gradient of `values`, in their layout, or on the wire's with `fold`; grad_out [batch, features, chunks * chunk].
template <class Real>
void pool_backward(const Bags& bags, const Real* grad_out, int64_t rows, const int64_t* starts, const uint8_t* widths, bool fold,
                   Real* grad_values);

// Gradient of the per-lookup weights: grad_weights [N].
template <class Real>
void pool_weights_backward(const Bags& bags, const Real* grad_out, const Real* values, const int64_t* starts, const uint8_t* widths,
                           Real* grad_weights);

// Sum over each row's lookups of the norm of the lookup's own gradient: norms [rows].
void lookup_norms(const Bags& bags, const float* grad_out, int64_t rows, float* norms);

// Makes zeros of each of the n vectors that is longer than that, or not finite; returns how many.
int64_t clear_odd(int64_t n, int dim, float longest, float* vectors);

// 64-bit hashes of n strings, keyed by the seed; string i is bytes[offsets[i]] up to bytes[offsets[i + 1]]. Stable: saved models
// depend on them.
void hash_strings(int64_t n, const int64_t* offsets, const uint8_t* bytes, uint64_t seed, int64_t* out);

// Ids of the cross of two columns, keyed by the seed; the order of the columns matters.
void cross_ids(int64_t n, const int64_t* left, const int64_t* right, uint64_t seed, int64_t* out);

}  // namespace fiited
