// Kernels on one batch, before and after the store: keys and dedup, pooling, and the way of the gradient back.
#pragma once

#include <cstdint>

namespace fiited {

struct Deduped {
  int64_t unique;
  int64_t* keys;     // [N] capacity; `unique` are written
  int32_t* tables;   // [N]
  int32_t* counts;   // [N] lookups of each unique key
  int32_t* inverse;  // [N] position among the unique ones
};

// Raw ids, feature by feature, to unique keys in the order of their owner and, within an owner, of first occurrence.
// `splits` [workers] receives how many belong to each. Throws when there are 2^31 ids or more.
void dedup_ids(const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features, uint64_t seed, int workers,
               Deduped& out, int64_t* splits);

// The same for keys that came from several workers: their counts are summed. Order of first occurrence.
void dedup_keys(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out);

// Shape of a pooled lookup. Bag (f, b) is lookups offsets[f * batch + b] up to offsets[f * batch + b + 1].
struct Bags {
  int64_t features;
  int64_t batch;
  const int64_t* offsets;  // [features * batch + 1]
  const int32_t* inverse;  // [N] row of each lookup
  const void* weights;     // [N] in the values' type, or null
  bool mean;               // divide each bag by its number of lookups
  int chunk;
  int chunks;
};

// values: rows of widths[u] * chunk floats one behind the other, starting at starts[u]; out [batch, features, chunks * chunk].
template <class Real>
void pool(const Bags& bags, const Real* values, const int64_t* starts, const uint8_t* widths, Real* out);

// Gradient of `values`: zero-filled `grad_values` of the same layout is added to. With `fold`, rows are laid out as on the
// wire instead (see gradient_size) and the missing chunks' gradient is folded in behind the live ones.
template <class Real>
void pool_backward(const Bags& bags, const Real* grad_out, const int64_t* starts, const uint8_t* widths, bool fold, Real* grad_values);

// Gradient of the per-lookup weights: grad_weights [N].
template <class Real>
void pool_weights_backward(const Bags& bags, const Real* grad_out, const Real* values, const int64_t* starts, const uint8_t* widths,
                           Real* grad_weights);

// Sum over each row's lookups of the norm of the lookup's own gradient: norms [rows], zero-filled, is added to.
void lookup_norms(const Bags& bags, const float* grad_out, float* norms);

// 64-bit hashes of n strings; string i is bytes[offsets[i]] up to bytes[offsets[i + 1]].
void hash_strings(int64_t n, const int64_t* offsets, const uint8_t* bytes, int64_t* out);

// Ids of the cross of two columns; the order of the columns matters.
void cross_ids(int64_t n, const int64_t* left, const int64_t* right, int64_t* out);

// Adds rows of `from` (sizes[i] floats each, one behind the other) into row target[i] of `to`, which starts at starts[target[i]].
void add_rows(int64_t n, const int32_t* target, const int64_t* sizes, const float* from, const int64_t* starts, float* to);

}  // namespace fiited
