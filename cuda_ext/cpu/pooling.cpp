#include <atomic>
#include <cmath>

#include "cpu/bags.h"

namespace fiited {

namespace {

constexpr int64_t kRowsPerTask = 1024;
constexpr int64_t kVectorsPerTask = 8192;

// Numbers stored as they are.
template <class Real>
struct Plain {
  using Bits = Real;
  static Real to_float(Real value) { return value; }
};

}  // namespace

template <class Real>
void pool(const Bags& bags, const Real* values, const int64_t* starts, const uint8_t* widths, Real* out) {
  const auto vector_of = [=, inverse = bags.inverse, chunk = bags.chunk](int64_t i) {
    const int32_t row = inverse[i];
    return StoredVector<Plain<Real>>{values + starts[row], widths[row] * chunk};
  };
  pool_rows<Real, Plain<Real>>(bags, vector_of, out);
}

template <class Real>
void pool_backward(const Bags& bags, const Real* grad_out, int64_t rows, const int64_t* starts, const uint8_t* widths, bool fold,
                   Real* grad_values) {
  const BagGradients<Real> gradients(bags, grad_out, rows, fold);
  for_each_range(rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<Real> scratch(kSumLevels * bags.dim());
    gradients.start(begin);
    for (int64_t row = begin; row < end; ++row) {
      const Real* sum = gradients.sum(row, widths[row], scratch.data());
      copy(static_cast<int>(starts[row + 1] - starts[row]), sum, grad_values + starts[row]);
    }
  });
}

template <class Real>
void pool_weights_backward(const Bags& bags, const Real* grad_out, const Real* values, const int64_t* starts, const uint8_t* widths,
                           Real* grad_weights) {
  const int dim = bags.dim();
  for_each_task(bags.features, [&](int64_t f) {
    for (int64_t b = 0; b < bags.batch; ++b) {
      const int64_t* bag = bags.offsets + f * bags.batch + b;
      for (int64_t i = bag[0]; i < bag[1]; ++i) {
        const int32_t row = bags.inverse[i];
        Real dot = 0;
        for (int d = 0; d < widths[row] * bags.chunk; ++d) dot += grad_out[(b * bags.features + f) * dim + d] * values[starts[row] + d];
        grad_weights[i] = bags.mean ? dot / static_cast<Real>(bag[1] - bag[0]) : dot;
      }
    }
  });
}

void lookup_norms(const Bags& bags, const float* grad_out, int64_t rows, float* norms) {
  const BagGradients<float> gradients(bags, grad_out, rows, false);
  for_each_range(rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    gradients.start(begin);
    for (int64_t row = begin; row < end; ++row) {
      norms[row] = 0;
      gradients.for_each_lookup(
          row, [&](float factor, const float* g) { norms[row] += std::abs(factor) * std::sqrt(sum_of_squares(bags.dim(), g)); });
    }
  });
}

int64_t clear_odd(int64_t n, int dim, float longest, float* vectors) {
  std::atomic<int64_t> found{0};
  for_each_range(n, kVectorsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const vector = vectors + i * dim;
      if (sum_of_squares(dim, vector) <= longest * longest) continue;  // never true of NaN
      std::fill_n(vector, dim, 0.0f);
      ++found;
    }
  });
  return found;
}

template void pool<float>(const Bags&, const float*, const int64_t*, const uint8_t*, float*);
template void pool<double>(const Bags&, const double*, const int64_t*, const uint8_t*, double*);
template void pool_backward<float>(const Bags&, const float*, int64_t, const int64_t*, const uint8_t*, bool, float*);
template void pool_backward<double>(const Bags&, const double*, int64_t, const int64_t*, const uint8_t*, bool, double*);
template void pool_weights_backward<float>(const Bags&, const float*, const float*, const int64_t*, const uint8_t*, float*);
template void pool_weights_backward<double>(const Bags&, const double*, const double*, const int64_t*, const uint8_t*, double*);

}  // namespace fiited
