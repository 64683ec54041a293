// Threads for kernels. parallel.cpp runs them on torch's pool; tests/sanitizer brings plain threads of its own.
#pragma once

#include <cstdint>
#include <functional>

namespace dlkernels {

// Calls run(begin, end) on slices that cover [0, count), on as many threads as torch.set_num_threads allows but at most
// one for every `grain` items. Denormals are flushed while it runs. What run does for an item must not depend on the
// slice the item falls into: results are the same for any number of threads.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& run);

// How many threads parallel_for may use at most. For decisions on speed, never on how sums are made.
int64_t thread_count();

}  // namespace dlkernels
