// A pool of threads that share numbered tasks.
#pragma once

#include <cstdint>

namespace bitdecoding {

// Cores that this process may use.
int available_cores() noexcept;

// Calls run(context, task) for every task below num_tasks, each once, in at most num_threads threads, the caller's
// included; returns when all are done. Threads are started at first use and kept; one call at a time has them.
void parallel_for(std::int64_t num_tasks, int num_threads, void (*run)(void* context, std::int64_t task),
                  void* context) noexcept;

template <typename Function>
void parallel_for(std::int64_t num_tasks, int num_threads, Function& function) noexcept {
  parallel_for(
      num_tasks, num_threads, [](void* context, std::int64_t task) { (*static_cast<Function*>(context))(task); },
      &function);
}

}  // namespace bitdecoding
