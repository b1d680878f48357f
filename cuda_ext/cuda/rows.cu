// Rows out of a shard in device memory, and the check of all its invariants.
#include "cuda/shard.h"

namespace fiited::device {

// Rows' vectors and states, in lists of numbers one behind the other.
template <class Stored>
void DeviceShard::write_rows(int64_t n, const uint32_t* addresses, float* values, const int64_t* value_starts, float* state,
                             const int64_t* state_starts) const {
  const View view = this->view();
  launch_tiles(stream_, n, 0, [view, addresses, values, value_starts, state, state_starts] FIITED_KERNEL(int64_t i, const Tile& tile) {
    const uint32_t address = addresses[i];
    const int width = view.addresses.width(address);
    const auto* const vector = reinterpret_cast<const typename Stored::Bits*>(view.row(address) + sizeof(RowHeader));
    const float* const own_state = view.state(address);
    tile.each(width * view.layout.chunk, [&](int d) { values[value_starts[i] + d] = Stored::to_float(vector[d]); });
    tile.each(view.layout.state_bytes(width) / 4, [&](int d) { state[state_starts[i] + d] = own_state[d]; });
  });
}

namespace {

// Starts of rows of these widths in a list of their vectors, and of their states: [n + 1] each.
void list_starts(Stream stream, const RowLayout& layout, int64_t n, const uint8_t* widths, int64_t* value_starts, int64_t* state_starts) {
  const Scratch<int64_t> sizes(stream, n + 1);
  launch(stream, n + 1,
         [layout, n, widths, sizes = sizes.get()] FIITED_KERNEL(int64_t i) { sizes[i] = i < n ? int64_t{widths[i]} * layout.chunk : 0; });
  exclusive_scan(stream, n + 1, sizes.get(), value_starts);
  launch(stream, n + 1, [layout, n, widths, sizes = sizes.get()] FIITED_KERNEL(int64_t i) {
    sizes[i] = i < n ? int64_t{layout.state_bytes(widths[i])} / 4 : 0;
  });
  exclusive_scan(stream, n + 1, sizes.get(), state_starts);
}

}  // namespace

ExportedRows DeviceShard::export_rows(uint32_t first_bucket, uint32_t end_bucket) const {
  const View view = this->view();
  int64_t all = 0;
  for (int width = 1; width <= layout_.chunks; ++width) all += pools_.count(width);
  const Scratch<int64_t> wanted(stream_, all + 1);
  const Scratch<int64_t> rank(stream_, all + 1);
  const Scratch<uint32_t> address_of(stream_, all + 1);
  set_bytes(stream_, wanted.get(), 0, (all + 1) * sizeof(int64_t));
  int64_t base = 0;
  for (int width = 1; width <= layout_.chunks; ++width) {
    launch(stream_, pools_.count(width),
           [view, width, base, first_bucket, end_bucket, wanted = wanted.get(), address_of = address_of.get()] FIITED_KERNEL(int64_t at) {
             const uint32_t address = view.addresses.of(width, static_cast<uint32_t>(at));
             const uint32_t bucket = bucket_of(view.header(address).key);
             wanted[base + at] = bucket >= first_bucket && bucket < end_bucket;
             address_of[base + at] = address;
           });
    base += pools_.count(width);
  }
  exclusive_scan(stream_, all + 1, wanted.get(), rank.get());
  const int64_t n = read_one(stream_, rank.get() + all);

  // Ordered by key, and by table where keys are equal.
  const Scratch<uint32_t> tables(stream_, n);
  const Scratch<uint32_t> sorted_tables(stream_, n);
  const Scratch<uint64_t> keys(stream_, n);
  const Scratch<uint64_t> sorted_keys(stream_, n);
  const Scratch<int32_t> addresses(stream_, n);
  const Scratch<int32_t> by_table(stream_, n);
  const Scratch<int32_t> ordered(stream_, n);
  launch(stream_, all,
         [view, wanted = wanted.get(), rank = rank.get(), address_of = address_of.get(), tables = tables.get(),
          addresses = addresses.get()] FIITED_KERNEL(int64_t at) {
           if (!wanted[at]) return;
           tables[rank[at]] = view.header(address_of[at]).table;
           addresses[rank[at]] = static_cast<int32_t>(address_of[at]);
         });
  sort_pairs(stream_, n, tables.get(), sorted_tables.get(), addresses.get(), by_table.get(), 16);
  launch(stream_, n, [view, keys = keys.get(), by_table = by_table.get()] FIITED_KERNEL(int64_t i) {
    keys[i] = view.header(static_cast<uint32_t>(by_table[i])).key;
  });
  sort_pairs(stream_, n, keys.get(), sorted_keys.get(), by_table.get(), ordered.get(), 64);

  const Scratch<int64_t> raw_ids(stream_, n);
  const Scratch<int32_t> out_tables(stream_, n);
  const Scratch<uint8_t> widths(stream_, n);
  const Scratch<float> importance(stream_, n);
  launch(stream_, n,
         [view, seed = config_.seed, ordered = ordered.get(), raw_ids = raw_ids.get(), out_tables = out_tables.get(), widths = widths.get(),
          importance = importance.get()] FIITED_KERNEL(int64_t i) {
           const auto address = static_cast<uint32_t>(ordered[i]);
           const RowHeader header = view.header(address);
           raw_ids[i] = static_cast<int64_t>(raw_id_of(header.key, table_salt(seed, header.table)));
           out_tables[i] = header.table;
           widths[i] = static_cast<uint8_t>(view.addresses.width(address));
           importance[i] = header.importance * view.unscale;
         });
  const Scratch<int64_t> value_starts(stream_, n + 1);
  const Scratch<int64_t> state_starts(stream_, n + 1);
  list_starts(stream_, layout_, n, widths.get(), value_starts.get(), state_starts.get());
  const int64_t values_size = read_one(stream_, value_starts.get() + n);
  const int64_t state_size = read_one(stream_, state_starts.get() + n);
  const Scratch<float> values(stream_, values_size);
  const Scratch<float> state(stream_, state_size);
  with_storage(config_.storage, [&](auto stored) {
    write_rows<decltype(stored)>(n, reinterpret_cast<const uint32_t*>(ordered.get()), values.get(), value_starts.get(), state.get(),
                                 state_starts.get());
  });
  return {read_back(stream_, raw_ids.get(), n),          read_back(stream_, out_tables.get(), n),
          read_back(stream_, widths.get(), n),           read_back(stream_, importance.get(), n),
          read_back(stream_, values.get(), values_size), read_back(stream_, state.get(), state_size)};
}

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
      atomic_add(rows_by + int64_t{header.table} * view.layout.chunks + width - 1, int64_t{1});
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
  const int64_t used = ledger_.used() + uncounted_bytes();
  if (used > limit_) throw std::runtime_error("check: more bytes are taken than the limit allows");
  if (used > planned_) throw std::runtime_error("check: more bytes are taken than planned");
}

}  // namespace fiited::device
