#include <bit>
#include <cstring>

#include "core/hash.h"
#include "cpu/batch.h"

namespace fiited {

namespace {

// SipHash-1-3 (Aumasson and Bernstein 2012), the keyed hash of CPython's and Rust's dictionaries: who does not know the key cannot
// make two texts that share an id.
class SipHash {
 public:
  explicit SipHash(uint64_t seed) {
    const uint64_t k0 = mix64(seed ^ kGolden);
    const uint64_t k1 = mix64(k0 + kGolden);
    start_[0] = k0 ^ 0x736f6d6570736575ull;
    start_[1] = k1 ^ 0x646f72616e646f6dull;
    start_[2] = k0 ^ 0x6c7967656e657261ull;
    start_[3] = k1 ^ 0x7465646279746573ull;
  }

  uint64_t operator()(const uint8_t* at, uint64_t length) const {
    uint64_t v[4] = {start_[0], start_[1], start_[2], start_[3]};
    uint64_t left = length;
    for (; left >= 8; left -= 8, at += 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      absorb(v, word);
    }
    uint64_t word = 0;
    if (left != 0) std::memcpy(&word, at, left);
    absorb(v, word | length << 56);
    v[2] ^= 0xFF;
    for (int i = 0; i < 3; ++i) round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
  }

 private:
  static void absorb(uint64_t* v, uint64_t word) {
    v[3] ^= word;
    round(v);
    v[0] ^= word;
  }
  static void round(uint64_t* v) {
    v[0] += v[1], v[1] = std::rotl(v[1], 13) ^ v[0], v[0] = std::rotl(v[0], 32);
    v[2] += v[3], v[3] = std::rotl(v[3], 16) ^ v[2];
    v[0] += v[3], v[3] = std::rotl(v[3], 21) ^ v[0];
    v[2] += v[1], v[1] = std::rotl(v[1], 17) ^ v[2], v[2] = std::rotl(v[2], 32);
  }

  uint64_t start_[4];
};

}  // namespace

void hash_strings(int64_t n, const int64_t* offsets, const uint8_t* bytes, uint64_t seed, int64_t* out) {
  const SipHash hash(seed);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<int64_t>(hash(bytes + offsets[i], static_cast<uint64_t>(offsets[i + 1] - offsets[i])));
  }
}

void cross_ids(int64_t n, const int64_t* left, const int64_t* right, uint64_t seed, int64_t* out) {
  const SipHash hash(seed);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t pair[2] = {left[i], right[i]};
    uint8_t bytes[sizeof(pair)];
    std::memcpy(bytes, pair, sizeof(pair));
    out[i] = static_cast<int64_t>(hash(bytes, sizeof(pair)));
  }
}

}  // namespace fiited
