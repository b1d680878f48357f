#include "cpu/interaction.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace fiited {

namespace {

constexpr int kLanes = 16;  // of the widest vector
constexpr int kRows = 6;    // of a block: enough sums to keep the multipliers busy, few enough for the registers
constexpr int64_t kBatchPerTask = 64;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[row][lane] = sum over k of a[row][k] * b[k][lane], for kRows rows and as many lanes.
template <int lanes>
[[gnu::always_inline]] inline void multiply_block(int n, const float* a, int a_stride, const float* b, int b_stride, float* out,
                                                  int out_stride) {
  typedef float Lanes __attribute__((vector_size(lanes * sizeof(float))));
  typedef float Anywhere __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  Lanes sums[kRows] = {};
  for (int k = 0; k < n; ++k) {
    const Lanes right = *reinterpret_cast<const Anywhere*>(b + k * b_stride);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) sums[row] += a[row * a_stride + k] * right;
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) *reinterpret_cast<Anywhere*>(out + row * out_stride) = sums[row];
}

// What a task needs beside its input; rows and columns are padded with zeros to whole blocks.
struct Scratch {
  explicit Scratch(const Interaction& shape)
      : vectors(round_up(round_up(shape.vectors_all(), kRows), kLanes)),
        dim(round_up(shape.dim, kLanes)),
        rows(vectors * dim),
        turned(vectors * dim),
        products(vectors * vectors) {}

  int vectors;
  int dim;
  std::vector<float> rows;      // [vectors][dim]
  std::vector<float> turned;    // [dim][vectors]; backward: gradients by [vectors][dim]
  std::vector<float> products;  // [vectors][vectors]
};

const float* vector_of(const Interaction& shape, int64_t b, int i) {
  const int before = shape.below != nullptr;
  if (i < before) return shape.below + b * shape.dim;
  return shape.vectors + (b * shape.vectors_in + i - before) * shape.dim;
}

template <int lanes>
[[gnu::always_inline]] inline void interact_rows(const Interaction& shape, int columns, int64_t begin, int64_t end, Scratch& scratch,
                                                 float* out) {
  const int count = shape.vectors_all();
  const int dim = shape.dim;
  for (int64_t b = begin; b < end; ++b) {
    for (int i = 0; i < count; ++i) {
      const float* from = vector_of(shape, b, i);
      float* row = scratch.rows.data() + i * scratch.dim;
      float* column = scratch.turned.data() + i;
      for (int d = 0; d < dim; ++d) {
        row[d] = from[d];
        column[d * scratch.vectors] = from[d];
      }
    }
    for (int i = 0; i < count; i += kRows) {
      for (int j = 0; j < i + kRows && j < count; j += lanes) {
        multiply_block<lanes>(dim, scratch.rows.data() + i * scratch.dim, scratch.dim, scratch.turned.data() + j, scratch.vectors,
                              scratch.products.data() + i * scratch.vectors + j, scratch.vectors);
      }
    }
    float* to = out + b * columns;
    if (shape.below != nullptr) to = std::copy_n(shape.below + b * dim, dim, to);
    for (int i = 1; i < count; ++i) to = std::copy_n(scratch.products.data() + i * scratch.vectors, i, to);
    std::fill(to, out + (b + 1) * columns, 0.0f);
  }
}

template <int lanes>
[[gnu::always_inline]] inline void backward_rows(const Interaction& shape, int columns, const float* grad_out, int64_t begin, int64_t end,
                                                 Scratch& scratch, float* grad_below, float* grad_vectors) {
  const int count = shape.vectors_all();
  const int dim = shape.dim;
  const int before = shape.below != nullptr;
  for (int64_t b = begin; b < end; ++b) {
    for (int i = 0; i < count; ++i) std::copy_n(vector_of(shape, b, i), dim, scratch.rows.data() + i * scratch.dim);
    const float* direct = grad_out + b * columns;
    const float* grad = direct + (before ? dim : 0);
    for (int i = 1; i < count; ++i) {  // both halves of a symmetric matrix
      float* row = scratch.products.data() + i * scratch.vectors;
      float* column = scratch.products.data() + i;
      for (int j = 0; j < i; ++j) {
        row[j] = grad[j];
        column[j * scratch.vectors] = grad[j];
      }
      grad += i;
    }
    for (int i = 0; i < count; i += kRows) {
      for (int d = 0; d < dim; d += lanes) {
        multiply_block<lanes>(count, scratch.products.data() + i * scratch.vectors, scratch.vectors, scratch.rows.data() + d, scratch.dim,
                              scratch.turned.data() + i * scratch.dim + d, scratch.dim);
      }
    }
    if (before) {
      for (int d = 0; d < dim; ++d) grad_below[b * dim + d] = direct[d] + scratch.turned[d];
    }
    float* to = grad_vectors + b * shape.vectors_in * dim;
    for (int i = before; i < count; ++i) to = std::copy_n(scratch.turned.data() + i * scratch.dim, dim, to);
  }
}

// The same body for each instruction set; which one runs is decided when the library is loaded.
struct Bodies {
  decltype(&interact_rows<4>) forward;
  decltype(&backward_rows<4>) backward;
};

#if defined(__x86_64__)
#define FIITED_BODIES(name, instructions, lanes)                                                                                          \
  __attribute__((target(instructions))) void forward_##name(const Interaction& shape, int columns, int64_t begin, int64_t end,            \
                                                            Scratch& scratch, float* out) {                                               \
    interact_rows<lanes>(shape, columns, begin, end, scratch, out);                                                                       \
  }                                                                                                                                       \
  __attribute__((target(instructions))) void backward_##name(const Interaction& shape, int columns, const float* grad_out, int64_t begin, \
                                                             int64_t end, Scratch& scratch, float* grad_below, float* grad_vectors) {     \
    backward_rows<lanes>(shape, columns, grad_out, begin, end, scratch, grad_below, grad_vectors);                                        \
  }
FIITED_BODIES(avx512, "avx512f", 16)
FIITED_BODIES(avx2, "avx2,fma", 8)
#endif

Bodies bodies_for_this_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return {&forward_avx512, &backward_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {&forward_avx2, &backward_avx2};
#endif
  return {&interact_rows<4>, &backward_rows<4>};
}

const Bodies bodies = bodies_for_this_cpu();

}  // namespace

void interact(const Interaction& shape, int columns, float* out) {
  for_each_range(shape.batch, kBatchPerTask, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    bodies.forward(shape, columns, begin, end, scratch, out);
  });
}

void interact_backward(const Interaction& shape, int columns, const float* grad_out, float* grad_below, float* grad_vectors) {
  for_each_range(shape.batch, kBatchPerTask, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    bodies.backward(shape, columns, grad_out, begin, end, scratch, grad_below, grad_vectors);
  });
}

}  // namespace fiited
