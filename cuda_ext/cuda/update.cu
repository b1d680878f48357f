// A shard's step: gradients summed by row, importance, the fused optimizer, and rows that absent keys win by the sketch.
#include <cmath>

#include "core/optimizers.h"
#include "cuda/shard.h"

namespace fiited::device {

void DeviceShard::advance(int64_t step) {
  step_ = step;
  if (const int by = decay_.advance(step)) {
    const View view = this->view();
    const float factor = std::ldexp(1.0f, -by);
    for (int width = 1; width <= layout_.chunks; ++width) {
      launch(stream_, pools_.count(width), [view, width, factor] FIITED_KERNEL(int64_t position) {
        RowHeader& header = view.header(view.addresses.of(width, static_cast<uint32_t>(position)));
        header.importance *= factor;
        header.mark = Mark::kChanged;
      });
    }
    levels_.base -= kLevelsPerOctave * by;
  }
  aim_sketch();
}

void DeviceShard::aim_sketch() {
  if (threshold_ <= 0.0) return;
  const LevelScale wanted = LevelScale::ending_at(static_cast<float>(threshold_ * config_.admission) * decay_.scale());
  const int by = wanted.base - levels_.base;
  if (by == 0) return;
  levels_ = wanted;
  launch(stream_, config_.sketch_bytes() / 2,
         [cells = cells_, by] FIITED_KERNEL(int64_t at) { cells[at] = LevelScale::moved(cells[at], by); });
}

void DeviceShard::update(const Update& rows, const float* gradients, int64_t arrivals, const int32_t* target) {
  advance(rows.step);
  clear_board();
  const Scratch<int64_t> sizes(stream_, arrivals + 1);
  const Scratch<int64_t> starts_of(stream_, arrivals + 1);
  Faults* const faults = device_faults(stream_);
  launch(stream_, arrivals + 1, [rows, arrivals, target, faults, layout = layout_, sizes = sizes.get()] FIITED_KERNEL(int64_t i) {
    const int64_t row = i == arrivals ? 0 : target ? target[i] : i;
    const bool there = row >= 0 && row < rows.n;
    if (i < arrivals && !there) note(faults, Fault::kTarget, i);
    sizes[i] = i < arrivals && there
                   ? gradient_size(rows.widths[row] < layout.chunks ? rows.widths[row] : layout.chunks, layout.chunk, layout.chunks)
                   : 0;
  });
  exclusive_scan(stream_, arrivals + 1, sizes.get(), starts_of.get());
  launch(stream_, 1, [arrivals, numbers = rows.numbers, starts_of = starts_of.get(), board = board_.get(), faults] FIITED_KERNEL(int64_t) {
    if (starts_of[arrivals] == numbers) return;
    note(faults, Fault::kSize, starts_of[arrivals]);
    board->stop = 1;
  });
  std::unique_ptr<Groups> groups;
  if (target != nullptr) {
    const Scratch<uint32_t> row_of(stream_, arrivals);
    const Scratch<int32_t> positions(stream_, arrivals);
    launch(stream_, arrivals, [rows, target, row_of = row_of.get(), positions = positions.get()] FIITED_KERNEL(int64_t i) {
      const bool there = target[i] >= 0 && target[i] < rows.n;
      row_of[i] = static_cast<uint32_t>(there ? target[i] : rows.n);
      positions[i] = static_cast<int32_t>(i);
    });
    groups = std::make_unique<Groups>(stream_, arrivals, row_of.get(), positions.get(), rows.n);
  }
  const WireSource source{gradients, starts_of.get(), groups ? groups->sorted() : nullptr};
  // As many arrivals for one row as there are workers: more than are summed at once only where there are very many.
  std::unique_ptr<GroupSummer<float>> sums;
  GroupSums<float> view{};
  if (groups) {
    sums = std::make_unique<GroupSummer<float>>(
        stream_, rows.n, groups->starts(), arrivals, layout_.dim(), source,
        [widths = rows.widths, layout = layout_, board = board_.get()] FIITED_KERNEL(int64_t row) {
          return board->stop ? 0
                             : static_cast<int>(
                                   gradient_size(widths[row] < layout.chunks ? widths[row] : layout.chunks, layout.chunk, layout.chunks));
        });
    view = sums->view();
  }
  update_rows(rows, source, groups ? groups->starts() : nullptr, view);
}

void DeviceShard::update_pooled(const Update& rows, const Bags& bags, int64_t n, const float* grad_out) {
  advance(rows.step);
  clear_board();
  const BagOrder<float> order(stream_, bags, n, grad_out, rows.n);
  const GroupSummer<float> sums(stream_, rows.n, order.starts(), n, bags.dim(), order.source(),
                                [dim = bags.dim()] FIITED_KERNEL(int64_t) { return dim; });
  update_rows(rows, order.source(), order.starts(), sums.view());
}

template <class Source>
void DeviceShard::update_rows(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups) {
  if (config_.importance == Importance::kLookupNormSum && rows.lookup_norms == nullptr) {
    throw std::runtime_error("importance lookup_norm_sum needs the lookups' gradient norms");
  }
  const Scratch<float> gains(stream_, rows.n);  // of importance, for the keys without a row; negative for the others
  with_storage(config_.storage, [&](auto stored) { learn<decltype(stored), Source>(rows, source, starts, groups, gains.get()); });
  name_infinite(rows);
  if (threshold_ != 0.0) return win_rows(rows, source, starts, groups, gains.get());
  check_faults(stream_);  // rows are then given out at lookup: there is nothing else to read
}

// Keeps the id of the first gradient that was not finite, for whoever throws that.
void DeviceShard::name_infinite(const Update& rows) const {
  launch(stream_, 1, [rows, seed = config_.seed, faults = device_faults(stream_)] FIITED_KERNEL(int64_t) {
    const int64_t at = faults->first[static_cast<int>(Fault::kInfinite)];
    if (at == kNoFault || faults->table >= 0) return;
    faults->table = rows.tables[at];
    faults->id =
        static_cast<int64_t>(raw_id_of(static_cast<uint64_t>(rows.keys[at]), table_salt(seed, static_cast<uint32_t>(faults->table))));
  });
}

// One value of a row and its state, as loaded.
template <class Stored>
struct Learning {
  typename Stored::Bits value;
  float first, second;
};

// The first `n` of a row's `live` values: their gradient.
template <class Stored, Optimizer kind>
FIITED_DEVICE void learn_values(const Tile& tile, typename Stored::Bits* vector, float* state, const float* g, int n, int live, float rate,
                                uint64_t key, const StepConstants& constants) {
  constexpr int kMoments = kind == Optimizer::kAdam ? 2 : kind == Optimizer::kAdagrad ? 1 : 0;
  tile.map(
      n, [&](int d) { return Learning<Stored>{vector[d], kMoments > 0 ? state[d] : 0.0f, kMoments > 1 ? state[live + d] : 0.0f}; },
      [&](int d, Learning<Stored> at) {
        learn_value<Stored, kind>(at.value, at.first, at.second, static_cast<uint32_t>(d), g[d], rate, key, constants);
        vector[d] = at.value;
        if (kMoments > 0) state[d] = at.first;
        if (kMoments > 1) state[live + d] = at.second;
      });
}

// The first `n` of a row's values, mostly all: their gradient and its sum of squares.
template <class Stored>
FIITED_DEVICE void learn_row(const RowLayout& layout, const Tile& tile, std::byte* row, int width, uint64_t key, const float* g, int n,
                             float squares, const StepConstants& constants) {
  auto* const vector = reinterpret_cast<typename Stored::Bits*>(row + sizeof(RowHeader));
  auto* const state = reinterpret_cast<float*>(row + layout.state_offset(width));
  const int live = width * layout.chunk;
  switch (layout.optimizer) {
    case Optimizer::kSgd: return learn_values<Stored, Optimizer::kSgd>(tile, vector, state, g, n, live, 0, key, constants);
    case Optimizer::kAdagrad: return learn_values<Stored, Optimizer::kAdagrad>(tile, vector, state, g, n, live, 0, key, constants);
    case Optimizer::kAdam: return learn_values<Stored, Optimizer::kAdam>(tile, vector, state, g, n, live, 0, key, constants);
    case Optimizer::kRowwiseAdagrad: {
      const float raised = state[0] + squares / static_cast<float>(n);
      tile.sync();  // all lanes have read it
      tile.once([&] { state[0] = raised; });
      const float rate = rowwise_rate(raised, constants);
      return learn_values<Stored, Optimizer::kRowwiseAdagrad>(tile, vector, state, g, n, live, rate, key, constants);
    }
  }
}

constexpr int kLearnersPrepared = 2;  // by a tile at a time: with more, their headers are out of the cache again when their turn comes

// A key that learns.
struct Learner {
  uint64_t key;
  std::byte* row;  // null: it has none
  GroupSums<float>::Items items;
  int32_t position;
  int32_t width;  // below 0: it is left out
  int32_t count;
  float lookup_norm;
};

template <class Stored, class Source>
void DeviceShard::learn(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups,
                        float* gains) const {
  constexpr bool kWire = std::is_same_v<Source, WireSource>;
  const View view = this->view();
  const StepConstants constants = step_constants(rows.lr, config_.eps, config_.beta1, config_.beta2, rows.step);
  Faults* const faults = device_faults(stream_);
  const int dim = layout_.dim();
  launch_prepared<Learner, kBlocksThatSum>(
      stream_, rows.n, dim, dim,
      [view, rows, starts, groups, gains, faults, board = board_.get()] FIITED_KERNEL(int64_t i) {
        Learner learner{};
        learner.width = -1;
        const uint32_t address = rows.addresses[i];
        const auto key = static_cast<uint64_t>(rows.keys[i]);
        const int width = rows.widths[i];
        gains[i] = -1.0f;
        const bool table_there = rows.tables[i] >= 0 && rows.tables[i] < view.tables;
        if (!view.belongs(key) || !table_there) {
          note(faults, table_there ? Fault::kForeignKey : Fault::kNoTable, i);
          return learner;
        }
        const bool fits = view.fits(address, width);
        if (fits && address != kAbsent) learner.row = view.row(address);
        const auto row = static_cast<int32_t>(i);
        learner.items = groups.items_of(i, starts ? starts[i] : row, starts ? starts[i + 1] : row + 1);
        if (!fits || (address != kAbsent && !view.is_row(address, key, rows.tables[i]))) {
          note(faults, Fault::kMoved, i);
          return learner;
        }
        if (board->stop) return learner;
        learner.key = key;
        learner.position = row;
        learner.width = width;
        learner.count = rows.counts[i];
        learner.lookup_norm = rows.lookup_norms ? rows.lookup_norms[i] : 0.0f;
        return learner;
      },
      [layout = layout_, scale = view.scale, signs = fold_signs(), source, groups, gains, constants, importance = config_.importance,
       faults, dim] FIITED_KERNEL(const Learner& learner, const Tile& tile) {
        if (learner.width < 0) return;
        if (learner.row != nullptr) tile.prefetch(learner.row, layout.stride(learner.width));
        const int chunk = layout.chunk;
        const int live = whole_chunks(learner.width) * chunk;
        const bool folds = has_folded_chunk(learner.width, layout.chunks);
        float* const g = tile.scratch;
        groups.add_up(tile, source, learner.items, !folds ? live : kWire ? live + chunk : dim, g);
        tile.sync();
        const float live_squares = tile.sum(live, [&](int d) { return g[d] * g[d]; });
        float squares = live_squares;
        if (folds) {
          squares += tile.sum(chunk, [&](int d) {
            const float x = kWire ? g[live + d] : folded(signs, g, live, chunk, dim, d);
            return x * x;
          });
        }
        if (!(squares < INFINITY)) {  // infinite or NaN
          tile.once([&] { note(faults, Fault::kInfinite, learner.position); });
          return;
        }
        const float gain = gain_of(importance, learner.count, std::sqrt(squares), learner.lookup_norm) * scale;
        tile.once([&] {
          if (learner.row == nullptr) {
            gains[learner.position] = gain;
          } else {
            auto* const header = reinterpret_cast<RowHeader*>(learner.row);
            header->importance += gain;
            header->mark = Mark::kChanged;
          }
        });
        if (learner.row == nullptr) return;
        learn_row<Stored>(layout, tile, learner.row, learner.width, learner.key, g, live, live_squares, constants);
      },
      nullptr, kLearnersPrepared);
}

// Absent keys add to the sketch, set by set and in their order. Each set is gone through twice: once as if there were room for all, which
// tells where room ends; then for good. The rows won then take a step by what won them.
template <class Source>
void DeviceShard::win_rows(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups,
                           const float* gains) {
  const View view = this->view();
  Board* const board = board_.get();
  const int64_t n = rows.n;
  const int64_t sets = int64_t{config_.buckets()} * config_.sketch_sets;
  const Scratch<uint32_t> set_of(stream_, n);
  const Scratch<uint32_t> sorted(stream_, n);
  const Scratch<int32_t> positions(stream_, n);
  const Scratch<int32_t> order(stream_, n);
  launch(stream_, n, [view, rows, gains, sets, board, set_of = set_of.get(), positions = positions.get()] FIITED_KERNEL(int64_t i) {
    if (i == 0) board->full_from = kNoFault;
    const auto key = static_cast<uint64_t>(rows.keys[i]);
    set_of[i] = gains[i] < 0 ? static_cast<uint32_t>(sets) : sketch_set_of(key, view.first_bucket, view.sets_per_bucket);
    positions[i] = static_cast<int32_t>(i);
  });
  sort_pairs(stream_, n, set_of.get(), sorted.get(), positions.get(), order.get(), bits_for(static_cast<uint64_t>(sets)));

  const Scratch<uint8_t> earned(stream_, n);  // width that the estimate is worth
  const Scratch<uint8_t> granted(stream_, n);
  const Scratch<float> estimates(stream_, n);
  const Scratch<int64_t> bytes(stream_, n);
  const Scratch<int64_t> before(stream_, n);
  set_bytes(stream_, earned.get(), 0, n);
  set_bytes(stream_, granted.get(), 0, n);
  set_bytes(stream_, bytes.get(), 0, n * sizeof(int64_t));
  const auto admission = static_cast<float>(config_.admission);
  for (const bool for_good : {false, true}) {
    launch(stream_, n,
           [view, rows, gains, sets, n, for_good, admission, board, sorted = sorted.get(), order = order.get(), earned = earned.get(),
            granted = granted.get(), estimates = estimates.get(), bytes = bytes.get()] FIITED_KERNEL(int64_t at) {
             const uint32_t number = sorted[at];
             if (number == static_cast<uint32_t>(sets) || (at > 0 && sorted[at - 1] == number)) return;  // not the first of a set
             uint16_t* const stands = view.cells + int64_t{number} * kSketchEntries;
             uint16_t set[kSketchEntries];
             for (int entry = 0; entry < kSketchEntries; ++entry) set[entry] = stands[entry];
             for (int64_t next = at; next < n && sorted[next] == number; ++next) {
               const int32_t i = order[next];
               const auto key = static_cast<uint64_t>(rows.keys[i]);
               estimates[i] = add_to_set(set, view.levels, key, gains[i], rows.step);
               const int width = width_of(estimates[i] * view.unscale / admission, view.cuts, view.layout.chunks);
               const bool asks = width > 0 && let_in(key, rows.step, rows.quota);
               const bool wins = asks && (!for_good || i < board->full_from);
               if (wins) forget_in_set(set, key);
               earned[i] = static_cast<uint8_t>(width);
               granted[i] = static_cast<uint8_t>(wins ? width : 0);
               bytes[i] = asks ? view.layout.stride(width) + Index::kBytesPerRow : 0;
             }
             if (!for_good) return;
             for (int entry = 0; entry < kSketchEntries; ++entry) stands[entry] = set[entry];
           });
    if (for_good) break;
    exclusive_scan(stream_, n, bytes.get(), before.get());
    launch(stream_, n, [room = room(), board, bytes = bytes.get(), before = before.get()] FIITED_KERNEL(int64_t i) {
      if (bytes[i] > 0 && before[i] + bytes[i] > room) atomic_min(&board->full_from, i);
    });
  }

  launch_sums<2>(stream_, n, &board->asked_bytes,
                 [layout = layout_, earned = earned.get(), granted = granted.get()] FIITED_KERNEL(int64_t i) {
                   const int64_t bytes = earned[i] ? int64_t{layout.stride(earned[i])} + Index::kBytesPerRow : int64_t{0};
                   return std::array<int64_t, 2>{bytes, earned[i] != 0 && granted[i] == 0};  // and refused
                 });
  launch_tally(
      stream_, n, kMostChunks + 1, [granted = granted.get()] FIITED_KERNEL(int64_t i) { return granted[i] ? int{granted[i]} : -1; },
      [board] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(board->by_width + bin, count); });
  launch_tally(
      stream_, n, index_.partitions(),
      [view, rows, granted = granted.get()] FIITED_KERNEL(int64_t i) {
        return granted[i] ? view.part_number(static_cast<uint64_t>(rows.keys[i])) : -1;
      },
      [board] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(board->by_part + bin, count); });
  launch(stream_, n,
         [granted = granted.get(), by_width = set_of.get(), most = static_cast<uint32_t>(layout_.chunks + 1)] FIITED_KERNEL(int64_t i) {
           by_width[i] = granted[i] ? granted[i] : most;  // those without a row last
         });
  sort_pairs(stream_, n, set_of.get(), sorted.get(), positions.get(), order.get(), bits_for(static_cast<uint64_t>(layout_.chunks) + 1));

  const Board told = read_board();
  throw_if_any(stream_, told.faults);
  counted_.asked_bytes += told.asked_bytes;
  counted_.refused += told.refused;
  int64_t count = 0;
  for (int width = 1; width <= layout_.chunks; ++width) count += told.by_width[width];
  const Scratch<uint32_t> addresses(stream_, n);
  admit({count, order.get(), reinterpret_cast<const uint64_t*>(rows.keys), rows.tables, granted.get(), estimates.get(), addresses.get(),
         nullptr},
        told);
  with_storage(config_.storage,
               [&](auto stored) { learn_first<decltype(stored)>(rows, source, starts, groups, count, order.get(), addresses.get()); });
}

// The first step of new rows, by the gradient of their first chunk, which alone has come.
template <class Stored, class Source>
void DeviceShard::learn_first(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups,
                              int64_t count, const int32_t* chosen, const uint32_t* addresses) const {
  const View view = this->view();
  const StepConstants constants = step_constants(rows.lr, config_.eps, config_.beta1, config_.beta2, rows.step);
  launch_tiles<kBlocksThatSum>(
      stream_, count, layout_.chunk, layout_.chunk,
      [view, rows, source, starts, groups, chosen, addresses, constants] FIITED_KERNEL(int64_t at, const Tile& tile) {
        const int32_t i = chosen[at];
        const int chunk = view.layout.chunk;
        float* const g = tile.scratch;
        groups.add_up(tile, source, groups.items_of(i, starts ? starts[i] : i, starts ? starts[i + 1] : i + 1), chunk, g);
        tile.sync();
        const float squares = tile.sum(chunk, [&](int d) { return g[d] * g[d]; });
        learn_row<Stored>(view.layout, tile, view.row(addresses[i]), view.addresses.width(addresses[i]),
                          static_cast<uint64_t>(rows.keys[i]), g, chunk, squares, constants);
      });
}

}  // namespace fiited::device
