// reset_gate_rnn on CUDA: the sums of reset_gate_rnn.h as they stand, kernels for every step.
//
// Who owns what: in products a block owns a tile of the result, all of its sum over k; in everything else a thread owns
// an element. No sum is shared: the same bits on every run. Passes over memory: a step reads the recurrent weights, the
// products over all rows (x W_ih^T, and the gradients of x and of the weights) are made at once. The workspace is 2H
// (in the backward up to 5H + I) numbers for every row.
#include "../reset_gate_rnn.h"

#include "../tensor.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "stream.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int kTile = 64;              // rows and columns of a block's tile of a product
constexpr int kTileDepth = 16;         // of a sum, between two loads into shared memory
constexpr int kRun = 16 * kTileDepth;  // of a sum that is added to the rest as one
constexpr int kSide = 16;              // kSide x kSide threads, each owning kOwn x kOwn elements of the tile
constexpr int kOwn = kTile / kSide;
static_assert(kSide * kSide == kThreads);

// ---- kernels: products -----------------------------------------------------------------------------

// An operand of a product: element (i, j) at data[i / per_step * step_stride + i % per_step * stride + j * other]. Only
// rows of a sequence whose steps are no neighbours in memory need the first term.
template <class T>
struct Operand {
  const T* data;
  int64_t stride, other;
  int64_t per_step = INT64_MAX, step_stride = 0;

  __device__ T at(int64_t i, int64_t j) const {
    return data[i / per_step * step_stride + i % per_step * stride + j * other];
  }
};

// The operand's transpose: element (j, i).
template <class T>
struct Transposed {
  Operand<T> operand;
  __device__ T at(int64_t j, int64_t i) const { return operand.at(i, j); }
};

// sums[m][n] = (ADD ? sums[m][n] : 0) + sum over k of left(m, k) * right(n, k)
// left (M, K), right (N, K), sums (M, N) with rows sum_stride apart; a block per tile
template <bool ADD, class Left, class Right, class A>
__global__ void multiply(int64_t count, int64_t M, int64_t N, int64_t K, Left left, Right right, A* sums,
                         int64_t sum_stride) {
  __shared__ A left_tile[kTileDepth][kTile + 1], right_tile[kTileDepth][kTile + 1];
  const int64_t tiles_n = ceil_div(N, kTile);
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  for (int64_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const int64_t m0 = tile / tiles_n * kTile, n0 = tile % tiles_n * kTile;
    // long sums are made of short ones, of a `run` each, which keeps rounding errors small
    A own[kOwn][kOwn] = {}, run[kOwn][kOwn] = {};
    for (int64_t k0 = 0; k0 < K; k0 += kTileDepth) {
      for (int i = threadIdx.x; i < kTile * kTileDepth; i += kThreads) {
        const int64_t k = k0 + i % kTileDepth, m = m0 + i / kTileDepth, n = n0 + i / kTileDepth;
        left_tile[i % kTileDepth][i / kTileDepth] = k < K && m < M ? A(load(left.at(m, k))) : A(0);
        right_tile[i % kTileDepth][i / kTileDepth] = k < K && n < N ? A(load(right.at(n, k))) : A(0);
      }
      __syncthreads();
      for (int k = 0; k < min(int64_t(kTileDepth), K - k0); ++k) {
        for (int a = 0; a < kOwn; ++a) {
          for (int b = 0; b < kOwn; ++b) run[a][b] += left_tile[k][row + a * kSide] * right_tile[k][column + b * kSide];
        }
      }
      if ((k0 + kTileDepth) % kRun == 0 || k0 + kTileDepth >= K) {
        for (int a = 0; a < kOwn; ++a) {
          for (int b = 0; b < kOwn; ++b) own[a][b] += run[a][b], run[a][b] = 0;
        }
      }
      __syncthreads();
    }
    for (int a = 0; a < kOwn; ++a) {
      for (int b = 0; b < kOwn; ++b) {
        const int64_t m = m0 + row + a * kSide, n = n0 + column + b * kSide;
        if (m >= M || n >= N) continue;
        A& sum = sums[m * sum_stride + n];
        sum = ADD ? sum + own[a][b] : own[a][b];
      }
    }
  }
}

// sums[j] = sum over rows of values[row][j]; count = columns, a block for some of them, in double
template <class A>
__global__ void sum_rows(int64_t count, int64_t rows, const A* values, int64_t stride, A* sums) {
  const double sum = column_sum<double>(rows, count, values, stride);
  if (threadIdx.y == 0 && own_column() < count) sums[own_column()] = A(sum);
}

// to[i] = from[i], in another type
template <class From, class To>
__global__ void convert(int64_t count, const From* from, To* to) {
  for (int64_t i = first_item(); i < count; i += item_stride()) to[i] = store<To>(Accumulate<To>(load(from[i])));
}

// ---- kernels: a step -------------------------------------------------------------------------------

// What a step's kernels work on: `count` sequences; a thread for each element (b, j) of (count, H).
template <class T>
struct Step {
  using A = Accumulate<T>;

  int64_t H;
  Reset reset;
  const A* sums;               // (count, 2H): [W_ir x | W_in x], the forward's
  const A* recurrent;          // (count, 2H): [W_hr h' | W_hn h' or W_hn q]
  const T *bias_ih, *bias_hh;  // (2H) or null
  A* h;                        // (count, H): h', then h
  A* q;                        // (count, H): r * h', "before"
  T *output, *gates;           // (count, H), (count, saved * H) or null
};

template <class T>
__device__ Accumulate<T> bias_at(const T* bias, int64_t i) {
  return bias == nullptr ? Accumulate<T>(0) : Accumulate<T>(load(bias[i]));
}

template <class T>
__device__ Accumulate<T> gate_r(const Step<T>& step, int64_t b, int64_t j) {
  const int64_t i = b * 2 * step.H + j;
  const Accumulate<T> sum = step.sums[i] + bias_at(step.bias_ih, j) + step.recurrent[i] + bias_at(step.bias_hh, j);
  return 1 / (1 + exp(-sum));
}

// "before": q = r * h'
template <class T>
__global__ void reset_state(int64_t count, Step<T> step) {
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const Accumulate<T> r = gate_r(step, i / step.H, i % step.H);
    if (step.gates != nullptr) step.gates[i] = store<T>(r);
    step.q[i] = r * step.h[i];
  }
}

// h = the formula of the form
template <class T>
__global__ void next_state(int64_t count, Step<T> step) {
  using A = Accumulate<T>;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t H = step.H, b = i / H, j = i % H;
    const A a_n = step.sums[b * 2 * H + H + j] + bias_at(step.bias_ih, H + j);
    const A g = step.recurrent[b * 2 * H + H + j] + bias_at(step.bias_hh, H + j);
    A h, saved[2];
    if (step.reset == Reset::before) {
      h = tanh(a_n + g);
    } else {
      const A r = gate_r(step, b, j);
      const A n = step.reset == Reset::after ? tanh(a_n + r * g) : tanh(a_n + g);
      h = step.reset == Reset::after ? n : r * n;
      saved[0] = r, saved[1] = step.reset == Reset::after ? g : n;
      for (int gate = 0; gate < 2 && step.gates != nullptr; ++gate) {
        step.gates[(b * 2 + gate) * H + j] = store<T>(saved[gate]);
      }
    }
    step.output[i] = store<T>(h);
    step.h[i] = load(step.output[i]);
  }
}

// The same of the backward. h_before[b] is the row `b` of the step before for b < has_before, else of h0.
template <class T>
struct StepBackward {
  using A = Accumulate<T>;

  int64_t H, width;
  Reset reset;
  const T* grad_output;  // (count, H), rows grad_stride apart, or null
  int64_t grad_stride;
  const T *output, *gates, *before, *h0;
  int64_t has_before;
  A* dh;        // (count, H): the gradient of h; in "before" then dq r
  const A* dq;  // (count, H), "before"
  A* u;         // (count, width): u_r, u_n, and u_g in "after"
  A* h_rows;    // (count, H): what u_r met, h'
  A* q_rows;    // (count, H): what u_h met where it is not h', q in "before"
};

// u of a step; in "before" only u_n, and the rows that the weights' gradients need
template <class T>
__global__ void step_backward(int64_t count, StepBackward<T> step) {
  using A = Accumulate<T>;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t H = step.H, b = i / H, j = i % H;
    const A asked = step.grad_output == nullptr ? A(0) : A(load(step.grad_output[b * step.grad_stride + j]));
    const A dh = step.dh[i] + asked;
    const A before = load(b < step.has_before ? step.before[i] : step.h0[i]);
    A* u = step.u + b * step.width + j;
    step.h_rows[i] = before;
    if (step.reset == Reset::before) {
      const A n = load(step.output[i]);
      u[H] = dh * (1 - n * n);
      step.q_rows[i] = A(load(step.gates[i])) * before;
      continue;
    }
    const A r = load(step.gates[b * 2 * H + j]), other = load(step.gates[b * 2 * H + H + j]);
    if (step.reset == Reset::after) {
      const A n = load(step.output[i]), u_n = dh * (1 - n * n);
      u[0] = u_n * other * (r * (1 - r)), u[H] = u_n, u[2 * H] = u_n * r;
    } else {
      u[0] = dh * other * (r * (1 - r)), u[H] = dh * r * (1 - other * other);
    }
  }
}

// "before": u_r, and dq r as the beginning of dh'
template <class T>
__global__ void reset_backward(int64_t count, StepBackward<T> step) {
  using A = Accumulate<T>;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const A r = load(step.gates[i]), dq = step.dq[i];
    step.u[i / step.H * step.width + i % step.H] = dq * step.h_rows[i] * (r * (1 - r));
    step.dh[i] = dq * r;
  }
}

// ---- launchers -----------------------------------------------------------------------------------

struct CudaResetGateRnn : CudaKernels {
  using CudaKernels::CudaKernels;

  template <bool ADD, class Left, class Right, class A>
  void multiply_into(int64_t M, int64_t N, int64_t K, const Left& left, const Right& right, A* sums,
                     int64_t sum_stride) const {
    const int64_t tiles = ceil_div(M, kTile) * ceil_div(N, kTile);
    launch_block_per_item(stream(), "reset_gate_rnn", tiles, multiply<ADD, Left, Right, A>, M, N, K, left, right, sums,
                          sum_stride);
  }

  template <class From, class To>
  void convert_into(int64_t count, const From* from, To* to) const {
    if (to != nullptr) launch_for_items(stream(), "reset_gate_rnn", count, convert<From, To>, from, to);
  }

  // x as the left or right operand, row by row
  template <class T>
  static Operand<T> rows_of(const ResetGateRnnShape& shape, const Sequence<T>& sequence) {
    if (sequence.first != nullptr) return {sequence.data, sequence.row_stride, 1};
    return {sequence.data, sequence.row_stride, 1, std::max<int64_t>(1, shape.B), sequence.step_stride};
  }

  template <class T>
  void forward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in,
               const ResetGateRnnResult<T>& result) const {
    using A = Accumulate<T>;
    const int64_t B = shape.B, I = shape.I, H = shape.H, rows = shape.rows();
    const auto sums = workspace<A>(rows * 2 * H), state = workspace<A>(B * H), q = workspace<A>(B * H);
    const auto recurrent = workspace<A>(B * 2 * H);
    A* h = (A*)state.mutable_data_ptr();
    A* r_sums = (A*)recurrent.mutable_data_ptr();
    convert_into(B * H, in.h0, h);
    multiply_into<false>(rows, 2 * H, I, rows_of(shape, in.input), Operand<T>{in.weight_ih, I, 1},
                         (A*)sums.mutable_data_ptr(), 2 * H);
    for (int64_t s = 0; s < shape.T; ++s) {
      const int64_t t = shape.time(s), count = shape.rows(t), first = shape.first[t];
      const Step<T> step{H,
                         shape.reset,
                         (const A*)sums.const_data_ptr() + first * 2 * H,
                         r_sums,
                         in.bias_ih,
                         in.bias_hh,
                         h,
                         (A*)q.mutable_data_ptr(),
                         result.output + first * H,
                         result.gates == nullptr ? nullptr : result.gates + first * shape.saved() * H};
      if (shape.reset == Reset::before) {
        multiply_into<false>(count, H, H, Operand<A>{h, H, 1}, Operand<T>{in.weight_hh, H, 1}, r_sums, 2 * H);
        launch_for_items(stream(), "reset_gate_rnn", count * H, reset_state<T>, step);
        multiply_into<false>(count, H, H, Operand<A>{step.q, H, 1}, Operand<T>{in.weight_hh + H * H, H, 1}, r_sums + H,
                             2 * H);
      } else {
        multiply_into<false>(count, 2 * H, H, Operand<A>{h, H, 1}, Operand<T>{in.weight_hh, H, 1}, r_sums, 2 * H);
      }
      launch_for_items(stream(), "reset_gate_rnn", count * H, next_state<T>, step);
    }
    convert_into(B * H, h, result.h_n);
  }

  template <class T>
  void backward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in, const ResetGateRnnGrad<T>& grad,
                const ResetGateRnnGradients<T>& wanted) const {
    using A = Accumulate<T>;
    const int64_t B = shape.B, I = shape.I, H = shape.H, rows = shape.rows();
    const bool is_before = shape.reset == Reset::before, is_after = shape.reset == Reset::after;
    const int64_t width = is_after ? 3 * H : 2 * H, h_part = is_after ? 2 * H : H;
    const auto u_tensor = workspace<A>(rows * width), dh_tensor = workspace<A>(B * H), dq_tensor = workspace<A>(B * H);
    const auto h_tensor = workspace<A>(rows * H), q_tensor = workspace<A>(is_before ? rows * H : 0);
    A *u = (A*)u_tensor.mutable_data_ptr(), *dh = (A*)dh_tensor.mutable_data_ptr();
    A *dq = (A*)dq_tensor.mutable_data_ptr(), *h_rows = (A*)h_tensor.mutable_data_ptr();
    A* q_rows = is_before ? (A*)q_tensor.mutable_data_ptr() : h_rows;
    if (grad.grad_h_n != nullptr) {
      convert_into(B * H, grad.grad_h_n, dh);
    } else {
      check_cuda(cudaMemsetAsync(dh, 0, B * H * sizeof(A), stream()), "reset_gate_rnn_backward");
    }
    for (int64_t s = shape.T - 1; s >= 0; --s) {
      const int64_t t = shape.time(s), count = shape.rows(t), first = shape.first[t];
      const int64_t before = s > 0 ? shape.time(s - 1) : -1;
      const bool asked = grad.grad_output.data != nullptr;
      const StepBackward<T> step{H,
                                 width,
                                 shape.reset,
                                 asked ? grad.grad_output.row(t, 0) : nullptr,
                                 grad.grad_output.row_stride,
                                 grad.output + first * H,
                                 grad.gates + first * shape.saved() * H,
                                 before < 0 ? nullptr : grad.output + shape.first[before] * H,
                                 in.h0,
                                 before < 0 ? 0 : shape.rows(before),
                                 dh,
                                 dq,
                                 u + first * width,
                                 h_rows + first * H,
                                 q_rows + first * H};
      // right(n, k) = W[k][n]: the product with W itself
      const Operand<T> W_hr{in.weight_hh, 1, H}, W_hn{in.weight_hh + H * H, 1, H};
      launch_for_items(stream(), "reset_gate_rnn_backward", count * H, step_backward<T>, step);
      if (is_before) {
        multiply_into<false>(count, H, H, Operand<A>{step.u + H, width, 1}, W_hn, dq, H);
        launch_for_items(stream(), "reset_gate_rnn_backward", count * H, reset_backward<T>, step);
        multiply_into<true>(count, H, H, Operand<A>{step.u, width, 1}, W_hr, dh, H);
      } else {
        multiply_into<false>(count, H, H, Operand<A>{step.u, width, 1}, W_hr, dh, H);
        multiply_into<true>(count, H, H, Operand<A>{step.u + h_part, width, 1}, W_hn, dh, H);
      }
    }
    convert_into(B * H, dh, wanted.h0);
    if (wanted.input != nullptr) {
      const auto sums = workspace<A>(rows * I);
      A* to = (A*)sums.mutable_data_ptr();
      multiply_into<false>(rows, I, H, Operand<A>{u, width, 1}, Operand<T>{in.weight_ih, 1, I}, to, I);
      multiply_into<true>(rows, I, H, Operand<A>{u + H, width, 1}, Operand<T>{in.weight_ih + H * I, 1, I}, to, I);
      convert_into(rows * I, to, wanted.input);
    }
    // left(m, row) = u[row][m], right(n, row) = x[row][n]
    if (wanted.weight_ih != nullptr) {
      const auto sums = workspace<A>(2 * H * I);
      A* to = (A*)sums.mutable_data_ptr();
      multiply_into<false>(2 * H, I, rows, Operand<A>{u, 1, width}, Transposed<T>{rows_of(shape, in.input)}, to, I);
      convert_into(2 * H * I, to, wanted.weight_ih);
    }
    if (wanted.weight_hh != nullptr) {
      const auto sums = workspace<A>(2 * H * H);
      A* to = (A*)sums.mutable_data_ptr();
      multiply_into<false>(H, H, rows, Operand<A>{u, 1, width}, Operand<A>{h_rows, 1, H}, to, H);
      multiply_into<false>(H, H, rows, Operand<A>{u + h_part, 1, width}, Operand<A>{q_rows, 1, H}, to + H * H, H);
      convert_into(2 * H * H, to, wanted.weight_hh);
    }
    const auto bias_tensor = workspace<A>(width);
    A* bias = (A*)bias_tensor.mutable_data_ptr();
    if (wanted.bias_ih == nullptr && wanted.bias_hh == nullptr) return;
    launch_for_columns(stream(), "reset_gate_rnn_backward", width, sum_rows<A>, rows, (const A*)u, width, bias);
    convert_into(2 * H, bias, wanted.bias_ih);
    convert_into(H, bias, wanted.bias_hh);
    convert_into(H, bias + h_part, wanted.bias_hh == nullptr ? nullptr : wanted.bias_hh + H);
  }
};

}  // namespace

// ---- registration --------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CUDA, library) {
  using torch::stable::Tensor;
  library.impl("reset_gate_rnn", TORCH_BOX((&reset_gate_rnn<CudaResetGateRnn, Tensor>)));
  library.impl("reset_gate_rnn_backward", TORCH_BOX((&reset_gate_rnn_backward<CudaResetGateRnn, Tensor>)));
}

}  // namespace dlkernels
