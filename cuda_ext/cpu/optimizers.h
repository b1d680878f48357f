// The fused sparse optimizers: one row's vector and state, float arithmetic, storage of any type.
#pragma once

#include <cmath>

#include "core/numeric.h"
#include "cpu/floats.h"
#include "cpu/pools.h"

namespace fiited {

struct StepConstants {
  float lr, eps;
  float beta1, beta2;
  float correction1, correction2;  // Adam: 1 - beta^t, with t the shard's step as in torch.optim.SparseAdam
  int64_t step;
};

template <class Store>
inline void write(typename Store::Bits* to, int dim, float value, uint64_t key, int64_t step) {
  to[dim] = Store::from_float(value, Store::kRounds ? rounding_bits(key, static_cast<uint64_t>(step), static_cast<uint32_t>(dim)) : 0u);
}

// `n` live values, their gradient `g` and its sum of squares.
template <class Store, Optimizer kind>
inline void apply(std::byte* vector, std::byte* state_bytes, const float* __restrict g, int n, float sum_of_squares, uint64_t key,
                  const StepConstants& c) {
  auto* __restrict v = reinterpret_cast<typename Store::Bits*>(vector);
  auto* __restrict state = reinterpret_cast<float*>(state_bytes);
  if constexpr (kind == Optimizer::kSgd) {
    for_each_dim(n, [&](int i) { write<Store>(v, i, Store::to_float(v[i]) - c.lr * g[i], key, c.step); });
  } else if constexpr (kind == Optimizer::kRowwiseAdagrad) {
    state[0] += sum_of_squares / static_cast<float>(n);
    const float rate = c.lr / (std::sqrt(state[0]) + c.eps);
    for_each_dim(n, [&](int i) { write<Store>(v, i, Store::to_float(v[i]) - rate * g[i], key, c.step); });
  } else if constexpr (kind == Optimizer::kAdagrad) {
    for_each_dim(n, [&](int i) {
      state[i] += g[i] * g[i];
      write<Store>(v, i, Store::to_float(v[i]) - c.lr * g[i] / (std::sqrt(state[i]) + c.eps), key, c.step);
    });
  } else {
    float* __restrict m = state;
    float* __restrict s = state + n;
    for_each_dim(n, [&](int i) {
      m[i] += (1.0f - c.beta1) * (g[i] - m[i]);
      s[i] += (1.0f - c.beta2) * (g[i] * g[i] - s[i]);
      const float change = c.lr * (m[i] / c.correction1) / (std::sqrt(s[i] / c.correction2) + c.eps);
      write<Store>(v, i, Store::to_float(v[i]) - change, key, c.step);
    });
  }
}

}  // namespace fiited
