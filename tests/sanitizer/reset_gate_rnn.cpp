// Runs reset_gate_rnn's CPU kernels on random shapes, in buffers of the exact size, and compares them with the sums of
// csrc/reset_gate_rnn.h as they stand. Built with the address and undefined-behaviour, or the thread sanitizer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cpu/reset_gate_rnn/sequence.h"

using namespace dlkernels;
using Numbers = std::vector<double>;

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Numbers of about `size` as T, and what they are after rounding.
template <class T>
struct Values {
  std::vector<T> stored;
  Numbers exact;

  Values(int64_t count, double size) : stored(count), exact(count) {
    std::uniform_real_distribution<double> uniform(-size, size);
    for (int64_t i = 0; i < count; ++i) {
      stored[i] = store<T>(Accumulate<T>(uniform(generator)));
      exact[i] = load(stored[i]);
    }
  }
};

ResetGateRnnShape random_shape(bool large) {
  ResetGateRnnShape s{};
  s.T = draw(0, 7), s.B = draw(1, large ? 3 : 20), s.I = draw(0, 20), s.H = large ? draw(190, 260) : draw(1, 60);
  s.reset = Reset(draw(0, 2)), s.reverse = draw(0, 1);
  s.first = {0};
  int64_t rows = s.B;
  for (int64_t t = 0; t < s.T; ++t) {
    s.first.push_back(s.first.back() + rows);
    rows = draw(std::max<int64_t>(1, rows - 3), rows);
  }
  return s;
}

// The definition in double: h of every row, and all gradients.
struct Exact {
  const ResetGateRnnShape& s;
  const Numbers &x, &h0, &W_x, &W_h, &b_x, &b_h;
  Numbers output, grad_x, dh, grad_W_x, grad_W_h, grad_b_x, grad_b_h;

  double* row_of(Numbers& rows, int64_t t, int64_t b) { return rows.data() + (s.first[t] + b) * s.H; }
  const double* before(int64_t t, int64_t b) {
    const int64_t earlier = s.reverse ? t + 1 : t - 1;
    const bool has = earlier >= 0 && earlier < s.T && b < s.rows(earlier);
    return has ? row_of(output, earlier, b) : h0.data() + b * s.H;
  }
  double input_sum(int64_t t, int64_t b, int64_t m) {
    double sum = b_x[m];
    for (int64_t i = 0; i < s.I; ++i) sum += W_x[m * s.I + i] * x[(s.first[t] + b) * s.I + i];
    return sum;
  }
  double state_sum(int64_t m, const double* h) {
    double sum = b_h[m];
    for (int64_t k = 0; k < s.H; ++k) sum += W_h[m * s.H + k] * h[k];
    return sum;
  }

  // r, what W_hn meets, g = W_hn of it + b_hn, and n, of one row
  void gates(int64_t t, int64_t b, Numbers& r, Numbers& q, Numbers& g, Numbers& n) {
    const double* h = before(t, b);
    q.assign(h, h + s.H);
    for (auto* gate : {&r, &g, &n}) gate->resize(s.H);
    for (int64_t j = 0; j < s.H; ++j) r[j] = 1 / (1 + std::exp(-input_sum(t, b, j) - state_sum(j, h)));
    for (int64_t j = 0; j < s.H && s.reset == Reset::before; ++j) q[j] *= r[j];
    for (int64_t j = 0; j < s.H; ++j) {
      g[j] = state_sum(s.H + j, q.data());
      n[j] = std::tanh(input_sum(t, b, s.H + j) + (s.reset == Reset::after ? r[j] * g[j] : g[j]));
    }
  }

  void forward() {
    Numbers r, q, g, n;
    output.resize(s.rows() * s.H);
    for (int64_t step = 0; step < s.T; ++step) {
      const int64_t t = s.time(step);
      for (int64_t b = 0; b < s.rows(t); ++b) {
        gates(t, b, r, q, g, n);
        for (int64_t j = 0; j < s.H; ++j) row_of(output, t, b)[j] = s.reset == Reset::output ? r[j] * n[j] : n[j];
      }
    }
  }

  void backward(const Numbers& grad_output, const Numbers& grad_h_n) {
    Numbers r, q, g, n, u(2 * s.H), u_h(s.H), dq(s.H), dh_before(s.H);
    dh = grad_h_n;
    grad_x.resize(s.rows() * s.I), grad_W_x.resize(W_x.size()), grad_W_h.resize(W_h.size());
    grad_b_x.resize(2 * s.H), grad_b_h.resize(2 * s.H);
    for (int64_t step = s.T - 1; step >= 0; --step) {
      const int64_t t = s.time(step);
      for (int64_t b = 0; b < s.rows(t); ++b) {
        gates(t, b, r, q, g, n);
        const double* h = before(t, b);
        for (int64_t j = 0; j < s.H; ++j) {
          const double d = dh[b * s.H + j] + grad_output[(s.first[t] + b) * s.H + j], slope = r[j] * (1 - r[j]);
          u[s.H + j] = (s.reset == Reset::output ? d * r[j] : d) * (1 - n[j] * n[j]);
          u[j] = (s.reset == Reset::output ? d * n[j] : u[s.H + j] * g[j]) * slope;
          u_h[j] = s.reset == Reset::after ? u[s.H + j] * r[j] : u[s.H + j];
        }
        for (int64_t k = 0; k < s.H; ++k) {
          dq[k] = 0;
          for (int64_t j = 0; j < s.H; ++j) dq[k] += W_h[(s.H + j) * s.H + k] * u_h[j];
        }
        for (int64_t j = 0; j < s.H && s.reset == Reset::before; ++j) u[j] = dq[j] * h[j] * r[j] * (1 - r[j]);
        for (int64_t k = 0; k < s.H; ++k) {
          dh_before[k] = s.reset == Reset::before ? dq[k] * r[k] : dq[k];
          for (int64_t j = 0; j < s.H; ++j) dh_before[k] += W_h[j * s.H + k] * u[j];
        }
        std::copy(dh_before.begin(), dh_before.end(), dh.begin() + b * s.H);
        for (int64_t m = 0; m < 2 * s.H; ++m) {
          const double u_x = u[m], u_state = m < s.H ? u[m] : u_h[m - s.H];
          for (int64_t i = 0; i < s.I; ++i) {
            grad_x[(s.first[t] + b) * s.I + i] += u_x * W_x[m * s.I + i];
            grad_W_x[m * s.I + i] += u_x * x[(s.first[t] + b) * s.I + i];
          }
          for (int64_t k = 0; k < s.H; ++k) grad_W_h[m * s.H + k] += u_state * (m < s.H ? h[k] : q[k]);
          grad_b_x[m] += u_x, grad_b_h[m] += u_state;
        }
      }
    }
  }
};

template <class T>
void expect(const std::vector<T>& got, const Numbers& exact, const char* what) {
  constexpr double kBound = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-4 : 0.1;  // 16 bits: h is rounded every step
  double largest = 0, error = 0;
  for (double value : exact) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < exact.size(); ++i) error = std::max(error, std::abs(double(load(got[i])) - exact[i]));
  if (got.size() == exact.size() && error <= kBound * (largest + 0.01)) return;
  std::printf("%s: off by %g, the largest is %g\n", what, error, largest);
  std::exit(1);
}

template <class T>
void check(const ResetGateRnnShape& s) {
  const int64_t H = s.H, rows = s.rows();
  const double scale = 1 / std::sqrt(double(H));
  const Values<T> x(rows * s.I, 1), h0(s.B * H, 1), W_x(2 * H * s.I, 0.5), W_h(2 * H * H, scale), b_x(2 * H, 1);
  const Values<T> b_h(2 * H, 1), grad_output(rows * H, 1), grad_h_n(s.B * H, 1);
  std::vector<T> output(rows * H), h_n(s.B * H), gates(rows * s.saved() * H);
  const Sequence<T> sequence{x.stored.data(), 0, s.I, s.first.data()};
  const ResetGateRnnInput<T> in{sequence,          h0.stored.data(),  W_x.stored.data(),
                                W_h.stored.data(), b_x.stored.data(), b_h.stored.data()};
  reset_gate_rnn_forward(s, in, ResetGateRnnResult<T>{output.data(), h_n.data(), gates.data()});
  std::vector<T> again(rows * H), last(s.B * H);
  reset_gate_rnn_forward(s, in, ResetGateRnnResult<T>{again.data(), last.data(), nullptr});

  std::vector<T> grad_x(rows * s.I), dh(s.B * H), grad_W_x(2 * H * s.I), grad_W_h(2 * H * H), grad_b_x(2 * H);
  std::vector<T> grad_b_h(2 * H);
  const Sequence<T> asked{grad_output.stored.data(), 0, H, s.first.data()};
  reset_gate_rnn_backward(s, in, ResetGateRnnGrad<T>{asked, grad_h_n.stored.data(), output.data(), gates.data()},
                          ResetGateRnnGradients<T>{grad_x.data(), dh.data(), grad_W_x.data(), grad_W_h.data(),
                                                   grad_b_x.data(), grad_b_h.data()});

  Exact exact{s, x.exact, h0.exact, W_x.exact, W_h.exact, b_x.exact, b_h.exact};
  exact.forward();
  exact.backward(grad_output.exact, grad_h_n.exact);
  Numbers last_exact = h0.exact;
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t row = s.last_row(b);
    if (row >= 0) std::copy_n(exact.output.begin() + row * H, H, last_exact.begin() + b * H);
  }
  expect(output, exact.output, "output");
  expect(again, exact.output, "output without gates");
  expect(h_n, last_exact, "h_n");
  expect(last, last_exact, "h_n without gates");
  expect(grad_x, exact.grad_x, "grad_input");
  expect(dh, exact.dh, "grad_h0");
  expect(grad_W_x, exact.grad_W_x, "grad_weight_ih");
  expect(grad_W_h, exact.grad_W_h, "grad_weight_hh");
  expect(grad_b_x, exact.grad_b_x, "grad_bias_ih");
  expect(grad_b_h, exact.grad_b_h, "grad_bias_hh");
}

}  // namespace

int main() {
  for (int round = 0; round < 24; ++round) {
    const bool large = round % 4 == 0;  // its columns are divided among threads
    check<double>(random_shape(large));
    check<float>(random_shape(large));
    check<BFloat16>(random_shape(large));
    check<Half>(random_shape(large));
  }
  std::puts("reset_gate_rnn: 96 random shapes right");
}
