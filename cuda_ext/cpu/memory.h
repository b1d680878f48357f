// Counted memory: every block a shard holds is taken here, so that its bytes are known at any time and never pass the limit.
#pragma once

#include <malloc.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace fiited {

class Memory {
 public:
  static constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
  static constexpr size_t kPage = 4096;
  static constexpr size_t kMapFrom = 256 * 1024;  // larger blocks come from mmap, so that freeing one gives it back at once

  // Zeroed, 64-byte aligned; nullptr when it would pass the limit or the system has none.
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    if (static_cast<int64_t>(size) > limit_ - used_) return nullptr;
    void* block;
    if (size >= kMapFrom) {
      block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (block == MAP_FAILED) return nullptr;
    } else {
      block = std::aligned_alloc(64, size);
      if (block == nullptr) return nullptr;
      std::memset(block, 0, size);
    }
    used_ += static_cast<int64_t>(size);
    if (used_ > peak_) peak_ = used_;
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
    used_ -= static_cast<int64_t>(size);
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

}  // namespace fiited
