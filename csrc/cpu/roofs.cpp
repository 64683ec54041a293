// What this processor can do at most: arithmetic on registers alone, on every thread. The benchmarks' roofs.
#include <torch/csrc/stable/library.h>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "simd.h"

namespace dlkernels {
namespace {

constexpr int64_t kTasks = 64;                 // shared evenly by any usual number of threads
constexpr int kChains = kVectorRegisters / 2;  // independent sums: hide an FMA's latency of 4 cycles on two ports

// chain[i] = chain[i] * scale + step, `rounds` times on every task; stays finite
void fma_task(int64_t rounds) {
  Vector<float> chain[kChains] = {}, scale = Vector<float>{} + 0.5f, step = Vector<float>{} + 1.0f;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) {
      chain[i] = chain[i] * scale + step;
      asm volatile("" : "+x"(chain[i]));  // or the compiler would see through the loop
    }
  }
}

// Runs the loop; the number of float32 operations done, all threads together.
int64_t roof_fma(int64_t rounds) {
  parallel_for(kTasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fma_task(rounds);
  });
  return kTasks * rounds * kChains * kLanes<float> * 2;
}

#if defined(__AMX_BF16__)

constexpr int kTileRowCount = 16, kTileRowBytes = 64;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

TileShapes full_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = kTileRowBytes, shapes.rows[tile] = kTileRowCount;
  return shapes;
}

// four 16 x 16 sums of products of 16 x 32 by 32 x 16 bfloat16 tiles, all zero
void amx_task(int64_t rounds) {
  static const TileShapes shapes = full_tiles();
  _tile_loadconfig(&shapes);
  // clang-format off
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  // clang-format on
  _tile_release();
}

// Runs the loop; the number of bfloat16 operations done, all threads together.
int64_t roof_amx(int64_t rounds) {
  parallel_for(kTasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) amx_task(rounds);
  });
  return kTasks * rounds * 4 * (16 * 16 * 32 * 2);
}

#else

// This instruction set has no tiles.
int64_t roof_amx(int64_t) { return 0; }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CompositeExplicitAutograd, library) {
  library.impl("roof_fma", TORCH_BOX(&roof_fma));
  library.impl("roof_amx", TORCH_BOX(&roof_amx));
}

}  // namespace dlkernels
