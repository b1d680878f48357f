#include <cmath>

#include "core/numeric.h"
#include "cuda/api.h"
#include "cuda/sums.h"

namespace fiited::device {

// Numbers stored as they are.
template <class Real>
struct Plain {
  using Bits = Real;
  static FIITED_HD Real to_float(Real value) { return value; }
};

// Rows one behind the other; one that does not fit into the values counts as missing.
template <class Real>
struct PlainRows {
  const Real* values;
  const int64_t* starts;
  int64_t size;

  FIITED_DEVICE VectorAt<Plain<Real>> operator()(int64_t row) const {
    const int64_t live = starts[row + 1] - starts[row];
    return starts[row + 1] <= size ? VectorAt<Plain<Real>>{values + starts[row], static_cast<int>(live)}
                                   : VectorAt<Plain<Real>>{nullptr, 0};
  }
};

static void check_size(Stream stream, int64_t rows, const int64_t* starts, int64_t size) {
  Faults* const faults = device_faults(stream);
  launch(stream, 1, [rows, starts, size, faults] FIITED_KERNEL(int64_t) {
    if (starts[rows] != size) note(faults, Fault::kSize, starts[rows]);
  });
}

void find_row_starts(Stream stream, int64_t rows, const uint8_t* widths, int chunk, int chunks, bool wire, int64_t* starts) {
  const Scratch<int64_t> sizes(stream, rows + 1);
  Faults* const faults = device_faults(stream);
  launch(stream, rows + 1, [rows, widths, chunk, chunks, wire, faults, sizes = sizes.get()] FIITED_KERNEL(int64_t row) {
    int width = row < rows ? widths[row] : 0;
    if (width > chunks) {
      note(faults, Fault::kWidth, row);
      width = chunks;
    }
    sizes[row] = row == rows ? 0 : wire ? gradient_size(width, chunk, chunks) : int64_t{width} * chunk;
  });
  exclusive_scan(stream, rows + 1, sizes.get(), starts);
}

int64_t row_starts(void* at, int64_t rows, const uint8_t* widths, int chunk, int chunks, bool wire, int64_t* starts) {
  const auto stream = static_cast<Stream>(at);
  find_row_starts(stream, rows, widths, chunk, chunks, wire, starts);
  return read_one(stream, starts + rows);
}

template <class Real>
void pool(void* at, const Bags& bags, int64_t n, int64_t rows, const Real* values, int64_t size, const uint8_t* widths, Real* out) {
  const auto stream = static_cast<Stream>(at);
  const Scratch<int64_t> starts(stream, rows + 1);
  find_row_starts(stream, rows, widths, bags.chunk, bags.chunks, false, starts.get());
  check_size(stream, rows, starts.get(), size);
  pool_bags<Real, Plain<Real>>(stream, bags, n, rows, PlainRows<Real>{values, starts.get(), size}, out);
  check_faults(stream);
}

template <class Real>
void pool_backward(void* at, const Bags& bags, int64_t n, const Real* grad_out, int64_t rows, const int64_t* starts, const uint8_t* widths,
                   bool fold, Real* grad_values) {
  const auto stream = static_cast<Stream>(at);
  const BagOrder<Real> order(stream, bags, n, grad_out, rows);
  const int chunk = bags.chunk;
  const int dim = bags.dim();
  const GroupSummer<Real> groups(stream, rows, order.starts(), n, dim, order.source(), [=] FIITED_KERNEL(int64_t row) {
    const int live = widths[row] * chunk;
    return fold || live > dim ? dim : live;
  });
  launch_tiles<kBlocksThatSum>(stream, rows, dim, dim * static_cast<int>(sizeof(Real) / sizeof(float)),
                               [signs = fold_signs(), widths, fold, chunk, dim, starts, grad_values, first = order.starts(),
                                source = order.source(), sums = groups.view()] FIITED_KERNEL(int64_t row, const Tile& tile) {
                                 const int whole = (fold ? whole_chunks(widths[row]) : widths[row]) * chunk;
                                 const int live = whole < dim ? whole : dim;
                                 const bool folds = fold && has_folded_chunk(widths[row], dim / chunk);
                                 auto* const sum = reinterpret_cast<Real*>(tile.scratch);
                                 sums.add_up(tile, source, sums.items_of(row, first[row], first[row + 1]), folds ? dim : live, sum);
                                 tile.sync();
                                 Real* const to = grad_values + starts[row];
                                 tile.each(live, [&](int i) { to[i] = sum[i]; });
                                 if (folds) tile.each(chunk, [&](int i) { to[live + i] = folded(signs, sum, live, chunk, dim, i); });
                               });
  check_faults(stream);
}

template <class Real>
void pool_weights_backward(void* at, const Bags& bags, int64_t n, const Real* grad_out, int64_t rows, const Real* values, int64_t size,
                           const uint8_t* widths, Real* grad_weights) {
  const auto stream = static_cast<Stream>(at);
  const Scratch<int64_t> starts(stream, rows + 1);
  find_row_starts(stream, rows, widths, bags.chunk, bags.chunks, false, starts.get());
  check_size(stream, rows, starts.get(), size);
  const PlainRows<Real> vectors{values, starts.get(), size};
  Faults* const faults = device_faults(stream);
  check_bags(stream, bags, n);
  launch(stream, bags.features * bags.batch, [bags, n, rows, grad_out, vectors, faults, grad_weights] FIITED_KERNEL(int64_t bag) {
    const Lookups of = lookups_of(bags, n, bag, faults);
    const Real* const grad = grad_out + int64_t{out_row_of(bags, bag)} * bags.dim();
    for (int64_t i = of.begin; i < of.end; ++i) {
      const int32_t row = bags.inverse[i];
      const bool there = row >= 0 && row < rows;
      if (!there) note(faults, Fault::kRow, i);
      const auto vector = there ? vectors(row) : VectorAt<Plain<Real>>{nullptr, 0};
      Real dot = 0;
      for (int d = 0; d < vector.live; ++d) dot += grad[d] * vector.at[d];
      grad_weights[i] = bags.mean ? dot / static_cast<Real>(of.end - of.begin) : dot;
    }
  });
  check_faults(stream);
}

void lookup_norms(void* at, const Bags& bags, int64_t n, const float* grad_out, int64_t rows, float* norms) {
  const auto stream = static_cast<Stream>(at);
  const BagOrder<float> order(stream, bags, n, grad_out, rows);
  const Scratch<float> norm_of(stream, n);
  launch_tiles(stream, n, bags.dim(), 0,
               [dim = bags.dim(), rows, starts = order.starts(), source = order.source(), norm_of = norm_of.get()] FIITED_KERNEL(
                   int64_t at, const Tile& tile) {
                 if (at >= starts[rows]) return;  // of no row
                 const float* const g = source.gradient(at);
                 const float squares = tile.sum(dim, [&](int i) { return g[i] * g[i]; });
                 tile.once([&] { norm_of[at] = std::fabs(source.factor(at)) * std::sqrt(squares); });
               });
  launch(stream, rows, [norms, starts = order.starts(), norm_of = norm_of.get()] FIITED_KERNEL(int64_t row) {
    float sum = 0;
    for (int32_t at = starts[row]; at < starts[row + 1]; ++at) sum += norm_of[at];
    norms[row] = sum;
  });
  check_faults(stream);
}

void clear_odd(void* at, int64_t n, int dim, float longest, float* vectors, int64_t* found) {
  const auto stream = static_cast<Stream>(at);
  set_bytes(stream, found, 0, sizeof(int64_t));
  launch_tiles(stream, n, dim, 0, [dim, most = longest * longest, vectors, found] FIITED_KERNEL(int64_t i, const Tile& tile) {
    float* const vector = vectors + i * dim;
    if (tile.sum(dim, [&](int d) { return vector[d] * vector[d]; }) <= most) return;  // never true of NaN
    tile.sync();                                                                      // all lanes have read it
    tile.each(dim, [&](int d) { vector[d] = 0; });
    tile.once([&] { atomic_add(found, int64_t{1}); });
  });
}

template void pool<float>(void*, const Bags&, int64_t, int64_t, const float*, int64_t, const uint8_t*, float*);
template void pool<double>(void*, const Bags&, int64_t, int64_t, const double*, int64_t, const uint8_t*, double*);
template void pool_backward<float>(void*, const Bags&, int64_t, const float*, int64_t, const int64_t*, const uint8_t*, bool, float*);
template void pool_backward<double>(void*, const Bags&, int64_t, const double*, int64_t, const int64_t*, const uint8_t*, bool, double*);
template void pool_weights_backward<float>(void*, const Bags&, int64_t, const float*, int64_t, const float*, int64_t, const uint8_t*,
                                           float*);
template void pool_weights_backward<double>(void*, const Bags&, int64_t, const double*, int64_t, const double*, int64_t, const uint8_t*,
                                            double*);

}  // namespace fiited::device
