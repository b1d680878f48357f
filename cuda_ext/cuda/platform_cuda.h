// The platform of cuda/platform.h on a GPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/hash.h"

#define FIITED_KERNEL __device__
#define FIITED_DEVICE __device__ inline

namespace fiited::device {

using Stream = cudaStream_t;

constexpr bool kEmulated = false;

inline void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("fiited: CUDA, ") + what + ": " + cudaGetErrorString(status));
}

inline int current_device() {
  int device = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// ---- atomics ------------------------------------------------------------------------------------------------------------

FIITED_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
FIITED_DEVICE int32_t atomic_add(int32_t* at, int32_t value) { return atomicAdd(at, value); }
FIITED_DEVICE int64_t atomic_add(int64_t* at, int64_t value) {
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value)));
}
FIITED_DEVICE void atomic_min(int32_t* at, int32_t value) { atomicMin(at, value); }
FIITED_DEVICE void atomic_min(int64_t* at, int64_t value) { atomicMin(reinterpret_cast<long long*>(at), static_cast<long long>(value)); }
FIITED_DEVICE uint32_t atomic_cas(uint32_t* at, uint32_t expected, uint32_t wanted) { return atomicCAS(at, expected, wanted); }
FIITED_DEVICE void atomic_and(uint32_t* at, uint32_t bits) { atomicAnd(at, bits); }

// A read of what other threads may be writing by atomics.
template <class T>
FIITED_DEVICE T read_shared(const T* at) {
  return *static_cast<const volatile T*>(at);
}

// Adds a value that is the same for all threads that add to a place together: a warp's are added as one.
FIITED_DEVICE void add_together(int64_t* at, int64_t value) {
  const unsigned active = __activemask();
  const unsigned same = __match_any_sync(active, reinterpret_cast<unsigned long long>(at));
  if (static_cast<int>(threadIdx.x % 32) == __ffs(static_cast<int>(same)) - 1) atomic_add(at, value * __popc(same));
}

// Large arrays that go by once should not push what is needed again out of the cache.
template <class Real>
FIITED_DEVICE Real load_once(const Real* at) {
  return __ldcs(at);
}
template <class Real>
FIITED_DEVICE void store_once(Real* at, Real value) {
  __stcs(at, value);
}

// ---- launches -----------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

inline int multiprocessors() {
  int count = 0;
  require(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()), "cudaDeviceGetAttribute");
  return count;
}

// Enough blocks to fill the device a few times over; items are strided over them.
inline int blocks_for(int64_t n, int64_t in_block) {
  return static_cast<int>(std::min<int64_t>((n + in_block - 1) / in_block, int64_t{64} * multiprocessors()));
}

template <class Body>
__global__ void __launch_bounds__(kThreads) for_items(int64_t n, const Body body) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) body(i);
}

template <class Body>
void launch(Stream stream, int64_t n, const Body& body) {
  if (n <= 0) return;
  for_items<<<blocks_for(n, kThreads), kThreads, 0, stream>>>(n, body);
  require(cudaGetLastError(), "launch");
}

// Lanes of a warp that work on one row: 8, 16 or 32. Their sums are those of the CPU's vector code, to the last bit (cpu/floats.h).
struct Tile {
  static constexpr int kSummed = 8;       // numbers that the CPU adds side by side
  static constexpr int kInFlight = 4;     // loads of each lane before the first is used
  static constexpr int kAddedAtOnce = 2;  // rows of so many loads
  float* scratch;                         // shared memory of this tile
  int lane;
  int lanes;
  unsigned mask;

  // How many a row of so many numbers keeps busy with kInFlight loads each.
  static int lanes_for(int numbers) { return numbers >= 32 * kInFlight ? 32 : numbers >= 16 * kInFlight ? 16 : 8; }

  template <class Visit>
  __device__ void each(int n, const Visit& visit) const {
    for (int i = lane; i < n; i += lanes) visit(i);
  }
  // keep(i, load(i)) for i in [0, n), several loads in flight.
  template <class Load, class Keep>
  __device__ void map(int n, const Load& load, const Keep& keep) const {
    for (int begin = lane; begin < n; begin += kInFlight * lanes) {
      decltype(load(0)) loaded[kInFlight];
#pragma unroll
      for (int at = 0; at < kInFlight; ++at) {
        if (begin + at * lanes < n) loaded[at] = load(begin + at * lanes);
      }
#pragma unroll
      for (int at = 0; at < kInFlight; ++at) {
        if (begin + at * lanes < n) keep(begin + at * lanes, loaded[at]);
      }
    }
  }
  // to[i] = factor(0) * from(0)[i] + factor(1) * from(1)[i] + ..., in this order, for i in [0, n). Each lane finds other rows than the
  // rest.
  template <class Real, class From, class Factor>
  __device__ void add_up(int items, int n, const From& from, const Factor& factor, Real* to) const {
    for (int begin = lane; begin - lane < n; begin += kInFlight * lanes) {
      Real sums[kInFlight] = {};
      for (int found = 0; found < items; found += lanes) {
        const bool mine = found + lane < items;
        const Real* const own = mine ? from(found + lane) : nullptr;
        const Real own_factor = mine ? factor(found + lane) : Real(0);
        const int many = items - found < lanes ? items - found : lanes;
        for (int first = 0; first < many; first += kAddedAtOnce) {
          Real loaded[kAddedAtOnce][kInFlight];
          Real factors[kAddedAtOnce];
#pragma unroll
          for (int item = 0; item < kAddedAtOnce; ++item) {
            if (first + item >= many) continue;
            const Real* const numbers = shared_by(own, first + item);
            factors[item] = __shfl_sync(mask, own_factor, first + item, lanes);
#pragma unroll
            for (int at = 0; at < kInFlight; ++at) {
              if (begin + at * lanes < n) loaded[item][at] = load_once(numbers + begin + at * lanes);
            }
          }
#pragma unroll
          for (int item = 0; item < kAddedAtOnce; ++item) {
            if (first + item >= many) continue;
#pragma unroll
            for (int at = 0; at < kInFlight; ++at) {
              if (begin + at * lanes < n) sums[at] += factors[item] * loaded[item][at];
            }
          }
        }
      }
#pragma unroll
      for (int at = 0; at < kInFlight; ++at) {
        if (begin + at * lanes < n) to[begin + at * lanes] = sums[at];
      }
    }
  }
  // use(prepare(i)) for i in [first, end): each lane prepares another one, and all use each.
  template <class Prepare, class Use>
  __device__ void prepared(int64_t first, int64_t end, const Prepare& prepare, const Use& use) const {
    for (; first < end; first += lanes) {
      decltype(prepare(first)) own{};
      if (first + lane < end) own = prepare(first + lane);
      const int many = end - first < lanes ? static_cast<int>(end - first) : lanes;
      for (int at = 0; at < many; ++at) use(shared_by(own, at));
    }
  }
  // A lane's value, for all.
  template <class T>
  __device__ T shared_by(const T& own, int from) const {
    static_assert(sizeof(T) % sizeof(uint32_t) == 0);
    uint32_t words[sizeof(T) / sizeof(uint32_t)];
    memcpy(words, &own, sizeof(T));
#pragma unroll
    for (uint32_t& word : words) word = __shfl_sync(mask, word, from, lanes);
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
  }
  template <class Part>
  __device__ float sum(int n, const Part& part) const {
    const int whole = n & ~(kSummed - 1);
    float total = 0;
    for (int i = lane % kSummed; i < whole; i += kSummed) total += part(i);
    for (int apart = 1; apart < kSummed; apart *= 2) total += __shfl_xor_sync(mask, total, apart);
    for (int i = whole; i < n; ++i) total += part(i);
    return total;
  }
  // Brings nearer what is soon to be read.
  __device__ void prefetch(const std::byte* begin, int bytes) const {
    constexpr int kLine = 128;
    for (int at = lane * kLine; at < bytes + kLine; at += lanes * kLine) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(begin + (at < bytes ? at : bytes - 1)));
    }
  }
  template <class Visit>
  __device__ void once(const Visit& visit) const {
    if (lane == 0) visit();
  }
  // What one lane makes, for all.
  template <class Make>
  __device__ int32_t told(const Make& make) const {
    int32_t made = 0;
    if (lane == 0) made = make();
    return __shfl_sync(mask, made, 0, lanes);
  }
  __device__ void sync() const { __syncwarp(mask); }
};

template <class Prepared, int kBlocks, class Prepare, class Use>
__global__ void __launch_bounds__(kThreads, kBlocks)
    for_tiles(int64_t n, const int32_t* limit, int at_a_time, int lanes, int scratch_floats, const Prepare prepare, const Use use) {
  extern __shared__ __align__(16) std::byte shared[];
  const int in_block = static_cast<int>(blockDim.x) / lanes;
  const int number = static_cast<int>(threadIdx.x) / lanes;
  Prepared* const prepared = reinterpret_cast<Prepared*>(shared) + number * at_a_time;
  float* const scratch = reinterpret_cast<float*>(shared + sizeof(Prepared) * in_block * at_a_time) + number * scratch_floats;
  const unsigned mask = lanes == 32 ? kWholeWarp : ((1u << lanes) - 1) << (threadIdx.x % 32 / lanes * lanes);
  const Tile tile{scratch, static_cast<int>(threadIdx.x) % lanes, lanes, mask};
  if (limit != nullptr && *limit < n) n = *limit;
  const int64_t stride = int64_t{gridDim.x} * in_block * at_a_time;
  for (int64_t first = (int64_t{blockIdx.x} * in_block + number) * at_a_time; first < n; first += stride) {
    const int many = n - first < at_a_time ? static_cast<int>(n - first) : at_a_time;
    if (tile.lane < many) prepared[tile.lane] = prepare(first + tile.lane);
    for (int at = 0; at < many; ++at) {
      tile.sync();  // what was prepared is there, and nobody needs the item before
      use(prepared[at], tile);
    }
    tile.sync();
  }
}

// use(prepare(item), tile) for each item: a lane prepares, and every lane of a tile uses. `numbers` is what a row has, `scratch_floats`
// what its tile needs. With a `limit`, which is the device's, there are at most so many items. At least `kBlocks` blocks are to fit on a
// multiprocessor: what has many loads of each lane in flight needs registers rather than blocks.
template <class Prepared, int kBlocks = 6, class Prepare, class Use>
void launch_prepared(Stream stream, int64_t n, int numbers, int scratch_floats, const Prepare& prepare, const Use& use,
                     const int32_t* limit = nullptr, int at_a_time = 8) {
  if (n <= 0) return;
  constexpr size_t kMost = 48 * 1024;
  const int lanes = Tile::lanes_for(numbers);
  int threads = kThreads;
  const auto shared = [&] { return threads / lanes * (scratch_floats * sizeof(float) + at_a_time * sizeof(Prepared)); };
  while (threads > 32 && shared() > kMost) threads /= 2;
  if (shared() > kMost) throw std::runtime_error("fiited: rows of more than 12000 values are too wide for the CUDA store");
  for_tiles<Prepared, kBlocks><<<blocks_for(n, int64_t{threads / lanes} * at_a_time), threads, shared(), stream>>>(
      n, limit, at_a_time, lanes, scratch_floats, prepare, use);
  require(cudaGetLastError(), "launch of tiles");
}

// An item, as it is.
struct Itself {
  __device__ int64_t operator()(int64_t item) const { return item; }
};

// body(item, tile) for each item, with nothing to prepare.
template <int kBlocks = 6, class Body>
void launch_tiles(Stream stream, int64_t n, int numbers, int scratch_floats, const Body& body, const int32_t* limit = nullptr) {
  launch_prepared<int64_t, kBlocks>(stream, n, numbers, scratch_floats, Itself{}, body, limit, 1);
}

template <size_t kSums, class NumbersOf>
__global__ void __launch_bounds__(kThreads) for_sums(int64_t n, int64_t* sums, const NumbersOf numbers_of) {
  __shared__ int64_t of_warp[kThreads / 32][kSums];
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  int64_t mine[kSums] = {};
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) {
    const std::array<int64_t, kSums> numbers = numbers_of(i);
#pragma unroll
    for (size_t sum = 0; sum < kSums; ++sum) mine[sum] += numbers[sum];
  }
#pragma unroll
  for (size_t sum = 0; sum < kSums; ++sum) {
    for (int apart = 16; apart > 0; apart /= 2) mine[sum] += __shfl_down_sync(kWholeWarp, mine[sum], apart);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][sum] = mine[sum];
  }
  __syncthreads();
  if (threadIdx.x >= kSums) return;
  int64_t total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += of_warp[warp][threadIdx.x];
  if (total != 0) atomic_add(sums + threadIdx.x, total);
}

// Adds the numbers of all items, an array for each, to sums[0], sums[1], ...
template <size_t kSums, class NumbersOf>
void launch_sums(Stream stream, int64_t n, int64_t* sums, const NumbersOf& numbers_of) {
  if (n <= 0) return;
  for_sums<kSums><<<blocks_for(n, kThreads), kThreads, 0, stream>>>(n, sums, numbers_of);
  require(cudaGetLastError(), "launch of sums");
}

template <class PlaceOf>
__global__ void __launch_bounds__(kThreads) for_counts(int64_t n, int32_t* counts, const PlaceOf place_of) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x - lane; begin < n; begin += stride) {
    const int32_t place = begin + lane < n ? place_of(begin + lane) : -1;
    const unsigned same = __match_any_sync(kWholeWarp, place);
    if (place >= 0 && lane == __ffs(static_cast<int>(same)) - 1) atomicAdd(counts + place, __popc(same));
  }
}

// Adds 1 to counts[place_of(i)] for each item; a warp adds its equal ones together, so that a place of very many is no bottleneck.
template <class PlaceOf>
void launch_counts(Stream stream, int64_t n, int32_t* counts, const PlaceOf& place_of) {
  if (n <= 0) return;
  for_counts<<<blocks_for(n, kThreads), kThreads, 0, stream>>>(n, counts, place_of);
  require(cudaGetLastError(), "launch of counts");
}

template <class BinOf, class Flush>
__global__ void __launch_bounds__(kThreads) for_tally(int64_t n, int bins, const BinOf bin_of, const Flush flush) {
  extern __shared__ uint32_t counts[];
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += kThreads) counts[bin] = 0;
  __syncthreads();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) {
    const int bin = bin_of(i);
    if (bin >= 0) atomicAdd(counts + bin, 1u);
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += kThreads) {
    if (counts[bin]) flush(bin, counts[bin]);
  }
}

// Counts items by bin in shared memory: `bin_of` gives a bin or -1; `flush(bin, count)` adds a block's counts to the whole.
template <class BinOf, class Flush>
void launch_tally(Stream stream, int64_t n, int bins, const BinOf& bin_of, const Flush& flush) {
  if (n <= 0) return;
  const int blocks = std::min(blocks_for(n, kThreads), 8 * multiprocessors());
  for_tally<<<blocks, kThreads, bins * sizeof(uint32_t), stream>>>(n, bins, bin_of, flush);
  require(cudaGetLastError(), "launch of a tally");
}

// ---- memory -------------------------------------------------------------------------------------------------------------

// From the device's stream-ordered pool, which keeps what is given back.
void* allocate(Stream stream, size_t bytes);
void release(Stream stream, void* block);

inline void set_bytes(Stream stream, void* at, int value, size_t bytes) {
  require(cudaMemsetAsync(at, value, bytes, stream), "cudaMemsetAsync");
}
// Waits for the copy, and so for all that the stream did before.
inline void copy_to_host(Stream stream, void* host, const void* device, size_t bytes) {
  require(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

// A copy of few bytes to the host, that waits for what the stream did before it and not for what comes after.
class Reading {
 public:
  Reading(Stream stream, const void* device, size_t bytes);
  const void* wait() const;  // where the bytes stand until the thread's next reading

 private:
  void* page_;
  cudaEvent_t done_;
};
// The host's memory may be used again at once: CUDA stages pageable memory before it returns.
inline void copy_to_device(Stream stream, void* device, const void* host, size_t bytes) {
  require(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
}
inline void copy_on_device(Stream stream, void* to, const void* from, size_t bytes) {
  require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
}
inline void wait(Stream stream) { require(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }

// Address space of which a part, from its beginning on, has memory behind it, in pages of the device (2 MiB).
class Reservation {
 public:
  explicit Reservation(size_t bytes);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  std::byte* begin() const { return reinterpret_cast<std::byte*>(begin_); }

  // Makes the first `bytes` usable and gives memory behind them back; what stands in the part that stays does so. False when there is no
  // memory. When it gives back, the device must be done with what is given.
  bool resize(size_t bytes);

  static size_t device_bytes();

 private:
  int device_ = 0;
  size_t page_ = 0;
  size_t bytes_ = 0;
  CUdeviceptr begin_ = 0;
  std::vector<CUmemGenericAllocationHandle> pages_;
};

// ---- sorts and scans ----------------------------------------------------------------------------------------------------

// Stable, by the lowest `bits` of the keys.
void sort_pairs(Stream stream, int64_t n, const uint32_t* keys, uint32_t* sorted_keys, const int32_t* values, int32_t* sorted_values,
                int bits);
void sort_pairs(Stream stream, int64_t n, const uint64_t* keys, uint64_t* sorted_keys, const int32_t* values, int32_t* sorted_values,
                int bits);
// out[i] = in[0] + ... + in[i - 1], for i in [0, n).
void exclusive_scan(Stream stream, int64_t n, const int64_t* in, int64_t* out);

}  // namespace fiited::device
