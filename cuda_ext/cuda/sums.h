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

// Values by the row that `row_of` names, in rising order of their positions 0..n-1: row u has sorted[starts[u]] .. sorted[starts[u + 1] -
// 1]. Positions whose row is not among 0..rows-1 are left out.
class Groups {
 public:
  Groups(Stream stream, int64_t n, const uint32_t* row_of, const int32_t* values, int64_t rows)
      : starts_(stream, rows + 1), sorted_(stream, n) {
    sort(stream, n, row_of, values, rows);
  }
  const int32_t* starts() const { return starts_.get(); }
  const int32_t* sorted() const { return sorted_.get(); }

  // Of the constructor: nvcc wants kernels' lambdas in functions that have an address, and public ones.
  void sort(Stream stream, int64_t n, const uint32_t* row_of, const int32_t* values, int64_t rows) {
    const Scratch<uint32_t> keys(stream, n);
    sort_pairs(stream, n, row_of, keys.get(), values, sorted_.get(), bits_for(static_cast<uint64_t>(rows)));
    launch(stream, rows + 1, [n, keys = keys.get(), starts = starts_.get()] FIITED_KERNEL(int64_t row) {
      starts[row] = static_cast<int32_t>(bisect(n, [&](int64_t at) { return keys[at] < row; }));
    });
  }

 private:
  Scratch<int32_t> starts_;  // [rows + 1]
  Scratch<int32_t> sorted_;  // [n]
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
constexpr int kBlocksThatSum = 4;  // on a multiprocessor, of kernels that add up rows

// Sums of groups of lookups, of groups of those, ...; level 0 are groups of the lookups themselves.
template <class Real>
struct GroupSums {
  const int32_t* first[kMostLevels];  // [rows] the number of a row's first group at a level, where it has any
  Real* sums[kMostLevels];            // [groups, dim]
  int dim = 0;

  // What a row is the sum of: items begin .. begin+count-1 of a level; of level 0 they are lookups.
  struct Items {
    int32_t begin, count, level;
  };
  FIITED_DEVICE Items items_of(int64_t row, int32_t begin, int32_t end) const {
    Items items{begin, end - begin, 0};
    for (; items.count > kSummedTogether; ++items.level) items.count = (items.count + kSummedTogether - 1) / kSummedTogether;
    if (items.level > 0) items.begin = first[items.level - 1][row];
    return items;
  }

  // Their sum, `size` numbers, in tile scratch.
  template <class Source>
  FIITED_DEVICE void add_up(const Tile& tile, const Source& source, const Items& items, int size, Real* to) const {
    if (items.level == 0) {
      tile.add_up(
          items.count, size, [&](int item) { return source.gradient(items.begin + item); },
          [&](int item) { return source.factor(items.begin + item); }, to);
    } else {
      const Real* const from = sums[items.level - 1] + int64_t{items.begin} * dim;
      tile.add_up(items.count, size, [&](int item) { return from + int64_t{item} * dim; }, [](int) { return Real(1); }, to);
    }
  }
};

// The groups of a level.
struct Level {
  int32_t* first;  // [rows] as in GroupSums
  int32_t* owner;  // [most] the row of each group
  int64_t most;
};
struct Levels {
  Level at[kMostLevels];
};

// Makes the sums of all groups that rows of more than kSummedTogether lookups have. `size_of(row)` says how many numbers are wanted.
template <class Real>
class GroupSummer {
 public:
  template <class Source, class SizeOf>
  GroupSummer(Stream stream, int64_t rows, const int32_t* starts, int64_t n, int dim, const Source& source, const SizeOf& size_of) {
    view_.dim = dim;
    if (n > kSummedTogether) sum(stream, rows, starts, n, dim, source, size_of);
  }
  const GroupSums<Real>& view() const { return view_; }

  // Of the constructor, as in Groups.
  template <class Source, class SizeOf>
  void sum(Stream stream, int64_t rows, const int32_t* starts, int64_t n, int dim, const Source& source, const SizeOf& size_of) {
    Levels levels{};
    int count = 0;
    const Scratch<int32_t> counts(stream, kMostLevels);
    set_bytes(stream, counts.get(), 0, kMostLevels * sizeof(int32_t));
    // A row with more than 32 items has at most 2/32 as many groups of them.
    int64_t most = n;
    for (int64_t least = kSummedTogether; count < kMostLevels && n > least; least *= kSummedTogether, ++count) {
      most = std::max<int64_t>(1, most / (kSummedTogether / 2));
      numbers_.push_back(std::make_unique<Scratch<int32_t>>(stream, rows + most));  // the owners' behind the rows'
      sums_.push_back(std::make_unique<Scratch<Real>>(stream, most * dim));
      levels.at[count] = {numbers_.back()->get(), numbers_.back()->get() + rows, most};
      view_.first[count] = numbers_.back()->get();
      view_.sums[count] = sums_.back()->get();
    }
    launch_tiles(stream, rows, 0, 0, [starts, levels, counts = counts.get()] FIITED_KERNEL(int64_t row, const Tile& tile) {
      int64_t items = starts[row + 1] - starts[row];
      for (int level = 0; items > kSummedTogether; ++level) {
        items = (items + kSummedTogether - 1) / kSummedTogether;
        const int32_t groups = static_cast<int32_t>(items);
        const int32_t first = tile.told([&] { return atomic_add(counts + level, groups); });
        tile.once([&] { levels.at[level].first[row] = first; });
        tile.each(groups, [&](int group) { levels.at[level].owner[first + group] = static_cast<int32_t>(row); });
      }
    });
    const GroupSums<Real> sums = view_;
    for (int level = 0; level < count; ++level) {
      launch_tiles<kBlocksThatSum>(
          stream, levels.at[level].most, dim, 0,
          [sums, level, starts, source, size_of, at = levels.at[level]] FIITED_KERNEL(int64_t group, const Tile& tile) {
            const int32_t row = at.owner[group];
            int32_t items = starts[row + 1] - starts[row];
            for (int up = 0; up < level; ++up) items = (items + kSummedTogether - 1) / kSummedTogether;
            const int32_t first = (static_cast<int32_t>(group) - at.first[row]) * kSummedTogether;
            const int32_t base = level == 0 ? starts[row] : sums.first[level - 1][row];
            const int32_t count = items - first < kSummedTogether ? items - first : kSummedTogether;
            sums.add_up(tile, source, {base + first, count, level}, size_of(row), sums.sums[level] + group * sums.dim);
          },
          counts.get() + level);
    }
  }

 private:
  GroupSums<Real> view_{};
  std::vector<std::unique_ptr<Scratch<int32_t>>> numbers_;
  std::vector<std::unique_ptr<Scratch<Real>>> sums_;
};

// Signs of the folded gradient, at hand for all dimensions that there mostly are: fold_signs() has them.
struct FoldSigns {
  static constexpr int kAtHand = 1024;
  uint32_t negative[kAtHand / 32] = {};

  FoldSigns() {
    for (uint32_t dim = 0; dim < kAtHand; ++dim) negative[dim / 32] |= uint32_t{fold_sign(dim) < 0} << dim % 32;
  }
  FIITED_DEVICE float operator()(int dim) const {
    if (dim >= kAtHand) return fold_sign(static_cast<uint32_t>(dim));
    return negative[dim / 32] >> dim % 32 & 1 ? -1.0f : 1.0f;
  }
};

inline const FoldSigns& fold_signs() {
  static const FoldSigns signs;
  return signs;
}

// Value `i` of the missing dimensions folded into one chunk; `sum` has all `dim` of them.
template <class Real>
FIITED_DEVICE Real folded(const FoldSigns& signs, const Real* sum, int live, int chunk, int dim, int i) {
  Real value = static_cast<Real>(signs(live + i)) * sum[live + i];
  for (int at = live + chunk + i; at < dim; at += chunk) value += static_cast<Real>(signs(at)) * sum[at];
  return value;
}

struct Lookups {
  int32_t begin, end;
};
// Those of bag (f, b) = f * batch + b, within what there is whatever the offsets say; notes offsets that cannot be.
FIITED_DEVICE Lookups lookups_of(const Bags& bags, int64_t n, int64_t bag, Faults* faults) {
  const int64_t begin = bags.offsets[bag];
  const int64_t end = bags.offsets[bag + 1];
  const bool last = bag == bags.features * bags.batch - 1;
  if ((bag == 0 && begin != 0) || (last && end != n)) note(faults, Fault::kOffsetsEnds, last);
  if (begin > end) note(faults, Fault::kOffsetsFall, (bag / bags.batch) << 32 | bag % bags.batch);
  const auto within = [n](int64_t at) { return static_cast<int32_t>(at < 0 ? 0 : at > n ? n : at); };
  return {within(begin), within(end)};
}

// Sizes, and the offsets of no bags at all.
inline void check_bags(Stream stream, const Bags& bags, int64_t n) {
  if (std::max(n, bags.features * bags.batch) >= int64_t{1} << 31) throw std::runtime_error("2^31 lookups or bags, or more, on a device");
  if (bags.features * bags.batch > 0) return;
  Faults* const faults = device_faults(stream);
  launch(stream, 1, [bags, n, faults] FIITED_KERNEL(int64_t) {
    if (bags.offsets[0] != 0 || n != 0) note(faults, Fault::kOffsetsEnds, 0);
  });
}

// Which row of the pooled vectors a bag is.
FIITED_DEVICE int32_t out_row_of(const Bags& bags, int64_t bag) {
  const auto number = static_cast<uint32_t>(bag);  // 64-bit divisions are slow
  const auto batch = static_cast<uint32_t>(bags.batch);
  return static_cast<int32_t>(number % batch * static_cast<uint32_t>(bags.features) + number / batch);
}

// The lookups of bags in the order of their rows.
template <class Real>
class BagOrder {
 public:
  BagOrder(Stream stream, const Bags& bags, int64_t n, const Real* grad_out, int64_t rows)
      : scaled_(bags.weights != nullptr || bags.mean), out_rows_(stream, scaled_ ? n : 1), factors_(stream, scaled_ ? n : 1) {
    sort(stream, bags, n, rows);
    source_ = {grad_out, scaled_ ? out_rows_.get() : groups_->sorted(), scaled_ ? factors_.get() : nullptr, bags.dim()};
  }
  const int32_t* starts() const { return groups_->starts(); }
  const PooledSource<Real>& source() const { return source_; }

  // Of the constructor, as in Groups. What is sorted are rows of grad_out; with factors beside them, lookups.
  void sort(Stream stream, const Bags& bags, int64_t n, int64_t rows) {
    check_bags(stream, bags, n);
    const auto* weights = static_cast<const Real*>(bags.weights);
    Faults* const faults = device_faults(stream);
    const Scratch<uint32_t> row_of(stream, n);
    const Scratch<int32_t> values(stream, n);
    const Scratch<int32_t> bag_of(stream, scaled_ ? n : 1);
    const Scratch<Real> factor_of(stream, scaled_ ? n : 1);
    set_bytes(stream, row_of.get(), 0xFF, n * sizeof(uint32_t));  // those of no bag
    launch(stream, bags.features * bags.batch,
           [bags, n, rows, weights, faults, scaled = scaled_, row_of = row_of.get(), values = values.get(), bag_of = bag_of.get(),
            factor_of = factor_of.get()] FIITED_KERNEL(int64_t bag) {
             const Lookups of = lookups_of(bags, n, bag, faults);
             const int32_t out_row = out_row_of(bags, bag);
             for (int32_t i = of.begin; i < of.end; ++i) {
               const int32_t row = bags.inverse[i];
               const bool there = row >= 0 && row < rows;
               if (!there) note(faults, Fault::kRow, i);
               row_of[i] = there ? static_cast<uint32_t>(row) : static_cast<uint32_t>(rows);
               values[i] = scaled ? i : out_row;
               if (!scaled) continue;
               bag_of[i] = out_row;
               factor_of[i] = (weights ? weights[i] : Real(1)) / (bags.mean ? static_cast<Real>(of.end - of.begin) : Real(1));
             }
           });
    groups_ = std::make_unique<Groups>(stream, n, row_of.get(), values.get(), rows);
    if (!scaled_) return;
    launch(stream, n,
           [rows, starts = groups_->starts(), order = groups_->sorted(), bag_of = bag_of.get(), factor_of = factor_of.get(),
            out_rows = out_rows_.get(), factors = factors_.get()] FIITED_KERNEL(int64_t at) {
             if (at >= starts[rows]) return;  // of no row
             out_rows[at] = bag_of[order[at]];
             factors[at] = factor_of[order[at]];
           });
  }

 private:
  bool scaled_;
  std::unique_ptr<Groups> groups_;
  Scratch<int32_t> out_rows_;
  Scratch<Real> factors_;
  PooledSource<Real> source_{};
};

// Where each row starts, in numbers: [rows + 1]; `wire`: of gradients in wire layout.
void find_row_starts(Stream stream, int64_t rows, const uint8_t* widths, int chunk, int chunks, bool wire, int64_t* starts);

// For each position, the first one with the same key and table.
void find_first(Stream stream, int64_t n, const uint64_t* keys, const int32_t* tables, int32_t* first);

// A row's vector as it is stored, to be read as numbers.
template <class Stored>
struct VectorAt {
  const typename Stored::Bits* at = nullptr;
  int live = 0;
};

// A lookup's vector and what it counts in its bag.
template <class Real, class Stored>
struct Pooled {
  VectorAt<Stored> vector;
  Real factor;
};

// A bag, and its first lookup where that is all there is.
template <class Real, class Stored>
struct PooledBag {
  Pooled<Real, Stored> only;
  Lookups lookups;
  int32_t out_row;
};

template <class Real, class Stored, class VectorOf>
FIITED_DEVICE Pooled<Real, Stored> pooled(const Bags& bags, int64_t rows, const VectorOf& vector_of, Faults* faults, int64_t i,
                                          int32_t size) {
  const int32_t row = bags.inverse[i];
  const bool there = row >= 0 && row < rows;
  if (!there) note(faults, Fault::kRow, i);
  const auto* weights = static_cast<const Real*>(bags.weights);
  Real factor = weights ? weights[i] : Real(1);
  if (bags.mean) factor /= static_cast<Real>(size);
  return {there ? vector_of(row) : VectorAt<Stored>{nullptr, 0}, factor};
}

// Pools the rows that `vector_of(u)` finds, missing dimensions as zero: out [batch, features, dim].
template <class Real, class Stored, class VectorOf>
void pool_bags(Stream stream, const Bags& bags, int64_t n, int64_t rows, const VectorOf& vector_of, Real* out) {
  check_bags(stream, bags, n);
  Faults* const faults = device_faults(stream);
  launch_prepared<PooledBag<Real, Stored>, 5>(
      stream, bags.features * bags.batch, bags.dim(), bags.dim() * static_cast<int>(sizeof(Real) / sizeof(float)),
      [bags, n, rows, vector_of, faults] FIITED_KERNEL(int64_t bag) {
        PooledBag<Real, Stored> prepared{};
        prepared.lookups = lookups_of(bags, n, bag, faults);
        prepared.out_row = out_row_of(bags, bag);
        const int32_t begin = prepared.lookups.begin;
        if (prepared.lookups.end - begin == 1) prepared.only = pooled<Real, Stored>(bags, rows, vector_of, faults, begin, 1);
        return prepared;
      },
      [bags, rows, vector_of, out, faults] FIITED_KERNEL(const PooledBag<Real, Stored>& bag, const Tile& tile) {
        const int dim = bags.dim();
        Real* const to = out + int64_t{bag.out_row} * dim;
        const int32_t size = bag.lookups.end - bag.lookups.begin;
        if (size == 1) {  // as most bags are: straight from the row to the result
          const Pooled<Real, Stored>& only = bag.only;
          tile.map(
              dim, [&](int d) { return d < only.vector.live ? only.vector.at[d] : typename Stored::Bits{}; },
              [&](int d, auto x) { store_once(to + d, d < only.vector.live ? only.factor * Stored::to_float(x) : Real(0)); });
          return;
        }
        auto* const sum = reinterpret_cast<Real*>(tile.scratch);
        tile.each(dim, [&](int d) { sum[d] = 0; });
        tile.prepared(
            bag.lookups.begin, bag.lookups.end, [&](int64_t i) { return pooled<Real, Stored>(bags, rows, vector_of, faults, i, size); },
            [&](const Pooled<Real, Stored>& one) {
              tile.map(
                  one.vector.live, [&](int d) { return one.vector.at[d]; },
                  [&](int d, auto x) { sum[d] += one.factor * Stored::to_float(x); });
            });
        tile.each(dim, [&](int d) { to[d] = sum[d]; });
      });
}

}  // namespace fiited::device
