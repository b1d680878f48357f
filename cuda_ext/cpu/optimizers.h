// A whole row's step of the fused sparse optimizers.
#pragma once

#include "core/optimizers.h"
#include "cpu/floats.h"

namespace fiited {

// The first `n` of a row's `live` values, mostly all: their gradient `g` and its sum of squares.
template <class Store, Optimizer kind>
inline void apply(std::byte* vector, std::byte* state_bytes, const float* __restrict g, int n, int live, float sum_of_squares, uint64_t key,
                  const StepConstants& c) {
  auto* __restrict v = reinterpret_cast<typename Store::Bits*>(vector);
  auto* __restrict state = reinterpret_cast<float*>(state_bytes);
  float rate = 0;
  if constexpr (kind == Optimizer::kRowwiseAdagrad) {
    state[0] += sum_of_squares / static_cast<float>(n);
    rate = rowwise_rate(state[0], c);
  }
  for_each_dim(n,
               [&](int64_t i) { learn_value<Store, kind>(v[i], state[i], state[live + i], static_cast<uint32_t>(i), g[i], rate, key, c); });
}

}  // namespace fiited
