// Importance of ids that have no row, in a fixed number of bytes. Sets of sixteen 4-byte entries (one cache line), each a
// 12-bit tag and a 20-bit float; each virtual bucket has its own sets, so the estimates do not depend on who owns the bucket.
// An id that finds no entry takes the smallest one's place when it weighs as much, and wears it down by its weight otherwise
// (weighted majority vote, after Misra and Gries 1982): what comes often stays, a crowd of rare ids does not lift the estimates.
#pragma once

#include <cstdint>

#include "core/hash.h"
#include "core/numeric.h"

namespace fiited {

class Sketch {
 public:
  static constexpr int kEntries = 16;
  static constexpr int64_t kSetBytes = kEntries * 4;

  // `cells` hold `sets_per_bucket` sets for each bucket from `first_bucket` on.
  Sketch(uint32_t* cells, uint32_t first_bucket, uint32_t sets_per_bucket)
      : cells_(cells), first_bucket_(first_bucket), sets_per_bucket_(sets_per_bucket) {}

  [[gnu::always_inline]] void prefetch(uint64_t key) const { __builtin_prefetch(set_of(key), 1); }

  // Adds `weight` to the id and gives its estimate.
  float add(uint64_t key, float weight) {
    uint32_t* set = set_of(key);
    const uint32_t tag = tag12_of(key);
    int smallest = 0;
    for (int at = 0; at < kEntries; ++at) {
      if ((set[at] & 0xFFFu) == tag && (set[at] >> 12) != 0) {
        const float sum = value(set[at]) + weight;
        set[at] = entry(sum, tag);
        return sum;
      }
      if ((set[at] >> 12) < (set[smallest] >> 12)) smallest = at;
    }
    const float least = value(set[smallest]);
    if (weight >= least) {
      set[smallest] = entry(weight, tag);
    } else {
      set[smallest] = entry(least - weight, set[smallest] & 0xFFFu);
    }
    return weight;
  }

  void forget(uint64_t key) {
    uint32_t* set = set_of(key);
    for (int at = 0; at < kEntries; ++at) {
      if ((set[at] & 0xFFFu) == tag12_of(key)) set[at] = 0;
    }
  }

  // Multiplies every estimate by 2^-octaves.
  void lower(int octaves, uint32_t buckets) {
    const uint32_t step = static_cast<uint32_t>(octaves) << 24;  // the exponent's lowest bit in an entry
    const size_t entries = size_t{buckets} * sets_per_bucket_ * kEntries;
    for (size_t at = 0; at < entries; ++at) cells_[at] = cells_[at] >= step + (1u << 24) ? cells_[at] - step : 0;
  }

 private:
  uint32_t* set_of(uint64_t key) const {
    const uint32_t set = reduce_range(static_cast<uint32_t>(key), sets_per_bucket_);
    return cells_ + (size_t{bucket_of(key) - first_bucket_} * sets_per_bucket_ + set) * kEntries;
  }
  // A float that is not negative without its lowest 11 mantissa bits: 8 bits of exponent, 12 of mantissa.
  static float value(uint32_t entry) { return float_of((entry >> 12) << 11); }
  static uint32_t entry(float value, uint32_t tag) { return ((bits_of(value) >> 11) << 12) | tag; }

  uint32_t* cells_;
  uint32_t first_bucket_;
  uint32_t sets_per_bucket_;
};

}  // namespace fiited
