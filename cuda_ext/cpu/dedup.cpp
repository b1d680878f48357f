#include <algorithm>
#include <bit>
#include <stdexcept>
#include <vector>

#include "core/hash.h"
#include "cpu/batch.h"

namespace fiited {

namespace {

// Open-addressing set of positions in an array of (key, table), at most half full.
class Seen {
 public:
  explicit Seen(int64_t most) : slots_(std::bit_ceil(static_cast<uint64_t>(2 * most + 2)), -1), mask_(slots_.size() - 1) {}

  // Position of (key, table) in `out`, where it is appended if it is new.
  int32_t put(uint64_t key, int32_t table, Deduped& out) {
    for (uint64_t at = (key + static_cast<uint64_t>(table) * kGolden) & mask_;; at = (at + 1) & mask_) {
      const int32_t position = slots_[at];
      if (position < 0) {
        slots_[at] = static_cast<int32_t>(out.unique);
        out.keys[out.unique] = static_cast<int64_t>(key);
        out.tables[out.unique] = table;
        out.counts[out.unique] = 0;
        return static_cast<int32_t>(out.unique++);
      }
      if (static_cast<uint64_t>(out.keys[position]) == key && out.tables[position] == table) return position;
    }
  }

 private:
  std::vector<int32_t> slots_;
  uint64_t mask_;
};

void check_size(int64_t n) {
  if (n >= (int64_t{1} << 31)) throw std::runtime_error("more than 2^31 - 1 ids in one batch");
}

// Reorders the unique keys by owner, stably, and renumbers `inverse`.
void group_by_owner(int64_t n, int workers, Deduped& out, int64_t* splits) {
  std::fill(splits, splits + workers, 0);
  for (int64_t u = 0; u < out.unique; ++u) ++splits[owner_of(static_cast<uint64_t>(out.keys[u]), workers)];
  if (workers == 1) return;
  std::vector<int64_t> next(workers, 0);
  for (int r = 1; r < workers; ++r) next[r] = next[r - 1] + splits[r - 1];
  std::vector<int32_t> place(out.unique);
  for (int64_t u = 0; u < out.unique; ++u) place[u] = static_cast<int32_t>(next[owner_of(static_cast<uint64_t>(out.keys[u]), workers)]++);
  const std::vector<int64_t> keys(out.keys, out.keys + out.unique);
  const std::vector<int32_t> tables(out.tables, out.tables + out.unique);
  const std::vector<int32_t> counts(out.counts, out.counts + out.unique);
  for (int64_t u = 0; u < out.unique; ++u) {
    out.keys[place[u]] = keys[u];
    out.tables[place[u]] = tables[u];
    out.counts[place[u]] = counts[u];
  }
  for (int64_t i = 0; i < n; ++i) out.inverse[i] = place[out.inverse[i]];
}

}  // namespace

void dedup_ids(const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features, uint64_t seed, int workers,
               Deduped& out, int64_t* splits) {
  const int64_t n = features ? feature_ends[features - 1] : 0;
  check_size(n);
  Seen seen(n);
  out.unique = 0;
  int64_t i = 0;
  for (int feature = 0; feature < features; ++feature) {
    const int32_t table = feature_tables[feature];
    const TableSalt salt = table_salt(seed, static_cast<uint32_t>(table));
    for (; i < feature_ends[feature]; ++i) {
      const int32_t position = seen.put(key_of(static_cast<uint64_t>(ids[i]), salt), table, out);
      ++out.counts[position];
      out.inverse[i] = position;
    }
  }
  group_by_owner(n, workers, out, splits);
}

void dedup_keys(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out) {
  check_size(n);
  Seen seen(n);
  out.unique = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t position = seen.put(static_cast<uint64_t>(keys[i]), tables[i], out);
    out.counts[position] += counts[i];
    out.inverse[i] = position;
  }
}

}  // namespace fiited
