// A shard out to the host's memory and back, for checkpoints: rows are gathered and scattered on the device, in pieces of bounded size.
#include "cuda/shard.h"
#include "cuda/staging.h"

namespace fiited::device {

// What the host reads about rows that are to come: the first refusal, by row and then by kind; and how many go into each partition.
struct Coming {
  int64_t refused;
  uint32_t by_part[kMostParts];
};

namespace {

// Rows that are listed together; emulated, so few that every test goes over their end.
constexpr int64_t kRowsAtATime = kEmulated ? 100 : int64_t{1} << 22;

// Why a row is refused, in the order in which that is looked for.
enum class Refusal : int { kForeign, kInfinite, kNaN, kDoubled, kNoAddress, kTaken, kNoRoom, kCount };

const char* words_for(Refusal why) {
  switch (why) {
    case Refusal::kForeign: return "belongs to another shard";
    case Refusal::kInfinite: return "has a value that is not finite";
    case Refusal::kNaN: return "has NaN in its optimizer state";
    case Refusal::kDoubled: return "is already in the store";
    case Refusal::kNoAddress: return "has an address that is none of its width";
    case Refusal::kTaken: return "has the address of another row";
    default: return "does not fit into the limit of ";
  }
}

FIITED_DEVICE void refuse(Coming* coming, int64_t row, Refusal why) {
  atomic_min(&coming->refused, row * static_cast<int64_t>(Refusal::kCount) + static_cast<int64_t>(why));
}

}  // namespace

// All rows, or those that changed, by width and position; with `mark` they count as saved from now on.
Listed DeviceShard::list_rows(bool all, bool mark) const {
  const View view = this->view();
  Listed found;
  const Scratch<int64_t> wanted(stream_, kRowsAtATime + 1);
  const Scratch<int64_t> rank(stream_, kRowsAtATime + 1);
  const Scratch<uint32_t> addresses(stream_, kRowsAtATime);
  const Scratch<uint16_t> bucket_at(stream_, kRowsAtATime);
  for (int width = 1; width <= layout_.chunks; ++width) {
    for (int64_t begin = 0; begin < pools_.count(width); begin += kRowsAtATime) {
      const int64_t n = std::min<int64_t>(kRowsAtATime, pools_.count(width) - begin);
      launch(stream_, n + 1, [view, all, width, begin, n, wanted = wanted.get()] FIITED_KERNEL(int64_t i) {
        wanted[i] = i < n && (all || view.header(view.addresses.of(width, static_cast<uint32_t>(begin + i))).mark != Mark::kSaved);
      });
      exclusive_scan(stream_, n + 1, wanted.get(), rank.get());
      launch(stream_, n,
             [view, mark, width, begin, wanted = wanted.get(), rank = rank.get(), addresses = addresses.get(),
              bucket_at = bucket_at.get()] FIITED_KERNEL(int64_t i) {
               if (!wanted[i]) return;
               const uint32_t address = view.addresses.of(width, static_cast<uint32_t>(begin + i));
               RowHeader& header = view.header(address);
               addresses[rank[i]] = address;
               bucket_at[rank[i]] = static_cast<uint16_t>(bucket_of(header.key));
               if (mark) header.mark = Mark::kSaved;
             });
      const auto before = static_cast<int64_t>(found.addresses.size());
      const int64_t more = read_one(stream_, rank.get() + n);
      if (more == 0) continue;
      found.addresses.resize(before + more);
      found.buckets.resize(before + more);
      read_back(stream_, addresses.get(), found.addresses.data() + before, more);
      read_back(stream_, bucket_at.get(), found.buckets.data() + before, more);
    }
  }
  return found;
}

std::vector<uint32_t> DeviceShard::addresses_in(uint32_t first_bucket, uint32_t end_bucket) const {
  const Listed rows = list_rows(true, false);
  std::vector<uint32_t> addresses;
  for (size_t i = 0; i < rows.addresses.size(); ++i) {
    if (rows.buckets[i] >= first_bucket && rows.buckets[i] < end_bucket) addresses.push_back(rows.addresses[i]);
  }
  return addresses;
}

void DeviceShard::widths_at(int64_t n, const uint32_t* addresses, uint8_t* widths) const {
  for (int64_t i = 0; i < n; ++i) {
    if (!pools_.holds(addresses[i])) throw std::runtime_error("take: no row stands at address " + std::to_string(addresses[i]));
    widths[i] = static_cast<uint8_t>(pools_.addresses().width(addresses[i]));
  }
}

void DeviceShard::take(int64_t n, const uint32_t* addresses, const HeldRows& out) const {
  in_pieces(layout_, n, out, [&](int64_t first, int64_t count, const HeldRows& to) {
    const Staged staged(stream_, layout_, count, to);
    const Scratch<uint32_t> own(stream_, count);
    upload(stream_, own.get(), addresses + first, count);
    with_storage(config_.storage, [&](auto stored) { gather_rows<decltype(stored)>(count, own.get(), staged.rows()); });
    staged.to_host();
  });
}

template <class Stored>
void DeviceShard::gather_rows(int64_t n, const uint32_t* addresses, const StagedRows& staged) const {
  const View view = this->view();
  launch_tiles(stream_, n, layout_.dim(), 0, [view, seed = config_.seed, addresses, staged] FIITED_KERNEL(int64_t i, const Tile& tile) {
    const uint32_t address = addresses[i];
    const std::byte* const row = view.row(address);
    const int width = view.addresses.width(address);
    tile.once([&] {
      const RowHeader header = *reinterpret_cast<const RowHeader*>(row);
      staged.rows.raw_ids[i] = static_cast<int64_t>(raw_id_of(header.key, table_salt(seed, header.table)));
      staged.rows.tables[i] = header.table;
      staged.rows.importance[i] = header.importance;
    });
    const auto* const vector = reinterpret_cast<const typename Stored::Bits*>(row + sizeof(RowHeader));
    const float* const state = view.state(address);
    auto* const to = static_cast<typename Stored::Bits*>(staged.rows.values) + staged.value_starts[i];
    float* const state_to = staged.rows.state + staged.state_starts[i];
    tile.map(width * view.layout.chunk, [&](int d) { return vector[d]; }, [&](int d, auto x) { to[d] = x; });
    tile.map(view.layout.state_bytes(width) / 4, [&](int d) { return state[d]; }, [&](int d, float x) { state_to[d] = x; });
  });
}

ShardState DeviceShard::state() const {
  if (stale_) read_board();
  ShardState s{step_, decay_.lowered(), levels_.base, counted_};
  s.counted.lookups = known_.lookups;
  s.counted.hits = known_.hits;
  return s;
}

void DeviceShard::sketch(uint16_t* cells, uint8_t* registers) const {
  read_back(stream_, cells_, cells, config_.sketch_bytes() / static_cast<int64_t>(sizeof(uint16_t)));
  read_back(stream_, reinterpret_cast<const uint8_t*>(board_.get()->distinct), registers, int64_t{kRegistersPerBucket} * config_.buckets());
}

void DeviceShard::require_no_rows(const char* what) const {
  for (int width = 1; width <= layout_.chunks; ++width) {
    if (pools_.count(width)) throw std::runtime_error(std::string(what) + ": there are rows in the store already");
  }
}

void DeviceShard::restore(const ShardState& state, double threshold) {
  require_no_rows("restore");
  decay_.restore(state.lowered);
  levels_.base = static_cast<int>(state.base);
  threshold_ = threshold;
  cuts_ = cuts_of(threshold_, config_.levels);
  advance(state.step);
  upload(stream_, &board_.get()->lookups, &state.counted.lookups, 1);
  upload(stream_, &board_.get()->hits, &state.counted.hits, 1);
  stale_ = true;
  counted_ = state.counted;
}

void DeviceShard::reserve(const std::vector<int64_t>& rows_by_width) {
  require_no_rows("reserve");
  for (int width = 1; width <= layout_.chunks; ++width) {
    const int64_t rows = rows_by_width[width - 1];
    if (rows < 0 || !pools_.reserve(width, static_cast<uint64_t>(rows))) {
      throw std::runtime_error("reserve: there is no memory for " + std::to_string(rows) + " rows of width " + std::to_string(width));
    }
    pools_.set_count(width, static_cast<uint32_t>(rows));
  }
  const View view = this->view();
  for (int width = 1; width <= layout_.chunks; ++width) {
    launch(stream_, pools_.count(width),
           [view, width] FIITED_KERNEL(int64_t at) { view.header(view.addresses.of(width, static_cast<uint32_t>(at))) = RowHeader{}; });
  }
}

void DeviceShard::put(int64_t n, const HeldRows& rows, const uint32_t* addresses) {
  in_pieces(layout_, n, rows, [&](int64_t first, int64_t count, const HeldRows& from) {
    const Staged staged(stream_, layout_, count, from);
    staged.to_device();
    with_storage(config_.storage, [&](auto stored) {
      put_piece<decltype(stored)>(first, count, from, staged.rows(), addresses ? addresses + first : nullptr);
    });
  });
}

// Rows `first` .. first+n-1 of those that are put.
template <class Stored>
void DeviceShard::put_piece(int64_t first, int64_t n, const HeldRows& host, const StagedRows& staged, const uint32_t* addresses) {
  const Scratch<uint64_t> keys(stream_, n);
  const Scratch<uint32_t> own(stream_, n);  // addresses
  if (addresses) upload(stream_, own.get(), addresses, n);
  const Scratch<Coming> coming(stream_, 1);
  inspect_rows<Stored>(n, staged, keys.get(), addresses ? own.get() : nullptr, coming.get());
  const Coming told = read_one(stream_, coming.get());
  if (told.refused != kNoFault) {
    const int64_t at = told.refused / static_cast<int64_t>(Refusal::kCount);
    const auto why = static_cast<Refusal>(told.refused % static_cast<int64_t>(Refusal::kCount));
    throw std::runtime_error("row " + std::to_string(first + at) + " (table " + std::to_string(host.tables[at]) + ", id " +
                             std::to_string(host.raw_ids[at]) + ") " + words_for(why) +
                             (why == Refusal::kNoRoom ? std::to_string(limit_) + " bytes" : ""));
  }

  std::vector<uint32_t> more(layout_.chunks + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++more[host.widths[i]];
  if (!addresses) append_rows(n, host.widths, more, own.get());
  const View view = this->view();
  index_.reserve(stream_, view, told.by_part);
  for (int width = 1; width <= layout_.chunks; ++width) planned_ += more[width] * row_bytes_[width];
  scatter_rows<Stored>(n, staged, keys.get(), own.get());
}

// Makes room at the end of the pools, `more[w]` rows of width w; their addresses in the order in which they come.
void DeviceShard::append_rows(int64_t n, const uint8_t* widths, const std::vector<uint32_t>& more, uint32_t* addresses) {
  std::vector<uint32_t> next(layout_.chunks + 1, 0);
  for (int width = 1; width <= layout_.chunks; ++width) {
    next[width] = pools_.count(width);
    if (!pools_.reserve(width, uint64_t{next[width]} + more[width])) {
      throw std::runtime_error("fiited: the device has no memory left for " + std::to_string(more[width]) + " rows more");
    }
  }
  for (int width = 1; width <= layout_.chunks; ++width) pools_.set_count(width, next[width] + more[width]);
  std::vector<uint32_t> own(n);
  for (int64_t i = 0; i < n; ++i) own[i] = pools_.addresses().of(widths[i], next[widths[i]]++);
  upload(stream_, addresses, own.data(), n);
}

// Finds the keys of rows that are to come, and what is wrong with them. Without addresses they are to find room.
template <class Stored>
void DeviceShard::inspect_rows(int64_t n, const StagedRows& staged, uint64_t* keys, const uint32_t* addresses, Coming* coming) const {
  const View view = this->view();
  const Scratch<int32_t> first(stream_, n);
  const Scratch<int32_t> first_there(stream_, n);
  const Scratch<int64_t> bytes(stream_, n);
  const Scratch<int64_t> before(stream_, n);
  set_bytes(stream_, coming, 0, sizeof(Coming));
  launch(stream_, 1, [coming] FIITED_KERNEL(int64_t) { coming->refused = kNoFault; });
  launch(stream_, n, [view, seed = config_.seed, staged, keys, bytes = bytes.get()] FIITED_KERNEL(int64_t i) {
    keys[i] = key_of(static_cast<uint64_t>(staged.rows.raw_ids[i]), table_salt(seed, static_cast<uint32_t>(staged.rows.tables[i])));
    bytes[i] = view.layout.stride(staged.rows.widths[i]) + Index::kBytesPerRow;
  });
  find_first(stream_, n, keys, staged.rows.tables, first.get());
  exclusive_scan(stream_, n, bytes.get(), before.get());
  launch(stream_, n,
         [view, staged, keys, addresses, coming, room = room(), first = first.get(), bytes = bytes.get(),
          before = before.get()] FIITED_KERNEL(int64_t i) {
           if (!view.belongs(keys[i])) refuse(coming, i, Refusal::kForeign);
           if (first[i] != i || view.find(keys[i], staged.rows.tables[i]) != kAbsent) refuse(coming, i, Refusal::kDoubled);
           if (!addresses && before[i] + bytes[i] > room) refuse(coming, i, Refusal::kNoRoom);
         });
  if (addresses) {
    const Scratch<uint64_t> places(stream_, n);
    const Scratch<int32_t> no_tables(stream_, n);
    set_bytes(stream_, no_tables.get(), 0, n * sizeof(int32_t));
    launch(stream_, n, [addresses, places = places.get()] FIITED_KERNEL(int64_t i) { places[i] = mix64(addresses[i]); });
    find_first(stream_, n, places.get(), no_tables.get(), first_there.get());
    launch(stream_, n, [view, staged, addresses, coming, first_there = first_there.get()] FIITED_KERNEL(int64_t i) {
      if (!view.fits(addresses[i], staged.rows.widths[i])) {
        refuse(coming, i, Refusal::kNoAddress);
      } else if (first_there[i] != i || view.header(addresses[i]).mark == Mark::kPlaced) {
        refuse(coming, i, Refusal::kTaken);
      }
    });
  }
  launch_tiles(stream_, n, layout_.dim(), 0, [view, staged, coming] FIITED_KERNEL(int64_t i, const Tile& tile) {
    const int width = staged.rows.widths[i];
    const auto* const vector = static_cast<const typename Stored::Bits*>(staged.rows.values) + staged.value_starts[i];
    const float* const state = staged.rows.state + staged.state_starts[i];
    tile.each(width * view.layout.chunk, [&](int d) {
      const float value = Stored::to_float(vector[d]);
      if (!(value - value == 0)) refuse(coming, i, Refusal::kInfinite);
    });
    tile.each(view.layout.state_bytes(width) / 4, [&](int d) {
      if (state[d] != state[d]) refuse(coming, i, Refusal::kNaN);
    });
  });
  launch_tally(
      stream_, n, index_.partitions(), [view, keys] FIITED_KERNEL(int64_t i) { return view.part_number(keys[i]); },
      [coming] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(coming->by_part + bin, count); });
}

template <class Stored>
void DeviceShard::scatter_rows(int64_t n, const StagedRows& staged, const uint64_t* keys, const uint32_t* addresses) const {
  const View view = this->view();
  launch_tiles(stream_, n, layout_.dim(), 0, [view, staged, keys, addresses] FIITED_KERNEL(int64_t i, const Tile& tile) {
    const uint32_t address = addresses[i];
    const int width = view.addresses.width(address);
    std::byte* const row = view.row(address);
    tile.once([&] {
      const auto table = static_cast<uint16_t>(staged.rows.tables[i]);
      *reinterpret_cast<RowHeader*>(row) = RowHeader{keys[i], staged.rows.importance[i], table, Mark::kPlaced};
      view.put(keys[i], address);
      add_together(view.rows_by + int64_t{table} * view.layout.chunks + width - 1, 1);
    });
    auto* const vector = reinterpret_cast<typename Stored::Bits*>(row + sizeof(RowHeader));
    float* const state = view.state(address);
    const auto* const from = static_cast<const typename Stored::Bits*>(staged.rows.values) + staged.value_starts[i];
    const float* const state_from = staged.rows.state + staged.state_starts[i];
    tile.map(width * view.layout.chunk, [&](int d) { return from[d]; }, [&](int d, auto x) { vector[d] = x; });
    tile.map(view.layout.state_bytes(width) / 4, [&](int d) { return state_from[d]; }, [&](int d, float x) { state[d] = x; });
  });
}

void DeviceShard::put_sketch(uint32_t first_bucket, uint32_t buckets, const uint16_t* cells, int base, const uint8_t* registers) {
  const int64_t in_bucket = int64_t{config_.sketch_sets} * kSketchEntries;
  const int64_t from = first_bucket - config_.first_bucket;
  uint16_t* const own = cells_ + from * in_bucket;
  upload(stream_, own, cells, buckets * in_bucket);
  launch(stream_, buckets * in_bucket,
         [own, by = levels_.base - base] FIITED_KERNEL(int64_t at) { own[at] = LevelScale::moved(own[at], by); });
  upload(stream_, reinterpret_cast<uint8_t*>(board_.get()->distinct) + from * kRegistersPerBucket, registers,
         int64_t{kRegistersPerBucket} * buckets);
  stale_ = true;
}

void DeviceShard::seal() {
  const View view = this->view();
  const Scratch<int64_t> missing(stream_, layout_.chunks);  // of each width, the first row that never came
  launch(stream_, layout_.chunks, [missing = missing.get()] FIITED_KERNEL(int64_t at) { missing[at] = kNoFault; });
  for (int width = 1; width <= layout_.chunks; ++width) {
    launch(stream_, pools_.count(width), [view, width, missing = missing.get()] FIITED_KERNEL(int64_t at) {
      RowHeader& header = view.header(view.addresses.of(width, static_cast<uint32_t>(at)));
      if (header.mark != Mark::kPlaced) atomic_min(missing + width - 1, at);
      header.mark = Mark::kSaved;
    });
  }
  const std::vector<int64_t> found = read_back(stream_, missing.get(), layout_.chunks);
  for (int width = 1; width <= layout_.chunks; ++width) {
    if (found[width - 1] == kNoFault) continue;
    throw std::runtime_error("row " + std::to_string(found[width - 1]) + " of width " + std::to_string(width) + " never came");
  }
}

}  // namespace fiited::device
