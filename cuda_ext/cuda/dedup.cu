#include "core/hash.h"
#include "cuda/api.h"
#include "cuda/faults.h"
#include "cuda/sums.h"

namespace fiited::device {

namespace {

void check_size(int64_t n) {
  if (n > (int64_t{1} << 29)) throw std::runtime_error("more than 2^29 ids in one batch on a device");
}

// Numbers the firsts in the order of their groups, and then of their positions: keys, tables and inverse of `out`. `group_of` [n] is below
// `groups` for firsts and `groups` for others.
void number_firsts(Stream stream, int64_t n, const uint64_t* keys, const int32_t* tables, const int32_t* first, const uint32_t* group_of,
                   uint32_t groups, Deduped& out) {
  const Scratch<uint32_t> sorted(stream, n);
  const Scratch<int32_t> positions(stream, n);
  const Scratch<int32_t> order(stream, n);
  const Scratch<int32_t> place(stream, n);
  launch(stream, n, [positions = positions.get()] FIITED_KERNEL(int64_t i) { positions[i] = static_cast<int32_t>(i); });
  sort_pairs(stream, n, group_of, sorted.get(), positions.get(), order.get(), bits_for(groups));
  const Deduped to = out;
  launch(stream, n,
         [keys, tables, groups, to, sorted = sorted.get(), order = order.get(), place = place.get()] FIITED_KERNEL(int64_t number) {
           if (sorted[number] >= groups) return;
           const int32_t from = order[number];
           to.keys[number] = static_cast<int64_t>(keys[from]);
           to.tables[number] = tables[from];
           place[from] = static_cast<int32_t>(number);
         });
  launch(stream, n, [first, to, place = place.get()] FIITED_KERNEL(int64_t i) { to.inverse[i] = place[first[i]]; });
}

}  // namespace

// A hash table of positions: one that comes to an equal key leaves the lower
// of both there, so that the result does not depend on who comes first.
void find_first(Stream stream, int64_t n, const uint64_t* keys, const int32_t* tables, int32_t* first) {
  const auto size = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(2 * n, 2)));
  const Scratch<int32_t> slots(stream, static_cast<int64_t>(size));
  set_bytes(stream, slots.get(), 0xFF, size * sizeof(int32_t));
  launch(stream, n, [keys, tables, first, size, slots = slots.get()] FIITED_KERNEL(int64_t i) {
    const auto mine = static_cast<int32_t>(i);
    uint64_t at = (keys[i] + static_cast<uint64_t>(tables[i]) * kGolden) & (size - 1);
    while (true) {
      int32_t other = read_shared(slots + at);
      if (other < 0)
        other = static_cast<int32_t>(atomic_cas(reinterpret_cast<uint32_t*>(slots + at), 0xFFFFFFFFu, static_cast<uint32_t>(mine)));
      if (other < 0) break;
      if (keys[other] == keys[i] && tables[other] == tables[i]) {
        if (mine < other) atomic_min(slots + at, mine);
        break;
      }
      at = (at + 1) & (size - 1);
    }
    first[i] = static_cast<int32_t>(at);
  });
  launch(stream, n, [first, slots = slots.get()] FIITED_KERNEL(int64_t i) { first[i] = slots[first[i]]; });
}

void dedup_ids(void* at, int64_t n, const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features,
               uint64_t seed, int workers, Deduped& out, int64_t* splits) {
  const auto stream = static_cast<Stream>(at);
  check_size(n);
  Faults* const faults = device_faults(stream);
  const Scratch<uint64_t> keys(stream, n);
  const Scratch<int32_t> tables(stream, n);
  const Scratch<int32_t> first(stream, n);
  const Scratch<uint32_t> group_of(stream, n);
  launch(stream, features, [n, features, feature_ends, faults] FIITED_KERNEL(int64_t f) {
    if (feature_ends[f] < (f ? feature_ends[f - 1] : 0)) note(faults, Fault::kOffsetsFall, f << 32);
    if (f == features - 1 && feature_ends[f] != n) note(faults, Fault::kOffsetsEnds, f);
  });
  launch(stream, n,
         [ids, feature_ends, feature_tables, features, seed, faults, keys = keys.get(), tables = tables.get()] FIITED_KERNEL(int64_t i) {
           int low = 0;  // the feature: the first that ends behind i
           for (int high = features - 1; low < high;) {
             const int middle = (low + high) / 2;
             if (feature_ends[middle] > i) {
               high = middle;
             } else {
               low = middle + 1;
             }
           }
           int32_t table = feature_tables[low];
           if (table < 0 || table > 0xFFFF) {
             note(faults, Fault::kNoTable, i);
             table = 0;
           }
           tables[i] = table;
           keys[i] = key_of(static_cast<uint64_t>(ids[i]), table_salt(seed, static_cast<uint32_t>(table)));
         });
  find_first(stream, n, keys.get(), tables.get(), first.get());
  const auto groups = static_cast<uint32_t>(workers) << 16;  // an owner's tables
  launch(
      stream, n,
      [workers, groups, keys = keys.get(), tables = tables.get(), first = first.get(), group_of = group_of.get()] FIITED_KERNEL(int64_t i) {
        group_of[i] = first[i] == i ? owner_of(keys[i], static_cast<uint32_t>(workers)) << 16 | static_cast<uint32_t>(tables[i]) : groups;
      });
  number_firsts(stream, n, keys.get(), tables.get(), first.get(), group_of.get(), groups, out);
  const Groups lookups(stream, n, out.inverse, n, Fault::kRow);
  launch(stream, n, [counts = out.counts, starts = lookups.starts()] FIITED_KERNEL(int64_t u) { counts[u] = starts[u + 1] - starts[u]; });

  const Scratch<int64_t> told(stream, workers + static_cast<int64_t>(Fault::kCount));  // what the host reads, in one piece
  told_faults(stream, told.get() + workers);
  set_bytes(stream, told.get(), 0, workers * sizeof(int64_t));
  launch_tally(
      stream, n, workers,
      [groups, group_of = group_of.get()] FIITED_KERNEL(int64_t i) {
        return group_of[i] >= groups ? -1 : static_cast<int>(group_of[i] >> 16);
      },
      [told = told.get()] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(told + bin, static_cast<int64_t>(count)); });
  const std::vector<int64_t> answer = read_back(stream, told.get(), workers + static_cast<int64_t>(Fault::kCount));
  throw_if_told(stream, answer.data() + workers);
  out.unique = 0;
  for (int worker = 0; worker < workers; ++worker) {
    splits[worker] = answer[worker];
    out.unique += answer[worker];
  }
}

void dedup_keys(void* at, int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out) {
  const auto stream = static_cast<Stream>(at);
  check_size(n);
  const auto* words = reinterpret_cast<const uint64_t*>(keys);
  const Scratch<int32_t> first(stream, n);
  const Scratch<uint32_t> group_of(stream, n);
  find_first(stream, n, words, tables, first.get());
  launch(stream, n, [first = first.get(), group_of = group_of.get()] FIITED_KERNEL(int64_t i) { group_of[i] = first[i] == i ? 0u : 1u; });
  number_firsts(stream, n, words, tables, first.get(), group_of.get(), 1, out);
  const Groups arrivals(stream, n, out.inverse, n, Fault::kRow);
  launch(stream, n, [counts, sums = out.counts, starts = arrivals.starts(), order = arrivals.order()] FIITED_KERNEL(int64_t u) {
    int32_t sum = 0;
    for (int32_t at = starts[u]; at < starts[u + 1]; ++at) sum += counts[order[at]];
    sums[u] = sum;
  });
  const Scratch<int64_t> told(stream, 1 + static_cast<int64_t>(Fault::kCount));
  told_faults(stream, told.get() + 1);
  set_bytes(stream, told.get(), 0, sizeof(int64_t));
  launch_sum(stream, n, told.get(), [first = first.get()] FIITED_KERNEL(int64_t i) { return int64_t{first[i] == i}; });
  const std::vector<int64_t> answer = read_back(stream, told.get(), 1 + static_cast<int64_t>(Fault::kCount));
  throw_if_told(stream, answer.data() + 1);
  out.unique = answer[0];
}

}  // namespace fiited::device
