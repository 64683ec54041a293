// conv2d by Winograd's F(2 x 2, 3 x 3): 3 x 3 kernels, stride 1.
//
//   Y = A^T [(G g G^T) * (B^T d B)] A      g: 3 x 3 weights   d: 4 x 4 inputs   Y: 2 x 2 outputs   *: element by
//   element
//
//         1  0 -1  0           1   0   0
//   B^T = 0  1  1  0     G =  1/2 1/2 1/2    A^T = 1  1  1  0
//         0 -1  1  0          1/2-1/2 1/2          0  1 -1 -1
//         0  1  0 -1           0   0   1
//
// The products are summed over the channels before A^T and A are applied, so each of the 16 positions of a tile is a
// matrix product of its own: tiles x channels times channels x channels, 16 multiplications for 4 outputs where the
// definition has 36. The formula holds for one dimension, and so for two: with m = G g * B^T d,
//   y0 = m0 + m1 + m2 = (d0 - d2) g0 + (d1 + d2)(g0 + g1 + g2)/2 + (d2 - d1)(g0 - g1 + g2)/2 = d0 g0 + d1 g1 + d2 g2
// and y1 = m1 - m2 - m3 alike. Factors are 1 and 1/2, so small integers stay exact, and output y0 is made of d0, d1, d2
// only: nothing spreads beyond the pixels that the definition reads.
//
//   grad_input  the same with the kernel rotated by 180 degrees, C and K exchanged and padding 2 - pad
//   grad_weight the derivative of Y in g: G^T [sum over tiles of (A dY A^T) * (B^T d B)] G
//
// Infinity and NaN would reach other outputs than in the definition as NaN, and large numbers overflow earlier here.
// Both show in the results, in the very tile: if any result is not finite, `direct` computes them all again.
//
// Who owns what: a task owns a block of tiles and a panel of channels (of grad_weight: a block of each kind of channels
// and a stretch of tiles). Its transformed tiles and sums stay in the second cache. Passes over memory: images are read
// about once and written once; transformed weights are written once. Sums over channels run in blocks of a fixed size,
// added in order, whatever the thread count.
#include "winograd.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../parallel.h"
#include "direct.h"
#include "panels.h"
#include "slab.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int kPositions = 16;
constexpr int64_t kBlockChannels = 64;  // summed before a sum goes to memory; also bounds the rounding errors
constexpr int64_t kBlockTiles = 48;     // of a task: 16 positions of 64 channels are 196 KB, as many are the sums
constexpr int64_t kSummedTiles = 72;    // the same for grad_weight, whose sums of 64 x 64 channels are 262 KB
constexpr int64_t kFewTiles = 256;      // up to which it pays that tasks pack their own weights
constexpr int64_t kSkew = 16;  // floats between the positions: else all 16 would compete for one set of the first cache

using Floats = Vector<float>;
constexpr int64_t kFloats = kLanes<float>;

// ---- the transforms, in one dimension, then in two -----------------------------------------------

struct InputTransform {  // B^T d
  static void apply(const Floats d[4], Floats v[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
};
struct WeightTransform {  // G g
  static void apply(const Floats g[3], Floats u[4]) {
    const Floats ends = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
    u[0] = g[0];
    u[1] = ends + middle;
    u[2] = ends - middle;
    u[3] = g[2];
  }
};
struct OutputTransform {  // A^T m
  static void apply(const Floats m[4], Floats y[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};
struct GradTransform {  // A y
  static void apply(const Floats y[2], Floats m[4]) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
};
struct SumsTransform {  // G^T u
  static void apply(const Floats u[4], Floats g[3]) {
    const Floats sum = (u[1] + u[2]) * 0.5f, difference = (u[1] - u[2]) * 0.5f;
    g[0] = u[0] + sum;
    g[1] = difference;
    g[2] = sum + u[3];
  }
};

// to = T from T^T, both row by row
template <class Transform, int FROM, int TO>
inline void transform_2d(const Floats (&from)[FROM * FROM], Floats (&to)[TO * TO]) {
  Floats half[FROM][TO];  // half[s] = T applied to column s
  for (int s = 0; s < FROM; ++s) {
    Floats column[FROM];
    for (int r = 0; r < FROM; ++r) column[r] = from[r * FROM + s];
    Transform::apply(column, half[s]);
  }
  for (int r = 0; r < TO; ++r) {
    Floats row[FROM];
    for (int s = 0; s < FROM; ++s) row[s] = half[s][r];
    Transform::apply(row, to + r * TO);
  }
}

// ---- reading tiles -------------------------------------------------------------------------------

// An image cut into N x I x J tiles that begin at pixel (2*i - pad_top, 2*j - pad_left), counted in that order.
struct Tiling {
  int64_t N, I, J;
  int64_t pad_top, pad_left;
  int64_t count() const { return N * I * J; }
};

// Tiles [begin, end) of one row of tiles, or of several whole ones, of one image.
struct Part {
  int64_t n, i, j;
  int64_t rows, columns;
};

template <class Run>
void for_each_part(const Tiling& tiling, int64_t begin, int64_t end, const Run& run) {
  constexpr int64_t kNarrow = 24;  // tiles in a row, so that several rows of tiles are read as one
  while (begin < end) {
    const int64_t j = begin % tiling.J, i = begin / tiling.J % tiling.I, n = begin / tiling.J / tiling.I;
    const int64_t whole_rows = j == 0 && tiling.J <= kNarrow ? std::min((end - begin) / tiling.J, tiling.I - i) : 0;
    const Part part = {n, i, j, std::max<int64_t>(1, whole_rows), std::min(tiling.J - j, end - begin)};
    run(part);
    begin += part.rows * part.columns;
  }
}

// The SIZE x SIZE pixels of each tile of a block. Channels that lie side by side are read where they are; others are
// first copied. Outside the image all is zero.
template <int SIZE, class T>
class Tiles {
 public:
  Tiles(const Strided4d<const T>& source, int64_t H, int64_t W, const Tiling& tiling)
      : source_(source), H_(H), W_(W), tiling_(tiling) {
    in_place_ = source.stride_c == 1;
  }

  // Channels [first, first + count) of tiles [begin, end).
  void read(int64_t first, int64_t count, int64_t begin, int64_t end) {
    const int64_t pitch = ceil_div(count, kFloats) * kFloats;
    zeros_.resize(std::max<size_t>(zeros_.size(), pitch), 0.0f);
    pixels_.clear();
    std::vector<Area> areas;
    int64_t size = 0;
    for_each_part(tiling_, begin, end, [&](const Part& part) {
      const Area area = area_of(part);
      areas.push_back(area);
      size += area.rows * area.columns * pitch;
    });
    if (!in_place_ && int64_t(copy_.size()) < size) copy_.resize(size);

    float* copy = copy_.data();
    auto area = areas.begin();
    for_each_part(tiling_, begin, end, [&](const Part& part) {
      if (in_place_) {
        const float* origin = area->rows * area->columns > 0 ? &source_.at(part.n, first, area->h, area->w) : nullptr;
        add_pixels(part, *area, origin, source_.stride_h, source_.stride_w);
      } else {
        copy_area(part.n, first, count, pitch, *area, copy);
        add_pixels(part, *area, copy, area->columns * pitch, pitch);
        copy += area->rows * area->columns * pitch;
      }
      ++area;
    });
  }

  const float* const* of_tile(int64_t tile) const { return pixels_.data() + tile * SIZE * SIZE; }

 private:
  // Pixels [h, h + rows) x [w, w + columns): what a part reads inside of the image.
  struct Area {
    int64_t h, w, rows, columns;
  };

  Area area_of(const Part& part) const {
    const int64_t h = 2 * part.i - tiling_.pad_top, w = 2 * part.j - tiling_.pad_left;
    const int64_t first_h = std::clamp<int64_t>(h, 0, H_), first_w = std::clamp<int64_t>(w, 0, W_);
    return {first_h, first_w, std::clamp<int64_t>(h + 2 * (part.rows - 1) + SIZE, first_h, H_) - first_h,
            std::clamp<int64_t>(w + 2 * (part.columns - 1) + SIZE, first_w, W_) - first_w};
  }

  void copy_area(int64_t n, int64_t first, int64_t count, int64_t pitch, const Area& area, float* to) const {
    const bool rows_join = area.columns == W_ && source_.stride_h == W_ * source_.stride_w;
    const int64_t run = rows_join ? area.rows * area.columns : area.columns;
    for (int64_t x = 0; x < area.rows * area.columns; x += run) {
      copy_pixels(&source_.at(n, first, area.h + x / area.columns, area.w), source_.stride_w, source_.stride_c, run,
                  count, to + x * pitch, pitch);
    }
  }

  // `origin` is the area's first pixel
  void add_pixels(const Part& part, const Area& area, const float* origin, int64_t stride_h, int64_t stride_w) {
    pixels_.resize(pixels_.size() + part.rows * part.columns * SIZE * SIZE);
    const float** pixel = pixels_.data() + pixels_.size() - part.rows * part.columns * SIZE * SIZE;
    for (int64_t i = part.i; i < part.i + part.rows; ++i) {
      const int64_t h = 2 * i - tiling_.pad_top - area.h;
      for (int64_t j = part.j; j < part.j + part.columns; ++j, pixel += SIZE * SIZE) {
        const int64_t w = 2 * j - tiling_.pad_left - area.w;
        const bool whole = h >= 0 && h + SIZE <= area.rows && w >= 0 && w + SIZE <= area.columns;
        for (int64_t x = 0; x < SIZE * SIZE; ++x) {
          const int64_t y = h + x / SIZE, z = w + x % SIZE;
          const bool inside = whole || (y >= 0 && y < area.rows && z >= 0 && z < area.columns);
          pixel[x] = inside ? origin + y * stride_h + z * stride_w : zeros_.data();
        }
      }
    }
  }

  Strided4d<const T> source_;
  int64_t H_, W_;
  Tiling tiling_;
  bool in_place_;
  std::vector<float> zeros_, copy_;
  std::vector<const float*> pixels_;
};

// transformed[position][tile][channel] of `count` tiles and `channels` channels; a tile has `pitch` floats
template <class Transform, int SIZE, class T>
void transform_tiles(const Tiles<SIZE, T>& tiles, int64_t count, int64_t channels, int64_t pitch, int64_t position,
                     float* transformed) {
  for (int64_t tile = 0; tile < count; ++tile) {
    const float* const* pixel = tiles.of_tile(tile);
    for (int64_t c = 0; c < channels; c += kFloats) {
      Floats from[SIZE * SIZE], to[kPositions];
      const int64_t lanes = std::min(kFloats, channels - c);
      if (lanes == kFloats) {
        for (int x = 0; x < SIZE * SIZE; ++x) from[x] = load_vector(pixel[x] + c);
      } else {
        for (int x = 0; x < SIZE * SIZE; ++x) from[x] = load_first(pixel[x] + c, lanes);
      }
      transform_2d<Transform, SIZE, 4>(from, to);
      for (int x = 0; x < kPositions; ++x) store_vector(transformed + x * position + tile * pitch + c, to[x]);
    }
  }
}

// ---- weights -------------------------------------------------------------------------------------

// Channels cut into blocks of whole vectors.
struct ChannelBlocks {
  explicit ChannelBlocks(int64_t channels)
      : channels(channels), vectors(ceil_div(channels, kFloats), kBlockChannels / kFloats) {}
  int64_t count() const { return vectors.count; }
  int64_t first(int64_t block) const { return vectors.begin(block) * kFloats; }
  int64_t pitch(int64_t block) const { return vectors.length(block) * kFloats; }
  int64_t length(int64_t block) const { return std::min(pitch(block), channels - first(block)); }
  int64_t padded() const { return vectors.size * kFloats; }

  int64_t channels;
  Pieces vectors;
};

std::vector<Tap> taps_of_kernel(bool rotated) {
  std::vector<Tap> taps;
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t s = 0; s < 3; ++s) taps.push_back({rotated ? 2 - r : r, rotated ? 2 - s : s, 0, 0});
  }
  return taps;
}

// transformed[position][d][column] = G g G^T of a panel's columns, for d_count channels; taps are (3, 3)
template <class T>
void transform_weight(const WeightView<const T>& weight, const Panel& panel, const std::vector<Tap>& taps,
                      int64_t d_begin, int64_t d_count, int64_t position, float* transformed, Scratch<float>& packed) {
  pack_weight(weight, panel, taps, d_begin, d_count, packed.data());
  const int64_t tap = d_count * panel.width;
  for (int64_t x = 0; x < tap; x += kFloats) {
    Floats g[9], u[kPositions];
    for (int t = 0; t < 9; ++t) g[t] = load_vector(packed.data() + t * tap + x);
    transform_2d<WeightTransform, 3, 4>(g, u);
    for (int p = 0; p < kPositions; ++p) store_vector(transformed + p * position + x, u[p]);
  }
}

// ---- writing tiles -------------------------------------------------------------------------------

// Where the 2 x 2 results of a block's tiles go: channels_last straight to memory, else through rows of pixels.
template <class T>
class Targets {
 public:
  Targets(const Strided4d<T>& target, int64_t P, int64_t Q, const Tiling& tiling)
      : target_(target), P_(P), Q_(Q), tiling_(tiling) {}

  void point_at(int64_t begin, int64_t end) {
    pixels_.clear();
    slots_.assign((end - begin) * 4, -1);
    int64_t tile = 0;
    for_each_part(tiling_, begin, end, [&](const Part& part) {
      for (int64_t i = part.i; i < part.i + part.rows; ++i, tile += part.columns) {
        for (int64_t r = 0; r < std::min<int64_t>(2, P_ - 2 * i); ++r) {
          T* row = &target_.at(part.n, 0, 2 * i + r, 2 * part.j);
          const int64_t columns = std::min(2 * part.columns, Q_ - 2 * part.j);
          for (int64_t q = 0; q < columns; ++q) {
            slots_[(tile + q / 2) * 4 + r * 2 + q % 2] = pixels_.size();
            pixels_.push_back(row + q * target_.stride_w);
          }
        }
      }
    });
  }

  // -1: beyond the last row or column
  int64_t slot(int64_t tile, int64_t output) const { return slots_[tile * 4 + output]; }
  const std::vector<T*>& pixels() const { return pixels_; }

 private:
  Strided4d<T> target_;
  int64_t P_, Q_;
  Tiling tiling_;
  std::vector<int64_t> slots_;
  std::vector<T*> pixels_;
};

// target = A^T sums A + bias for a panel; sums[position][tile][column]; bias (width). Whether all results are finite.
template <class T>
bool write_tiles(const float* sums, int64_t position, int64_t tiles, const float* bias, const Panel& panel,
                 const Targets<T>& targets, int64_t stride_c, float* rows) {
  Floats poison = {};  // 0 * result: NaN where that is not finite
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t j = 0; j < panel.width; j += kFloats) {
      Floats m[kPositions], y[4];
      for (int x = 0; x < kPositions; ++x) m[x] = load_vector(sums + x * position + tile * panel.width + j);
      transform_2d<OutputTransform, 4, 2>(m, y);
      const Floats b = load_vector(bias + j);
      for (int x = 0; x < 4; ++x) {
        y[x] += b;
        poison += 0.0f * y[x];
        const int64_t slot = targets.slot(tile, x);
        if (slot < 0) continue;
        if (stride_c == 1) {
          const int64_t lanes = std::min(kFloats, panel.count - j);
          if (lanes > 0) store_as<float>(targets.pixels()[slot] + panel.first + j, lanes, y[x]);
        } else {
          store_vector(rows + slot * panel.width + j, y[x]);
        }
      }
    }
  }
  if (stride_c != 1) write_pixels(rows, panel, targets.pixels(), stride_c);
  return sum_of_lanes<float>(poison) == 0;
}

// kernel[tap][x] = G^T sums G for x < count; sums[position][x]. Whether all results are finite.
bool transform_sums(const float* sums, int64_t position, int64_t count, float* kernel, int64_t tap) {
  Floats poison = {};
  for (int64_t i = 0; i < count; i += kFloats) {
    Floats u[kPositions], g[9];
    for (int x = 0; x < kPositions; ++x) u[x] = load_vector(sums + x * position + i);
    transform_2d<SumsTransform, 4, 3>(u, g);
    for (int t = 0; t < 9; ++t) {
      poison += 0.0f * g[t];
      store_vector(kernel + t * tap + i, g[t]);
    }
  }
  return sum_of_lanes<float>(poison) == 0;
}

// ---- launchers -----------------------------------------------------------------------------------

// target[n, g*M + m, p, q] = bias[g*M + m] + sum over d, r, s of weight_of(g)[m, d, tap (r, s)] *
// source[n, g*D + d, p + r - pad_top, q + s - pad_left]. Whether all results are finite.
template <class T, class WeightOf>
bool convolve(const Strided4d<const T>& source, int64_t H, int64_t W, int64_t D, int64_t G, int64_t M,
              const std::vector<Tap>& taps, const WeightOf& weight_of, const T* bias, int64_t bias_stride,
              const Strided4d<T>& target, int64_t N, int64_t P, int64_t Q, int64_t pad_top, int64_t pad_left) {
  const Tiling tiling = {N, ceil_div(P, 2), ceil_div(Q, 2), pad_top, pad_left};
  if (tiling.count() == 0 || M == 0) return true;
  if (D == 0) return false;  // sums of nothing
  const PanelCuts<float> panels(M);
  const ChannelBlocks channels(D);
  const int64_t most_width = std::min<int64_t>(kPanelVectors * kFloats, panels.padded());

  // Weights of a panel are [position][channel][column]. Few tiles: each task packs its own, which stay in its cache;
  // one core reads slowly what another has just written. Many tiles: they are packed before, once for all tasks.
  const bool own = tiling.count() <= kFewTiles;
  const auto weight_position = [&](const Panel& panel) { return D * panel.width + kSkew; };
  const auto weight_offset = [&](int64_t g, const Panel& panel) {
    return kPositions * (g * panels.padded() + panel.first) / kFloats * (D * kFloats + kSkew);
  };
  constexpr int64_t kPackedChannels = 16;
  const Pieces packs(D, kPackedChannels);
  const auto pack = [&](int64_t g, const Panel& panel, int64_t pack, float* weights, Scratch<float>& packed) {
    transform_weight(weight_of(g), panel, taps, packs.begin(pack), packs.length(pack), weight_position(panel),
                     weights + packs.begin(pack) * panel.width, packed);
  };
  Scratch<float> weights(own ? 0 : weight_offset(G, panels[0]));
  if (!own) {
    parallel_for(G * panels.count() * packs.count, grain_of(kPackedChannels * most_width * kPositions),
                 [&](int64_t begin, int64_t end) {
                   Scratch<float> packed(9 * kPackedChannels * most_width);
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t g = task / packs.count / panels.count();
                     const Panel panel = panels[task / packs.count % panels.count()];
                     pack(g, panel, task % packs.count, weights.data() + weight_offset(g, panel), packed);
                   }
                 });
  }

  // Blocks are whole register tiles; few of them are made of about the same size, and an even number of tasks.
  const int64_t tile_group = tile_rows(kPanelVectors), groups = ceil_div(tiling.count(), tile_group);
  Pieces blocks(groups, kBlockTiles / tile_group);
  const int64_t panel_count = G * panels.count();
  if (blocks.count * panel_count < 2 * kEnoughTasks) {
    const int64_t even = ceil_div(kEnoughTasks / 2, std::min(panel_count, kEnoughTasks / 2));
    blocks.count = std::min(groups, ceil_div(blocks.count, even) * even);
  }
  const int64_t most_tiles = blocks.most() * tile_group;
  std::vector<std::vector<int64_t>> depth(channels.count());
  for (int64_t d = 0; d < channels.count(); ++d) {
    depth[d].resize(channels.length(d));
    std::iota(depth[d].begin(), depth[d].end(), 0);
  }

  std::atomic<bool> finite = true;
  parallel_for(
      G * blocks.count * panels.count(), grain_of(most_tiles * kPositions * D * most_width),
      [&](int64_t begin, int64_t end) {
        const int64_t sums_position = most_tiles * most_width + kSkew;
        const int64_t block_size = kPositions * (most_tiles * kBlockChannels + kSkew);
        const int64_t slots = own ? blocks.count : 1;  // with their own weights, tasks come back to each block
        Scratch<float> all_transformed(slots * channels.count() * block_size), sums(kPositions * sums_position);
        std::vector<int64_t> block_in_slot(slots, -1);
        Scratch<float> rows(most_tiles * 4 * most_width), bias_row(most_width);
        Tiles<4, T> tiles(source, H, W, tiling);
        Targets<T> targets(target, P, Q, tiling);
        std::vector<int64_t> row(most_tiles);
        std::vector<float*> rows_of_sums(most_tiles);
        const float zeros[kPanelVectors * kFloats] = {};
        Scratch<float> own_weights(own ? kPositions * (D * most_width + kSkew) : 0),
            packed(own ? 9 * kPackedChannels * most_width : 0);
        int64_t last_panel = -1;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t g = task / panels.count() / blocks.count, rest = task % (panels.count() * blocks.count);
          const int64_t b = own ? rest % blocks.count : rest / panels.count(),
                        p = own ? rest / blocks.count : rest % panels.count();
          const Panel panel = panels[p];
          const float* weights_of_panel = own ? own_weights.data() : weights.data() + weight_offset(g, panel);
          if (own && g * panels.count() + p != last_panel) {
            last_panel = g * panels.count() + p;
            for (int64_t i = 0; i < packs.count; ++i) pack(g, panel, i, own_weights.data(), packed);
          }
          const int64_t first = blocks.begin(b) * tile_group;
          const int64_t count = std::min(blocks.length(b) * tile_group, tiling.count() - first);
          const auto tiles_position = [&](int64_t d) { return count * channels.pitch(d) + kSkew; };
          const int64_t slot = own ? b : 0;
          float* transformed = all_transformed.data() + slot * channels.count() * block_size;
          if (block_in_slot[slot] != g * blocks.count + b) {
            block_in_slot[slot] = g * blocks.count + b;
            for (int64_t d = 0; d < channels.count(); ++d) {
              tiles.read(g * D + channels.first(d), channels.length(d), first, first + count);
              transform_tiles<InputTransform>(tiles, count, channels.length(d), channels.pitch(d), tiles_position(d),
                                              transformed + d * block_size);
            }
          }
          for (int x = 0; x < kPositions; ++x) {
            float* sum = sums.data() + x * sums_position;
            for (int64_t t = 0; t < count; ++t) rows_of_sums[t] = sum + t * panel.width;
            for (int64_t d = 0; d < channels.count(); ++d) {
              for (int64_t t = 0; t < count; ++t) row[t] = t * channels.pitch(d);
              multiply(count, transformed + d * block_size + x * tiles_position(d), row.data(), depth[d],
                       weights_of_panel + x * weight_position(panel) + channels.first(d) * panel.width, panel.width,
                       panel.width, d == 0 ? zeros : nullptr, rows_of_sums.data());
            }
          }
          for (int64_t j = 0; j < panel.width; ++j) {
            const bool has_bias = bias != nullptr && j < panel.count;
            bias_row.data()[j] = has_bias ? bias[(g * M + panel.first + j) * bias_stride] : 0.0f;
          }
          targets.point_at(first, first + count);
          const Panel place = {g * M + panel.first, panel.count, panel.width};
          if (!write_tiles(sums.data(), sums_position, count, bias_row.data(), place, targets, target.stride_c,
                           rows.data())) {
            finite = false;
          }
        }
      });
  return finite;
}

// grad_weight[k, c, r, s] = sum over n, p, q of grad[n, k, p, q] * input[n, c, p + r - pad_top, q + s - pad_left].
// Tasks own a block of input channels, a panel of output channels and one of `chunks` stretches of tiles; the chunks'
// sums are then added in order. Whether all results are finite.
template <class T>
bool correlate(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
               const Strided4d<T>& grad_weight) {
  const int64_t M = shape.K / shape.G, D = shape.C / shape.G;
  if (D == 0) return true;
  const int64_t I = ceil_div(shape.P, 2), J = ceil_div(shape.Q, 2);
  const Tiling input_tiling = {shape.N, I, J, shape.pad_top, shape.pad_left}, grad_tiling = {shape.N, I, J, 0, 0};
  const PanelCuts<float> panels(M);
  const ChannelBlocks channels(D);
  const Pieces blocks(grad_tiling.count(), kSummedTiles);
  const int64_t most_width = std::min<int64_t>(kPanelVectors * kFloats, panels.padded());
  const int64_t tasks = shape.G * panels.count() * channels.count();
  const int64_t chunks = std::clamp(ceil_div(kEnoughTasks, tasks), int64_t(1), std::max<int64_t>(1, blocks.count));

  // a group's panel of one chunk is [tap][channel][column]
  const int64_t kernel_size = 9 * D * most_width;
  const auto kernel_of = [&](int64_t panel, int64_t chunk) { return (panel * chunks + chunk) * kernel_size; };
  Scratch<float> kernels(shape.G * panels.count() * chunks * kernel_size);
  const int64_t sums_position = std::min(kBlockChannels, channels.padded()) * most_width + kSkew;
  std::atomic<bool> finite = true;
  parallel_for(
      tasks * chunks, grain_of(blocks.count / chunks * kSummedTiles * kPositions * sums_position),
      [&](int64_t begin, int64_t end) {
        Scratch<float> inputs(kPositions * (blocks.most() * kBlockChannels + kSkew));
        Scratch<float> grads(kPositions * (blocks.most() * most_width + kSkew)), sums(kPositions * sums_position);
        Tiles<4, T> input_tiles(input, shape.H, shape.W, input_tiling);
        Tiles<2, T> grad_tiles(grad, shape.P, shape.Q, grad_tiling);
        std::vector<int64_t> row(kBlockChannels), depth;
        std::vector<float*> rows_of_sums(kBlockChannels);
        std::iota(row.begin(), row.end(), 0);
        for (int64_t index = begin; index < end; ++index) {
          const int64_t chunk = index % chunks, d = index / chunks % channels.count(), pitch = channels.pitch(d);
          const int64_t g = index / chunks / channels.count() / panels.count();
          const int64_t p = index / chunks / channels.count() % panels.count();
          const Panel panel = panels[p];
          std::fill_n(sums.data(), kPositions * sums_position, 0.0f);
          for (int64_t b = blocks.count * chunk / chunks; b < blocks.count * (chunk + 1) / chunks; ++b) {
            const int64_t first = blocks.begin(b), count = blocks.length(b);
            const int64_t input_position = count * pitch + kSkew, grad_position = count * panel.width + kSkew;
            input_tiles.read(g * D + channels.first(d), channels.length(d), first, first + count);
            transform_tiles<InputTransform>(input_tiles, count, channels.length(d), pitch, input_position,
                                            inputs.data());
            grad_tiles.read(g * M + panel.first, panel.count, first, first + count);
            transform_tiles<GradTransform>(grad_tiles, count, panel.count, panel.width, grad_position, grads.data());
            depth.resize(count);
            for (int64_t t = 0; t < count; ++t) depth[t] = t * pitch;
            for (int x = 0; x < kPositions; ++x) {
              for (int64_t c = 0; c < channels.length(d); ++c)
                rows_of_sums[c] = sums.data() + x * sums_position + c * panel.width;
              multiply<float>(channels.length(d), inputs.data() + x * input_position, row.data(), depth,
                              grads.data() + x * grad_position, panel.width, panel.width, nullptr, rows_of_sums.data());
            }
          }
          float* to = kernels.data() + kernel_of(g * panels.count() + p, chunk) + channels.first(d) * panel.width;
          if (!transform_sums(sums.data(), sums_position, channels.length(d) * panel.width, to, D * panel.width)) {
            finite = false;
          }
        }
      });

  if (chunks > 1) {
    parallel_for(shape.G * panels.count() * 9, grain_of(kernel_size / 9 * chunks), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t size = D * panels[i / 9 % panels.count()].width, tap = i % 9 * size;
        float* to = kernels.data() + kernel_of(i / 9, 0) + tap;
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
          const float* from = kernels.data() + kernel_of(i / 9, chunk) + tap;
          for (int64_t x = 0; x < size; x += kFloats) store_vector(to + x, load_vector(to + x) + load_vector(from + x));
        }
      }
    });
  }
  parallel_for(shape.G * panels.count(), grain_of(kernel_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const WeightView<T> view = {grad_weight.at(i / panels.count() * M, 0),
                                  grad_weight.stride_n,
                                  grad_weight.stride_c,
                                  grad_weight.stride_h,
                                  grad_weight.stride_w,
                                  3,
                                  3};
      unpack_weight(kernels.data() + kernel_of(i, 0), panels[i % panels.count()], taps_of_kernel(false), D, view);
    }
  });
  return finite;
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void Winograd::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                       int64_t bias_stride, Strided4d<T> output) {
  const int64_t M = shape.K / shape.G, D = shape.C / shape.G;
  const auto weight_of = [&](int64_t g) {
    return WeightView<const T>{
        weight.at(g * M, 0), weight.stride_n, weight.stride_c, weight.stride_h, weight.stride_w, 3, 3};
  };
  if (convolve(input, shape.H, shape.W, D, shape.G, M, taps_of_kernel(false), weight_of, bias, bias_stride, output,
               shape.N, shape.P, shape.Q, shape.pad_top, shape.pad_left)) {
    return;
  }
  Direct::forward(shape, input, weight, bias, bias_stride, output);
}

template <class T>
void Winograd::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                          int64_t bias_stride, Strided4d<T> grad_input) {
  const int64_t M = shape.C / shape.G, D = shape.K / shape.G;
  const auto weight_of = [&](int64_t g) {
    return WeightView<const T>{
        weight.at(g * D, 0), weight.stride_c, weight.stride_n, weight.stride_h, weight.stride_w, 3, 3};
  };
  if (convolve(grad, shape.P, shape.Q, D, shape.G, M, taps_of_kernel(true), weight_of, bias, bias_stride, grad_input,
               shape.N, shape.H, shape.W, 2 - shape.pad_top, 2 - shape.pad_left)) {
    return;
  }
  Direct::grad_input(shape, grad, weight, bias, bias_stride, grad_input);
}

template <class T>
void Winograd::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                           Strided4d<T> grad_weight) {
  if (correlate(shape, grad, input, grad_weight)) return;
  Direct::grad_weight(shape, grad, input, grad_weight);
}

template void Winograd::forward(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                int64_t, Strided4d<float>);
template void Winograd::grad_input(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                   int64_t, Strided4d<float>);
template void Winograd::grad_weight(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>,
                                    Strided4d<float>);

}  // namespace dlkernels
