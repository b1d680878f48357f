#include <cmath>
#include <vector>

#include "core/numeric.h"
#include "cpu/batch.h"

namespace fiited {

namespace {

constexpr int64_t kAhead = 16;  // lookups whose rows are fetched before they are needed

// Calls visit(lookup, row of `out`, factor) for every lookup of every bag.
template <class Real, class Visit>
void for_each_lookup(const Bags& bags, Visit&& visit) {
  const auto* weights = static_cast<const Real*>(bags.weights);
  for (int64_t f = 0; f < bags.features; ++f) {
    for (int64_t b = 0; b < bags.batch; ++b) {
      const int64_t begin = bags.offsets[f * bags.batch + b];
      const int64_t end = bags.offsets[f * bags.batch + b + 1];
      const Real share = bags.mean && end > begin ? Real(1) / static_cast<Real>(end - begin) : Real(1);
      for (int64_t i = begin; i < end; ++i) visit(i, b * bags.features + f, weights ? weights[i] * share : share);
    }
  }
}

int64_t lookups_of(const Bags& bags) { return bags.offsets[bags.features * bags.batch]; }

std::vector<float> fold_signs(int dims) {
  std::vector<float> signs(dims);
  for (int dim = 0; dim < dims; ++dim) signs[dim] = fold_sign(static_cast<uint32_t>(dim));
  return signs;
}

}  // namespace

template <class Real>
void pool(const Bags& bags, const Real* values, const int64_t* starts, const uint8_t* widths, Real* out) {
  const int dim = bags.chunk * bags.chunks;
  const int64_t n = lookups_of(bags);
  for_each_lookup<Real>(bags, [&](int64_t i, int64_t to, Real factor) {
    if (i + kAhead < n) __builtin_prefetch(values + starts[bags.inverse[i + kAhead]]);
    const int32_t row = bags.inverse[i];
    const Real* __restrict from = values + starts[row];
    Real* __restrict at = out + to * dim;
    const int live = widths[row] * bags.chunk;
    for (int d = 0; d < live; ++d) at[d] += factor * from[d];
  });
}

template <class Real>
void pool_backward(const Bags& bags, const Real* grad_out, const int64_t* starts, const uint8_t* widths, bool fold, Real* grad_values) {
  const int dim = bags.chunk * bags.chunks;
  const int64_t n = lookups_of(bags);
  const std::vector<float> signs = fold_signs(dim);
  for_each_lookup<Real>(bags, [&](int64_t i, int64_t from, Real factor) {
    if (i + kAhead < n) __builtin_prefetch(grad_values + starts[bags.inverse[i + kAhead]], 1);
    const int32_t row = bags.inverse[i];
    const Real* __restrict g = grad_out + from * dim;
    Real* __restrict at = grad_values + starts[row];
    const int live = widths[row] * bags.chunk;
    for (int d = 0; d < live; ++d) at[d] += factor * g[d];
    if (!fold) return;
    for (int begin = live; begin < dim; begin += bags.chunk) {
      for (int d = 0; d < bags.chunk; ++d) at[live + d] += factor * static_cast<Real>(signs[begin + d]) * g[begin + d];
    }
  });
}

template <class Real>
void pool_weights_backward(const Bags& bags, const Real* grad_out, const Real* values, const int64_t* starts, const uint8_t* widths,
                           Real* grad_weights) {
  const int dim = bags.chunk * bags.chunks;
  Bags unweighted = bags;
  unweighted.weights = nullptr;
  for_each_lookup<Real>(unweighted, [&](int64_t i, int64_t from, Real factor) {
    const int32_t row = bags.inverse[i];
    Real dot = 0;
    for (int d = 0; d < widths[row] * bags.chunk; ++d) dot += grad_out[from * dim + d] * values[starts[row] + d];
    grad_weights[i] = factor * dot;
  });
}

void lookup_norms(const Bags& bags, const float* grad_out, float* norms) {
  const int dim = bags.chunk * bags.chunks;
  for_each_lookup<float>(bags, [&](int64_t i, int64_t from, float factor) {
    float squares = 0;
    for (int d = 0; d < dim; ++d) squares += grad_out[from * dim + d] * grad_out[from * dim + d];
    norms[bags.inverse[i]] += std::abs(factor) * std::sqrt(squares);
  });
}

void add_rows(int64_t n, const int32_t* target, const int64_t* sizes, const float* from, const int64_t* starts, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    float* __restrict at = to + starts[target[i]];
    for (int64_t d = 0; d < sizes[i]; ++d) at[d] += from[d];
    from += sizes[i];
  }
}

template void pool<float>(const Bags&, const float*, const int64_t*, const uint8_t*, float*);
template void pool<double>(const Bags&, const double*, const int64_t*, const uint8_t*, double*);
template void pool_backward<float>(const Bags&, const float*, const int64_t*, const uint8_t*, bool, float*);
template void pool_backward<double>(const Bags&, const double*, const int64_t*, const uint8_t*, bool, double*);
template void pool_weights_backward<float>(const Bags&, const float*, const float*, const int64_t*, const uint8_t*, float*);
template void pool_weights_backward<double>(const Bags&, const double*, const double*, const int64_t*, const uint8_t*, double*);

}  // namespace fiited
