// Counted memory: every block a shard holds is taken here, so that its bytes are known at any time and never pass the limit.
#pragma once

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace fiited {

class Memory {
 public:
  static constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
  static constexpr size_t kPage = 4096;
  static constexpr size_t kMapFrom = 256 * 1024;  // larger blocks come from mmap, so that freeing one gives it back at once

  // Zeroed, 64-byte aligned; nullptr when it would pass the limit or the system has none.
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    if (!charge(static_cast<int64_t>(size))) return nullptr;
    void* block;
    if (size >= kMapFrom) {
      block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (block == MAP_FAILED) block = nullptr;
    } else {
      block = std::aligned_alloc(64, size);
      if (block != nullptr) std::memset(block, 0, size);
    }
    if (block == nullptr) charge(-static_cast<int64_t>(size));
    return block;
  }

  void give(void* block, size_t bytes) {
    if (block == nullptr) return;
    const size_t size = rounded(bytes);
    if (size >= kMapFrom) {
      munmap(block, size);
    } else {
      std::free(block);
    }
    charge(-static_cast<int64_t>(size));
  }

  // Counts bytes as taken, or as given back where negative; false when that would pass the limit.
  bool charge(int64_t bytes) {
    if (bytes > 0 && bytes > limit_ - used_) return false;
    used_ += bytes;
    if (used_ > peak_) peak_ = used_;
    return true;
  }

  // What a block of `bytes` really takes.
  static size_t rounded(size_t bytes) {
    if (bytes >= kMapFrom) return (bytes + kPage - 1) & ~(kPage - 1);
    return (bytes + 63) & ~size_t{63};
  }

  int64_t used() const { return used_; }
  int64_t limit() const { return limit_; }
  void set_limit(int64_t bytes) { limit_ = bytes; }
  int64_t take_peak() {
    const int64_t peak = peak_;
    peak_ = used_;
    return peak;
  }

 private:
  int64_t used_ = 0;
  int64_t peak_ = 0;
  int64_t limit_ = kUnlimited;
};

// An array that grows and shrinks at its end by granules, inside address space that is reserved once: it never moves, growing
// copies nothing, and only its granules take memory. Granules of 2 MiB ask for huge pages.
class Region {
 public:
  static constexpr size_t kHuge = size_t{2} << 20;

  Region(Memory& memory, size_t most_bytes, size_t granule) : memory_(memory), granule_(granule) {
    reserved_ = (most_bytes + 2 * kHuge - 1) & ~(kHuge - 1);
    mapping_ = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::runtime_error("cannot reserve " + std::to_string(reserved_) + " bytes of address space");
    begin_ = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(mapping_) + kHuge - 1) & ~(kHuge - 1));
    if (granule_ % kHuge == 0) madvise(begin_, room(), MADV_HUGEPAGE);
  }
  ~Region() {
    munmap(mapping_, reserved_);
    memory_.charge(-static_cast<int64_t>(taken_));
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::byte* begin() const { return begin_; }
  size_t taken() const { return taken_; }

  // Takes a granule more; false when that would pass the limit, the reservation or what the system has.
  bool grow() {
    if (taken_ + granule_ > room() || !memory_.charge(static_cast<int64_t>(granule_))) return false;
    if (mprotect(begin_ + taken_, granule_, PROT_READ | PROT_WRITE) != 0) {
      memory_.charge(-static_cast<int64_t>(granule_));
      return false;
    }
    taken_ += granule_;
    return true;
  }

  // Gives back the granules that do not hold the first `bytes`.
  void shrink(size_t bytes) {
    const size_t kept = (bytes + granule_ - 1) / granule_ * granule_;
    if (kept >= taken_) return;
    madvise(begin_ + kept, taken_ - kept, MADV_DONTNEED);
    mprotect(begin_ + kept, taken_ - kept, PROT_NONE);
    memory_.charge(-static_cast<int64_t>(taken_ - kept));
    taken_ = kept;
  }

  // More than the machine has is never needed.
  static size_t physical_bytes() { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

 private:
  size_t room() const { return reserved_ - static_cast<size_t>(begin_ - static_cast<std::byte*>(mapping_)); }

  Memory& memory_;
  size_t granule_;
  size_t reserved_ = 0;
  size_t taken_ = 0;
  void* mapping_ = nullptr;
  std::byte* begin_ = nullptr;
};

}  // namespace fiited
