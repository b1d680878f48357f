// What the operators on one batch take and give, on every device.
#pragma once

#include <cstdint>

#include "core/layout.h"

namespace fiited {

struct Deduped {
  int64_t unique;
  int64_t* keys;     // [N] capacity; `unique` are written
  int32_t* tables;   // [N]
  int32_t* counts;   // [N] lookups of each unique key
  int32_t* inverse;  // [N] position among the unique ones
};

// Shape of a pooled lookup. Bag (f, b) is lookups offsets[f * batch + b] up to offsets[f * batch + b + 1].
struct Bags {
  int64_t features;
  int64_t batch;
  const int64_t* offsets;  // [features * batch + 1]
  const int32_t* inverse;  // [N] row of each lookup
  const void* weights;     // [N] in the values' type, or null
  bool mean;               // divide each bag by its number of lookups
  int chunk;
  int chunks;

  FIITED_HD int64_t lookups() const { return offsets[features * batch]; }
  FIITED_HD int dim() const { return chunk * chunks; }
};

// Gradients of a row are summed in groups of so many, those sums again in groups of so many, and so on, each in order: a row of very many
// lookups can then be summed by many threads, to the same last bit as by one.
constexpr int32_t kSummedTogether = 32;

}  // namespace fiited
