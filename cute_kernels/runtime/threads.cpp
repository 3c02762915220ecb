// Our own threads rather than OpenMP: torch brings its own OpenMP runtime, and a second one in a process costs cores.
#include "threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace bitdecoding {
namespace {

// condition.wait(lock, done). GCC 12's own asks for a libstdc++ that distributions with glibc 2.34 do not have.
template <typename Done>
void wait(std::condition_variable* condition, std::unique_lock<std::mutex>* lock, const Done& done) {
  while (!done()) pthread_cond_wait(condition->native_handle(), lock->mutex()->native_handle());
}

class Pool {
 public:
  void run(std::int64_t num_tasks, int num_threads, void (*function)(void*, std::int64_t), void* context) {
    std::lock_guard<std::mutex> one_call(calls_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      function_ = function;
      context_ = context;
      num_tasks_ = num_tasks;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = grow(num_threads - 1);
      running_ = wanted_;
      ++call_;
    }
    begin_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    wait(&end_, &lock, [this] { return running_ == 0; });
  }

 private:
  // Threads that there are, at most `count`.
  int grow(int count) {
    for (; started_ < count; ++started_) {
      try {
        std::thread([this, index = started_, seen = call_] { loop(index, seen); }).detach();
      } catch (const std::system_error&) {
        break;
      }
    }
    return std::min(started_, count);
  }

  void loop(int index, std::uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wait(&begin_, &lock, [&] { return call_ != seen; });
      seen = call_;
      if (index >= wanted_) continue;
      lock.unlock();
      work();
      lock.lock();
      if (--running_ == 0) end_.notify_one();
    }
  }

  void work() {
    for (std::int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) {
      function_(context_, task);
    }
  }

  std::mutex calls_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  void (*function_)(void*, std::int64_t) = nullptr;
  void* context_ = nullptr;
  std::int64_t num_tasks_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::uint64_t call_ = 0;
  int started_ = 0;
  int wanted_ = 0;   // of this call: threads below this index
  int running_ = 0;  // of these, not done yet
};

std::atomic<Pool*> current_pool{nullptr};

// Never destroyed: threads may outlive main. A forked child has no threads, so it makes a pool of its own.
Pool* pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  static_cast<void>(registered);
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr || current_pool.compare_exchange_strong(found, made)) return made;
  delete made;
  return found;
}

}  // namespace

int available_cores() noexcept {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void parallel_for(std::int64_t num_tasks, int num_threads, void (*run)(void*, std::int64_t), void* context) noexcept {
  const int threads = static_cast<int>(std::min<std::int64_t>(num_tasks, num_threads));
  Pool* shared = threads > 1 ? pool() : nullptr;
  if (shared != nullptr) return shared->run(num_tasks, threads, run, context);
  for (std::int64_t task = 0; task < num_tasks; ++task) run(context, task);
}

}  // namespace bitdecoding
