// Threads that go through a chain of steps together, without a parallel region for each.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dlkernels {

// `steps` steps of `units` units each. A unit of step s may run once all units of step s - 1 are done. Any number of
// threads may join, late or never: a unit is claimed by the thread that runs it, and a thread that waits for another
// claims what that one has not begun. One thread alone, or slices run one after another, do the whole work; nobody can
// wait for a thread that never comes.
class Lockstep {
 public:
  Lockstep(int64_t steps, int64_t units) : steps_(steps), units_(units), claims_(new Claim[units]) {}

  // Takes part until all steps are done. The thread prefers the units [begin, end), whose data stay in its cache.
  // work(step, unit) must be the same whoever runs it.
  template <class Work>
  void join(int64_t begin, int64_t end, const Work& work) {
    for (int64_t step; (step = step_now()) < steps_;) {
      if (run(step, begin, end, work)) continue;
      Patience patience;
      while (step_now() == step) {
        if (patience.wait() && run(step, 0, units_, work)) break;
      }
    }
  }

 private:
  struct alignas(64) Claim {
    std::atomic<int64_t> next{0};  // the first step for which nobody has claimed the unit
  };

  // Spins for kSpin, then lets other threads have the processor. True once it has waited long enough to help out.
  class Patience {
   public:
    bool wait() {
      pause();
      if (++rounds_ % kRoundsPerLook != 0) return false;
      const auto waited = std::chrono::steady_clock::now() - start_;
      if (waited > kSpin) std::this_thread::yield();
      return waited > kHelp;
    }

   private:
    static constexpr int kRoundsPerLook = 16;  // pauses between two looks at the clock
    static constexpr std::chrono::microseconds kHelp{5}, kSpin{20};

    static void pause() {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }

    int rounds_ = 0;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  };

  int64_t step_now() const { return done_.load(std::memory_order_acquire) / units_; }

  // Runs the units of [begin, end) that nobody has claimed for this step; whether there were any.
  template <class Work>
  bool run(int64_t step, int64_t begin, int64_t end, const Work& work) {
    int64_t count = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t expected = step;
      if (!claims_[unit].next.compare_exchange_strong(expected, step + 1, std::memory_order_relaxed)) continue;
      work(step, unit);
      ++count;
    }
    if (count > 0) done_.fetch_add(count, std::memory_order_acq_rel);
    return count > 0;
  }

  const int64_t steps_, units_;
  const std::unique_ptr<Claim[]> claims_;
  alignas(64) std::atomic<int64_t> done_{0};  // units, of all steps together
};

}  // namespace dlkernels
