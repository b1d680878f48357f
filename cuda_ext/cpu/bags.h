// Pooling over any kind of rows, and the gradients of rows out of those of bags or off the wire.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/numeric.h"
#include "cpu/batch.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"

namespace fiited {

constexpr int64_t kBagsPerTask = 2048;
constexpr int64_t kLargeResult = int64_t{4} << 20;  // bytes: more than a core keeps for itself until it is read again

// Items begin..end-1 summed as kSummedTogether says: add(item, to) adds one; `to` has room for `size` numbers at each of its levels.
template <class Real, class Add>
void sum_in_groups(int64_t begin, int64_t end, int size, Real* to, Add&& add) {
  std::fill_n(to, size, Real(0));
  int64_t group = 1;
  while (end - begin > group * kSummedTogether) group *= kSummedTogether;
  if (group == 1) {
    for (int64_t item = begin; item < end; ++item) add(item, to);
    return;
  }
  for (int64_t first = begin; first < end; first += group) {
    sum_in_groups(first, std::min(end, first + group), size, to + size, add);
    fiited::add(size, to + size, to);
  }
}
constexpr int kSumLevels = 7;  // 32^7 is above 2^31

// A row's live dimensions in storage type, to be read as floats.
template <class Store>
struct StoredVector {
  const typename Store::Bits* at;
  int live;
};

// Pools the vectors of lookups that are added in order, missing dimensions as zero: out [batch, features, dim], from the bag with the
// number `first` on, of those that a batch holds feature by feature. Each goes to its own place in the result, past the caches if that is
// large.
template <class Real, class Store>
class Pooler {
 public:
  Pooler(const Bags& bags, Real* out, int64_t first)
      : weights_(static_cast<const Real*>(bags.weights)),
        mean_(bags.mean),
        streams_(std::is_same_v<Real, float> && bags.chunk % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
                 bags.batch * bags.features * bags.dim() * static_cast<int64_t>(sizeof(Real)) >= kLargeResult),
        dim_(bags.dim()),
        batch_(bags.batch),
        row_(bags.features * bags.dim()),
        bag_(bags.offsets + first),
        b_(first % bags.batch),
        to_(out + b_ * row_ + first / bags.batch * dim_),
        sum_(dim_) {}
  ~Pooler() {
    if (streams_) end_stream();
  }
  Pooler(const Pooler&) = delete;
  Pooler& operator=(const Pooler&) = delete;

  // The vector of lookup i.
  [[gnu::always_inline]] void add(int64_t i, StoredVector<Store> vector) {
    while (i >= bag_[1]) close();
    const auto* __restrict from = vector.at;
    const int live = vector.live;
    if (bag_[1] - bag_[0] == 1 && weights_ == nullptr) {
      write(live, [&](int64_t d) { return Store::to_float(from[d]); });
      return;
    }
    Real* const __restrict sum = sum_.data();
    if (summed_ == 0 && weights_ == nullptr && !mean_) {
      for_each_dim(live, [&](int64_t d) { sum[d] = Store::to_float(from[d]); });
      summed_ = live;
      return;
    }
    const Real factor = (weights_ ? weights_[i] : Real(1)) / (mean_ ? static_cast<Real>(bag_[1] - bag_[0]) : Real(1));
    const int both = std::min(summed_, live);
    for_each_dim(both, [&](int64_t d) { sum[d] += factor * Store::to_float(from[d]); });
    for_each_dim(live - both, [&](int64_t d) { sum[both + d] = factor * Store::to_float(from[both + d]); });
    summed_ = std::max(summed_, live);
  }

  // After the last lookup of the bags before `end`, a place in the bags' offsets.
  void close_until(const int64_t* end) {
    while (bag_ < end) close();
  }

 private:
  void close() {
    write(summed_, [sum = sum_.data()](int64_t d) { return sum[d]; });
    summed_ = 0;
  }

  // Of the bag at hand, `live` numbers and zeros behind them.
  template <class Value>
  [[gnu::always_inline]] void write(int live, Value&& value) {
    if constexpr (std::is_same_v<Real, float>) {
      if (streams_) {
        stream(live, to_, value);
        stream(dim_ - live, to_ + live, [](int64_t) { return 0.0f; });
        return pass();
      }
    }
    Real* const __restrict to = to_;
    for_each_dim(live, [&](int64_t d) { to[d] = value(d); });
    std::fill(to + live, to + dim_, Real(0));
    pass();
  }

  // To the next bag.
  [[gnu::always_inline]] void pass() {
    ++bag_;
    to_ += row_;
    if (++b_ < batch_) return;
    b_ = 0;
    to_ += dim_ - batch_ * row_;
  }

  const Real* weights_;
  bool mean_;
  bool streams_;
  int dim_;
  int64_t batch_;
  int64_t row_;         // numbers of the result for each batch row
  const int64_t* bag_;  // where its lookups begin
  int64_t b_;           // its batch row
  Real* to_;
  std::vector<Real> sum_;
  int summed_ = 0;  // numbers of it that have been written
};

// Pools the vectors that `vector_of(lookup)` names.
template <class Real, class Store, class VectorOf>
void pool_rows(const Bags& bags, VectorOf&& vector_of, Real* out) {
  const int ahead = ahead_of(bags.dim() * sizeof(typename Store::Bits));
  for_each_range(bags.features * bags.batch, kBagsPerTask, [&](int64_t first, int64_t last) {
    std::array<StoredVector<Store>, 2 * kInFlight> vectors;  // of a block that is added, and of the next one, which is fetched
    Pooler<Real, Store> pooler(bags, out, first);
    const int64_t begin = bags.offsets[first];
    const int64_t end = bags.offsets[last];
    for (int64_t at = begin; at < end + ahead; at += ahead) {
      for (int64_t i = at; i < std::min(end, at + ahead); ++i) {
        const auto vector = vectors[i % (2 * kInFlight)] = vector_of(i);
        prefetch(vector.at, static_cast<int64_t>(sizeof(typename Store::Bits)) * vector.live);
      }
      if (at == begin) continue;
      for (int64_t i = at - ahead; i < std::min(end, at); ++i) pooler.add(i, vectors[i % (2 * kInFlight)]);
    }
    pooler.close_until(bags.offsets + last);
  });
}

// The gradient of each row, summed over its lookups' bags, in wire layout, or of its own dimensions alone if `fold` is false. Calls of
// `sum` fetch ahead for calls that go through the rows in order, from the one that `start` was called with.
template <class Real>
class BagGradients {
 public:
  BagGradients(const Bags& bags, const Real* grad_out, int64_t rows, bool fold)
      : chunk_(bags.chunk), dim_(bags.dim()), grad_out_(grad_out), fold_(fold), ahead_(ahead_of(bags.dim() * sizeof(Real))) {
    for (int dim = 0; dim < dim_; ++dim) signs_.push_back(fold_sign(static_cast<uint32_t>(dim)));
    const auto* weights = static_cast<const Real*>(bags.weights);
    const int64_t n = bags.lookups();
    const std::unique_ptr<int32_t[]> bag_of(new int32_t[n]);  // its row in grad_out
    const std::unique_ptr<Real[]> factor_of(weights != nullptr || bags.mean ? new Real[n] : nullptr);
    for_each_task(bags.features, [&](int64_t f) {
      for (int64_t b = 0; b < bags.batch; ++b) {
        const int64_t* bag = bags.offsets + f * bags.batch + b;
        for (int64_t i = bag[0]; i < bag[1]; ++i) {
          bag_of[i] = static_cast<int32_t>(b * bags.features + f);
          if (factor_of) factor_of[i] = (weights ? weights[i] : Real(1)) / (bags.mean ? static_cast<Real>(bag[1] - bag[0]) : Real(1));
        }
      }
    });
    out_rows_.reset(new int32_t[n]);
    if (factor_of) factors_.reset(new Real[n]);
    starts_ = group_by_row(n, bags.inverse, rows, [&](int64_t lookup, int32_t at) {
      out_rows_[at] = bag_of[lookup];
      if (factor_of) factors_[at] = factor_of[lookup];
    });
    count_ = static_cast<int32_t>(n);
  }

  void start(int64_t row) const { fetch(starts_[row], (starts_[row] / ahead_ + 2) * ahead_); }

  // The sum, in `scratch` [kSumLevels * dim] or wherever it already stands.
  const Real* sum(int64_t row, int width, Real* scratch) const {
    const int live = (fold_ ? whole_chunks(width) : width) * chunk_;
    const bool folds = fold_ && has_folded_chunk(width, dim_ / chunk_);
    const int32_t begin = starts_[row];
    const int32_t end = starts_[row + 1];
    if (end - begin == 1 && !folds && !factors_) {
      fetch_after(begin);
      return gradient(begin);
    }
    const int wanted = folds ? dim_ : live;
    const Real* sum = scratch;
    if (end - begin == 1 && !factors_) {
      fetch_after(begin);
      sum = gradient(begin);
    } else {
      sum_in_groups(begin, end, wanted, scratch, [&](int64_t at, Real* to) {
        fetch_after(static_cast<int32_t>(at));
        if (factors_) {
          add_scaled(wanted, factors_[at], gradient(static_cast<int32_t>(at)), to);
        } else {
          add(wanted, gradient(static_cast<int32_t>(at)), to);
        }
      });
    }
    if (folds) fold(sum, live, scratch);
    return scratch;
  }

  // Visits the factor and the gradient [dim] of each lookup of a row.
  template <class Visit>
  void for_each_lookup(int64_t row, Visit&& visit) const {
    for (int32_t at = starts_[row]; at < starts_[row + 1]; ++at) {
      fetch_after(at);
      visit(factors_ ? factors_[at] : Real(1), gradient(at));
    }
  }

 private:
  const Real* gradient(int32_t at) const { return grad_out_ + int64_t{out_rows_[at]} * dim_; }
  [[gnu::always_inline]] void fetch(int32_t begin, int32_t end) const {
    for (int32_t at = begin; at < std::min(end, count_); ++at) prefetch(gradient(at), dim_ * static_cast<int64_t>(sizeof(Real)));
  }
  // Lookups are fetched in blocks: whoever reaches the first of a block fetches the next one.
  [[gnu::always_inline]] void fetch_after(int32_t at) const {
    if ((at & (ahead_ - 1)) == 0) fetch(at + ahead_, at + 2 * ahead_);
  }

  // The live dimensions and, behind them, the others folded into one chunk; `to` may be `g`.
  void fold(const Real* g, int live, Real* to) const {
    if (g != to) copy(live, g, to);
    Real* const folded = to + live;
    for_each_dim(chunk_, [&](int64_t i) { folded[i] = static_cast<Real>(signs_[live + i]) * g[live + i]; });
    for (int dim = live + chunk_; dim < dim_; dim += chunk_) {
      const Real* const more = g + dim;
      const float* const signs = signs_.data() + dim;
      for_each_dim(chunk_, [&](int64_t i) { folded[i] += static_cast<Real>(signs[i]) * more[i]; });
    }
  }

  int chunk_;
  int dim_;
  const Real* grad_out_;
  bool fold_;
  int32_t ahead_;
  std::unique_ptr<int32_t[]> starts_;    // [rows + 1] of a row's lookups
  std::unique_ptr<int32_t[]> out_rows_;  // [N] lookups in the order of their rows: where their bag's gradient is
  std::unique_ptr<Real[]> factors_;      // [N] in that order, or null where all are 1
  int32_t count_ = 0;
  std::vector<float> signs_;
};

// The same where gradients arrive off the wire: one behind the other, for row `target[i]` each, or for row i without targets.
class WireGradients {
 public:
  WireGradients(const float* data, int64_t rows, const uint8_t* widths, int chunk, int chunks, int64_t arrivals, const int32_t* target)
      : chunk_(chunk), chunks_(chunks), data_(data), starts_of_(arrivals + 1, 0), arrivals_(static_cast<int32_t>(arrivals)) {
    for (int64_t i = 0; i < arrivals; ++i) {
      starts_of_[i + 1] = starts_of_[i] + gradient_size(widths[target ? target[i] : i], chunk, chunks);
    }
    if (target == nullptr) return;
    order_.reset(new int32_t[arrivals]);
    starts_ = group_by_row(arrivals, target, rows, [&](int64_t arrival, int32_t at) { order_[at] = static_cast<int32_t>(arrival); });
  }

  void start(int64_t row) const { fetch(first_of(row), (first_of(row) / kInFlight + 2) * kInFlight); }

  const float* sum(int64_t row, int width, float* scratch) const {
    const int32_t begin = first_of(row);
    const int32_t end = first_of(row + 1);
    if (end - begin == 1) {
      fetch_after(begin);
      return gradient(begin);
    }
    const auto size = static_cast<int>(gradient_size(width, chunk_, chunks_));
    sum_in_groups(begin, end, size, scratch, [&](int64_t at, float* to) {
      fetch_after(static_cast<int32_t>(at));
      add(size, gradient(static_cast<int32_t>(at)), to);
    });
    return scratch;
  }

 private:
  int32_t first_of(int64_t row) const { return starts_ ? starts_[row] : static_cast<int32_t>(row); }
  int32_t arrival(int32_t at) const { return order_ ? order_[at] : at; }
  const float* gradient(int32_t at) const { return data_ + starts_of_[arrival(at)]; }
  [[gnu::always_inline]] void fetch(int32_t begin, int32_t end) const {
    for (int32_t at = begin; at < std::min(end, arrivals_); ++at) {
      const int32_t i = arrival(at);
      prefetch(data_ + starts_of_[i], 4 * (starts_of_[i + 1] - starts_of_[i]));
    }
  }
  [[gnu::always_inline]] void fetch_after(int32_t at) const {
    if (at % kInFlight == 0) fetch(at + static_cast<int32_t>(kInFlight), at + 2 * static_cast<int32_t>(kInFlight));
  }

  int chunk_;
  int chunks_;
  const float* data_;
  std::vector<int64_t> starts_of_;  // [arrivals + 1] in numbers
  int32_t arrivals_;
  std::unique_ptr<int32_t[]> starts_;  // [rows + 1] of a row's arrivals; null where each row has one
  std::unique_ptr<int32_t[]> order_;   // [arrivals] in the order of their rows
};

}  // namespace fiited
