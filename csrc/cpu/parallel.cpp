#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include "simd.h"

namespace dlkernels {

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& run) {
  if (count <= 0) return;
  if (count <= grain) {  // torch would run it on this thread, too, after 0.3 us
    FlushDenormals flush;
    return run(0, count);
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    FlushDenormals flush;
    run(begin, end);
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace dlkernels
