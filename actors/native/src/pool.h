// A few threads that share out the tasks of one call.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace expertmesh {

// Workers spin for a few tens of microseconds after a call, as the next layer's call is near, then sleep in the kernel.
// Nobody waits for a worker that has not begun a task: where it does not get a core, the caller does all of them.
class Pool {
 public:
  // fn(task) for all tasks 0 .. tasks < 2^32, on this thread and up to threads - 1 others; returns when all are done.
  // A pool that another thread is using is not waited for: the caller then does its tasks alone.
  template <class Fn>
  void run(int64_t tasks, int threads, const Fn& fn) {
    if (tasks <= 1 || threads <= 1 || !busy_.try_lock()) {
      for (int64_t i = 0; i < tasks; ++i) fn(i);
      return;
    }
    const int helpers = threads - 1 < kMostWorkers ? threads - 1 : kMostWorkers;
    while (workers_ < helpers) std::thread([this, number = workers_++] { loop(number); }).detach();
    call_ = [](const void* self, int64_t task) { (*static_cast<const Fn*>(self))(task); };
    self_ = &fn;
    tasks_ = tasks;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t generation = (state_.load(std::memory_order_relaxed) >> 40) + 1;
    state_.store(generation << 40 | uint64_t(helpers) << 32 | uint64_t(tasks), std::memory_order_release);
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
    while (work(0)) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != tasks; ++spins) wait_a_moment(spins);
    busy_.unlock();
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

  void loop(int number) {
    for (uint32_t seen = 0;;) {
      for (int spins = 0; spins < kSpins && bell_.load(std::memory_order_acquire) == seen; ++spins) wait_a_moment(0);
      bell_.wait(seen, std::memory_order_acquire);
      seen = bell_.load(std::memory_order_acquire);
      while (work(number + 1)) {
      }
    }
  }

  // One task of the call under way, if there is one left and this worker is wanted. The state holds, from the top, the
  // call's number, its workers and the tasks that nobody has begun: who takes one belongs to that very call, which then
  // lasts until the task is done.
  bool work(int worker) {
    uint64_t state = state_.load(std::memory_order_acquire);
    do {
      if (uint32_t(state) == 0 || worker > int(state >> 32 & 255)) return false;
    } while (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    call_(self_, tasks_ - int64_t(uint32_t(state)));
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
  std::atomic<uint32_t> bell_{0};
};

}  // namespace expertmesh
