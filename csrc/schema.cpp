// The table of contents: every operator's schema, and the small Python module `_C`.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// ---- schemas ------------------------------------------------------------------------------------

// conv2d's padding is (top, bottom, left, right); a gradient that output_mask leaves out comes back as None.
STABLE_TORCH_LIBRARY(dlkernels, library) {
  library.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
      "SymInt groups) -> Tensor");
  library.def(
      "conv2d_backward(Tensor grad, Tensor input, Tensor weight, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  library.def(
      "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] output_padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  library.def(
      "conv_transpose2d_backward(Tensor grad, Tensor input, Tensor weight, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] output_padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  // for tests: by the strategy of that number (csrc/cpu/conv2d/conv2d.cpp), whatever the chooser says
  library.def(
      "conv2d_by(int strategy, Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups) -> Tensor");
  library.def(
      "conv2d_backward_by(int strategy, Tensor grad, Tensor input, Tensor weight, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  library.def("drop_mask(Tensor keys, SymInt dropped) -> Tensor");
  library.def(
      "drop_norm(Tensor input, Tensor? keep, Tensor? weight, Tensor? bias, SymInt[] normalized_shape, float eps, "
      "bool rescale) -> Tensor");
  library.def(
      "drop_norm_backward(Tensor grad, Tensor input, Tensor? keep, Tensor? weight, SymInt[] normalized_shape, "
      "float eps, bool rescale, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  // reset is 0 after, 1 before, 2 output; gates are kept for the backward where `save`; biases go along for its
  // derivative
  library.def(
      "reset_gate_rnn(Tensor input, Tensor h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? batch_sizes, int reset, bool reverse, bool save) -> (Tensor, Tensor, Tensor)");
  library.def(
      "reset_gate_rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor h0, Tensor weight_ih, "
      "Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor output, Tensor gates, Tensor? batch_sizes, int "
      "reset, "
      "bool reverse, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // for the benchmarks: run the processor at its limit, return the number of operations (0: it has no such unit)
  library.def("roof_fma(int rounds) -> int");
  library.def("roof_amx(int rounds) -> int");
}

// ---- what the processor can run ------------------------------------------------------------------

namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(unsigned value, int index) { return (value >> index) & 1u; }

// Linux hands out the 8 KiB of tile registers only to processes that ask (since 5.16).
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && bit(cpuid(1, 0).c, 29);  // 29: F16C
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_amx() {
  const unsigned tiles = cpuid(7, 0).d;
  const bool amx_bf16 = bit(tiles, 22), amx_tile = bit(tiles, 24), avx512_bf16 = bit(cpuid(7, 1).a, 5);
  return has_avx512() && amx_bf16 && amx_tile && avx512_bf16 && may_use_tiles();
}

#else

bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_amx() { return false; }

#endif

// Name of each instruction set we build for -> whether this processor and operating system run it.
pybind11::dict cpu_features() {
  pybind11::dict features;
  features["baseline"] = true;
  features["avx2"] = has_avx2();
  features["avx512"] = has_avx512();
  features["amx"] = has_amx();
  return features;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = DLKERNELS_BUILD_TORCH;
  info["torch_abi"] = "2.11";
  info["compiler"] = __VERSION__;
  info["cuda_architectures"] = DLKERNELS_BUILD_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Registers the operators' schemas; tells what was built and what this processor can run.";
  module.def("cpu_features", &cpu_features, "Instruction set -> whether this machine runs it.");
  module.def("build_info", &build_info, "What this build was made with.");
}
