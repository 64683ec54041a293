// parallel_for on plain threads: lets the sanitizers watch the kernels without torch.
#include "../../csrc/cpu/parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "../../csrc/cpu/simd.h"

namespace dlkernels {

constexpr int64_t kThreads = 3;

int64_t thread_count() { return kThreads; }

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& run) {
  const int64_t slice = std::max(grain, (count + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += slice) {
    threads.emplace_back([=, &run] {
      FlushDenormals flush;
      run(begin, std::min(count, begin + slice));
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace dlkernels
