// Lookups in the order of their rows, and sums of gradients over them. Rows of very many lookups are summed by many tiles, in the groups
// that core/batch.h names.
#pragma once

#include <memory>
#include <vector>

#include "core/batch.h"
#include "core/numeric.h"
#include "cuda/faults.h"
#include "cuda/platform.h"

namespace fiited::device {

// Positions 0..n-1 by the row that `row_of` names: row u has order[starts[u]] .. order[starts[u + 1] - 1], in rising order. Positions that
// name no row are left out, and noted as `fault`.
class Groups {
 public:
  Groups(Stream stream, int64_t n, const int32_t* row_of, int64_t rows, Fault fault)
      : starts_(stream, rows + 1), order_(stream, n), sorted_(stream, n) {
    sort(stream, n, row_of, rows, fault);
  }
  const int32_t* starts() const { return starts_.get(); }
  const int32_t* order() const { return order_.get(); }

  // Of the constructor: nvcc wants kernels' lambdas in functions that have an address, and public ones.
  void sort(Stream stream, int64_t n, const int32_t* row_of, int64_t rows, Fault fault) {
    const Scratch<uint32_t> keys(stream, n);
    const Scratch<int32_t> positions(stream, n);
    Faults* const faults = device_faults(stream);
    launch(stream, n, [n, row_of, rows, fault, faults, keys = keys.get(), positions = positions.get()] FIITED_KERNEL(int64_t i) {
      const bool there = row_of[i] >= 0 && row_of[i] < rows;
      if (!there) note(faults, fault, i);
      keys[i] = there ? static_cast<uint32_t>(row_of[i]) : static_cast<uint32_t>(rows);
      positions[i] = static_cast<int32_t>(i);
    });
    sort_pairs(stream, n, keys.get(), sorted_.get(), positions.get(), order_.get(), bits_for(static_cast<uint64_t>(rows)));
    launch(stream, n + 1, [n, rows, sorted = sorted_.get(), starts = starts_.get()] FIITED_KERNEL(int64_t i) {
      const int64_t before = i == 0 ? int64_t{-1} : int64_t{sorted[i - 1]};
      const int64_t here = i == n ? rows : int64_t{sorted[i]};
      for (int64_t row = before + 1; row <= here; ++row) starts[row] = static_cast<int32_t>(i);
    });
  }

 private:
  Scratch<int32_t> starts_;   // [rows + 1]
  Scratch<int32_t> order_;    // [n]
  Scratch<uint32_t> sorted_;  // [n]
};

// Where lookups' gradients stand, in the order of their rows.
template <class Real>
struct PooledSource {
  const Real* grad_out;
  const int32_t* out_rows;  // [n] row of grad_out
  const Real* factors;      // [n], or null where all are 1
  int dim;

  FIITED_DEVICE const Real* gradient(int64_t at) const { return grad_out + int64_t{out_rows[at]} * dim; }
  FIITED_DEVICE Real factor(int64_t at) const { return factors ? factors[at] : Real(1); }
};

// The same for gradients that arrived off the wire, one behind the other.
struct WireSource {
  const float* data;
  const int64_t* starts_of;  // [arrivals] in numbers
  const int32_t* order;      // [arrivals], or null where each row has one

  FIITED_DEVICE const float* gradient(int64_t at) const { return data + starts_of[order ? order[at] : at]; }
  FIITED_DEVICE float factor(int64_t) const { return 1.0f; }
};

constexpr int kMostLevels = 6;

// Sums of groups of lookups, of groups of those, ...; level 0 are the lookups themselves.
template <class Real>
struct GroupSums {
  int levels = 0;                     // that have groups
  const int64_t* first[kMostLevels];  // [rows] the number of a row's first group at a level
  Real* sums[kMostLevels];            // [groups, dim]
  int dim = 0;

  // Items of a level-0 range that are left at the level where few enough are, and that level.
  static FIITED_DEVICE int64_t few(int64_t items, int* level) {
    *level = 0;
    for (; items > kSummedTogether; ++*level) items = (items + kSummedTogether - 1) / kSummedTogether;
    return items;
  }

  // A row's sum over lookups begin..end-1, in tile scratch.
  template <class Source>
  FIITED_DEVICE void sum(const Tile& tile, const Source& source, int64_t row, int64_t begin, int64_t end, int size, Real* to) const {
    int level;
    const int64_t items = few(end - begin, &level);
    tile.each(size, [&](int i) { to[i] = 0; });
    for (int64_t item = 0; item < items; ++item)
      add(tile, source, level, level == 0 ? begin + item : first[level - 1][row] + item, size, to);
  }

  template <class Source>
  FIITED_DEVICE void add(const Tile& tile, const Source& source, int level, int64_t item, int size, Real* to) const {
    const Real* const from = level == 0 ? source.gradient(item) : sums[level - 1] + item * dim;
    const Real factor = level == 0 ? source.factor(item) : Real(1);
    tile.map(size, [&](int i) { return from[i]; }, [&](int i, Real x) { to[i] += factor * x; });
  }
};

// Makes the sums of all groups that rows of more than kSummedTogether lookups have. `size_of(row)` says how many numbers are wanted.
template <class Real>
class GroupSummer {
 public:
  template <class Source, class SizeOf>
  GroupSummer(Stream stream, int64_t rows, const int32_t* starts, int64_t n, int dim, const Source& source, const SizeOf& size_of) {
    view_.dim = dim;
    sum(stream, rows, starts, n, dim, source, size_of);
  }
  const GroupSums<Real>& view() const { return view_; }

  // Of the constructor, as in Groups.
  template <class Source, class SizeOf>
  void sum(Stream stream, int64_t rows, const int32_t* starts, int64_t n, int dim, const Source& source, const SizeOf& size_of) {
    const int scratch_floats = dim * static_cast<int>(sizeof(Real) / sizeof(float));
    // A row with more than 32 items has at most 2/32 as many groups of them.
    for (int64_t most = n / (kSummedTogether / 2); n > kSummedTogether && most > 0 && view_.levels < kMostLevels;
         most /= kSummedTogether / 2) {
      const int level = view_.levels;
      const Scratch<int64_t> groups(stream, rows);
      numbers_.push_back(std::make_unique<Scratch<int64_t>>(stream, rows));
      sums_.push_back(std::make_unique<Scratch<Real>>(stream, most * dim));
      const Scratch<int32_t> owner(stream, most);
      set_bytes(stream, owner.get(), 0xFF, most * sizeof(int32_t));
      launch(stream, rows,
             [starts, level, groups = groups.get()] FIITED_KERNEL(int64_t row) { groups[row] = groups_of(starts, row, level); });
      exclusive_scan(stream, rows, groups.get(), numbers_.back()->get());
      int64_t* const numbers = numbers_.back()->get();
      launch(stream, rows, [numbers, owner = owner.get(), groups = groups.get()] FIITED_KERNEL(int64_t row) {
        for (int64_t group = 0; group < groups[row]; ++group) owner[numbers[row] + group] = static_cast<int32_t>(row);
      });
      view_.first[level] = numbers;
      view_.sums[level] = sums_.back()->get();
      const GroupSums<Real> below = view_;
      launch_tiles(stream, most, scratch_floats,
                   [below, level, starts, source, size_of, numbers, owner = owner.get()] FIITED_KERNEL(int64_t group, const Tile& tile) {
                     const int32_t row = owner[group];
                     if (row < 0) return;
                     const int size = size_of(row);
                     const int64_t first = (group - numbers[row]) * kSummedTogether;
                     int64_t items = starts[row + 1] - starts[row];
                     for (int up = 0; up < level; ++up) items = (items + kSummedTogether - 1) / kSummedTogether;
                     const int64_t end = first + kSummedTogether < items ? first + kSummedTogether : items;
                     const int64_t base = level == 0 ? starts[row] : below.first[level - 1][row];
                     auto* const to = reinterpret_cast<Real*>(tile.scratch);
                     tile.each(size, [&](int i) { to[i] = 0; });
                     for (int64_t item = first; item < end; ++item) below.add(tile, source, level, base + item, size, to);
                     tile.each(size, [&](int i) { below.sums[level][group * below.dim + i] = to[i]; });
                   });
      ++view_.levels;
    }
  }

  // Groups of a row at a level; none where its items there are few enough to be summed at once.
  static FIITED_DEVICE int64_t groups_of(const int32_t* starts, int64_t row, int level) {
    int64_t items = starts[row + 1] - starts[row];
    for (int up = 0; up < level; ++up) {
      if (items <= kSummedTogether) return 0;
      items = (items + kSummedTogether - 1) / kSummedTogether;
    }
    return items <= kSummedTogether ? 0 : (items + kSummedTogether - 1) / kSummedTogether;
  }

 private:
  GroupSums<Real> view_;
  std::vector<std::unique_ptr<Scratch<int64_t>>> numbers_;
  std::vector<std::unique_ptr<Scratch<Real>>> sums_;
};

// Value `i` of the missing dimensions folded into one chunk; `sum` has all `dim` of them.
template <class Real>
FIITED_DEVICE Real folded(const Real* sum, int live, int chunk, int dim, int i) {
  Real value = static_cast<Real>(fold_sign(static_cast<uint32_t>(live + i))) * sum[live + i];
  for (int at = live + chunk + i; at < dim; at += chunk) value += static_cast<Real>(fold_sign(static_cast<uint32_t>(at))) * sum[at];
  return value;
}

// The lookups of bags in the order of their rows.
template <class Real>
class BagOrder {
 public:
  BagOrder(Stream stream, const Bags& bags, int64_t n, const Real* grad_out, int64_t rows)
      : groups_(stream, n, bags.inverse, rows, Fault::kRow), out_rows_(stream, n), factors_(stream, n) {
    put_in_order(stream, bags, n);
    source_ = {grad_out, out_rows_.get(), scaled_ ? factors_.get() : nullptr, bags.dim()};
  }
  const int32_t* starts() const { return groups_.starts(); }
  const PooledSource<Real>& source() const { return source_; }

  // Of the constructor, as in Groups.
  void put_in_order(Stream stream, const Bags& bags, int64_t n) {
    const auto* weights = static_cast<const Real*>(bags.weights);
    scaled_ = weights != nullptr || bags.mean;
    const Scratch<int32_t> bag_of(stream, n);
    const Scratch<Real> factor_of(stream, scaled_ ? n : 1);
    set_bytes(stream, bag_of.get(), 0, n * sizeof(int32_t));
    launch(stream, bags.features * bags.batch,
           [bags, n, weights, scaled = scaled_, bag_of = bag_of.get(), factor_of = factor_of.get()] FIITED_KERNEL(int64_t bag) {
             const Lookups of = lookups_of(bags, n, bag);
             for (int64_t i = of.begin; i < of.end; ++i) {
               bag_of[i] = static_cast<int32_t>(bag % bags.batch * bags.features + bag / bags.batch);
               if (scaled) factor_of[i] = (weights ? weights[i] : Real(1)) / (bags.mean ? static_cast<Real>(of.end - of.begin) : Real(1));
             }
           });
    launch(stream, n,
           [scaled = scaled_, order = groups_.order(), bag_of = bag_of.get(), factor_of = factor_of.get(), out_rows = out_rows_.get(),
            factors = factors_.get()] FIITED_KERNEL(int64_t at) {
             out_rows[at] = bag_of[order[at]];
             if (scaled) factors[at] = factor_of[order[at]];
           });
  }

  struct Lookups {
    int64_t begin, end;
  };
  // Those of bag (f, b) = f * batch + b, within what there is whatever the offsets say.
  static FIITED_DEVICE Lookups lookups_of(const Bags& bags, int64_t n, int64_t bag) {
    const int64_t begin = bags.offsets[bag] < 0 ? 0 : bags.offsets[bag];
    const int64_t end = bags.offsets[bag + 1] > n ? n : bags.offsets[bag + 1];
    return {begin, end};
  }

 private:
  Groups groups_;
  Scratch<int32_t> out_rows_;
  Scratch<Real> factors_;
  bool scaled_ = false;
  PooledSource<Real> source_{};
};

// Where each row starts, in numbers: [rows + 1]; `wire`: of gradients in wire layout.
void find_row_starts(Stream stream, int64_t rows, const uint8_t* widths, int chunk, int chunks, bool wire, int64_t* starts);

// For each position, the first one with the same key and table.
void find_first(Stream stream, int64_t n, const uint64_t* keys, const int32_t* tables, int32_t* first);

// Notes offsets that cannot be.
inline void check_offsets(Stream stream, const Bags& bags, int64_t n) {
  Faults* const faults = device_faults(stream);
  launch(stream, bags.features * bags.batch + 1, [bags, n, faults] FIITED_KERNEL(int64_t i) {
    const int64_t last = bags.features * bags.batch;
    if ((i == 0 && bags.offsets[i] != 0) || (i == last && bags.offsets[i] != n)) note(faults, Fault::kOffsetsEnds, i);
    if (i < last && bags.offsets[i] > bags.offsets[i + 1]) note(faults, Fault::kOffsetsFall, (i / bags.batch) << 32 | i % bags.batch);
  });
}

// A row's vector as it is stored, to be read as numbers.
template <class Stored>
struct VectorAt {
  const typename Stored::Bits* at;
  int live;
};

// Pools the rows that `vector_of(u)` finds, missing dimensions as zero: out [batch, features, dim].
template <class Real, class Stored, class VectorOf>
void pool_bags(Stream stream, const Bags& bags, int64_t n, int64_t rows, const VectorOf& vector_of, Real* out) {
  check_offsets(stream, bags, n);
  Faults* const faults = device_faults(stream);
  const int scratch_floats = bags.dim() * static_cast<int>(sizeof(Real) / sizeof(float));
  launch_tiles(
      stream, bags.features * bags.batch, scratch_floats,
      [bags, n, rows, vector_of, out, faults] FIITED_KERNEL(int64_t bag, const Tile& tile) {
        const auto of = BagOrder<Real>::lookups_of(bags, n, bag);
        const auto* weights = static_cast<const Real*>(bags.weights);
        const int dim = bags.dim();
        Real* const to = out + (bag % bags.batch * bags.features + bag / bags.batch) * dim;
        auto* const sum = reinterpret_cast<Real*>(tile.scratch);
        const bool several = of.end - of.begin != 1;
        if (several) tile.each(dim, [&](int i) { sum[i] = 0; });
        for (int64_t i = of.begin; i < of.end; ++i) {
          const int32_t row = bags.inverse[i];
          const bool there = row >= 0 && row < rows;
          if (!there) tile.once([&] { note(faults, Fault::kRow, i); });
          const VectorAt<Stored> vector = there ? vector_of(row) : VectorAt<Stored>{nullptr, 0};
          const Real factor = (weights ? weights[i] : Real(1)) / (bags.mean ? static_cast<Real>(of.end - of.begin) : Real(1));
          if (several) {
            tile.map(vector.live, [&](int d) { return vector.at[d]; }, [&](int d, auto x) { sum[d] += factor * Stored::to_float(x); });
          } else {  // as most bags are: straight from the row to the result
            tile.map(vector.live, [&](int d) { return vector.at[d]; }, [&](int d, auto x) { to[d] = factor * Stored::to_float(x); });
            tile.each(dim - vector.live, [&](int d) { to[vector.live + d] = 0; });
          }
        }
        if (several) tile.each(dim, [&](int d) { to[d] = sum[d]; });
      });
}

}  // namespace fiited::device
