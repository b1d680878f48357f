// Threads for the kernels: whoever loads them says how tasks are run in parallel (torch's own pool, in the binding).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fiited {

struct Threads {
  int (*count)() = [] { return 1; };
  // Calls body(context) once on each of `count` threads and waits for all of them.
  void (*run)(int count, void (*body)(void*), void* context) = [](int, void (*body)(void*), void* context) { body(context); };
};
inline Threads threads;

// Calls visit(task) for each task in [0, tasks), handed out one by one. The order is not fixed: what a task writes must be its own.
template <class Visit>
void for_each_task(int64_t tasks, Visit&& visit) {
  const int used = static_cast<int>(std::min<int64_t>(tasks, threads.count()));
  if (used <= 1) {
    for (int64_t task = 0; task < tasks; ++task) visit(task);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    Visit& visit;
  } context{0, tasks, visit};
  threads.run(
      used,
      [](void* at) {
        auto& shared = *static_cast<Context*>(at);
        for (int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) shared.visit(task);
      },
      &context);
}

// The same over [0, n) in ranges of at most `size`: visit(begin, end).
template <class Visit>
void for_each_range(int64_t n, int64_t size, Visit&& visit) {
  for_each_task((n + size - 1) / size, [&](int64_t task) { visit(task * size, std::min(n, (task + 1) * size)); });
}

}  // namespace fiited
