// Importance of ids that have no row, in a fixed number of bytes. Sets of 32 two-byte entries (one cache line), each a 12-bit tag and
// a 4-bit level, a quarter of an octave apart, that ends a little above what wins a row; from the oldest entry to the newest. Each virtual
// bucket has its own sets, so the estimates do not depend on who owns the bucket.
//
// An id that finds no entry takes the smallest one's place, and adds to what stood there, with probability weight / (least + weight): so
// the estimates are right on average (randomised admission, Ben Basat et al. 2017), though few ids leave a trace at their first
// sight. What it inherits counts from its second sight on, so that a crowd of ids that come once wins no rows.
#pragma once

#include <cstdint>

#include "core/hash.h"
#include "core/numeric.h"

namespace fiited {

constexpr int kSketchEntries = 32;
constexpr int kLevelsPerOctave = 4;
constexpr int kHighestLevel = 15;

// 2^(step / 4)
FIITED_HD float quarter_octaves(int step) { return step == 0 ? 1.0f : step == 1 ? 1.18920712f : step == 2 ? 1.41421356f : 1.68179283f; }

// The largest level whose power 2^(level / 4) is at most x.
FIITED_HD int level_below(float x) {
  const uint32_t bits = bits_of(x);
  const float within = float_of((bits & 0x7FFFFFu) | 0x3F800000u);
  const int step = (within >= quarter_octaves(1)) + (within >= quarter_octaves(2)) + (within >= quarter_octaves(3));
  return kLevelsPerOctave * (static_cast<int>(bits >> 23) - 127) + step;
}

// What the four bits of an entry stand for: 2^((base + code) / 4).
struct LevelScale {
  int base = 0;

  // The scale whose levels end just above `importance`.
  static FIITED_HD LevelScale ending_at(float importance) { return {level_below(importance) - (kHighestLevel - 2)}; }

  FIITED_HD float value(int code) const { return code == 0 ? 0.0f : power(base + code); }

  // The code for a value: rounded up or down by `chance`, such that it is right on average; down for a chance of 1.
  FIITED_HD int code(float value_, float chance) const {
    int level = level_below(value_) - base;
    if (level < 0) level = 0;
    if (level >= kHighestLevel) return kHighestLevel;
    const float below = value(level);
    return chance * (value(level + 1) - below) < value_ - below ? level + 1 : level;
  }

  // An entry of this scale in a scale whose base is higher by `by`; what falls below it is forgotten.
  static FIITED_HD uint16_t moved(uint16_t entry, int by) {
    const int level = entry & kHighestLevel;
    int now = level == 0 ? 0 : level - by;
    if (now > kHighestLevel) now = kHighestLevel;
    return now > 0 ? static_cast<uint16_t>((entry & ~kHighestLevel) | now) : static_cast<uint16_t>(0);
  }

 private:
  static FIITED_HD float power(int level) {  // within the normal floats
    int exponent = level >> 2;
    if (exponent < -126) exponent = -126;
    if (exponent > 127) exponent = 127;
    return float_of(bits_of(quarter_octaves(level & (kLevelsPerOctave - 1))) + (static_cast<uint32_t>(exponent) << 23));
  }
};

// Which of the shard's sets is a key's.
FIITED_HD uint32_t sketch_set_of(uint64_t key, uint32_t first_bucket, uint32_t sets_per_bucket) {
  return (bucket_of(key) - first_bucket) * sets_per_bucket + reduce_range(static_cast<uint32_t>(key), sets_per_bucket);
}

struct SketchPlaces {
  int16_t own;       // the tag's entry, -1 when there is none
  int16_t smallest;  // the oldest of the smallest entries
};

FIITED_HD SketchPlaces find_in_set(const uint16_t* set, uint32_t tag) {
  int16_t own = -1;
  int16_t smallest = 0x7FFF;
  for (int16_t at = 0; at < kSketchEntries; ++at) {  // without branches: the compiler makes a few wide instructions of it
    const int16_t level = set[at] & kHighestLevel;
    const bool mine = (set[at] >> 4) == static_cast<uint16_t>(tag) && level != 0;
    const int16_t here = mine ? at : static_cast<int16_t>(-1);
    const auto rank = static_cast<int16_t>(level * kSketchEntries + at);
    own = own > here ? own : here;
    smallest = smallest < rank ? smallest : rank;
  }
  return {own, static_cast<int16_t>(smallest % kSketchEntries)};
}

// Writes an entry and makes it the newest.
FIITED_HD void put_in_set(uint16_t* set, int16_t at, uint32_t tag, int level) {
  for (int16_t i = 0; i < kSketchEntries - 1; ++i) {  // over the whole line, so that it takes a few wide instructions wherever `at` is
    const uint16_t stays = set[i];
    const uint16_t next = set[i + 1];
    set[i] = i < at ? stays : next;
  }
  set[kSketchEntries - 1] = static_cast<uint16_t>(tag << 4 | static_cast<uint32_t>(level));
}

// 24 random bits as a number in [0, 1).
FIITED_HD float unit_of(uint64_t random) { return static_cast<float>(static_cast<uint32_t>(random) >> 8) * 0x1p-24f; }

// Adds `weight` to the id and gives its estimate. Chance is a hash of key and step, the same for any owner.
FIITED_HD float add_to_set(uint16_t* set, LevelScale scale, uint64_t key, float weight, int64_t step) {
  const uint64_t random = mix64(~key + kGolden * static_cast<uint64_t>(step));
  const SketchPlaces found = find_in_set(set, tag12_of(key));
  if (found.own >= 0) {
    const float sum = scale.value(set[found.own] & kHighestLevel) + weight;
    put_in_set(set, found.own, tag12_of(key), scale.code(sum, unit_of(random >> 32)));
    return sum;
  }
  const float sum = scale.value(set[found.smallest] & kHighestLevel) + weight;
  if (unit_of(random) * sum < weight) {
    const int level = scale.code(sum, unit_of(random >> 32));
    if (level > 0) put_in_set(set, found.smallest, tag12_of(key), level);
  }
  return weight;
}

// Remembers what a row had, unless all entries of its set have more.
FIITED_HD void hand_back_to_set(uint16_t* set, LevelScale scale, uint64_t key, float importance) {
  const SketchPlaces found = find_in_set(set, tag12_of(key));
  const int16_t at = found.own >= 0 ? found.own : found.smallest;
  const int level = scale.code(importance, 1.0f);
  if (level > (set[at] & kHighestLevel)) put_in_set(set, at, tag12_of(key), level);
}

FIITED_HD void forget_in_set(uint16_t* set, uint64_t key) {
  for (int at = 0; at < kSketchEntries; ++at) {
    if (set[at] >> 4 == tag12_of(key)) set[at] = 0;
  }
}

}  // namespace fiited
