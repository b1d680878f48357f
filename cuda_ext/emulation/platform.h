// The platform of cuda/platform.h on the CPU: one thread, the items of a launch in an order that changes from launch to launch, a tile's
// lanes last to first. Device memory is the CPU's.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/hash.h"

#define FIITED_KERNEL
#define FIITED_DEVICE inline

namespace fiited::device {

struct StreamOfEmulation;
using Stream = StreamOfEmulation*;

constexpr bool kEmulated = true;

inline int current_device() { return 0; }

// ---- atomics ------------------------------------------------------------------------------------------------------------

template <class T>
T atomic_add(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
void atomic_min(T* at, T value) {
  *at = std::min(*at, value);
}
inline uint32_t atomic_cas(uint32_t* at, uint32_t expected, uint32_t wanted) {
  const uint32_t before = *at;
  if (before == expected) *at = wanted;
  return before;
}
inline void atomic_and(uint32_t* at, uint32_t bits) { *at &= bits; }
template <class T>
T read_shared(const T* at) {
  return *at;
}
inline void add_together(int64_t* at, int64_t value) { *at += value; }
template <class Real>
Real load_once(const Real* at) {
  return *at;
}
template <class Real>
void store_once(Real* at, Real value) {
  *at = value;
}

// ---- launches -----------------------------------------------------------------------------------------------------------

// A permutation of [0, n): every launch another one.
class Shuffle {
 public:
  explicit Shuffle(int64_t n) : n_(static_cast<uint64_t>(n)) {
    static std::atomic<uint64_t> launches{0};
    const uint64_t random = mix64(launches.fetch_add(1) * kGolden);
    first_ = random % n_;
    step_ = n_ == 1 ? 1 : 1 + (random >> 32) % (n_ - 1);
    while (std::gcd(step_, n_) != 1) ++step_;
  }
  template <class Visit>
  void for_each(Visit&& visit) const {
    uint64_t at = first_;
    for (uint64_t i = 0; i < n_; ++i) {
      visit(static_cast<int64_t>(at));
      at = (at + step_) % n_;
    }
  }

 private:
  uint64_t n_, first_, step_;
};

template <class Body>
void launch(Stream, int64_t n, const Body& body) {
  if (n > 0) Shuffle(n).for_each(body);
}

struct Tile {
  static constexpr int kLanes = 8;
  float* scratch;

  template <class Visit>
  void each(int n, const Visit& visit) const {
    for (int lane = kLanes; lane-- > 0;) {
      for (int i = lane; i < n; i += kLanes) visit(i);
    }
  }
  template <class Load, class Keep>
  void map(int n, const Load& load, const Keep& keep) const {
    each(n, [&](int i) { keep(i, load(i)); });
  }
  template <class Real, class From, class Factor>
  void add_up(int items, int n, const From& from, const Factor& factor, Real* to) const {
    each(n, [&](int i) {
      Real sum = 0;
      for (int item = 0; item < items; ++item) sum += factor(item) * from(item)[i];
      to[i] = sum;
    });
  }
  template <class Part>
  float sum(int n, const Part& part) const {
    float lanes[kLanes] = {};
    const int whole = n & ~(kLanes - 1);
    for (int i = 0; i < whole; ++i) lanes[i % kLanes] += part(i);
    float total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    for (int i = whole; i < n; ++i) total += part(i);
    return total;
  }
  template <class Visit>
  void once(const Visit& visit) const {
    visit();
  }
  void prefetch(const std::byte*, int) const {}
  template <class Prepare, class Use>
  void prepared(int64_t first, int64_t end, const Prepare& prepare, const Use& use) const {
    for (; first < end; ++first) use(prepare(first));
  }
  template <class Make>
  int32_t told(const Make& make) const {
    return make();
  }
  void sync() const {}
};

// Adds the numbers of all items, an array for each, to sums[0], sums[1], ...
template <size_t kSums, class NumbersOf>
void launch_sums(Stream, int64_t n, int64_t* sums, const NumbersOf& numbers_of) {
  launch(nullptr, n, [&](int64_t i) {
    const std::array<int64_t, kSums> numbers = numbers_of(i);
    for (size_t sum = 0; sum < kSums; ++sum) sums[sum] += numbers[sum];
  });
}

// Adds 1 to counts[place_of(i)] for each item.
template <class PlaceOf>
void launch_counts(Stream, int64_t n, int32_t* counts, const PlaceOf& place_of) {
  launch(nullptr, n, [&](int64_t i) {
    const int32_t place = place_of(i);
    if (place >= 0) ++counts[place];
  });
}

template <class Prepared, int = 0, class Prepare, class Use>
void launch_prepared(Stream, int64_t n, int, int scratch_floats, const Prepare& prepare, const Use& use, const int32_t* limit = nullptr,
                     int = 0) {
  if (limit != nullptr && *limit < n) n = *limit;
  std::vector<float> scratch(scratch_floats);
  launch(nullptr, n, [&](int64_t item) {
    std::fill(scratch.begin(), scratch.end(), -1e30f);  // nothing may be read that this item did not write
    const Prepared prepared = prepare(item);
    use(prepared, Tile{scratch.data()});
  });
}

template <int = 0, class Body>
void launch_tiles(Stream stream, int64_t n, int numbers, int scratch_floats, const Body& body, const int32_t* limit = nullptr) {
  launch_prepared<int64_t>(stream, n, numbers, scratch_floats, [](int64_t item) { return item; }, body, limit);
}

// Counts items by bin: `bin_of` gives a bin or -1; `flush(bin, count)` is called now and then, and must add up.
template <class BinOf, class Flush>
void launch_tally(Stream, int64_t n, int bins, const BinOf& bin_of, const Flush& flush) {
  constexpr int64_t kBlock = 1000;
  std::vector<uint32_t> counts(bins);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    std::fill(counts.begin(), counts.end(), 0u);
    launch(nullptr, std::min(kBlock, n - begin), [&](int64_t i) {
      const int bin = bin_of(begin + i);
      if (bin >= 0) ++counts[bin];
    });
    for (int bin = 0; bin < bins; ++bin) {
      if (counts[bin]) flush(bin, counts[bin]);
    }
  }
}

// ---- memory -------------------------------------------------------------------------------------------------------------

inline void* allocate(Stream, size_t bytes) {
  void* block = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (block != nullptr) std::memset(block, 0xA5, bytes);  // what is read before it is written must not look like zeros
  return block;
}
inline void release(Stream, void* block) { std::free(block); }
inline void set_bytes(Stream, void* at, int value, size_t bytes) { std::memset(at, value, bytes); }
inline void copy_to_host(Stream, void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
inline void copy_to_device(Stream, void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
inline void copy_on_device(Stream, void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void wait(Stream) {}

class Reading {
 public:
  Reading(Stream, const void* device, size_t bytes)
      : bytes_(static_cast<const std::byte*>(device), static_cast<const std::byte*>(device) + bytes) {}
  const void* wait() const { return bytes_.data(); }

 private:
  std::vector<std::byte> bytes_;
};

// Address space of which a part, from its beginning on, has memory behind it.
class Reservation {
 public:
  static constexpr size_t kPage = 4096;

  explicit Reservation(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    begin_ = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin_ == MAP_FAILED) throw std::runtime_error("cannot reserve " + std::to_string(bytes_) + " bytes of address space");
  }
  ~Reservation() { munmap(begin_, bytes_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  std::byte* begin() const { return static_cast<std::byte*>(begin_); }

  // Makes the first `bytes` usable and gives memory behind them back; what stands in the part that stays does so. False when there is no
  // memory. When it gives back, the device must be done with what is given.
  bool resize(size_t bytes) {
    const size_t wanted = (bytes + kPage - 1) / kPage * kPage;
    if (wanted > bytes_) return false;
    if (wanted > mapped_ && mprotect(begin() + mapped_, wanted - mapped_, PROT_READ | PROT_WRITE) != 0) return false;
    if (wanted < mapped_) {
      madvise(begin() + wanted, mapped_ - wanted, MADV_DONTNEED);
      mprotect(begin() + wanted, mapped_ - wanted, PROT_NONE);
    }
    mapped_ = wanted;
    return true;
  }

  static size_t device_bytes() { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  void* begin_;
};

// ---- sorts and scans ----------------------------------------------------------------------------------------------------

// Stable, by the lowest `bits` of the keys.
template <class Key>
void sort_pairs(Stream, int64_t n, const Key* keys, Key* sorted_keys, const int32_t* values, int32_t* sorted_values, int bits) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  const Key mask = bits >= static_cast<int>(8 * sizeof(Key)) ? ~Key{0} : static_cast<Key>((Key{1} << bits) - 1);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int64_t i = 0; i < n; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
}

// out[i] = in[0] + ... + in[i - 1], for i in [0, n).
template <class T>
void exclusive_scan(Stream, int64_t n, const T* in, T* out) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = in[i];
    out[i] = sum;
    sum += value;
  }
}

}  // namespace fiited::device
