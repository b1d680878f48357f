// Virtual keys: how an id of a table becomes 64 well-mixed bits, and what those bits decide.
//
//   63 ........ 54 | 53 ........ 44 | 43 ..... 32 | 31 ............ 0
//   virtual bucket | partition      | tag         | position in the partition
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FIITED_HD __host__ __device__ inline
#else
#define FIITED_HD inline
#endif

namespace fiited {

constexpr int kBucketBits = 10;
constexpr int kBuckets = 1 << kBucketBits;
constexpr int kMostTables = 1 << 16;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Stafford's variant 13 of the murmur finaliser, a bijection of 64-bit words.
FIITED_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

FIITED_HD uint64_t unmix64(uint64_t x) {
  x = (x ^ (x >> 31) ^ (x >> 62)) * 0x319642B2D24D8EC3ull;
  x = (x ^ (x >> 27) ^ (x >> 54)) * 0x96DE1B173F119089ull;
  return x ^ (x >> 30) ^ (x >> 60);
}

// A keyed bijection for each table: two ids of a table never share a key, and without the seed nobody can aim at a bucket.
// Keys of different tables may be equal, so a row is known by (key, table).
struct TableSalt {
  uint64_t before;
  uint64_t between;
};

FIITED_HD TableSalt table_salt(uint64_t seed, uint32_t table) {
  const uint64_t base = mix64(seed + kGolden * (2ull * table + 1));
  return {base, mix64(base + kGolden)};
}

FIITED_HD uint64_t key_of(uint64_t raw_id, TableSalt salt) { return mix64(mix64(raw_id ^ salt.before) + salt.between); }

FIITED_HD uint64_t raw_id_of(uint64_t key, TableSalt salt) { return unmix64(unmix64(key) - salt.between) ^ salt.before; }

FIITED_HD uint32_t bucket_of(uint64_t key) { return static_cast<uint32_t>(key >> (64 - kBucketBits)); }

// Buckets are dealt to workers in contiguous ranges: worker r owns [ceil(r * 1024 / W), ceil((r + 1) * 1024 / W)).
FIITED_HD uint32_t owner_of(uint64_t key, uint32_t workers) { return (bucket_of(key) * workers) >> kBucketBits; }

FIITED_HD uint32_t partition_bits(uint64_t key) { return static_cast<uint32_t>(key >> 44) & 1023u; }

FIITED_HD uint32_t tag12_of(uint64_t key) { return static_cast<uint32_t>(key >> 32) & 0xFFFu; }

// Maps 32 uniform bits to [0, n) without a division (Lemire 2019, arXiv 1805.10941).
FIITED_HD uint32_t reduce_range(uint32_t bits, uint32_t n) { return static_cast<uint32_t>((static_cast<uint64_t>(bits) * n) >> 32); }

}  // namespace fiited
