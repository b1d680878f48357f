// The platform of cuda/platform.h on a GPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
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

// ---- launches -----------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

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

// Eight lanes that work on one row. Their sums are those of the CPU's vector code, to the last bit (cpu/floats.h).
struct Tile {
  static constexpr int kLanes = 8;
  static constexpr int kInFlight = 4;  // loads of each lane before the first is used
  float* scratch;                      // shared memory of this tile
  int lane;
  unsigned mask;

  template <class Visit>
  __device__ void each(int n, const Visit& visit) const {
    for (int i = lane; i < n; i += kLanes) visit(i);
  }
  // keep(i, load(i)) for i in [0, n), several loads in flight.
  template <class Load, class Keep>
  __device__ void map(int n, const Load& load, const Keep& keep) const {
    int i = lane;
    for (; i + (kInFlight - 1) * kLanes < n; i += kInFlight * kLanes) {
      decltype(load(0)) loaded[kInFlight];
#pragma unroll
      for (int at = 0; at < kInFlight; ++at) loaded[at] = load(i + at * kLanes);
#pragma unroll
      for (int at = 0; at < kInFlight; ++at) keep(i + at * kLanes, loaded[at]);
    }
    for (; i < n; i += kLanes) keep(i, load(i));
  }
  template <class Part>
  __device__ float sum(int n, const Part& part) const {
    const int whole = n & ~(kLanes - 1);
    float total = 0;
    for (int i = lane; i < whole; i += kLanes) total += part(i);
    for (int apart = 1; apart < kLanes; apart *= 2) total += __shfl_xor_sync(mask, total, apart);
    for (int i = whole; i < n; ++i) total += part(i);
    return total;
  }
  template <class Visit>
  __device__ void once(const Visit& visit) const {
    if (lane == 0) visit();
  }
  __device__ void sync() const { __syncwarp(mask); }
};

template <class Body>
__global__ void __launch_bounds__(kThreads) for_tiles(int64_t n, int scratch_floats, const Body body) {
  extern __shared__ float shared[];
  const int in_block = static_cast<int>(blockDim.x) / Tile::kLanes;
  const int number = static_cast<int>(threadIdx.x) / Tile::kLanes;
  const Tile tile{shared + number * scratch_floats, static_cast<int>(threadIdx.x) % Tile::kLanes,
                  0xFFu << (threadIdx.x % 32 / Tile::kLanes * Tile::kLanes)};
  const int64_t stride = int64_t{gridDim.x} * in_block;
  for (int64_t item = int64_t{blockIdx.x} * in_block + number; item < n; item += stride) {
    body(item, tile);
    tile.sync();  // before the next item writes its scratch
  }
}

// body(item, tile) for each item; every lane of a tile runs it.
template <class Body>
void launch_tiles(Stream stream, int64_t n, int scratch_floats, const Body& body) {
  if (n <= 0) return;
  constexpr size_t kMost = 48 * 1024;
  int threads = kThreads;
  const auto shared = [&] { return static_cast<size_t>(threads / Tile::kLanes) * scratch_floats * sizeof(float); };
  while (threads > 32 && shared() > kMost) threads /= 2;
  if (shared() > kMost) throw std::runtime_error("fiited: rows of more than 3072 values are too wide for the CUDA store");
  for_tiles<<<blocks_for(n, threads / Tile::kLanes), threads, shared(), stream>>>(n, scratch_floats, body);
  require(cudaGetLastError(), "launch of tiles");
}

template <class ValueOf>
__global__ void __launch_bounds__(kThreads) for_sum(int64_t n, int64_t* sum, const ValueOf value_of) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  int64_t mine = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) mine += value_of(i);
  for (int apart = 16; apart > 0; apart /= 2) mine += __shfl_down_sync(0xFFFFFFFFu, mine, apart);
  if (threadIdx.x % 32 == 0 && mine != 0) atomic_add(sum, mine);
}

// Adds value_of(i) over all items to *sum.
template <class ValueOf>
void launch_sum(Stream stream, int64_t n, int64_t* sum, const ValueOf& value_of) {
  if (n <= 0) return;
  for_sum<<<blocks_for(n, kThreads), kThreads, 0, stream>>>(n, sum, value_of);
  require(cudaGetLastError(), "launch of a sum");
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
