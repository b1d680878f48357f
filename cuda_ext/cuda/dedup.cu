#include "core/hash.h"
#include "cuda/api.h"
#include "cuda/faults.h"
#include "cuda/sums.h"

namespace fiited::device {

namespace {

void check_size(int64_t n) {
  if (n > (int64_t{1} << 29)) throw std::runtime_error("more than 2^29 ids in one batch on a device");
}

// Positions in a hash table: one that comes to an equal one leaves the lower of both there, so that the result does not depend on who comes
// first. Finds each position's slot; `batch` says which are equal. `size` is a power of two.
template <class Batch>
void find_slots(Stream stream, int64_t n, const Batch& batch, int32_t* slots, int64_t size, int32_t* slot_of) {
  set_bytes(stream, slots, 0xFF, size * sizeof(int32_t));
  launch(stream, n, [batch, slots, size, slot_of] FIITED_KERNEL(int64_t i) {
    const auto mine = static_cast<int32_t>(i);
    uint64_t at = batch.hash(i) & (size - 1);
    while (true) {
      int32_t other = read_shared(slots + at);
      if (other < 0)
        other = static_cast<int32_t>(atomic_cas(reinterpret_cast<uint32_t*>(slots + at), 0xFFFFFFFFu, static_cast<uint32_t>(mine)));
      if (other < 0) break;
      if (batch.equal(i, other)) {
        if (mine < other) atomic_min(slots + at, mine);
        break;
      }
      at = (at + 1) & (size - 1);
    }
    slot_of[i] = static_cast<int32_t>(at);
  });
}

int64_t slots_for(int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(2 * n, 2)))); }

// Keys of tables, as they arrive from other workers.
struct Keys {
  const uint64_t* keys;
  const int32_t* tables;
  const int32_t* counts;

  FIITED_DEVICE uint64_t key(int64_t i) const { return keys[i]; }
  FIITED_DEVICE int32_t table(int64_t i) const { return tables[i]; }
  FIITED_DEVICE uint64_t hash(int64_t i) const { return keys[i] + static_cast<uint64_t>(tables[i]) * kGolden; }
  FIITED_DEVICE bool equal(int64_t i, int64_t j) const { return keys[i] == keys[j] && tables[i] == tables[j]; }
  FIITED_DEVICE uint32_t group(int64_t) const { return 0; }

  // As many arrivals of a key as there are workers: no place has very many.
  template <class PlaceOf>
  void add_up(Stream stream, int64_t n, int32_t* sums, const PlaceOf& place_of) const {
    launch(stream, n, [counts = counts, sums, place_of] FIITED_KERNEL(int64_t i) { atomic_add(sums + place_of(i), counts[i]); });
  }
};

// Ids of features, as a batch has them. A group is an owner's table.
struct Ids {
  const int64_t* ids;
  const int64_t* feature_ends;
  const int32_t* tables;  // [features] as they are counted: 0 where there is no such table
  const uint32_t* ranks;  // [features] features of lower tables
  int features;
  uint64_t seed;
  uint32_t workers;

  // The first that ends behind i.
  FIITED_DEVICE int feature(int64_t i) const {
    return bisect(features - 1, [&](int at) { return feature_ends[at] <= i; });
  }
  FIITED_DEVICE uint64_t key_in(int32_t table, int64_t i) const {
    return key_of(static_cast<uint64_t>(ids[i]), table_salt(seed, static_cast<uint32_t>(table)));
  }
  FIITED_DEVICE int32_t table(int64_t i) const { return tables[feature(i)]; }
  FIITED_DEVICE uint64_t key(int64_t i) const { return key_in(table(i), i); }
  FIITED_DEVICE uint64_t hash(int64_t i) const {
    const int32_t own = table(i);
    return key_in(own, i) + static_cast<uint64_t>(own) * kGolden;
  }
  FIITED_DEVICE bool equal(int64_t i, int64_t j) const { return ids[i] == ids[j] && table(i) == table(j); }
  FIITED_DEVICE uint32_t group(int64_t i) const {
    const int own = feature(i);
    return owner_of(key_in(tables[own], i), workers) * static_cast<uint32_t>(features) + ranks[own];
  }

  template <class PlaceOf>
  void add_up(Stream stream, int64_t n, int32_t* counts, const PlaceOf& place_of) const {
    launch_counts(stream, n, counts, place_of);
  }
};

// Numbers the distinct ones of a batch in the order of their `groups`, and then of their first positions: keys, tables and inverse of
// `out`. `splits` [workers] is the host's; `groups / workers` belong to each.
template <class Batch>
void number(Stream stream, int64_t n, const Batch& batch, uint32_t groups, int workers, Deduped& out, int64_t* splits) {
  const int64_t size = slots_for(n);
  const Scratch<int32_t> slots(stream, size);
  const Scratch<int32_t> slot_of(stream, n);
  const Scratch<uint32_t> group_of(stream, n);
  const Scratch<uint32_t> sorted(stream, n);
  const Scratch<int32_t> positions(stream, n);
  const Scratch<int32_t> order(stream, n);
  const Scratch<int64_t> told(stream, workers + kFaultWords);  // what the host reads, in one piece
  find_slots(stream, n, batch, slots.get(), size, slot_of.get());
  set_bytes(stream, told.get(), 0, workers * sizeof(int64_t));
  launch_tally(
      stream, n, workers,
      [batch, groups, in_worker = groups / static_cast<uint32_t>(workers), slots = slots.get(), slot_of = slot_of.get(),
       group_of = group_of.get(), positions = positions.get()] FIITED_KERNEL(int64_t i) {
        const bool first = slots[slot_of[i]] == i;
        const uint32_t group = first ? batch.group(i) : groups;
        group_of[i] = group;
        positions[i] = static_cast<int32_t>(i);
        return first ? static_cast<int>(group / in_worker) : -1;
      },
      [told = told.get()] FIITED_KERNEL(int bin, uint32_t count) { atomic_add(told + bin, static_cast<int64_t>(count)); });
  told_faults(stream, told.get() + workers);
  const ReadAhead<int64_t> answer(stream, told.get(), workers + kFaultWords);

  sort_pairs(stream, n, group_of.get(), sorted.get(), positions.get(), order.get(), bits_for(groups));
  const Deduped to = out;
  launch(stream, n,
         [batch, groups, to, sorted = sorted.get(), order = order.get(), slots = slots.get(),
          slot_of = slot_of.get()] FIITED_KERNEL(int64_t number) {
           if (sorted[number] >= groups) return;
           const int32_t from = order[number];
           to.keys[number] = static_cast<int64_t>(batch.key(from));
           to.tables[number] = batch.table(from);
           slots[slot_of[from]] = static_cast<int32_t>(number);
         });
  set_bytes(stream, out.counts, 0, n * sizeof(int32_t));
  batch.add_up(stream, n, out.counts, [to, slots = slots.get(), slot_of = slot_of.get()] FIITED_KERNEL(int64_t i) {
    const int32_t number = slots[slot_of[i]];
    to.inverse[i] = number;
    return number;
  });
  const int64_t* const told_by = answer.wait();
  throw_if_told(stream, told_by + workers);
  out.unique = 0;
  for (int worker = 0; worker < workers; ++worker) {
    splits[worker] = told_by[worker];
    out.unique += told_by[worker];
  }
}

}  // namespace

void find_first(Stream stream, int64_t n, const uint64_t* keys, const int32_t* tables, int32_t* first) {
  const int64_t size = slots_for(n);
  const Scratch<int32_t> slots(stream, size);
  find_slots(stream, n, Keys{keys, tables, nullptr}, slots.get(), size, first);
  launch(stream, n, [first, slots = slots.get()] FIITED_KERNEL(int64_t i) { first[i] = slots[first[i]]; });
}

void dedup_ids(void* at, int64_t n, const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features,
               uint64_t seed, int workers, Deduped& out, int64_t* splits) {
  const auto stream = static_cast<Stream>(at);
  check_size(n);
  Faults* const faults = device_faults(stream);
  const Scratch<int32_t> tables(stream, features);
  const Scratch<uint32_t> ranks(stream, features);
  launch(stream, features,
         [n, features, feature_ends, feature_tables, faults, tables = tables.get(), ranks = ranks.get()] FIITED_KERNEL(int64_t f) {
           const int64_t begin = f ? feature_ends[f - 1] : 0;
           if (feature_ends[f] < begin) note(faults, Fault::kOffsetsFall, f << 32);
           if (f == features - 1 && feature_ends[f] != n) note(faults, Fault::kOffsetsEnds, f);
           const auto there = [](int32_t table) { return table >= 0 && table <= 0xFFFF; };
           if (!there(feature_tables[f]) && begin < feature_ends[f]) note(faults, Fault::kNoTable, begin);
           tables[f] = there(feature_tables[f]) ? feature_tables[f] : 0;
           uint32_t lower = 0;
           for (int other = 0; other < features; ++other) lower += there(feature_tables[other]) && feature_tables[other] < tables[f];
           ranks[f] = lower;
         });
  const Ids batch{ids, feature_ends, tables.get(), ranks.get(), features, seed, static_cast<uint32_t>(workers)};
  number(stream, n, batch, static_cast<uint32_t>(workers) * static_cast<uint32_t>(features), workers, out, splits);
}

void dedup_keys(void* at, int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out) {
  const auto stream = static_cast<Stream>(at);
  check_size(n);
  int64_t unique;
  number(stream, n, Keys{reinterpret_cast<const uint64_t*>(keys), tables, counts}, 1, 1, out, &unique);
}

}  // namespace fiited::device
