// A few threads that share out the tasks of one call.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace expertmesh {

// Workers spin for a few tens of microseconds after a call, as the next layer's call is near, then sleep in the kernel.
// Nobody waits for a worker that has not begun a task: where it does not get a core, the caller does all of them. So does
// the child of a fork, which has the pool but none of its threads.
class Pool {
 public:
  // fn(task) for all tasks 0 .. tasks < 2^32, on this thread and up to threads - 1 others; returns when all are done.
  // A pool that another thread is using is not waited for: the caller then does its tasks alone. Throws std::bad_alloc,
  // when no task is under way any more, if one threw anything.
  template <class Fn>
  void run(int64_t tasks, int threads, const Fn& fn) {
    std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
    if (tasks <= 1 || threads <= 1 || !mine.try_lock()) {
      for (int64_t i = 0; i < tasks; ++i) fn(i);
      return;
    }
    start(threads - 1 < kMostWorkers ? threads - 1 : kMostWorkers);
    call_ = [](const void* self, int64_t task) { (*static_cast<const Fn*>(self))(task); };
    self_ = &fn;
    tasks_ = tasks;
    done_.store(0, std::memory_order_relaxed);
    state_.store(uint64_t(threads - 1) << 32 | uint64_t(tasks), std::memory_order_release);
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
    while (work(0)) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != tasks; ++spins) wait_a_moment(spins);
    if (failed_.exchange(false, std::memory_order_relaxed)) throw std::bad_alloc();
  }

 private:
  static constexpr int kSpins = 2000;  // of some 20 ns
  static constexpr int kMostWorkers = 255;

  static void wait_a_moment(int spins) {
    if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // Workers up to so many; fewer where the system has no more threads to give.
  void start(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this, number = workers_] { loop(number); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void loop(int number) {
    for (uint32_t seen = 0;;) {
      for (int spins = 0; spins < kSpins && bell_.load(std::memory_order_acquire) == seen; ++spins) wait_a_moment(0);
      bell_.wait(seen, std::memory_order_acquire);
      seen = bell_.load(std::memory_order_acquire);
      while (work(number + 1)) {
      }
    }
  }

  // One task of the call under way, if there is one left and this worker is wanted. The state holds the number of workers
  // above and that of the tasks that nobody has begun below: who takes one belongs to the call that is then under way,
  // whatever it read before, and that call lasts until the task is done.
  bool work(int worker) {
    uint64_t state = state_.load(std::memory_order_acquire);
    do {
      if (uint32_t(state) == 0 || worker > int(state >> 32)) return false;
    } while (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    try {
      call_(self_, tasks_ - int64_t(uint32_t(state)));
    } catch (...) {  // the call's owner is told: a worker has nobody to throw it to
      failed_.store(true, std::memory_order_relaxed);
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  std::mutex busy_;
  int workers_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* self_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::atomic<uint32_t> bell_{0};
};

}  // namespace expertmesh
