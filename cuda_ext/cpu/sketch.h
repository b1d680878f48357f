// Importance of ids that have no row, in a fixed number of bytes. Sets of 32 two-byte entries (one cache line), each a 12-bit tag and
// a 4-bit level, a quarter of an octave apart, that ends a little above what wins a row; from the oldest entry to the newest. Each virtual
// bucket has its own sets, so the estimates do not depend on who owns the bucket.
//
// An id that finds no entry takes the smallest one's place, and adds to what stood there, with probability weight / (least + weight): so
// the estimates are right on average (randomised admission, Ben Basat et al. 2017), though few ids leave a trace at their first
// sight. What it inherits counts from its second sight on, so that a crowd of ids that come once wins no rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/hash.h"
#include "core/numeric.h"

namespace fiited {

class Sketch {
 public:
  static constexpr int kEntries = 32;
  static constexpr int64_t kSetBytes = kEntries * 2;

  // `cells` hold `sets_per_bucket` sets for each bucket from `first_bucket` on.
  Sketch(uint16_t* cells, uint32_t first_bucket, uint32_t sets_per_bucket)
      : cells_(cells), first_bucket_(first_bucket), sets_per_bucket_(sets_per_bucket) {}

  [[gnu::always_inline]] void prefetch(uint64_t key) const { __builtin_prefetch(set_of(key), 1); }

  // Adds `weight` to the id and gives its estimate. Chance is a hash of key and step, the same for any owner.
  float add(uint64_t key, float weight, int64_t step) {
    uint16_t* set = set_of(key);
    const uint64_t random = mix64(~key + kGolden * static_cast<uint64_t>(step));
    const Found found = find(set, tag12_of(key));
    if (found.own >= 0) {
      const float sum = value(code_of(set[found.own])) + weight;
      put(set, found.own, tag12_of(key), code(sum, unit(random >> 32)));
      return sum;
    }
    const float sum = value(code_of(set[found.smallest])) + weight;
    if (unit(random) * sum < weight) {
      const int level = code(sum, unit(random >> 32));
      if (level > 0) put(set, found.smallest, tag12_of(key), level);
    }
    return weight;
  }

  // Remembers what a row had, unless all entries of its set have more.
  void hand_back(uint64_t key, float importance) {
    uint16_t* set = set_of(key);
    const Found found = find(set, tag12_of(key));
    const int16_t at = found.own >= 0 ? found.own : found.smallest;
    const int level = code(importance, 1.0f);
    if (level > code_of(set[at])) put(set, at, tag12_of(key), level);
  }

  void forget(uint64_t key) {
    uint16_t* set = set_of(key);
    for (int at = 0; at < kEntries; ++at) {
      if (set[at] >> 4 == tag12_of(key)) set[at] = 0;
    }
  }

  // Multiplies every estimate by 2^-octaves.
  void lower(int octaves) { base_ -= kPerOctave * octaves; }

  int base() const { return base_; }
  void set_base(int base) { base_ = base; }

  // Takes over the sets of a bucket from a sketch whose levels begin at `base`.
  void put_bucket(uint32_t bucket, const uint16_t* cells, int base) {
    const size_t entries = size_t{sets_per_bucket_} * kEntries;
    uint16_t* own = cells_ + size_t{bucket - first_bucket_} * entries;
    for (size_t at = 0; at < entries; ++at) own[at] = relevelled(cells[at], base_ - base);
  }

  // Moves the range of the levels so that it ends just above `importance`; what falls below it is forgotten.
  void aim(float importance, uint32_t buckets) {
    const int base = level_below(importance) - (kHighest - 2);
    const int by = base - base_;
    if (by == 0) return;
    base_ = base;
    const size_t entries = size_t{buckets} * sets_per_bucket_ * kEntries;
    for (size_t at = 0; at < entries; ++at) cells_[at] = relevelled(cells_[at], by);
  }

 private:
  static constexpr int kPerOctave = 4;
  static constexpr int kHighest = 15;
  static constexpr float kSteps[kPerOctave] = {1.0f, 1.18920712f, 1.41421356f, 1.68179283f};  // 2^(i / 4)

  struct Found {
    int16_t own;       // the tag's entry, -1 when there is none
    int16_t smallest;  // the oldest of the smallest entries
  };

  uint16_t* set_of(uint64_t key) const {
    const uint32_t set = reduce_range(static_cast<uint32_t>(key), sets_per_bucket_);
    return cells_ + (size_t{bucket_of(key) - first_bucket_} * sets_per_bucket_ + set) * kEntries;
  }

  // An entry whose level is counted from a base that is `by` higher.
  static uint16_t relevelled(uint16_t entry, int by) {
    const int level = code_of(entry);
    const int moved = level == 0 ? 0 : std::min(level - by, kHighest);
    return moved > 0 ? static_cast<uint16_t>((entry & ~kHighest) | moved) : 0;
  }

  static int code_of(uint16_t entry) { return entry & kHighest; }

  static Found find(const uint16_t* set, uint32_t tag) {
    int16_t own = -1;
    int16_t smallest = INT16_MAX;
    for (int16_t at = 0; at < kEntries; ++at) {  // without branches: the compiler makes a few wide instructions of it
      const int16_t level = set[at] & kHighest;
      const bool mine = (set[at] >> 4) == static_cast<uint16_t>(tag) && level != 0;
      own = std::max<int16_t>(own, mine ? at : -1);
      smallest = std::min<int16_t>(smallest, static_cast<int16_t>(level * kEntries + at));
    }
    return {own, static_cast<int16_t>(smallest % kEntries)};
  }

  // Writes an entry and makes it the newest.
  static void put(uint16_t* set, int16_t at, uint32_t tag, int level) {
    for (int16_t i = 0; i < kEntries - 1; ++i) {  // over the whole line, so that it takes a few wide instructions wherever `at` is
      const uint16_t stays = set[i];
      const uint16_t next = set[i + 1];
      set[i] = i < at ? stays : next;
    }
    set[kEntries - 1] = static_cast<uint16_t>(tag << 4 | static_cast<uint32_t>(level));
  }

  // 24 random bits as a number in [0, 1).
  static float unit(uint64_t random) { return static_cast<float>(static_cast<uint32_t>(random) >> 8) * 0x1p-24f; }

  // 2^(level / 4), within the normal floats.
  static float power(int level) {
    const int exponent = std::clamp(level >> 2, -126, 127);
    return float_of(bits_of(kSteps[level & (kPerOctave - 1)]) + (static_cast<uint32_t>(exponent) << 23));
  }
  float value(int code) const { return code == 0 ? 0.0f : power(base_ + code); }

  // The largest level whose power is at most x.
  static int level_below(float x) {
    const uint32_t bits = bits_of(x);
    const float within = float_of((bits & 0x7FFFFFu) | 0x3F800000u);
    const int step = (within >= kSteps[1]) + (within >= kSteps[2]) + (within >= kSteps[3]);
    return kPerOctave * (static_cast<int>(bits >> 23) - 127) + step;
  }

  // The code for a value: rounded up or down by `chance`, such that it is right on average; down for a chance of 1.
  int code(float value_, float chance) const {
    const int level = std::max(level_below(value_) - base_, 0);
    if (level >= kHighest) return kHighest;
    const float below = value(level);
    return chance * (value(level + 1) - below) < value_ - below ? level + 1 : level;
  }

  uint16_t* cells_;
  uint32_t first_bucket_;
  uint32_t sets_per_bucket_;
  int base_ = 0;  // a code stands for 2^((base + code) / 4)
};

}  // namespace fiited
