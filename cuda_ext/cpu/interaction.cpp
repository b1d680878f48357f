#include "cpu/interaction.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace fiited {

namespace {

constexpr int kRows = 7;  // of a block: enough sums to keep the multipliers busy, few enough for the registers
constexpr int64_t kBatchPerTask = 64;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <int... lane>
constexpr Numbers counted(std::integer_sequence<int, lane...>) {
  return Numbers{lane...};
}

// sums[row] = sum over k of left[row][k] * (kLanes numbers at right(k)).
template <class Right>
inline void multiply_block(int n, const float* const* left, Right&& right, Lanes (&sums)[kRows]) {
  for (Lanes& sum : sums) sum = Lanes{};
  for (int k = 0; k < n; ++k) {
    const Lanes numbers = load(right(k));
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) sums[row] += left[row][k] * numbers;
  }
}

// What a task needs beside its input. Rows and columns are padded to whole blocks: missing vectors are zero, and so are the numbers
// behind a vector's end, for which it is copied where it is not a whole number of lanes long.
class Scratch {
 public:
  explicit Scratch(const Interaction& shape)
      : count(round_up(round_up(shape.vectors_all(), kRows), kLanes)),
        dim(round_up(shape.dim, kLanes)),
        vectors(count),
        square(size_t(count) * std::max(count, dim)),
        packed(size_t(shape.width()) + count),
        rows(size_t(count) * dim),
        shape_(shape) {}

  // Points `vectors` at those of a row of the batch.
  void look_at(int64_t b) {
    const int before = shape_.below != nullptr;
    for (int i = 0; i < shape_.vectors_all(); ++i) {
      const float* from = i < before ? shape_.below + b * shape_.dim : shape_.vectors + (b * shape_.vectors_in + i - before) * shape_.dim;
      vectors[i] = shape_.dim == dim ? from : std::copy_n(from, shape_.dim, row(i)) - shape_.dim;
    }
    for (int i = shape_.vectors_all(); i < count; ++i) vectors[i] = row(i);
  }

  float* row(int i) { return rows.data() + size_t(i) * dim; }

  int count;
  int dim;
  std::vector<const float*> vectors;  // [count]
  std::vector<float> square;          // forward: the vectors by columns [dim][count]; backward: gradients of the products [count][count]
  std::vector<float> packed;          // a row of the result, or its gradient
  std::vector<float> rows;            // [count][dim]

 private:
  const Interaction& shape_;
};

void interact_rows(const Interaction& shape, int columns, int64_t begin, int64_t end, Scratch& scratch, float* out) {
  const int count = shape.vectors_all();
  float* const direct = scratch.packed.data();
  float* const products = direct + shape.width() - shape.pairs();
  for (int64_t b = begin; b < end; ++b) {
    scratch.look_at(b);
    for (int j = 0; j < count; j += kLanes) {
      for (int d = 0; d < scratch.dim; d += kLanes) {
        Tile tile;
        for (int i = 0; i < kLanes; ++i) tile.rows[i] = load(scratch.vectors[j + i] + d);
        tile.transpose();
        for (int i = 0; i < kLanes; ++i) store(scratch.square.data() + size_t(d + i) * scratch.count + j, tile.rows[i]);
      }
    }
    // Products are written in whole vectors to where they belong, row behind row: what passes a row's end lies among the first kLanes
    // numbers of the rows after it, which are written later because the blocks of a row come from its end.
    for (int i = 0; i < count; i += kRows) {
      for (int j = (std::min(i + kRows, count) - 1) / kLanes * kLanes; j >= 0; j -= kLanes) {
        Lanes sums[kRows];
        multiply_block(shape.dim, &scratch.vectors[i], [&](int k) { return scratch.square.data() + size_t(k) * scratch.count + j; }, sums);
        for (int row = std::max(i, j + 1); row < std::min(i + kRows, count); ++row)
          store(products + row * (row - 1) / 2 + j, sums[row - i]);
      }
    }
    if (shape.below != nullptr) std::copy_n(shape.below + b * shape.dim, shape.dim, direct);
    std::fill(std::copy_n(direct, shape.width(), out + b * columns), out + (b + 1) * columns, 0.0f);
  }
}

// The square of a symmetric matrix, zero on its diagonal, from its rows below the diagonal one behind the other.
void unpack_square(int count, const float* packed, Scratch& scratch) {
  for (int i = 0; i < count; i += kLanes) {
    for (int j = 0; j <= i; j += kLanes) {
      float* const lower = scratch.square.data() + size_t(i) * scratch.count + j;
      float* const upper = scratch.square.data() + size_t(j) * scratch.count + i;
      Tile tile;
      for (int row = 0; row < kLanes; ++row) {
        const int length = i + row < count ? i + row - j : 0;
        const Lanes numbers = load(packed + (length > 0 ? (i + row) * (i + row - 1) / 2 + j : 0));
        tile.rows[row] = reinterpret_cast<Lanes>(reinterpret_cast<Numbers>(numbers) & (counted(EachLane()) < length));
      }
      for (int row = 0; row < kLanes; ++row) store(lower + size_t(row) * scratch.count, tile.rows[row]);
      tile.transpose();
      for (int row = 0; row < kLanes; ++row) {
        float* const to = upper + size_t(row) * scratch.count;
        store(to, i == j ? tile.rows[row] + load(to) : tile.rows[row]);
      }
    }
  }
}

void backward_rows(const Interaction& shape, int columns, const float* grad_out, int64_t begin, int64_t end, Scratch& scratch,
                   float* grad_below, float* grad_vectors) {
  const int count = shape.vectors_all();
  const int before = shape.below != nullptr;
  std::vector<float> ends(kRows * size_t(scratch.dim));  // results that have no place of their own
  for (int64_t b = begin; b < end; ++b) {
    scratch.look_at(b);
    const float* direct = grad_out + b * columns;
    std::copy_n(direct, shape.width(), scratch.packed.data());
    unpack_square(count, scratch.packed.data() + shape.width() - shape.pairs(), scratch);
    for (int i = 0; i < count; i += kRows) {
      const float* left[kRows];
      float* to[kRows];
      for (int row = 0; row < kRows; ++row) {
        left[row] = scratch.square.data() + size_t(i + row) * scratch.count;
        const bool own = shape.dim == scratch.dim && i + row >= before && i + row < count;
        to[row] = own ? grad_vectors + (b * shape.vectors_in + i + row - before) * shape.dim : ends.data() + size_t(row) * scratch.dim;
      }
      for (int d = 0; d < scratch.dim; d += kLanes) {
        Lanes sums[kRows];
        multiply_block(count, left, [&](int k) { return scratch.vectors[k] + d; }, sums);
        for (int row = 0; row < kRows; ++row) store(to[row] + d, sums[row]);
      }
      if (i == 0 && before) {
        for (int d = 0; d < shape.dim; ++d) grad_below[b * shape.dim + d] = direct[d] + to[0][d];
      }
      if (shape.dim == scratch.dim) continue;
      for (int row = std::max(i, before); row < std::min(i + kRows, count); ++row) {
        std::copy_n(to[row - i], shape.dim, grad_vectors + (b * shape.vectors_in + row - before) * shape.dim);
      }
    }
  }
}

}  // namespace

void interact(const Interaction& shape, int columns, float* out) {
  for_each_range(shape.batch, kBatchPerTask, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    interact_rows(shape, columns, begin, end, scratch, out);
  });
}

void interact_backward(const Interaction& shape, int columns, const float* grad_out, float* grad_below, float* grad_vectors) {
  for_each_range(shape.batch, kBatchPerTask, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    backward_rows(shape, columns, grad_out, begin, end, scratch, grad_below, grad_vectors);
  });
}

}  // namespace fiited
