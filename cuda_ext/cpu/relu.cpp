#include "cpu/relu.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace fiited {

namespace {

constexpr int64_t kRowsPerTask = 64;

inline float before_relu(float grad, float out) { return out <= 0 ? 0 : grad; }
inline Lanes before_relu(Lanes grad, Lanes out) { return reinterpret_cast<Lanes>(reinterpret_cast<Numbers>(grad) & ~(out <= Lanes{})); }

// Rows [begin, end).
void backward_rows(int64_t n, int width, int64_t begin, int64_t end, const float* grad, const float* out, float* before, float* columns,
                   float* sums) {
  const auto one = [&](int64_t i, int j) {
    const float number = before_relu(grad[i * width + j], out[i * width + j]);
    before[i * width + j] = number;
    if (columns != nullptr) columns[j * n + i] = number;
    return number;
  };
  int j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    Lanes sum{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      Tile tile;
      for (int row = 0; row < kLanes; ++row) {
        const int64_t at = (i + row) * width + j;
        tile.rows[row] = before_relu(load(grad + at), load(out + at));
        store(before + at, tile.rows[row]);
        sum += tile.rows[row];
      }
      if (columns == nullptr) continue;
      tile.transpose();
      for (int row = 0; row < kLanes; ++row) store(columns + (j + row) * n + i, tile.rows[row]);
    }
    store(sums + j, sum);
    for (; i < end; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) sums[j + lane] += one(i, j + lane);
    }
  }
  for (; j < width; ++j) {
    sums[j] = 0;
    for (int64_t i = begin; i < end; ++i) sums[j] += one(i, j);
  }
}

}  // namespace

void relu_backward(int64_t n, int width, const float* grad, const float* out, float* before, float* columns, float* sums) {
  const int64_t tasks = (n + kRowsPerTask - 1) / kRowsPerTask;
  std::vector<float> parts(static_cast<size_t>(tasks * width));  // sums of each task's rows
  for_each_range(n, kRowsPerTask, [&](int64_t begin, int64_t end) {
    backward_rows(n, width, begin, end, grad, out, before, columns, parts.data() + begin / kRowsPerTask * width);
  });
  std::fill_n(sums, width, 0.0f);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int j = 0; j < width; ++j) sums[j] += parts[task * width + j];
  }
}

}  // namespace fiited
