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
  if (target != nullptr) groups = std::make_unique<Groups>(stream_, arrivals, target, rows.n, Fault::kTarget);
  const WireSource source{gradients, starts_of.get(), groups ? groups->order() : nullptr};
  // As many arrivals for one row as there are workers: more than are summed at once only where there are very many.
  std::unique_ptr<GroupSummer<float>> sums;
  GroupSums<float> view{};
  const int dim = layout_.chunks * layout_.chunk;
  if (groups && arrivals > kSummedTogether) {
    sums = std::make_unique<GroupSummer<float>>(
        stream_, rows.n, groups->starts(), arrivals, dim, source,
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
  check_offsets(stream_, bags, n);
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
  if (threshold_ != 0.0) {
    win_rows(rows, source, starts, groups, gains.get());
  } else {  // rows are then given out at lookup: there is nothing to read but faults
    const Board told = read_board();
    if (first_of(told.faults, Fault::kInfinite) != kNoFault) throw_infinite(rows, first_of(told.faults, Fault::kInfinite));
    throw_if_any(stream_, told.faults);
  }
}

// One value of a row's vector and its state.
template <class Stored>
FIITED_DEVICE void learn_by(Optimizer optimizer, typename Stored::Bits* vector, float* state, int i, int n, float g, float rate,
                            uint64_t key, const StepConstants& constants) {
  switch (optimizer) {
    case Optimizer::kSgd: return learn_value<Stored, Optimizer::kSgd>(vector, state, i, n, g, rate, key, constants);
    case Optimizer::kAdagrad: return learn_value<Stored, Optimizer::kAdagrad>(vector, state, i, n, g, rate, key, constants);
    case Optimizer::kRowwiseAdagrad: return learn_value<Stored, Optimizer::kRowwiseAdagrad>(vector, state, i, n, g, rate, key, constants);
    case Optimizer::kAdam: return learn_value<Stored, Optimizer::kAdam>(vector, state, i, n, g, rate, key, constants);
  }
}

// The first `n` of a row's values, mostly all: their gradient and its sum of squares.
template <class Stored>
FIITED_DEVICE void learn_row(const View& view, const Tile& tile, uint32_t address, uint64_t key, const float* g, int n, float squares,
                             const StepConstants& constants) {
  auto* const vector = reinterpret_cast<typename Stored::Bits*>(view.row(address) + sizeof(RowHeader));
  float* const state = view.state(address);
  const int live = view.addresses.width(address) * view.layout.chunk;
  const Optimizer optimizer = view.layout.optimizer;
  float rate = 0;
  if (optimizer == Optimizer::kRowwiseAdagrad) {
    const float raised = state[0] + squares / static_cast<float>(n);
    rate = rowwise_rate(raised, constants);
    tile.sync();  // all lanes have read it
    tile.once([&] { state[0] = raised; });
  }
  tile.each(n, [&](int d) { learn_by<Stored>(optimizer, vector, state, d, live, g[d], rate, key, constants); });
}

template <class Stored, class Source>
void DeviceShard::learn(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups,
                        float* gains) const {
  constexpr bool kWire = std::is_same_v<Source, WireSource>;
  const View view = this->view();
  const StepConstants constants = step_constants(rows.lr, config_.eps, config_.beta1, config_.beta2, rows.step);
  const Importance importance = config_.importance;
  Faults* const faults = device_faults(stream_);
  const int dim = layout_.chunks * layout_.chunk;
  launch_tiles(stream_, rows.n, dim,
               [view, rows, source, starts, groups, gains, constants, importance, faults, dim, board = board_.get()] FIITED_KERNEL(
                   int64_t i, const Tile& tile) {
                 const uint32_t address = rows.addresses[i];
                 const auto key = static_cast<uint64_t>(rows.keys[i]);
                 const int width = rows.widths[i];
                 const int chunk = view.layout.chunk;
                 const int live = whole_chunks(width) * chunk;
                 tile.once([&] { gains[i] = -1.0f; });
                 const bool table_there = rows.tables[i] >= 0 && rows.tables[i] < view.tables;
                 if (!view.belongs(key) || !table_there) {
                   tile.once([&] { note(faults, table_there ? Fault::kForeignKey : Fault::kNoTable, i); });
                   return;
                 }
                 if (!view.fits(address, width) || (address != kAbsent && !view.is_row(address, key, rows.tables[i]))) {
                   tile.once([&] { note(faults, Fault::kMoved, i); });
                   return;
                 }
                 if (board->stop) return;

                 float* const g = tile.scratch;
                 const int64_t begin = starts ? starts[i] : i;
                 const int64_t end = starts ? starts[i + 1] : i + 1;
                 const bool folds = has_folded_chunk(width, view.layout.chunks);
                 const int size = !folds ? live : kWire ? live + chunk : dim;
                 groups.sum(tile, source, i, begin, end, size, g);
                 tile.sync();
                 const float live_squares = tile.sum(live, [&](int d) { return g[d] * g[d]; });
                 float squares = live_squares;
                 if (folds) {
                   squares += tile.sum(chunk, [&](int d) {
                     const float x = kWire ? g[live + d] : folded(g, live, chunk, dim, d);
                     return x * x;
                   });
                 }
                 if (!(squares < INFINITY)) {  // infinite or NaN
                   tile.once([&] { note(faults, Fault::kInfinite, i); });
                   return;
                 }
                 const float gain =
                     gain_of(importance, rows.counts[i], std::sqrt(squares), rows.lookup_norms ? rows.lookup_norms[i] : 0.0f) * view.scale;
                 if (address == kAbsent) {
                   tile.once([&] { gains[i] = gain; });
                   return;
                 }
                 tile.once([&] {
                   auto* const header = reinterpret_cast<RowHeader*>(view.row(address));
                   header->importance += gain;
                   header->mark = Mark::kChanged;
                 });
                 learn_row<Stored>(view, tile, address, key, g, live, live_squares, constants);
               });
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
  launch(stream_, n, [view, rows, gains, sets, set_of = set_of.get(), positions = positions.get()] FIITED_KERNEL(int64_t i) {
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

  launch_sum(stream_, n, &board->asked_bytes, [layout = layout_, earned = earned.get()] FIITED_KERNEL(int64_t i) {
    return earned[i] ? int64_t{layout.stride(earned[i])} + Index::kBytesPerRow : int64_t{0};
  });
  launch_sum(stream_, n, &board->refused, [earned = earned.get(), granted = granted.get()] FIITED_KERNEL(int64_t i) {
    return int64_t{earned[i] != 0 && granted[i] == 0};
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
  if (first_of(told.faults, Fault::kInfinite) != kNoFault) throw_infinite(rows, first_of(told.faults, Fault::kInfinite));
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
  launch_tiles(stream_, count, layout_.chunk,
               [view, rows, source, starts, groups, chosen, addresses, constants] FIITED_KERNEL(int64_t at, const Tile& tile) {
                 const int32_t i = chosen[at];
                 const int chunk = view.layout.chunk;
                 float* const g = tile.scratch;
                 groups.sum(tile, source, i, starts ? starts[i] : i, starts ? starts[i + 1] : i + 1, chunk, g);
                 tile.sync();
                 const float squares = tile.sum(chunk, [&](int d) { return g[d] * g[d]; });
                 learn_row<Stored>(view, tile, addresses[i], static_cast<uint64_t>(rows.keys[i]), g, chunk, squares, constants);
               });
}

void DeviceShard::throw_infinite(const Update& rows, int64_t at) const {
  clear_faults(stream_, device_faults(stream_));
  const int32_t table = read_one(stream_, rows.tables + at);
  const auto key = static_cast<uint64_t>(read_one(stream_, rows.keys + at));
  const auto raw = static_cast<int64_t>(raw_id_of(key, table_salt(config_.seed, static_cast<uint32_t>(table))));
  throw std::runtime_error("the gradient of table " + std::to_string(table) + ", id " + std::to_string(raw) + " is not finite");
}

}  // namespace fiited::device
