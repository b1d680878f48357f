#include <cstring>

#include "core/hash.h"
#include "cpu/batch.h"

namespace fiited {

// Eight bytes at a time, each word mixed into the running hash, the length last. Stable: saved models depend on it.
void hash_strings(int64_t n, const int64_t* offsets, const uint8_t* bytes, int64_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* at = bytes + offsets[i];
    const auto length = static_cast<uint64_t>(offsets[i + 1] - offsets[i]);
    uint64_t hash = kGolden;
    uint64_t left = length;
    for (; left >= 8; left -= 8, at += 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      hash = mix64(hash ^ word) + kGolden;
    }
    uint64_t word = 0;
    std::memcpy(&word, at, left);
    out[i] = static_cast<int64_t>(mix64(mix64(hash ^ word) + length));
  }
}

void cross_ids(int64_t n, const int64_t* left, const int64_t* right, int64_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<int64_t>(mix64(mix64(static_cast<uint64_t>(left[i]) + kGolden) ^ static_cast<uint64_t>(right[i])));
  }
}

}  // namespace fiited
