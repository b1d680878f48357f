// Pooling over any kind of rows, and the gradients of rows out of those of bags or off the wire.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "core/numeric.h"
#include "cpu/batch.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"

namespace fiited {

constexpr int64_t kTileRows = 64;  // batch rows that are pooled together

// A row's live dimensions in storage type, to be read as floats.
template <class Store>
struct StoredVector {
  const typename Store::Bits* at;
  int live;
};

// Pools the rows that `vector_of(u)` finds, missing dimensions as zero: out [batch, features, dim].
//
// A batch holds lookups feature by feature, the result has the features of a batch row side by side. Lookups are put into that order
// a tile of batch rows at a time: reading them across features one by one would jump by the batch size, which caches handle badly.
template <class Real, class Store, class VectorOf>
void pool_rows(const Bags& bags, VectorOf&& vector_of, Real* out) {
  const auto* weights = static_cast<const Real*>(bags.weights);
  const bool scaled = weights != nullptr || bags.mean;
  const int dim = bags.dim();
  for_each_range(bags.batch, kTileRows, [&](int64_t first, int64_t end) {
    const auto for_each_bag = [&](auto&& visit) {
      for (int64_t f = 0; f < bags.features; ++f) {
        for (int64_t b = first; b < end; ++b) visit((b - first) * bags.features + f, bags.offsets + f * bags.batch + b);
      }
    };
    std::vector<int32_t> starts((end - first) * bags.features + 1);
    for_each_bag([&](int64_t at, const int64_t* bag) { starts[at + 1] = static_cast<int32_t>(bag[1] - bag[0]); });
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    const int32_t lookups = starts.back();
    const std::unique_ptr<StoredVector<Store>[]> vectors(new StoredVector<Store>[lookups]);
    const std::unique_ptr<Real[]> factors(scaled ? new Real[lookups] : nullptr);
    for_each_bag([&](int64_t at, const int64_t* bag) {
      int32_t to = starts[at];
      for (int64_t i = bag[0]; i < bag[1]; ++i, ++to) {
        vectors[to] = vector_of(bags.inverse[i]);
        if (scaled) factors[to] = (weights ? weights[i] : Real(1)) / (bags.mean ? static_cast<Real>(bag[1] - bag[0]) : Real(1));
      }
    });

    const auto fetch = [&](int32_t at) __attribute__((always_inline)) {
      for (int32_t i = at; i < std::min<int32_t>(lookups, at + kInFlight); ++i) {
        prefetch(vectors[i].at, static_cast<int64_t>(sizeof(typename Store::Bits)) * vectors[i].live);
      }
    };
    fetch(0);
    for (size_t bag = 0; bag + 1 < starts.size(); ++bag) {
      Real* __restrict to = out + (first * bags.features + static_cast<int64_t>(bag)) * dim;
      int written = 0;
      for (int32_t i = starts[bag]; i < starts[bag + 1]; ++i) {
        if (i % kInFlight == 0) fetch(i + kInFlight);
        const auto* __restrict from = vectors[i].at;
        const int live = vectors[i].live;
        const Real factor = scaled ? factors[i] : Real(1);
        const int both = std::min(written, live);
        for_each_dim(both, [&](int d) { to[d] += factor * Store::to_float(from[d]); });
        for_each_dim(live - both, [&](int d) { to[both + d] = factor * Store::to_float(from[both + d]); });
        written = std::max(written, live);
      }
      std::fill_n(to + written, dim - written, Real(0));
    }
  });
}

// The gradient of each row, summed over its lookups' bags, in wire layout (without the folded part if `fold` is false).
template <class Real>
class BagGradients {
 public:
  BagGradients(const Bags& bags, const Real* grad_out, int64_t rows, bool fold)
      : chunk_(bags.chunk),
        dim_(bags.dim()),
        grad_out_(grad_out),
        fold_(fold),
        groups_(bags.lookups(), bags.inverse, rows),
        out_row_(new int32_t[bags.lookups()]) {
    for (int dim = 0; dim < dim_; ++dim) signs_.push_back(fold_sign(static_cast<uint32_t>(dim)));
    const auto* weights = static_cast<const Real*>(bags.weights);
    if (weights != nullptr || bags.mean) factor_.reset(new Real[bags.lookups()]);
    for_each_task(bags.features, [&](int64_t f) {
      for (int64_t b = 0; b < bags.batch; ++b) {
        const int64_t* bag = bags.offsets + f * bags.batch + b;
        for (int64_t i = bag[0]; i < bag[1]; ++i) {
          out_row_[i] = static_cast<int32_t>(b * bags.features + f);
          if (factor_) factor_[i] = (weights ? weights[i] : Real(1)) / (bags.mean ? static_cast<Real>(bag[1] - bag[0]) : Real(1));
        }
      }
    });
  }

  [[gnu::always_inline]] void prefetch(int64_t row) const {
    for (int32_t at = groups_.starts[row]; at < groups_.starts[row + 1]; ++at) {
      fiited::prefetch(grad_out_ + int64_t{out_row_[groups_.members[at]]} * dim_, dim_ * static_cast<int64_t>(sizeof(Real)));
    }
  }

  // The sum, in `scratch` [dim + chunk] or wherever it already stands.
  const Real* sum(int64_t row, int width, Real* scratch) const {
    const int live = width * chunk_;
    const bool folds = fold_ && live < dim_;
    const int32_t begin = groups_.starts[row];
    const int32_t end = groups_.starts[row + 1];
    if (end - begin == 1 && !folds && !factor_) return of_lookup(groups_.members[begin]);
    std::fill_n(scratch, live + (folds ? chunk_ : 0), Real(0));
    for (int32_t at = begin; at < end; ++at) {
      const int32_t lookup = groups_.members[at];
      const Real* g = of_lookup(lookup);
      if (factor_) {
        add_scaled(live, factor_[lookup], g, scratch);
      } else {
        add(live, g, scratch);
      }
      for (int begin_dim = live; folds && begin_dim < dim_; begin_dim += chunk_) {
        add_folded(begin_dim, factor_ ? factor_[lookup] : Real(1), g, scratch + live);
      }
    }
    return scratch;
  }

  // Visits the factor and the gradient [dim] of each lookup of a row.
  template <class Visit>
  void for_each_lookup(int64_t row, Visit&& visit) const {
    for (int32_t at = groups_.starts[row]; at < groups_.starts[row + 1]; ++at) {
      const int32_t lookup = groups_.members[at];
      visit(factor_ ? factor_[lookup] : Real(1), of_lookup(lookup));
    }
  }

 private:
  const Real* of_lookup(int32_t lookup) const { return grad_out_ + int64_t{out_row_[lookup]} * dim_; }

  void add_folded(int dim, Real factor, const Real* __restrict g, Real* __restrict to) const {
    const float* __restrict signs = signs_.data() + dim;
    for_each_dim(chunk_, [&](int i) { to[i] += factor * static_cast<Real>(signs[i]) * g[dim + i]; });
  }

  int chunk_;
  int dim_;
  const Real* grad_out_;
  bool fold_;
  Groups groups_;
  std::unique_ptr<int32_t[]> out_row_;  // [N] of grad_out
  std::unique_ptr<Real[]> factor_;      // [N], or null where all are 1
  std::vector<float> signs_;
};

// The same where gradients arrive off the wire: one behind the other, for row `target[i]` each, or for row i without targets.
class WireGradients {
 public:
  WireGradients(const float* data, int64_t rows, const uint8_t* widths, int chunk, int chunks, int64_t arrivals, const int32_t* target)
      : chunk_(chunk), chunks_(chunks), data_(data), widths_(widths), starts_(arrivals + 1, 0) {
    for (int64_t i = 0; i < arrivals; ++i) starts_[i + 1] = starts_[i] + gradient_size(widths[target ? target[i] : i], chunk, chunks);
    if (target) groups_ = std::make_unique<Groups>(arrivals, target, rows);
  }

  [[gnu::always_inline]] void prefetch(int64_t row) const {
    if (!groups_) return fiited::prefetch(data_ + starts_[row], 4 * (starts_[row + 1] - starts_[row]));
    for (int32_t at = groups_->starts[row]; at < groups_->starts[row + 1]; ++at) {
      const int32_t arrival = groups_->members[at];
      fiited::prefetch(data_ + starts_[arrival], 4 * (starts_[arrival + 1] - starts_[arrival]));
    }
  }

  const float* sum(int64_t row, int width, float* scratch) const {
    if (!groups_) return data_ + starts_[row];
    const int32_t begin = groups_->starts[row];
    const int32_t end = groups_->starts[row + 1];
    if (end - begin == 1) return data_ + starts_[groups_->members[begin]];
    const auto size = static_cast<int>(gradient_size(width, chunk_, chunks_));
    std::fill_n(scratch, size, 0.0f);
    for (int32_t at = begin; at < end; ++at) add(size, data_ + starts_[groups_->members[at]], scratch);
    return scratch;
  }

 private:
  int chunk_;
  int chunks_;
  const float* data_;
  const uint8_t* widths_;
  std::vector<int64_t> starts_;
  std::unique_ptr<Groups> groups_;
};

}  // namespace fiited
