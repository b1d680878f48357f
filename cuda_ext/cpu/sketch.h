// The sketch's sets of one shard; what happens within a set stands in core/sketch.h.
#pragma once

#include <cstdint>

#include "core/sketch.h"

namespace fiited {

class Sketch {
 public:
  static constexpr int64_t kSetBytes = kSketchEntries * 2;

  // `cells` hold `sets_per_bucket` sets for each bucket from `first_bucket` on.
  Sketch(uint16_t* cells, uint32_t first_bucket, uint32_t sets_per_bucket)
      : cells_(cells), first_bucket_(first_bucket), sets_per_bucket_(sets_per_bucket) {}

  [[gnu::always_inline]] void prefetch(uint64_t key) const { __builtin_prefetch(set_of(key), 1); }

  float add(uint64_t key, float weight, int64_t step) { return add_to_set(set_of(key), scale_, key, weight, step); }
  void hand_back(uint64_t key, float importance) { hand_back_to_set(set_of(key), scale_, key, importance); }
  void forget(uint64_t key) { forget_in_set(set_of(key), key); }

  // Multiplies every estimate by 2^-octaves.
  void lower(int octaves) { scale_.base -= kLevelsPerOctave * octaves; }

  // Moves the range of the levels so that it ends just above `importance`; what falls below it is forgotten.
  void aim(float importance, uint32_t buckets) {
    const LevelScale scale = LevelScale::ending_at(importance);
    const int by = scale.base - scale_.base;
    if (by == 0) return;
    scale_ = scale;
    const size_t entries = size_t{buckets} * sets_per_bucket_ * kSketchEntries;
    for (size_t at = 0; at < entries; ++at) cells_[at] = LevelScale::moved(cells_[at], by);
  }

  int base() const { return scale_.base; }
  void set_base(int base) { scale_.base = base; }

  // Takes over the sets of a bucket from a sketch whose levels begin at `base`.
  void put_bucket(uint32_t bucket, const uint16_t* cells, int base) {
    const size_t entries = size_t{sets_per_bucket_} * kSketchEntries;
    uint16_t* own = cells_ + size_t{bucket - first_bucket_} * entries;
    for (size_t at = 0; at < entries; ++at) own[at] = LevelScale::moved(cells[at], scale_.base - base);
  }

 private:
  uint16_t* set_of(uint64_t key) const { return cells_ + size_t{sketch_set_of(key, first_bucket_, sets_per_bucket_)} * kSketchEntries; }

  uint16_t* cells_;
  uint32_t first_bucket_;
  uint32_t sets_per_bucket_;
  LevelScale scale_;
};

}  // namespace fiited
