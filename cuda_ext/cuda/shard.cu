// A shard in device memory: what it is made of, its lookups, new rows, and the check of its invariants.
#include <cstddef>

#include "cuda/shard.h"

namespace fiited::device {

DeviceShard::DeviceShard(const ShardConfig& config)
    : StepShard(config),
      index_(nullptr, ledger_, config.partitions_log2()),
      pools_(ledger_, layout_, config.granule()),
      board_(nullptr, 1),
      rows_by_(nullptr, int64_t{config.tables} * config.chunks),
      left_(nullptr, kMostParts) {
  if (config.chunks > kMostChunks) throw std::runtime_error("chunks must be at most " + std::to_string(kMostChunks));
  ledger_.charge(static_cast<int64_t>(Memory::rounded(config.sketch_bytes())));
  cells_ = static_cast<uint16_t*>(allocate(stream_, config.sketch_bytes()));
  if (cells_ == nullptr) throw std::runtime_error("no memory for the sketch of " + std::to_string(config.sketch_bytes()) + " bytes");
  set_bytes(stream_, cells_, 0, config.sketch_bytes());
  board_.fill_bytes(0);
  rows_by_.fill_bytes(0);
  set_limit(config.limit_bytes);
  cuts_ = cuts_of(threshold_, config.levels);
  wait(stream_);
}

DeviceShard::~DeviceShard() {
  try {
    wait(stream_);                   // its members' memory goes back on other streams
  } catch (const std::exception&) {  // the device is gone already
  }
  release(stream_, cells_);
}

int64_t host_reads() { return reads_by_host; }

std::shared_ptr<StepShard> make_shard(const ShardConfig& config) {
  config.check_limit();
  return std::make_shared<DeviceShard>(config);
}

void DeviceShard::set_limit(int64_t bytes) {
  limit_ = bytes > 0 ? bytes : Memory::kUnlimited;
  ledger_.set_limit(bytes > 0 ? bytes - config_.uncounted_bytes() : Memory::kUnlimited);
}

View DeviceShard::view() const {
  View view{};
  view.layout = layout_;
  view.addresses = pools_.addresses();
  for (int width = 1; width <= layout_.chunks; ++width) {
    view.pools[width - 1] = pools_.begin(width);
    view.counts[width - 1] = pools_.count(width);
    view.cuts[width - 1] = cuts_[width - 1];
  }
  view.parts = index_.parts();
  view.part_shift = 10 - config_.partitions_log2();
  view.cells = cells_;
  view.levels = levels_;
  view.first_bucket = config_.first_bucket;
  view.end_bucket = config_.end_bucket;
  view.sets_per_bucket = config_.sketch_sets;
  view.tables = config_.tables;
  view.rows_by = rows_by_.get();
  view.scale = decay_.scale();
  view.unscale = decay_.unscale();
  view.init_scale = static_cast<float>(config_.init_scale);
  view.restore_scale = static_cast<float>(config_.restore_scale);
  return view;
}

void DeviceShard::clear_board() const { set_bytes(stream_, board_.get(), 0, offsetof(Board, lookups)); }

// The host's one look at a step.
Board DeviceShard::read_board() const {
  copy_on_device(stream_, &board_.get()->faults, device_faults(stream_), sizeof(Faults));
  known_ = read_one(stream_, board_.get());
  stale_ = false;
  return known_;
}

void DeviceShard::lookup(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, bool training, int64_t step,
                         uint64_t quota, uint32_t* addresses, uint8_t* widths) {
  const View view = this->view();
  Board* const board = board_.get();
  Faults* const faults = device_faults(stream_);
  const auto find = [view, board, faults, keys, tables, counts, training, addresses, widths] FIITED_KERNEL(int64_t i) {
    const auto key = static_cast<uint64_t>(keys[i]);
    const bool belongs = view.belongs(key);
    const bool table_there = tables[i] >= 0 && tables[i] < view.tables;
    if (!belongs) note(faults, Fault::kForeignKey, i);
    if (!table_there) note(faults, Fault::kNoTable, i);
    const uint32_t address = belongs && table_there ? view.find(key, tables[i]) : kAbsent;
    addresses[i] = address;
    widths[i] = address == kAbsent ? 0 : static_cast<uint8_t>(view.addresses.width(address));
    const int64_t count = training ? counts[i] : 0;
    if (training && belongs) {
      const DistinctMark mark = distinct_mark(key, static_cast<uint32_t>(tables[i]), view.first_bucket);
      uint32_t* const word = board->distinct + mark.place / 4;
      const int shift = mark.place % 4 * 8;
      for (uint32_t now = *word; (now >> shift & 0xFF) < mark.rank;) {  // what it was a while ago will do, for it only rises
        const uint32_t before = atomic_cas(word, now, (now & ~(0xFFu << shift)) | uint32_t{mark.rank} << shift);
        if (before == now) break;
        now = before;
      }
    }
    return std::array<int64_t, 3>{address == kAbsent, count, address == kAbsent ? 0 : count};
  };
  if (!training) {
    launch(stream_, n, find);
    return check_faults(stream_);
  }
  if (threshold_ == 0.0) clear_board();  // else nobody reads what is asked for here
  stale_ = true;
  launch_sums<3>(stream_, n, &board->asked, find);  // and lookups and hits
  if (threshold_ != 0.0) return check_faults(stream_);

  // Every absent key is worth a row of full width, as long as there is room.
  const Board found = read_board();
  throw_if_any(stream_, found.faults);
  if (found.asked > 0) admit_absent(n, keys, tables, found.asked, step, quota, addresses, widths);
}

void DeviceShard::admit_absent(int64_t n, const int64_t* keys, const int32_t* tables, int64_t absent, int64_t step, uint64_t quota,
                               uint32_t* addresses, uint8_t* widths) {
  const View view = this->view();
  Board* const board = board_.get();
  const Scratch<int64_t> wants(stream_, n);
  const Scratch<int64_t> rank(stream_, n);
  const Scratch<int32_t> chosen(stream_, n);
  launch(stream_, n, [view, keys, addresses, step, quota, wants = wants.get()] FIITED_KERNEL(int64_t i) {
    wants[i] = addresses[i] == kAbsent && let_in(static_cast<uint64_t>(keys[i]), step, quota);
  });
  exclusive_scan(stream_, n, wants.get(), rank.get());
  const int64_t most = room() == Memory::kUnlimited ? n : std::max<int64_t>(0, room() / row_bytes_[layout_.chunks]);
  launch_sums<1>(stream_, n, &board->granted,
                 [most, wants = wants.get(), rank = rank.get(), chosen = chosen.get()] FIITED_KERNEL(int64_t i) {
                   const bool granted = wants[i] && rank[i] < most;
                   if (granted) chosen[rank[i]] = static_cast<int32_t>(i);
                   return std::array<int64_t, 1>{granted};
                 });
  launch_tally(
      stream_, n, index_.partitions(),
      [view, keys, most, wants = wants.get(), rank = rank.get()] FIITED_KERNEL(int64_t i) {
        return wants[i] && rank[i] < most ? view.part_number(static_cast<uint64_t>(keys[i])) : -1;
      },
      [board] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(board->by_part + bin, count); });
  Board told = read_board();
  told.by_width[layout_.chunks] = static_cast<uint32_t>(told.granted);
  counted_.asked_bytes += absent * row_bytes_[layout_.chunks];
  counted_.refused += absent - told.granted;
  admit({told.granted, chosen.get(), reinterpret_cast<const uint64_t*>(keys), tables, nullptr, nullptr, addresses, widths}, told);
}

// Gives rows to the keys chosen; `board` counts them by width and partition.
void DeviceShard::admit(const NewRows& rows, const Board& board) {
  if (rows.count == 0) return;
  const View view = this->view();
  Starts starts{};
  for (int width = 1; width <= layout_.chunks; ++width) {
    starts.first[width + 1] = starts.first[width] + board.by_width[width];
    if (!pools_.reserve(width, uint64_t{pools_.count(width)} + board.by_width[width])) {
      throw std::runtime_error("fiited: the device has no memory left for " + std::to_string(board.by_width[width]) + " rows more");
    }
  }
  index_.reserve(stream_, view, board.by_part);
  with_storage(config_.storage, [&](auto stored) { fill<decltype(stored)>(rows, view, starts); });
  for (int width = 1; width <= layout_.chunks; ++width) {
    const int64_t bytes = board.by_width[width] * row_bytes_[width];
    pools_.set_count(width, pools_.count(width) + board.by_width[width]);
    planned_ += bytes;
    counted_.admitted_bytes += bytes;
  }
  counted_.admitted += rows.count;
}

template <class Stored>
void DeviceShard::fill(const NewRows& rows, const View& view, const Starts& starts) const {
  launch_tiles(stream_, rows.count, layout_.dim(), 0, [rows, view, starts] FIITED_KERNEL(int64_t at, const Tile& tile) {
    const int32_t i = rows.chosen[at];
    const int width = rows.widths ? rows.widths[i] : view.layout.chunks;
    const uint32_t address = view.addresses.of(width, view.counts[width - 1] + static_cast<uint32_t>(at) - starts.first[width]);
    std::byte* const row = view.row(address);
    const uint64_t key = rows.keys[i];
    const int32_t table = rows.tables[i];
    tile.once([&] {
      *reinterpret_cast<RowHeader*>(row) =
          RowHeader{key, rows.importance ? rows.importance[i] : 0.0f, static_cast<uint16_t>(table), Mark::kChanged};
      view.put(key, address);
      add_together(view.rows_by + int64_t{table} * view.layout.chunks + width - 1, 1);
      rows.addresses[i] = address;
      if (rows.found_widths) rows.found_widths[i] = static_cast<uint8_t>(width);
    });
    initialise<Stored>(tile, view, row, 0, width, key, table, view.init_scale);
    float* const state = view.state(address);
    tile.each(view.layout.state_bytes(width) / 4, [&](int d) { state[d] = 0; });
  });
}

int64_t DeviceShard::read_starts(int64_t n, int64_t rows, const int32_t* take, const uint32_t* addresses, const uint8_t* widths,
                                 int64_t* starts) const {
  const View view = this->view();
  Faults* const faults = device_faults(stream_);
  const Scratch<int64_t> sizes(stream_, n + 1);
  launch(stream_, rows, [view, addresses, widths, faults] FIITED_KERNEL(int64_t row) {
    if (!view.fits(addresses[row], widths[row])) note(faults, Fault::kMoved, row);
  });
  launch(stream_, n + 1, [view, n, rows, take, addresses, widths, faults, sizes = sizes.get()] FIITED_KERNEL(int64_t i) {
    const int64_t row = i == n ? 0 : take ? take[i] : i;
    const bool there = row >= 0 && row < rows;
    if (i < n && !there) note(faults, Fault::kTake, i);
    sizes[i] = i < n && there && view.fits(addresses[row], widths[row]) ? int64_t{widths[row]} * view.layout.chunk : 0;
  });
  exclusive_scan(stream_, n + 1, sizes.get(), starts);
  const Scratch<int64_t> told(stream_, 1 + kFaultWords);
  copy_on_device(stream_, told.get(), starts + n, sizeof(int64_t));
  told_faults(stream_, told.get() + 1);
  const std::vector<int64_t> answer = read_back(stream_, told.get(), 1 + kFaultWords);
  throw_if_told(stream_, answer.data() + 1);
  return answer[0];
}

namespace {

template <class Stored>
VectorAt<Stored> FIITED_DEVICE vector_at(const View& view, uint32_t address) {
  if (address == kAbsent) return {nullptr, 0};
  return {reinterpret_cast<const typename Stored::Bits*>(view.row(address) + sizeof(RowHeader)),
          view.addresses.width(address) * view.layout.chunk};
}

template <class Stored>
void copy_vectors(Stream stream, const View& view, int64_t n, const int32_t* take, const uint32_t* addresses, const int64_t* starts,
                  float* values) {
  launch_tiles(stream, n, view.layout.dim(), 0, [view, take, addresses, starts, values] FIITED_KERNEL(int64_t i, const Tile& tile) {
    const VectorAt<Stored> vector = vector_at<Stored>(view, addresses[take ? take[i] : i]);
    float* const to = values + starts[i];
    tile.map(vector.live, [&](int d) { return vector.at[d]; }, [&](int d, auto x) { to[d] = Stored::to_float(x); });
  });
}

// The vector of a lookup's row; noted, and of width 0, where the row has moved since.
template <class Stored>
struct StoredRows {
  View view;
  const uint32_t* addresses;
  const uint8_t* widths;
  Faults* faults;
  FIITED_DEVICE VectorAt<Stored> operator()(int64_t row) const {
    const uint32_t address = addresses[row];
    const bool fits = view.fits(address, widths[row]);
    if (!fits) note(faults, Fault::kMoved, row);
    return vector_at<Stored>(view, fits ? address : kAbsent);
  }
};

template <class Stored>
void pool_stored(Stream stream, const View& view, const Bags& bags, int64_t n, int64_t rows, const uint32_t* addresses,
                 const uint8_t* widths, float* out) {
  pool_bags<float, Stored>(stream, bags, n, rows, StoredRows<Stored>{view, addresses, widths, device_faults(stream)}, out);
}

}  // namespace

void DeviceShard::read(int64_t n, const int32_t* take, const uint32_t* addresses, const int64_t* starts, float* values) const {
  const View view = this->view();
  with_storage(config_.storage, [&](auto stored) { copy_vectors<decltype(stored)>(stream_, view, n, take, addresses, starts, values); });
}

void DeviceShard::pool(const Bags& bags, int64_t n, int64_t rows, const uint32_t* addresses, const uint8_t* widths, float* out) const {
  const View view = this->view();
  with_storage(config_.storage, [&](auto stored) { pool_stored<decltype(stored)>(stream_, view, bags, n, rows, addresses, widths, out); });
  check_faults(stream_);
}

void DeviceShard::histogram(int64_t* out) const {
  const Scratch<int64_t> counts(stream_, 2 * kImportanceBins);
  set_bytes(stream_, counts.get(), 0, 2 * kImportanceBins * sizeof(int64_t));
  const View view = this->view();
  for (int width = 1; width <= layout_.chunks; ++width) {
    launch_tally(
        stream_, pools_.count(width), kImportanceBins,
        [view, width] FIITED_KERNEL(int64_t position) {
          return importance_bin(view.header(view.addresses.of(width, static_cast<uint32_t>(position))).importance * view.unscale);
        },
        [counts = counts.get(), bytes = row_bytes_[width]] FIITED_KERNEL(int bin, uint32_t count) {
          atomic_add(counts + bin, static_cast<int64_t>(count));
          atomic_add(counts + kImportanceBins + bin, count * bytes);
        });
  }
  read_back(stream_, counts.get(), out, 2 * kImportanceBins);
}

ShardStats DeviceShard::stats() {
  if (stale_) read_board();
  ShardStats s = stats_of(pools_, index_, ledger_);
  s.distinct = distinct_estimate(reinterpret_cast<const uint8_t*>(known_.distinct), int64_t{kRegistersPerBucket} * config_.buckets());
  s.counted.lookups = known_.lookups;
  s.counted.hits = known_.hits;
  return s;
}

void DeviceShard::rows_by_width(int64_t* out) const { read_back(stream_, rows_by_.get(), out, int64_t{config_.tables} * config_.chunks); }

void DeviceShard::check() const {
  const View view = this->view();
  const int64_t counters = int64_t{config_.tables} * config_.chunks;
  const Scratch<int64_t> wrong(stream_, 2);
  const Scratch<int64_t> rows_by(stream_, counters);
  launch(stream_, 2, [wrong = wrong.get()] FIITED_KERNEL(int64_t kind) { wrong[kind] = kNoFault; });
  set_bytes(stream_, rows_by.get(), 0, counters * sizeof(int64_t));
  int64_t planned = config_.fixed_bytes();
  for (int width = 1; width <= layout_.chunks; ++width) {
    launch(stream_, pools_.count(width), [view, width, wrong = wrong.get(), rows_by = rows_by.get()] FIITED_KERNEL(int64_t at) {
      const uint32_t address = view.addresses.of(width, static_cast<uint32_t>(at));
      const RowHeader header = view.header(address);
      if (view.find(header.key, header.table) != address) atomic_min(wrong, int64_t{address});
      if (!(header.importance >= 0)) atomic_min(wrong + 1, int64_t{address});
      add_together(rows_by + int64_t{header.table} * view.layout.chunks + width - 1, 1);
    });
    planned += pools_.count(width) * row_bytes_[width];
  }
  const std::vector<int64_t> found = read_back(stream_, wrong.get(), 2);
  if (found[0] != kNoFault) throw std::runtime_error("check: the index does not lead to row " + std::to_string(found[0]));
  if (found[1] != kNoFault) throw std::runtime_error("check: importance of row " + std::to_string(found[1]) + " is negative or NaN");
  if (planned != planned_)
    throw std::runtime_error("check: planned bytes are " + std::to_string(planned_) + ", not " + std::to_string(planned));
  if (read_back(stream_, rows_by.get(), counters) != read_back(stream_, rows_by_.get(), counters))
    throw std::runtime_error("check: rows by table and width are miscounted");
  const int64_t used = ledger_.used() + config_.uncounted_bytes();
  if (used > limit_) throw std::runtime_error("check: more bytes are taken than the limit allows");
  if (used > planned_) throw std::runtime_error("check: more bytes are taken than planned");
}

}  // namespace fiited::device
