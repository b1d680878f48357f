// The fused sparse optimizers, one value at a time: float arithmetic, storage of any type.
#pragma once

#include <cmath>

#include "core/numeric.h"

namespace fiited {

struct StepConstants {
  float lr, eps;
  float beta1, beta2;
  float correction1, correction2;  // Adam: 1 - beta^t, with t the shard's step as in torch.optim.SparseAdam
  int64_t step;
};

inline StepConstants step_constants(double lr, double eps, double beta1, double beta2, int64_t step) {
  return {static_cast<float>(lr),
          static_cast<float>(eps),
          static_cast<float>(beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - std::pow(beta1, static_cast<double>(step))),
          static_cast<float>(1 - std::pow(beta2, static_cast<double>(step))),
          step};
}

// The rate at which a row of row-wise Adagrad learns, its state already raised by the mean of squares.
FIITED_HD float rowwise_rate(float state, const StepConstants& c) { return c.lr / (std::sqrt(state) + c.eps); }

// One value of a vector, dimension `dim`, and its state: Adagrad's sum or Adam's two moments. `rate` is rowwise_rate's.
template <class Store, Optimizer kind>
FIITED_HD void learn_value(typename Store::Bits& value, float& first, float& second, uint32_t dim, float g, float rate, uint64_t key,
                           const StepConstants& c) {
  float change;
  if constexpr (kind == Optimizer::kSgd) {
    change = c.lr * g;
  } else if constexpr (kind == Optimizer::kRowwiseAdagrad) {
    change = rate * g;
  } else if constexpr (kind == Optimizer::kAdagrad) {
    first += g * g;
    change = c.lr * g / (std::sqrt(first) + c.eps);
  } else {
    first += (1.0f - c.beta1) * (g - first);
    second += (1.0f - c.beta2) * (g * g - second);
    change = c.lr * (first / c.correction1) / (std::sqrt(second / c.correction2) + c.eps);
  }
  const uint32_t random = Store::kRounds ? rounding_bits(key, static_cast<uint64_t>(c.step), dim) : 0u;
  value = Store::from_float(Store::to_float(value) - change, random);
}

}  // namespace fiited
