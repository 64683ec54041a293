// drop_norm on CUDA: the sums of drop_norm.h, with rows held on the chip.
//
// Who owns what: a team of threads owns a row at a time, each of them up to 16 of its features; a warp where that is
// enough, then a block has eight teams, else the whole block. Mask, parameters and, in the backward, the sums for the
// parameters' gradients stay with the threads that own the features, from the first row of a block to its last; every
// block leaves one partial row of those sums behind, and a last kernel adds these in order. The number of partial rows
// follows from the shape alone, and there are no atomics on floats: the same bits on every run.
// Passes over memory: forward reads x and writes y; backward reads x and dy and writes grad_x. Rows wait in shared
// memory, fetched ahead. Those of more features than a block can hold are swept over twice, the second time in the L2
// cache, and once more for the parameters' gradients.
#include "../../drop_norm.h"

#include "../../tensor.h"
#include "../launch.cuh"
#include "../reduce.cuh"
#include "../stream.h"
#include "held.cuh"
#include "swept.cuh"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kProcessors = 132;           // of an H100; more or fewer only change how evenly the parts fill them
constexpr int64_t kThreadsPerProcessor = 512;  // with 128 registers each
constexpr int64_t kPartRows = 2;               // at least, of a team
constexpr int64_t kSweptParts = 64;            // of the rows that are not held
constexpr int kSelectThreads = 1024;           // of the one block that selects
constexpr int kDigitBits = 8;                  // of a key, sorted out in one pass over the keys
constexpr int kDigits = 1 << kDigitBits;

// ---- kernels: the parameters' gradients ------------------------------------------------------------

// grad_weight[i] = sum over parts of weight_parts[part][i], grad_bias alike; either may be null
// count = M columns, a block for some of them
template <class P, class A>
__global__ void drop_norm_sum_parts(int64_t count, int64_t parts, const A* weight_parts, const A* bias_parts,
                                    P* grad_weight, P* grad_bias) {
  const int64_t i = own_column();
  const A weight_sum = column_sum<A>(parts, count, weight_parts, count);
  const A bias_sum = column_sum<A>(parts, count, bias_parts, count);
  if (threadIdx.y > 0 || i >= count) return;
  if (grad_weight != nullptr) grad_weight[i] = store<P>(weight_sum);
  if (grad_bias != nullptr) grad_bias[i] = store<P>(bias_sum);
}

// ---- kernels: selection ----------------------------------------------------------------------------

// Key order as unsigned order.
__device__ inline uint32_t ordered(int32_t key) { return uint32_t(key) ^ (uint32_t(1) << 31); }

// The digit at which the running sum of counts reaches `rest` (1 or more), and the sum in front of it: in lane 0. By a
// warp, every lane of which owns a run of digits.
__device__ inline void find_digit(const int* counts, int rest, int& digit, int& below) {
  constexpr int kRun = kDigits / kWarp;
  const int lane = threadIdx.x % kWarp;
  int own = 0;
  for (int i = 0; i < kRun; ++i) own += counts[lane * kRun + i];
  int up_to = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  digit = lane * kRun, below = up_to - own;
  if (below < rest && rest <= up_to) {
    while (below + counts[digit] < rest) below += counts[digit++];
  }
  const int owner = __ffs(__ballot_sync(kAllLanes, up_to >= rest)) - 1;
  digit = __shfl_sync(kAllLanes, digit, owner);
  below = __shfl_sync(kAllLanes, below, owner);
}

// keep[i] = whether key i is not among the `dropped` smallest, of equal keys the lower index being smaller. One block:
// digit by digit from the top, it finds the key at the border and how many of its equals are still dropped.
__global__ void drop_mask_select(int64_t count, int dropped, const int32_t* keys, bool* keep) {
  __shared__ int counts[kDigits], shared_digit, shared_below;
  __shared__ int warp_counts[kSelectThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint32_t border = 0;  // the upper digits of the border key, as far as they are known
  int rest = dropped;   // how many keys with these upper digits are dropped
  for (int shift = 32 - kDigitBits; shift >= 0 && dropped > 0; shift -= kDigitBits) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kSelectThreads) counts[digit] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) {
      const uint32_t key = ordered(keys[i]);
      const bool same_above = shift + kDigitBits == 32 || key >> (shift + kDigitBits) == border;
      if (same_above) atomicAdd(&counts[(key >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (warp == 0) {
      int digit, below;
      find_digit(counts, rest, digit, below);
      if (lane == 0) shared_digit = digit, shared_below = below;
    }
    __syncthreads();
    border = border << kDigitBits | uint32_t(shared_digit);
    rest -= shared_below;
  }
  // equals of the border key are dropped in order of index until `rest` is used up
  int equals_before = 0;  // in front of this sweep of kSelectThreads keys
  for (int64_t base = 0; base < count; base += kSelectThreads) {
    const int64_t i = base + threadIdx.x;
    const uint32_t key = i < count ? ordered(keys[i]) : ~uint32_t(0);
    const bool equal = i < count && key == border;
    const unsigned votes = __ballot_sync(kAllLanes, equal);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int before = equals_before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kSelectThreads / kWarp; ++w) {
      if (w < warp) before += warp_counts[w];
      equals_before += warp_counts[w];
    }
    if (i < count) keep[i] = equal ? before >= rest : key > border;
    __syncthreads();
  }
}

// ---- launchers -----------------------------------------------------------------------------------

struct CudaDropNorm : CudaKernels {
  using CudaKernels::CudaKernels;

  template <class T, class P>
  void forward(const DropNormShape& shape, const DropNormInput<T, P>& in, T* output) const {
    if (shape.N == 0 || shape.M == 0) return;
    const bool aligned = is_aligned(in.input, in.row_stride);
    if (!can_hold<T, 1>(shape.M)) {
      return for_width<T>(shape.M, [&](auto width) {
        launch_swept("drop_norm", shape.N, drop_norm_forward_swept<width(), T, P, Accumulate<T>>, shape, in, aligned,
                     output);
      });
    }
    for_ownership<T>(shape.M, [&](auto own, Teams teams) {
      using Own = decltype(own);
      const int64_t most = processors() * std::max<int64_t>(1, kThreadsPerProcessor / teams.block());
      launch_held<kHeldBytes<T, Own, 1>>("drop_norm", std::min(ceil_div(shape.N, teams.count), most), teams,
                                         drop_norm_forward<Own, T, P>, shape, in, aligned, output);
    });
  }

  // grad_input, grad_weight and grad_bias may be null: not wanted.
  template <class T, class P>
  void backward(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                T* grad_input, P* grad_weight, P* grad_bias) const {
    using A = Accumulate<T>;
    if (shape.M == 0) return;
    const bool wants_sums = grad_weight != nullptr || grad_bias != nullptr;
    const int64_t parts = count_parts<T>(shape);
    const auto memory = workspace<A>(wants_sums ? 2 * parts * shape.M : 0);
    A* weight_parts = wants_sums ? (A*)memory.mutable_data_ptr() : nullptr;
    A* bias_parts = wants_sums ? weight_parts + parts * shape.M : nullptr;
    if (!can_hold<T, 2>(shape.M)) {
      backward_swept(shape, in, grad, grad_row_stride, grad_input, parts, weight_parts, bias_parts);
    } else {
      for_ownership<T>(shape.M, [&](auto own, Teams teams) {
        using Own = decltype(own);
        const bool aligned = is_aligned(in.input, in.row_stride) && is_aligned(grad, grad_row_stride);
        launch_held<kHeldBytes<T, Own, 2>>("drop_norm_backward", parts, teams, drop_norm_backward<Own, T, P, A>, shape,
                                           in, grad, grad_row_stride, aligned, grad_input, weight_parts, bias_parts);
      });
    }
    if (!wants_sums) return;
    launch_for_columns(stream(), "drop_norm_backward", shape.M, drop_norm_sum_parts<P, A>, parts,
                       (const A*)weight_parts, (const A*)bias_parts, grad_weight, grad_bias);
  }

  // From the shape and the kind of GPU alone: the order of the sums is the same on every run.
  template <class T>
  int64_t count_parts(const DropNormShape& shape) const {
    int64_t parts = kSweptParts;
    if (can_hold<T, 2>(shape.M)) {
      for_ownership<T>(shape.M, [&](auto, Teams teams) {
        const int64_t most = kProcessors * std::max<int64_t>(1, kThreadsPerProcessor / teams.block());
        parts = std::min(ceil_div(shape.N, kPartRows * teams.count), most);
      });
    }
    return std::max<int64_t>(1, std::min(parts, shape.N));
  }

  // Whether a block of this GPU has the shared memory that rows of M features need.
  template <class T, int TENSORS>
  bool can_hold(int64_t M) const {
    if (M > kHeldFeatures) return false;
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device());
    bool can = false;
    for_ownership<T>(M, [&](auto own, Teams teams) {
      can = kHeldBytes<T, decltype(own), TENSORS> * teams.block() + kOwnShared <= most;
    });
    return can;
  }

  // kernel(rows, args...) with a block for every row, as far as the grid goes.
  template <class... Params, class... Args>
  void launch_swept(const char* name, int64_t rows, void (*kernel)(int64_t, Params...), const Args&... args) const {
    if (rows == 0) return;
    kernel<<<std::min(rows, kMostBlocks), kMostThreads, 0, stream()>>>(rows, args...);
    check_cuda(cudaGetLastError(), name);
  }

  // kernel(args...) with THREAD_BYTES of shared memory for every thread.
  template <int THREAD_BYTES, class... Params, class... Args>
  void launch_held(const char* name, int64_t blocks, Teams teams, void (*kernel)(Params...),
                   const Args&... args) const {
    const int bytes = THREAD_BYTES * teams.block();
    if (bytes + kOwnShared > kFreeShared) {
      check_cuda(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
    }
    kernel<<<blocks, dim3(teams.threads, teams.count), bytes, stream()>>>(args...);
    check_cuda(cudaGetLastError(), name);
  }

  template <class T, class P, class A>
  void backward_swept(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                      T* grad_input, int64_t parts, A* weight_parts, A* bias_parts) const {
    const auto memory = workspace<A>(2 * shape.N);
    A* mean = (A*)memory.mutable_data_ptr();
    A* rstd = mean + shape.N;
    for_width<T>(shape.M, [&](auto width) {
      const bool aligned = is_aligned(in.input, in.row_stride) && is_aligned(grad, grad_row_stride);
      launch_swept("drop_norm_backward", shape.N, drop_norm_grad_input_swept<width(), T, P, A>, shape, in, grad,
                   grad_row_stride, aligned, mean, rstd, grad_input);
    });
    if (weight_parts == nullptr) return;
    launch_for_items(stream(), "drop_norm_backward", parts * shape.M, drop_norm_sum_rows_swept<T, P, A>, shape, in,
                     grad, grad_row_stride, (const A*)mean, (const A*)rstd, parts, weight_parts, bias_parts);
  }

  void select(int64_t M, int64_t dropped, const int32_t* keys, bool* keep) const {
    if (M == 0) return;
    drop_mask_select<<<1, kSelectThreads, 0, stream()>>>(M, int(dropped), keys, keep);
    check_cuda(cudaGetLastError(), "drop_mask");
  }
};

}  // namespace

// ---- registration --------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CUDA, library) {
  using torch::stable::Tensor;
  library.impl("drop_mask", TORCH_BOX((&drop_mask<CudaDropNorm, Tensor>)));
  library.impl("drop_norm", TORCH_BOX((&drop_norm<CudaDropNorm, Tensor>)));
  library.impl("drop_norm_backward", TORCH_BOX((&drop_norm_backward<CudaDropNorm, Tensor>)));
}

}  // namespace dlkernels
