#include <algorithm>
#include <bit>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/hash.h"
#include "cpu/batch.h"
#include "cpu/parallel.h"

namespace fiited {

namespace {

// Open-addressing set that numbers keys in the order of their first occurrence: four bytes a slot, at most half full. The keys
// themselves stand in the caller's list, in the order of their numbers.
class Seen {
 public:
  // Empties the set and makes room for `most` keys.
  void reset(int64_t most) {
    const size_t size = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(2 * most, 2)));
    if (slots_.size() < size) slots_.resize(size);
    std::fill_n(slots_.begin(), size, 0);
    mask_ = size - 1;
  }

  // The number of the key for which `same(number)` holds; `next` where there is none.
  template <class Same>
  int32_t put(uint64_t hash, int32_t next, Same&& same) {
    for (uint64_t at = hash & mask_;; at = (at + 1) & mask_) {
      int32_t& slot = slots_[at];
      if (slot == 0) {
        slot = next + 1;
        return next;
      }
      if (same(slot - 1)) return slot - 1;
    }
  }

 private:
  std::vector<int32_t> slots_;  // number plus one; 0: free
  uint64_t mask_ = 0;
};

// This thread's, for one call after the other. Its address is asked for once, not at every key.
Seen& seen_here() {
  static thread_local Seen seen;
  return seen;
}

constexpr int64_t kBlock = 256;  // ids turned into keys together, in vector code

void check_size(int64_t n) {
  if (n >= (int64_t{1} << 31)) throw std::runtime_error("more than 2^31 - 1 ids in one batch");
}

// What one table's lookups came to; `begin` is where its part of the scratch arrays begins.
struct TablePart {
  std::vector<int> features;
  int64_t begin = 0;
  int64_t lookups = 0;
  int32_t unique = 0;
  std::vector<int64_t> next;  // [workers] unique keys by owner; then where the next one goes
};

}  // namespace

void dedup_ids(const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features, uint64_t seed, int workers,
               Deduped& out, int64_t* splits) {
  const int64_t n = features ? feature_ends[features - 1] : 0;
  check_size(n);
  const auto first_of = [&](int feature) { return feature ? feature_ends[feature - 1] : 0; };
  std::vector<TablePart> parts(features ? *std::max_element(feature_tables, feature_tables + features) + 1 : 0);
  for (int feature = 0; feature < features; ++feature) {
    TablePart& part = parts[feature_tables[feature]];
    part.features.push_back(feature);
    part.lookups += feature_ends[feature] - first_of(feature);
  }
  for (size_t table = 1; table < parts.size(); ++table) parts[table].begin = parts[table - 1].begin + parts[table - 1].lookups;

  // Each table by itself: numbers within the table in `inverse`, its keys and counts in the scratch arrays.
  const std::unique_ptr<uint64_t[]> keys(new uint64_t[n]);
  const std::unique_ptr<int32_t[]> counts(new int32_t[n]);
  for_each_task(static_cast<int64_t>(parts.size()), [&](int64_t table) {
    Seen& seen = seen_here();
    TablePart& part = parts[table];
    part.next.assign(workers, 0);
    if (part.lookups == 0) return;
    seen.reset(part.lookups);
    const TableSalt salt = table_salt(seed, static_cast<uint32_t>(table));
    uint64_t* found = keys.get() + part.begin;
    int32_t* count = counts.get() + part.begin;
    uint64_t block[kBlock];
    for (const int feature : part.features) {
      for (int64_t begin = first_of(feature); begin < feature_ends[feature]; begin += kBlock) {
        const int64_t size = std::min(kBlock, feature_ends[feature] - begin);
        for (int64_t i = 0; i < size; ++i) block[i] = key_of(static_cast<uint64_t>(ids[begin + i]), salt);
        for (int64_t i = 0; i < size; ++i) {
          const uint64_t key = block[i];
          const int32_t number = seen.put(key, part.unique, [&](int32_t other) { return found[other] == key; });
          if (number == part.unique) {
            found[number] = key;
            count[number] = 0;
            ++part.next[owner_of(key, workers)];
            ++part.unique;
          }
          ++count[number];
          out.inverse[begin + i] = number;
        }
      }
    }
  });

  out.unique = 0;
  for (int worker = 0; worker < workers; ++worker) {
    const int64_t begin = out.unique;
    for (TablePart& part : parts) out.unique += std::exchange(part.next[worker], out.unique);
    splits[worker] = out.unique - begin;
  }

  // Then to their places, owner by owner and table by table.
  for_each_task(static_cast<int64_t>(parts.size()), [&](int64_t table) {
    TablePart& part = parts[table];
    uint64_t* found = keys.get() + part.begin;
    int32_t* count = counts.get() + part.begin;
    for (int32_t number = 0; number < part.unique; ++number) {
      const auto place = static_cast<int32_t>(part.next[owner_of(found[number], workers)]++);
      out.keys[place] = static_cast<int64_t>(found[number]);
      out.tables[place] = static_cast<int32_t>(table);
      out.counts[place] = std::exchange(count[number], place);
    }
    for (const int feature : part.features) {
      for (int64_t i = first_of(feature); i < feature_ends[feature]; ++i) out.inverse[i] = count[out.inverse[i]];
    }
  });
}

void dedup_keys(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out) {
  check_size(n);
  Seen& seen = seen_here();
  seen.reset(n);
  out.unique = 0;
  for (int64_t i = 0; i < n; ++i) {  // keys of different tables may be equal, so both count
    const auto next = static_cast<int32_t>(out.unique);
    const int32_t number = seen.put(static_cast<uint64_t>(keys[i]) + static_cast<uint64_t>(tables[i]) * kGolden, next,
                                    [&](int32_t other) { return out.keys[other] == keys[i] && out.tables[other] == tables[i]; });
    if (number == next) {
      out.keys[number] = keys[i];
      out.tables[number] = tables[i];
      out.counts[number] = 0;
      ++out.unique;
    }
    out.counts[number] += counts[i];
    out.inverse[i] = number;
  }
}

}  // namespace fiited
