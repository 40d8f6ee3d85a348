// Waiting as actors/transport/waiting.py does, which says why. Called without the GIL.
#pragma once

#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <time.h>

#include <algorithm>
#include <cmath>

namespace expertmesh {

inline double monotonic() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return static_cast<double>(at.tv_sec) + 1e-9 * static_cast<double>(at.tv_nsec);
}

class Waiter {
 public:
  explicit Waiter(double longest) : longest_(longest), budget_(longest) {}

  // How many events there are, 0 when the deadline has passed, less than 0 for an error.
  int wait(int epoll, epoll_event* events, int most, double deadline) {
    const double start = monotonic();
    int count = 0;
    if (abstain_) {
      --abstain_;
    } else if (budget_ > 0.0) {
      count = yielding(epoll, events, most, std::min(start + budget_, deadline));
      judge(monotonic() - start);
    }
    while (count == 0) {
      const double left = deadline - monotonic();
      const int milliseconds = left > 0.0 ? static_cast<int>(std::ceil(1e3 * std::min(left, 3600.0))) : 0;
      count = poll(epoll, events, most, milliseconds);
      if (left <= 0.0) break;
    }
    learn(monotonic() - start);
    return count;
  }

  static int look(int epoll, epoll_event* events, int most) { return poll(epoll, events, most, 0); }

 private:
  static constexpr int LEAST_PENALTY = 16, MOST_PENALTY = 1024;

  static int poll(int epoll, epoll_event* events, int most, int milliseconds) {
    const int count = epoll_wait(epoll, events, most, milliseconds);
    return count < 0 && errno == EINTR ? 0 : count;
  }

  static int yielding(int epoll, epoll_event* events, int most, double end) {
    while (true) {
      const int count = poll(epoll, events, most, 0);
      if (count || monotonic() >= end) return count;
      sched_yield();
    }
  }

  void judge(double polled) {
    if (polled > 10.0 * longest_) {
      abstain_ = penalty_;
      penalty_ = std::min(4 * penalty_, MOST_PENALTY);
    } else if (penalty_ > LEAST_PENALTY) {
      --penalty_;
    }
  }

  void learn(double waited) {
    if (waited <= 2.0 * longest_)
      budget_ = std::min(longest_, std::max(2.0 * budget_, longest_ / 4.0));
    else
      budget_ = budget_ > 2e-6 ? budget_ / 2.0 : 0.0;
  }

  double longest_, budget_;
  int penalty_ = LEAST_PENALTY, abstain_ = 0;
};

}  // namespace expertmesh
