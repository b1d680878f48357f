// What kernels stand on: streams, launches, tiles of lanes, atomics, memory. Under nvcc that is CUDA; with FIITED_EMULATED, under any
// C++ compiler, the same sources run on the CPU, item after item in shuffled order. Emulation proves logic, not races and not speed.
#pragma once

#if defined(FIITED_EMULATED)
#include "emulation/platform.h"
#else
#include "cuda/platform_cuda.h"
#endif

namespace fiited::device {

// An array that lives as long as the operation that needs it, given back in the order of the stream.
template <class T>
class Scratch {
 public:
  Scratch(Stream stream, int64_t count) : stream_(stream), count_(count > 0 ? count : 1) {
    at_ = static_cast<T*>(allocate(stream, count_ * sizeof(T)));
    if (at_ == nullptr)
      throw std::runtime_error("the device has no memory for " + std::to_string(count_ * sizeof(T)) + " bytes of scratch");
  }
  ~Scratch() { release(stream_, at_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return at_; }
  void fill_bytes(int value) { set_bytes(stream_, at_, value, count_ * sizeof(T)); }

 private:
  Stream stream_;
  int64_t count_;
  T* at_;
};

// The only way from device memory to the host, and the only wait: reads are counted.
inline std::atomic<int64_t> reads_by_host{0};

template <class T>
void read_back(Stream stream, const T* device, T* host, int64_t count) {
  if (count == 0) return;
  reads_by_host += 1;
  copy_to_host(stream, host, device, count * sizeof(T));
}

// A few values, read while the device goes on with what follows.
template <class T>
class ReadAhead {
 public:
  ReadAhead(Stream stream, const T* device, int64_t count) : reading_(stream, device, count * sizeof(T)) { reads_by_host += 1; }
  const T* wait() const { return static_cast<const T*>(reading_.wait()); }

 private:
  Reading reading_;
};

template <class T>
std::vector<T> read_back(Stream stream, const T* device, int64_t count) {
  std::vector<T> host(count);
  read_back(stream, device, host.data(), count);
  return host;
}

template <class T>
T read_one(Stream stream, const T* device) {
  return *ReadAhead<T>(stream, device, 1).wait();
}

template <class T>
void upload(Stream stream, T* device, const T* host, int64_t count) {
  if (count > 0) copy_to_device(stream, device, host, count * sizeof(T));
}

// The first of [0, count) that does not come before what is looked for; `before` holds for those that do, which stand first.
template <class Number, class Before>
FIITED_DEVICE Number bisect(Number count, const Before& before) {
  Number low = 0;
  for (Number high = count; low < high;) {
    const Number middle = (low + high) / 2;
    if (before(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

inline int bits_for(uint64_t highest) { return highest == 0 ? 1 : 64 - std::countl_zero(highest); }

}  // namespace fiited::device
