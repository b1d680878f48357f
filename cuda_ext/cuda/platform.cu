// The parts of the CUDA platform that are compiled once: the stream-ordered pool, virtual memory, CUB's sorts and scans.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <limits>
#include <map>
#include <mutex>
#include <set>

#include "cuda/platform.h"

namespace fiited::device {

namespace {

// The driver's functions, found at run time: nothing is linked that a machine without a driver lacks.
template <class Function>
Function* driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  require(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(std::string("fiited: this CUDA driver has no ") + name + "; update it");
  }
  return reinterpret_cast<Function*>(function);
}

void require_driver(CUresult status, const char* what) {
  if (status != CUDA_SUCCESS) throw std::runtime_error(std::string("fiited: CUDA driver, ") + what + ": error " + std::to_string(status));
}

CUmemAllocationProp on_device(int device) {
  CUmemAllocationProp property{};
  property.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  property.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  property.location.id = device;
  return property;
}

// Once for each device: memory that is given back stays in the pool, or each operation would get it from the system anew.
void keep_pool(int device) {
  static std::mutex mutex;
  static std::set<int> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!kept.insert(device).second) return;
  cudaMemPool_t pool;
  uint64_t most = std::numeric_limits<uint64_t>::max();
  require(cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
  require(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &most), "cudaMemPoolSetAttribute");
}

}  // namespace

void* allocate(Stream stream, size_t bytes) {
  keep_pool(current_device());
  void* block = nullptr;
  const cudaError_t status = cudaMallocAsync(&block, bytes, stream);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is told by the null pointer
    return nullptr;
  }
  require(status, "cudaMallocAsync");
  return block;
}

void release(Stream stream, void* block) {
  if (block != nullptr) cudaFreeAsync(block, stream);
}

namespace {

// A thread's own: pinned memory, to which the device copies by itself, and an event for each device.
struct ReadingPlace {
  static constexpr size_t kBytes = 64 * 1024;
  void* page = nullptr;
  std::map<int, cudaEvent_t> events;
};
thread_local ReadingPlace reading_place;

}  // namespace

Reading::Reading(Stream stream, const void* device, size_t bytes) {
  ReadingPlace& place = reading_place;
  if (bytes > ReadingPlace::kBytes) throw std::runtime_error("fiited: " + std::to_string(bytes) + " bytes are too many for one reading");
  if (place.page == nullptr) require(cudaHostAlloc(&place.page, ReadingPlace::kBytes, cudaHostAllocPortable), "cudaHostAlloc");
  cudaEvent_t& event = place.events[current_device()];
  if (event == nullptr) require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  require(cudaMemcpyAsync(place.page, device, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  require(cudaEventRecord(event, stream), "cudaEventRecord");
  page_ = place.page;
  done_ = event;
}

const void* Reading::wait() const {
  require(cudaEventSynchronize(done_), "cudaEventSynchronize");
  return page_;
}

Reservation::Reservation(size_t bytes) {
  device_ = current_device();
  const CUmemAllocationProp property = on_device(device_);
  require_driver(
      driver<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity")(&page_, &property, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
      "cuMemGetAllocationGranularity");
  bytes_ = (bytes + page_ - 1) / page_ * page_;
  require_driver(driver<decltype(cuMemAddressReserve)>("cuMemAddressReserve")(&begin_, bytes_, 0, 0, 0), "cuMemAddressReserve");
}

Reservation::~Reservation() {
  try {
    cudaDeviceSynchronize();
    resize(0);
    driver<decltype(cuMemAddressFree)>("cuMemAddressFree")(begin_, bytes_);
  } catch (const std::exception&) {  // the process is going down, and its driver with it
  }
}

bool Reservation::resize(size_t bytes) {
  const size_t wanted = (bytes + page_ - 1) / page_;
  if (wanted * page_ > bytes_) return false;
  const size_t before = pages_.size();
  const CUmemAllocationProp property = on_device(device_);
  while (pages_.size() < wanted) {
    CUmemGenericAllocationHandle page;
    const CUresult status = driver<decltype(cuMemCreate)>("cuMemCreate")(&page, page_, &property, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) {
      resize(before * page_);
      return false;
    }
    require_driver(status, "cuMemCreate");
    require_driver(driver<decltype(cuMemMap)>("cuMemMap")(begin_ + pages_.size() * page_, page_, 0, page, 0), "cuMemMap");
    pages_.push_back(page);
  }
  if (pages_.size() > before) {
    CUmemAccessDesc access{};
    access.location = property.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    require_driver(
        driver<decltype(cuMemSetAccess)>("cuMemSetAccess")(begin_ + before * page_, (pages_.size() - before) * page_, &access, 1),
        "cuMemSetAccess");
  }
  while (pages_.size() > wanted) {
    require_driver(driver<decltype(cuMemUnmap)>("cuMemUnmap")(begin_ + (pages_.size() - 1) * page_, page_), "cuMemUnmap");
    require_driver(driver<decltype(cuMemRelease)>("cuMemRelease")(pages_.back()), "cuMemRelease");
    pages_.pop_back();
  }
  return true;
}

size_t Reservation::device_bytes() {
  size_t free = 0;
  size_t total = 0;
  require(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return total;
}

namespace {

template <class Key>
void sort_pairs_of(Stream stream, int64_t n, const Key* keys, Key* sorted_keys, const int32_t* values, int32_t* sorted_values, int bits) {
  if (n == 0) return;
  size_t bytes = 0;
  require(
      cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, sorted_keys, values, sorted_values, static_cast<int32_t>(n), 0, bits, stream),
      "sort");
  const Scratch<std::byte> scratch(stream, static_cast<int64_t>(bytes));
  require(cub::DeviceRadixSort::SortPairs(scratch.get(), bytes, keys, sorted_keys, values, sorted_values, static_cast<int32_t>(n), 0, bits,
                                          stream),
          "sort");
}

}  // namespace

void sort_pairs(Stream stream, int64_t n, const uint32_t* keys, uint32_t* sorted_keys, const int32_t* values, int32_t* sorted_values,
                int bits) {
  sort_pairs_of(stream, n, keys, sorted_keys, values, sorted_values, bits);
}
void sort_pairs(Stream stream, int64_t n, const uint64_t* keys, uint64_t* sorted_keys, const int32_t* values, int32_t* sorted_values,
                int bits) {
  sort_pairs_of(stream, n, keys, sorted_keys, values, sorted_values, bits);
}

void exclusive_scan(Stream stream, int64_t n, const int64_t* in, int64_t* out) {
  if (n == 0) return;
  size_t bytes = 0;
  require(cub::DeviceScan::ExclusiveSum(nullptr, bytes, in, out, n, stream), "scan");
  const Scratch<std::byte> scratch(stream, static_cast<int64_t>(bytes));
  require(cub::DeviceScan::ExclusiveSum(scratch.get(), bytes, in, out, n, stream), "scan");
}

}  // namespace fiited::device
