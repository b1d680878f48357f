// A shard's rounds: rows narrowed, evicted and widened in waves from the end of each pool, and the holes they leave filled from its end.
#include <numeric>

#include "cuda/shard.h"

namespace fiited::device {

namespace {

constexpr uint32_t kMostInWave = 1u << 22;  // rows looked at together

// Visiting order of a wave: its last row first.
FIITED_DEVICE uint32_t address_in_wave(const View& view, int width, uint32_t end, int64_t number) {
  return view.addresses.of(width, end - 1 - static_cast<uint32_t>(number));
}

}  // namespace

int64_t DeviceShard::shrink(double threshold) {
  threshold_ = threshold;
  cuts_ = cuts_of(threshold_, config_.levels);
  aim_sketch();
  growth_ = 0;
  const int64_t limit = limit_;
  if (planned_ > limit) set_limit(planned_);  // what passes the limit is to give way here
  left_.fill_bytes(0);
  for (int width = layout_.chunks; width >= 1; --width) change_width(width, false);
  const std::vector<uint32_t> left = read_back(stream_, left_.get(), kMostParts);
  pools_.give_back();
  index_.shrink(stream_, view(), left.data());
  if (limit_ != limit) set_limit(limit);
  return growth_;
}

void DeviceShard::grow() {
  for (int width = layout_.chunks - 1; width >= 1; --width) change_width(width, true);
  wait(stream_);
  pools_.give_back();
}

void DeviceShard::change_width(int width, bool growing) {
  uint32_t wave = kMostInWave;  // rows that leave take memory before they give theirs back: fewer at a time where there is little
  for (uint32_t end = pools_.count(width); end > 0;) {
    const uint32_t size = std::min(wave, end);
    if (change_rows(width, growing, end - size, end)) {
      end -= size;
    } else if (size > 1) {
      wave = size / 2;
    } else {  // there is no room for this one: it stays as it is
      ++counted_.refused;
      --end;
    }
  }
}

// Rows begin..end-1 of a width, in one wave: those that are worth less leave for narrower pools or for good, or, growing, those that are
// worth more for wider ones. False, and nothing done, when there is no memory for so many.
bool DeviceShard::change_rows(int width, bool growing, uint32_t begin, uint32_t end) {
  const View view = this->view();
  Board* const board = board_.get();
  const int64_t n = end - begin;
  const int chunks = layout_.chunks;
  const auto stays = static_cast<uint32_t>(chunks + 1);
  const Scratch<uint32_t> goals(stream_, n);
  const Scratch<int32_t> numbers(stream_, n);
  clear_board();
  const auto goal_of = [view, width, growing, end, stays, goals = goals.get(), numbers = numbers.get()] FIITED_KERNEL(int64_t number) {
    const int wanted = view.wanted_width(view.header(address_in_wave(view, width, end, number)).importance);
    goals[number] = (growing ? wanted > width : wanted < width) ? static_cast<uint32_t>(wanted) : stays;
    numbers[number] = static_cast<int32_t>(number);
    return std::array<int64_t, 1>{wanted > width ? view.layout.stride(wanted) - view.layout.stride(width) : 0};  // bytes it is worth more
  };
  launch_sums<1>(stream_, n, &board->growth, goal_of);
  if (growing) {
    const Scratch<int64_t> more(stream_, n);
    const Scratch<int64_t> before(stream_, n);
    launch(stream_, n, [view, width, stays, goals = goals.get(), more = more.get()] FIITED_KERNEL(int64_t number) {
      more[number] = goals[number] == stays ? 0 : view.layout.stride(static_cast<int>(goals[number])) - view.layout.stride(width);
    });
    exclusive_scan(stream_, n, more.get(), before.get());
    launch(stream_, n,
           [room = room(), board, stays, goals = goals.get(), more = more.get(), before = before.get()] FIITED_KERNEL(int64_t number) {
             if (more[number] == 0 || before[number] + more[number] <= room) return;
             goals[number] = stays;
             atomic_add(&board->refused, int64_t{1});
           });
  }
  launch_tally(
      stream_, n, kMostChunks + 2, [goals = goals.get()] FIITED_KERNEL(int64_t number) { return static_cast<int>(goals[number]); },
      [board] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(board->by_width + bin, count); });
  const Board told = read_board();
  pools_.give_back();  // what earlier waves have left

  Starts starts{};
  for (int goal = 1; goal <= chunks; ++goal) {
    starts.first[goal] = starts.first[goal - 1] + told.by_width[goal - 1];
    if (told.by_width[goal] && !pools_.reserve(goal, uint64_t{pools_.count(goal)} + told.by_width[goal])) {
      pools_.give_back();
      return false;
    }
  }
  counted_.refused += told.refused;
  if (!growing) growth_ += told.growth;
  const int64_t evicted = told.by_width[0];
  const int64_t leaving = n - told.by_width[stays];
  if (leaving == 0) return true;
  const Scratch<uint32_t> sorted(stream_, n);
  const Scratch<int32_t> order(stream_, n);
  sort_pairs(stream_, n, goals.get(), sorted.get(), numbers.get(), order.get(), bits_for(stays));
  with_storage(config_.storage, [&](auto stored) {
    move_rows<decltype(stored)>(view, width, end, evicted, leaving - evicted, sorted.get(), order.get(), starts);
  });
  evict_rows(view, width, end, evicted, order.get());
  const auto left = static_cast<uint32_t>(pools_.count(width) - leaving);
  fill_holes(view, width, begin, end, pools_.count(width), left, goals.get());
  pools_.set_count(width, left);
  for (int goal = 1; goal <= chunks; ++goal) {
    if (told.by_width[goal]) pools_.set_count(goal, pools_.count(goal) + told.by_width[goal]);
    planned_ += told.by_width[goal] * (row_bytes_[goal] - row_bytes_[width]);
  }
  planned_ -= evicted * row_bytes_[width];
  counted_.evicted += evicted;
  counted_.resized += leaving - evicted;
  return true;
}

// Rows `first` .. first+count-1 of `order` go to the ends of the pools of their goals: the common prefix stays, what is new starts clean.
template <class Stored>
void DeviceShard::move_rows(const View& view, int width, uint32_t end, int64_t first, int64_t count, const uint32_t* goals,
                            const int32_t* order, const Starts& starts) const {
  launch(stream_, count, [view, width, end, first, goals, order] FIITED_KERNEL(int64_t item) {
    const int table = view.header(address_in_wave(view, width, end, order[first + item])).table;
    int64_t* const rows_by = view.rows_by + int64_t{table} * view.layout.chunks - 1;
    add_together(rows_by + width, -1);
    add_together(rows_by + goals[first + item], 1);
  });
  launch_tiles(stream_, count, layout_.dim(), 0,
               [view, width, end, first, goals, order, starts] FIITED_KERNEL(int64_t item, const Tile& tile) {
                 const int64_t at = first + item;
                 const int goal = static_cast<int>(goals[at]);
                 const uint32_t from = address_in_wave(view, width, end, order[at]);
                 const uint32_t to = view.addresses.of(goal, view.counts[goal - 1] + static_cast<uint32_t>(at) - starts.first[goal]);
                 const std::byte* const source = view.row(from);
                 std::byte* const target = view.row(to);
                 RowHeader header = *reinterpret_cast<const RowHeader*>(source);
                 header.mark = Mark::kChanged;
                 const int chunk = view.layout.chunk;
                 const int kept = (goal < width ? goal : width) * chunk;
                 tile.once([&] {
                   *reinterpret_cast<RowHeader*>(target) = header;
                   view.move(header.key, from, to);
                 });
                 const auto* const old_vector = reinterpret_cast<const typename Stored::Bits*>(source + sizeof(RowHeader));
                 auto* const new_vector = reinterpret_cast<typename Stored::Bits*>(target + sizeof(RowHeader));
                 tile.map(kept, [&](int i) { return old_vector[i]; }, [&](int i, auto x) { new_vector[i] = x; });
                 initialise<Stored>(tile, view, target, kept, goal, header.key, header.table, view.restore_scale);
                 const float* const old_state = view.state(from);
                 float* const new_state = view.state(to);
                 if (view.layout.optimizer == Optimizer::kRowwiseAdagrad) tile.once([&] { new_state[0] = old_state[0]; });
                 for (int moment = 0; moment < view.layout.moments(); ++moment) {
                   const float* const was = old_state + moment * width * chunk;
                   float* const is = new_state + moment * goal * chunk;
                   tile.each(goal * chunk, [&](int i) { is[i] = i < kept ? was[i] : 0.0f; });
                 }
               });
}

// The first `count` rows of `order` leave the index; the sketch remembers their importance, set by set.
void DeviceShard::evict_rows(const View& view, int width, uint32_t end, int64_t count, const int32_t* order) const {
  if (count == 0) return;
  const Scratch<uint32_t> set_of(stream_, count);
  const Scratch<uint32_t> sorted(stream_, count);
  const Scratch<int32_t> by_set(stream_, count);
  launch(stream_, count, [view, width, end, order, set_of = set_of.get()] FIITED_KERNEL(int64_t at) {
    const uint32_t address = address_in_wave(view, width, end, order[at]);
    const RowHeader header = view.header(address);
    set_of[at] = sketch_set_of(header.key, view.first_bucket, view.sets_per_bucket);
    view.erase(header.key, address);
    add_together(view.rows_by + int64_t{header.table} * view.layout.chunks + width - 1, -1);
  });
  const int64_t sets = int64_t{config_.buckets()} * config_.sketch_sets;
  sort_pairs(stream_, count, set_of.get(), sorted.get(), order, by_set.get(), bits_for(static_cast<uint64_t>(sets)));
  launch(stream_, count, [view, width, end, count, sorted = sorted.get(), by_set = by_set.get()] FIITED_KERNEL(int64_t at) {
    const uint32_t number = sorted[at];
    if (at > 0 && sorted[at - 1] == number) return;  // not the first of a set
    uint16_t* const set = view.cells + int64_t{number} * kSketchEntries;
    for (int64_t next = at; next < count && sorted[next] == number; ++next) {
      const RowHeader& header = view.header(address_in_wave(view, width, end, by_set[next]));
      hand_back_to_set(set, view.levels, header.key, header.importance);
    }
  });
  launch_tally(
      stream_, count, index_.partitions(),
      [view, width, end, order] FIITED_KERNEL(int64_t at) {
        return view.part_number(view.header(address_in_wave(view, width, end, order[at])).key);
      },
      [left = left_.get()] FIITED_KERNEL(int bin, uint32_t number) { atomic_add(left + bin, number); });
}

// Rows from the pool's end take the places below `left` that were left in begin..end-1.
void DeviceShard::fill_holes(const View& view, int width, uint32_t begin, uint32_t end, uint32_t count, uint32_t left,
                             const uint32_t* goals) const {
  const auto stays = static_cast<uint32_t>(layout_.chunks + 1);
  const int64_t wave = end - begin;
  const int64_t tail = count - left;  // as many as have left
  const Scratch<int64_t> hole(stream_, wave);
  const Scratch<int64_t> hole_rank(stream_, wave);
  const Scratch<int64_t> filler(stream_, tail);
  const Scratch<int64_t> filler_rank(stream_, tail);
  const Scratch<uint32_t> filler_at(stream_, tail);
  launch(stream_, wave, [begin, end, left, stays, goals, hole = hole.get()] FIITED_KERNEL(int64_t at) {
    const uint32_t position = begin + static_cast<uint32_t>(at);
    hole[at] = position < left && goals[end - 1 - position] != stays;
  });
  launch(stream_, tail, [begin, end, left, stays, goals, filler = filler.get()] FIITED_KERNEL(int64_t at) {
    const uint32_t position = left + static_cast<uint32_t>(at);
    filler[at] = position < begin || position >= end || goals[end - 1 - position] == stays;
  });
  exclusive_scan(stream_, wave, hole.get(), hole_rank.get());
  exclusive_scan(stream_, tail, filler.get(), filler_rank.get());
  launch(stream_, tail,
         [left, filler = filler.get(), filler_rank = filler_rank.get(), filler_at = filler_at.get()] FIITED_KERNEL(int64_t at) {
           if (filler[at]) filler_at[filler_rank[at]] = left + static_cast<uint32_t>(at);
         });
  launch_tiles(stream_, wave, layout_.dim(), 0,
               [view, width, begin, hole = hole.get(), hole_rank = hole_rank.get(), filler_at = filler_at.get()] FIITED_KERNEL(
                   int64_t at, const Tile& tile) {
                 if (!hole[at]) return;
                 const uint32_t from = view.addresses.of(width, filler_at[hole_rank[at]]);
                 const uint32_t to = view.addresses.of(width, begin + static_cast<uint32_t>(at));
                 const auto* const source = reinterpret_cast<const uint32_t*>(view.row(from));
                 auto* const target = reinterpret_cast<uint32_t*>(view.row(to));
                 tile.map(view.layout.stride(width) / 4, [&](int i) { return source[i]; }, [&](int i, uint32_t word) { target[i] = word; });
                 tile.sync();  // the header is written
                 tile.once([&] {
                   view.move(view.header(from).key, from, to);
                   view.header(to).mark = Mark::kChanged;  // it stands elsewhere now
                 });
               });
}

}  // namespace fiited::device
