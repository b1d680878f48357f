// Memory for large results, kept for the next one of its size: fresh pages cost more to get from the system than the results to
// write. Blocks are whole huge pages.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace fiited {

class Buffers {
 public:
  static constexpr size_t kFrom = size_t{1} << 20;  // smaller results are the allocator's business
  static constexpr size_t kKept = 8;                // free blocks, at most

  void* take(size_t bytes) {
    const size_t size = (bytes + kHuge - 1) & ~(kHuge - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fits = std::find_if(free_.rbegin(), free_.rend(), [&](const Block& block) { return block.size == size; });
      if (fits != free_.rend()) {
        void* const at = fits->at;
        free_.erase(std::next(fits).base());
        return at;
      }
    }
    // Huge pages need their own alignment: a little more is mapped, and its ends are given back.
    auto* const mapped = static_cast<std::byte*>(mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const size_t before = -reinterpret_cast<uintptr_t>(mapped) & (kHuge - 1);
    if (before != 0) munmap(mapped, before);
    munmap(mapped + before + size, kHuge - before);
    madvise(mapped + before, size, MADV_HUGEPAGE);
    return mapped + before;
  }

  void give(void* at, size_t bytes) {
    Block unwanted{nullptr, 0};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back({at, (bytes + kHuge - 1) & ~(kHuge - 1)});
      if (free_.size() > kKept) {
        unwanted = free_.front();  // the one that has been free the longest
        free_.erase(free_.begin());
      }
    }
    if (unwanted.at != nullptr) munmap(unwanted.at, unwanted.size);
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  struct Block {
    void* at;
    size_t size;
  };
  std::mutex mutex_;
  std::vector<Block> free_;
};

// All results' memory; never destroyed, for results may outlive everything else.
inline Buffers& buffers = *new Buffers;

}  // namespace fiited
