// drop_norm on CUDA: the sums of drop_norm.h as they stand.
//
// Who owns what: a block owns a row at a time, its threads share the features. For the parameters' gradients a thread
// owns a feature in a stretch of rows; the number of stretches follows from the shape alone and a last kernel adds them
// in order. No atomics on floats: the same bits on every run. Passes over memory: forward reads x once (the second and
// third sweep find the row in cache) and writes y; backward reads x and dy once for grad_x, which leaves every row's
// mean and rstd behind, and once for the parameters.
#include "../drop_norm.h"

#include "../tensor.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "stream.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kMostStretches = 64;  // of rows, for the parameters' gradients: with M threads each, they fill a GPU
constexpr int64_t kStretchRows = 64;    // at least, so that a stretch's sum is worth its write
constexpr int kDigitBits = 8;           // of a key, sorted out in one pass over the keys
constexpr int kDigits = 1 << kDigitBits;

// ---- kernels: rows -------------------------------------------------------------------------------

// s = M / kept when rescale, else 1; `kept` counts keep's true values. In every thread of the block.
template <class A>
__device__ void count_kept(const DropNormShape& shape, const bool* keep, A& kept, A& s) {
  __shared__ A count;
  A own = 0;
  for (int64_t i = threadIdx.x; i < shape.M; i += kThreads) own += keep == nullptr || keep[i];
  own = block_sum<kThreads>(own);
  if (threadIdx.x == 0) count = own;
  __syncthreads();
  kept = count;
  s = shape.rescale && keep != nullptr && kept > 0 ? A(shape.M) / kept : A(1);
}

// The sum of `value` over the block, in every thread.
template <class A>
__device__ A sum_for_all(A value) {
  __shared__ A sum;
  value = block_sum<kThreads>(value);
  if (threadIdx.x == 0) sum = value;
  __syncthreads();
  value = sum;
  __syncthreads();
  return value;
}

// mean = sum x / kept;  rstd = 1 / sqrt(sum (x - mean)^2 / kept + eps): of row x (M), in every thread of the block
template <class T, class A>
__device__ void row_statistics(const DropNormShape& shape, const T* x, const bool* keep, A kept, A& mean, A& rstd) {
  A sum = 0;
  for (int64_t i = threadIdx.x; i < shape.M; i += kThreads) {
    if (keep == nullptr || keep[i]) sum += load(x[i]);
  }
  mean = kept > 0 ? sum_for_all(sum) / kept : A(0);
  double squares = 0;  // rows of 1e30 have squares that no float holds
  for (int64_t i = threadIdx.x; i < shape.M; i += kThreads) {
    const double distance = keep == nullptr || keep[i] ? double(load(x[i]) - mean) : 0.0;
    squares += distance * distance;
  }
  squares = sum_for_all(squares);
  rstd = kept > 0 ? A(1 / sqrt(squares / kept + shape.eps)) : A(0);
}

// y[i] = s * (weight[i] * (x[i] - mean) * rstd + bias[i]) where kept, else 0
// in: rows x (N, M) -> output (N, M); a block per row, count = N
template <class T, class P, class A>
__global__ void drop_norm_forward(int64_t count, DropNormShape shape, DropNormInput<T, P> in, T* output) {
  A kept, s;
  count_kept(shape, in.keep, kept, s);
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const T* x = in.input + n * in.row_stride;
    A mean, rstd;
    row_statistics(shape, x, in.keep, kept, mean, rstd);
    for (int64_t i = threadIdx.x; i < shape.M; i += kThreads) {
      const bool keeps = in.keep == nullptr || in.keep[i];
      const A scale = in.weight == nullptr ? A(1) : A(load(in.weight[i]));
      const A shift = in.bias == nullptr ? A(0) : A(load(in.bias[i]));
      output[n * shape.M + i] = store<T>(keeps ? s * (scale * ((load(x[i]) - mean) * rstd) + shift) : A(0));
    }
  }
}

// grad_input[i] = rstd * (g[i] - mean_g - h[i] * mean_gh) where kept, else 0; g = s*weight*dy, h = (x - mean) * rstd
// in: rows x (N, M), grad (N, M) -> mean (N), rstd (N), grad_input (N, M) or null; a block per row, count = N
template <class T, class P, class A>
__global__ void drop_norm_grad_input(int64_t count, DropNormShape shape, DropNormInput<T, P> in, const T* grad,
                                     int64_t grad_row_stride, A* mean, A* rstd, T* grad_input) {
  A kept, s;
  count_kept(shape, in.keep, kept, s);
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const T* x = in.input + n * in.row_stride;
    const T* dy = grad + n * grad_row_stride;
    A mu, r;
    row_statistics(shape, x, in.keep, kept, mu, r);
    if (threadIdx.x == 0) mean[n] = mu, rstd[n] = r;
    if (grad_input == nullptr) continue;  // the same for the whole block
    A sum_g = 0, sum_gh = 0;
    for (int64_t i = threadIdx.x; i < shape.M; i += kThreads) {
      if (in.keep != nullptr && !in.keep[i]) continue;
      const A g = s * (in.weight == nullptr ? A(1) : A(load(in.weight[i]))) * load(dy[i]);
      sum_g += g;
      sum_gh += g * ((load(x[i]) - mu) * r);
    }
    const A mean_g = sum_for_all(sum_g) / kept, mean_gh = sum_for_all(sum_gh) / kept;
    for (int64_t i = threadIdx.x; i < shape.M; i += kThreads) {
      const bool keeps = in.keep == nullptr || in.keep[i];
      const A g = s * (in.weight == nullptr ? A(1) : A(load(in.weight[i]))) * load(dy[i]);
      const A h = (load(x[i]) - mu) * r;
      grad_input[n * shape.M + i] = store<T>(keeps ? r * (g - mean_g - h * mean_gh) : A(0));
    }
  }
}

// ---- kernels: the parameters' gradients ------------------------------------------------------------

// weight_sums[stretch][i] = sum over the stretch's rows of dy[i] * h[i], bias_sums[stretch][i] of dy[i]; 0 where
// dropped count = stretches * M, a thread for each
template <class T, class P, class A>
__global__ void drop_norm_sum_rows(int64_t count, DropNormShape shape, DropNormInput<T, P> in, const T* grad,
                                   int64_t grad_row_stride, const A* mean, const A* rstd, int64_t stretches,
                                   A* weight_sums, A* bias_sums) {
  for (int64_t item = first_item(); item < count; item += item_stride()) {
    const int64_t i = item % shape.M, stretch = item / shape.M;
    A weight_sum = 0, bias_sum = 0;
    if (in.keep == nullptr || in.keep[i]) {
      for (int64_t n = shape.N * stretch / stretches; n < shape.N * (stretch + 1) / stretches; ++n) {
        const A dy = load(grad[n * grad_row_stride + i]);
        weight_sum += dy * ((load(in.input[n * in.row_stride + i]) - mean[n]) * rstd[n]);
        bias_sum += dy;
      }
    }
    weight_sums[item] = weight_sum;
    bias_sums[item] = bias_sum;
  }
}

// grad_weight[i] = s * sum over stretches of weight_sums[stretch][i], grad_bias alike; either may be null
// count = M threads, in blocks that all count the kept features
template <class P, class A>
__global__ void drop_norm_sum_stretches(int64_t count, DropNormShape shape, const bool* keep, int64_t stretches,
                                        const A* weight_sums, const A* bias_sums, P* grad_weight, P* grad_bias) {
  A kept, s;
  count_kept(shape, keep, kept, s);
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    A weight_sum = 0, bias_sum = 0;
    for (int64_t stretch = 0; stretch < stretches; ++stretch) {
      weight_sum += weight_sums[stretch * count + i];
      bias_sum += bias_sums[stretch * count + i];
    }
    if (grad_weight != nullptr) grad_weight[i] = store<P>(s * weight_sum);
    if (grad_bias != nullptr) grad_bias[i] = store<P>(s * bias_sum);
  }
}

// ---- kernels: selection ----------------------------------------------------------------------------

// Key order as unsigned order.
__device__ inline uint32_t ordered(int32_t key) { return uint32_t(key) ^ (uint32_t(1) << 31); }

// keep[i] = whether key i is not among the `dropped` smallest, of equal keys the lower index being smaller. One block:
// digit by digit from the top, it finds the key at the border and how many of its equals are still dropped.
__global__ void drop_mask_select(int64_t count, int64_t dropped, const int32_t* keys, bool* keep) {
  __shared__ int64_t counts[kDigits];
  __shared__ uint32_t shared_border;
  __shared__ int64_t shared_rest;
  __shared__ int warp_counts[kThreads / kWarp];
  uint32_t border = 0;     // the upper digits of the border key, as far as they are known
  int64_t rest = dropped;  // how many keys with these upper digits are dropped
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) counts[digit] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t key = ordered(keys[i]);
      const bool same_above = shift + kDigitBits == 32 || key >> (shift + kDigitBits) == border;
      if (same_above) atomicAdd((unsigned long long*)&counts[(key >> shift) & (kDigits - 1)], 1ull);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t below = 0;
      int digit = 0;
      while (digit < kDigits - 1 && below + counts[digit] < rest) below += counts[digit++];
      shared_border = border << kDigitBits | uint32_t(digit);
      shared_rest = rest - below;
    }
    __syncthreads();
    border = shared_border;
    rest = shared_rest;
    __syncthreads();
  }
  // equals of the border key are dropped in order of index until `rest` is used up
  int64_t equals_before = 0;  // in front of this sweep of kThreads keys
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t base = 0; base < count; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const uint32_t key = i < count ? ordered(keys[i]) : ~uint32_t(0);
    const bool equal = i < count && key == border;
    const unsigned votes = __ballot_sync(0xffffffffu, equal);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int64_t before = equals_before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / kWarp; ++w) {
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
    launch_block_per_item(stream(), "drop_norm", shape.N, drop_norm_forward<T, P, Accumulate<T>>, shape, in, output);
  }

  // grad_input, grad_weight and grad_bias may be null: not wanted.
  template <class T, class P>
  void backward(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                T* grad_input, P* grad_weight, P* grad_bias) const {
    using A = Accumulate<T>;
    const int64_t stretches = std::clamp<int64_t>(shape.N / kStretchRows, 1, kMostStretches);
    const auto memory = workspace<A>(2 * shape.N + 2 * stretches * shape.M);
    A* mean = (A*)memory.mutable_data_ptr();
    A* rstd = mean + shape.N;
    A* weight_sums = rstd + shape.N;
    A* bias_sums = weight_sums + stretches * shape.M;
    launch_block_per_item(stream(), "drop_norm_backward", shape.N, drop_norm_grad_input<T, P, A>, shape, in, grad,
                          grad_row_stride, mean, rstd, grad_input);
    if (grad_weight == nullptr && grad_bias == nullptr) return;
    launch_for_items(stream(), "drop_norm_backward", stretches * shape.M, drop_norm_sum_rows<T, P, A>, shape, in, grad,
                     grad_row_stride, (const A*)mean, (const A*)rstd, stretches, weight_sums, bias_sums);
    launch_for_items(stream(), "drop_norm_backward", shape.M, drop_norm_sum_stretches<P, A>, shape, in.keep, stretches,
                     (const A*)weight_sums, (const A*)bias_sums, grad_weight, grad_bias);
  }

  void select(int64_t M, int64_t dropped, const int32_t* keys, bool* keep) const {
    if (M == 0) return;
    drop_mask_select<<<1, kThreads, 0, stream()>>>(M, dropped, keys, keep);
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
