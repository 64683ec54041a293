// conv2d as matrix products over gathered pixels (implicit GEMM), for every argument and memory layout.
//
//   output     [x, k] = bias[k] + sum over l of input[x + l] * weight[l, k]    x: n, p, q   l: (r, s, c)
//   grad_input [x, c] =           sum over l of grad [x + l] * weight[l, c]    x: n, h, w   l: (r, s, k)
//   grad_weight[l, k] =           sum over x of input[x + l] * grad[x, k]      x: n, p, q   l: (r, s, c)
//
// input[x + l] is what pixel x reads through term l: in an image whose channels lie side by side, and which is padded
// with zeros, its place is a sum of two offsets, one of the pixel and one of the term. So the image is gathered into
// such a slab, a block of pixels at a time, and never unfolded.
//
// Who owns what: a task owns a block of pixels and some of the panels of channels (of grad_weight: a panel and a
// stretch of pixels). Its slab and its panel of weights stay in the second cache. Passes over memory: each image is
// read about once and written once. Sums over l or x run in blocks of a fixed size, which are added in order, whatever
// the thread count.
#include "direct.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../gemm.h"
#include "../parallel.h"
#include "../simd.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;  // of channels: they divide the usual numbers of channels
constexpr int64_t kBlockPixels = 192;       // of a task: so often is a panel of weights used while it is in cache
constexpr int64_t kSlabBytes = 256 << 10;   // of a task, half a second cache or less
constexpr int64_t kBlockTerms = 288;        // summed before a sum goes to memory: 32 channels of a 3 x 3 kernel
constexpr int64_t kEnoughTasks = 8;         // for a handful of threads to share the work evenly
constexpr int64_t kTaskProducts = 1 << 17;  // multiply-adds (some 2 us) below which a second thread does not pay

// ---- kernels: copies -----------------------------------------------------------------------------

template <class T>
void copy_run(const T* from, int64_t count, Accumulate<T>* to) {
  constexpr int64_t L = kLanes<Accumulate<T>>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = std::min(L, count - i);
    store_as<Accumulate<T>>(to + i, lanes, load_as<Accumulate<T>>(from + i, lanes));
  }
}

// to[i*to_stride + j] = from[i + j*stride] for i < count, j < rows
template <class T>
void copy_transposed(const T* from, int64_t stride, int64_t count, int64_t rows, Accumulate<T>* to, int64_t to_stride) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  for (int64_t j = 0; j < rows; j += L) {
    const int64_t row_count = std::min(L, rows - j);
    for (int64_t i = 0; i < count; i += L) {
      const int64_t lanes = std::min(L, count - i);
      Vector<A> block[L] = {};
      for (int64_t row = 0; row < row_count; ++row) block[row] = load_as<A>(from + (j + row) * stride + i, lanes);
      transpose<A>(block);
      for (int64_t lane = 0; lane < lanes; ++lane) store_as<A>(to + (i + lane) * to_stride + j, row_count, block[lane]);
    }
  }
}

// to[x*to_stride + c] = from[x*stride_x + c*stride_c] for x < pixels, c < channels
template <class T>
void copy_pixels(const T* from, int64_t stride_x, int64_t stride_c, int64_t pixels, int64_t channels, Accumulate<T>* to,
                 int64_t to_stride) {
  constexpr int64_t kFewChannels = 6;  // are copied faster one by one than by transposes of sixteen
  if (stride_c == 1 || channels == 1) {
    if (stride_x == channels && to_stride == channels) return copy_run(from, pixels * channels, to);
    for (int64_t x = 0; x < pixels; ++x) copy_run(from + x * stride_x, channels, to + x * to_stride);
  } else if (stride_x == 1 && channels > kFewChannels) {
    copy_transposed(from, stride_c, pixels, channels, to, to_stride);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < pixels; ++x) to[x * to_stride + c] = load(from[x * stride_x + c * stride_c]);
    }
  }
}

// ---- kernels: gathering pixels -------------------------------------------------------------------

// A position of the weight kernel, and where it reads: pixel (i, j) of the grid reads source pixel
// (i*step_h + h, j*step_w + w).
struct Tap {
  int64_t r, s;
  int64_t h, w;
};

// What a grid of N x I x J pixels reads for each group: D channels at every tap, zero outside the source's H x W.
template <class T>
struct Gather {
  Strided4d<const T> source;  // (N, G*D, H, W)
  int64_t H, W, D;
  int64_t N, I, J;
  int64_t step_h, step_w;
  std::vector<Tap> taps;

  int64_t terms() const { return int64_t(taps.size()) * D; }
};

// Pixels [n, n + images) x [i, i + rows) x [j, j + columns) of the grid.
struct Block {
  int64_t n, i, j;
  int64_t images, rows, columns;
  int64_t pixels() const { return images * rows * columns; }
};

// `size` cut into pieces of about the same size, at most `most`.
struct Pieces {
  int64_t size, count;
  Pieces(int64_t size, int64_t most) : size(size), count(ceil_div(size, std::max<int64_t>(1, most))) {}
  int64_t begin(int64_t piece) const { return size * piece / count; }
  int64_t length(int64_t piece) const { return begin(piece + 1) - begin(piece); }
  int64_t most() const { return count > 0 ? ceil_div(size, count) : 0; }
};

// One dimension, height or width, of a slab: slot s of a block that begins at pixel b is position b*step + first +
// s*slot_step of the source. Where a single tap reads there, the positions between are left out.
struct SlabAxis {
  int64_t step, first, last, slot_step;

  SlabAxis(const std::vector<Tap>& taps, int64_t Tap::* position, int64_t step) : step(step), first(0), last(0) {
    if (!taps.empty()) first = last = taps[0].*position;
    for (const Tap& tap : taps) {
      first = std::min(first, tap.*position);
      last = std::max(last, tap.*position);
    }
    slot_step = first == last ? step : 1;
  }
  int64_t slots(int64_t pixels) const { return ((pixels - 1) * step + last - first) / slot_step + 1; }
  int64_t of_pixel(int64_t i) const { return i * step / slot_step; }
  int64_t of_tap(int64_t position) const { return (position - first) / slot_step; }
  int64_t source(int64_t begin, int64_t slot) const { return begin * step + first + slot * slot_step; }
};

// The source as blocks of the grid read it.
template <class T>
class Slab {
 public:
  using A = Accumulate<T>;

  explicit Slab(const Gather<T>& gather)
      : gather_(gather),
        rows_(gather.taps, &Tap::h, gather.step_h),
        columns_(gather.taps, &Tap::w, gather.step_w),
        columns(gather.J, most_columns()),
        rows(gather.I, most_rows()),
        images(gather.N, rows.count > 1 ? 1 : most_images()),
        width_(columns_.slots(columns.most())),
        height_(rows_.slots(rows.most())) {}

  int64_t size() const { return images.most() * height_ * width_ * gather_.D; }
  int64_t blocks() const { return images.count * rows.count * columns.count; }
  int64_t most_pixels() const { return images.most() * rows.most() * columns.most(); }

  Block block(int64_t index) const {
    const int64_t j = index % columns.count, i = index / columns.count % rows.count;
    const int64_t n = index / columns.count / rows.count;
    return {images.begin(n),  rows.begin(i),  columns.begin(j),
            images.length(n), rows.length(i), columns.length(j)};
  }

  // slab (images, height, width, D) of group g
  void fill(int64_t g, const Block& block, A* slab) const {
    const int64_t slots = columns_.slots(block.columns), D = gather_.D;
    const int64_t w = columns_.source(block.j, 0), step = columns_.slot_step;
    const int64_t begin = std::clamp(ceil_div(std::max<int64_t>(-w, 0), step), int64_t(0), slots);
    const int64_t end = gather_.W > w ? std::clamp(ceil_div(gather_.W - w, step), begin, slots) : begin;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t row = 0; row < rows_.slots(block.rows); ++row) {
        A* to = slab + (n * height_ + row) * width_ * D;
        const int64_t h = rows_.source(block.i, row);
        const int64_t first = h < 0 || h >= gather_.H ? slots : begin, last = std::max(first, end);
        std::fill(to, to + first * D, A(0));
        if (first < last) {
          copy_pixels(&gather_.source.at(block.n + n, g * D, h, w + first * step), step * gather_.source.stride_w,
                      gather_.source.stride_c, last - first, D, to + first * D, D);
        }
        std::fill(to + last * D, to + slots * D, A(0));
      }
    }
  }

  // Where pixel x of the block reads through the first term, and how far off that term l reads: slab[x + l].
  void offsets_of_pixels(const Block& block, std::vector<int64_t>& offsets) const {
    offsets.clear();
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i) {
        for (int64_t j = 0; j < block.columns; ++j) {
          offsets.push_back(((n * height_ + rows_.of_pixel(i)) * width_ + columns_.of_pixel(j)) * gather_.D);
        }
      }
    }
  }
  // of channels [d, d + count) at every tap
  void offsets_of_terms(int64_t d, int64_t count, std::vector<int64_t>& offsets) const {
    for (const Tap& tap : gather_.taps) {
      const int64_t first = (rows_.of_tap(tap.h) * width_ + columns_.of_tap(tap.w)) * gather_.D + d;
      for (int64_t i = 0; i < count; ++i) offsets.push_back(first + i);
    }
  }

 private:
  int64_t elements() const { return kSlabBytes / int64_t(sizeof(A)); }
  int64_t most_columns() const {
    const int64_t fit = elements() / std::max<int64_t>(1, rows_.slots(1) * gather_.D);
    return std::min(kBlockPixels, (fit - (columns_.last - columns_.first)) / gather_.step_w);
  }
  int64_t most_rows() const {
    const int64_t row = columns_.slots(columns.most()) * gather_.D;
    const int64_t fit = elements() / std::max<int64_t>(1, row);
    return std::min(kBlockPixels / columns.most(), (fit - (rows_.last - rows_.first)) / gather_.step_h);
  }
  int64_t most_images() const {
    const int64_t image = rows_.slots(gather_.I) * columns_.slots(gather_.J) * gather_.D;
    return std::min(kBlockPixels / (gather_.I * gather_.J), elements() / std::max<int64_t>(1, image));
  }

  const Gather<T>& gather_;
  SlabAxis rows_, columns_;

 public:
  Pieces columns, rows, images;  // in this order: each is cut so that what the others leave room for fits

 private:
  int64_t width_, height_;
};

// ---- kernels: weights ----------------------------------------------------------------------------

// weight[m, d, tap] lies at data[m*stride_m + d*stride_d + tap.r*stride_r + tap.s*stride_s]; T may be const.
template <class T>
struct WeightView {
  T* data;
  int64_t stride_m, stride_d, stride_r, stride_s;
  int64_t R, S;

  int64_t offset(const Tap& tap) const { return tap.r * stride_r + tap.s * stride_s; }
  bool taps_side_by_side() const { return (S == 1 || stride_s == 1) && (R == 1 || stride_r == S); }
};

// Channels cut into panels of whole vectors: columns [first, first + count) of M, `width` with the padding.
struct Panel {
  int64_t first, count, width;
};
template <class A>
class PanelCuts {
 public:
  explicit PanelCuts(int64_t M) : M_(M), vectors_(ceil_div(M, kLanes<A>), kPanelVectors) {}
  int64_t count() const { return vectors_.count; }
  int64_t padded() const { return vectors_.size * kLanes<A>; }
  Panel operator[](int64_t panel) const {
    const int64_t first = vectors_.begin(panel) * kLanes<A>, width = vectors_.length(panel) * kLanes<A>;
    return {first, std::min(width, M_ - first), width};
  }

 private:
  int64_t M_;
  Pieces vectors_;
};

// Calls run(from, row, count): `count` weights side by side from each of the panel's columns, `from` being column 0's,
// are terms row[0], row[1], ... of channels [d_begin, d_begin + d_count), in the order (tap, channel); -1: none of them.
template <class T, class Run>
void for_each_run(const WeightView<T>& weight, const std::vector<Tap>& taps, int64_t d_begin, int64_t d_count,
                  const Run& run) {
  std::vector<int64_t> row;
  T* first = weight.data + d_begin * weight.stride_d;
  if (weight.taps_side_by_side() && weight.R * weight.S > 1) {
    const int64_t positions = weight.R * weight.S;
    const int64_t channels = weight.stride_d == positions ? d_count : 1;  // of a run
    for (int64_t d = 0; d < d_count; d += channels) {
      row.assign(channels * positions, -1);
      for (size_t t = 0; t < taps.size(); ++t) {
        for (int64_t i = 0; i < channels; ++i) {
          row[i * positions + taps[t].r * weight.S + taps[t].s] = int64_t(t) * d_count + d + i;
        }
      }
      run(first + d * weight.stride_d, row.data(), channels * positions);
    }
  } else {
    const int64_t channels = weight.stride_d == 1 ? d_count : 1;
    for (size_t t = 0; t < taps.size(); ++t) {
      for (int64_t d = 0; d < d_count; d += channels) {
        row.resize(channels);
        std::iota(row.begin(), row.end(), int64_t(t) * d_count + d);
        run(first + weight.offset(taps[t]) + d * weight.stride_d, row.data(), channels);
      }
    }
  }
}

// packed[l][j] = weight[first + j, d, tap] for l = t*d_count + d - d_begin, 0 for the padding; packed (terms, width)
template <class T>
void pack_weight(const WeightView<const T>& weight, const Panel& panel, const std::vector<Tap>& taps, int64_t d_begin,
                 int64_t d_count, Accumulate<T>* packed) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const WeightView<const T> view = {weight.data + panel.first * weight.stride_m, weight.stride_m, weight.stride_d,
                                    weight.stride_r, weight.stride_s, weight.R, weight.S};
  if (weight.stride_m == 1) {  // the columns are side by side
    for (const Tap& tap : taps) {
      for (int64_t d = d_begin; d < d_begin + d_count; ++d, packed += panel.width) {
        const T* from = view.data + d * view.stride_d + view.offset(tap);
        for (int64_t j = 0; j < panel.width; j += L) {
          store_vector(packed + j, load_as<A>(from + j, std::clamp<int64_t>(panel.count - j, 0, L)));
        }
      }
    }
    return;
  }
  for_each_run(view, taps, d_begin, d_count, [&](const T* from, const int64_t* row, int64_t count) {
    for (int64_t j = 0; j < panel.width; j += L) {
      const int64_t columns = std::clamp<int64_t>(panel.count - j, 0, L);
      for (int64_t q = 0; q < count; q += L) {
        Vector<A> block[L] = {};
        const int64_t lanes = std::min(L, count - q);
        for (int64_t i = 0; i < columns; ++i) block[i] = load_as<A>(from + (j + i) * view.stride_m + q, lanes);
        transpose<A>(block);
        for (int64_t i = 0; i < lanes; ++i) {
          if (row[q + i] >= 0) store_vector(packed + row[q + i] * panel.width + j, block[i]);
        }
      }
    }
  });
}

// The way back, for all channels: weight[first + j, d, tap] = sums[t*D + d][j]
template <class T>
void unpack_weight(const Accumulate<T>* sums, const Panel& panel, const std::vector<Tap>& taps, int64_t D,
                   const WeightView<T>& weight) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const WeightView<T> view = {weight.data + panel.first * weight.stride_m, weight.stride_m, weight.stride_d,
                              weight.stride_r, weight.stride_s, weight.R, weight.S};
  for_each_run(view, taps, 0, D, [&](T* to, const int64_t* row, int64_t count) {
    for (int64_t j = 0; j < panel.count; j += L) {
      for (int64_t q = 0; q < count; q += L) {
        Vector<A> block[L] = {};
        const int64_t lanes = std::min(L, count - q);
        for (int64_t i = 0; i < lanes; ++i) block[i] = load_vector(sums + row[q + i] * panel.width + j);
        transpose<A>(block);
        for (int64_t i = 0; i < std::min(L, panel.count - j); ++i) {
          store_as<A>(to + (j + i) * view.stride_m + q, lanes, block[i]);
        }
      }
    }
  });
}

// ---- kernels: products and results ---------------------------------------------------------------

// sums[m][j] += sum over l of data[row[m] + depth[l]] * columns[l][j], for vectors of columns that one tile takes
template <class A>
void multiply(int64_t row_count, const A* data, const int64_t* row, const std::vector<int64_t>& depth, const A* columns,
              int64_t width, A* sums) {
  const int64_t vectors = width / kLanes<A>, rows = tile_rows(int(vectors));
  for (int64_t m = 0; m < row_count; m += rows) {
    const auto tile = indirect_tile<A>(std::min(rows, row_count - m), vectors);
    tile(int64_t(depth.size()), Indirect<A>{data, row + m, depth.data()}, columns, width, sums + m * width, width);
  }
}

// Where pixel x of the block lies in the target's memory.
template <class T>
void target_of_pixels(const Strided4d<T>& target, const Block& block, std::vector<T*>& pixels) {
  pixels.clear();
  for (int64_t n = 0; n < block.images; ++n) {
    for (int64_t i = 0; i < block.rows; ++i) {
      T* row = &target.at(block.n + n, 0, block.i + i, block.j);
      for (int64_t j = 0; j < block.columns; ++j) pixels.push_back(row + j * target.stride_w);
    }
  }
}

// pixels[x][(first + j)*stride_c] = sums[x][j] for j < panel.count
template <class T>
void write_pixels(const Accumulate<T>* sums, const Panel& panel, const std::vector<T*>& pixels, int64_t stride_c) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t pixel_count = pixels.size();
  for (int64_t x = 0; x < pixel_count;) {
    int64_t run = 1;  // pixels side by side
    while (run < L && x + run < pixel_count && pixels[x + run] == pixels[x] + run) ++run;
    T* to = pixels[x] + panel.first * stride_c;
    const A* from = sums + x * panel.width;
    for (int64_t j = 0; j < panel.count; j += L) {
      const int64_t lanes = std::min(L, panel.count - j);
      if (stride_c == 1) {
        store_as<A>(to + j, lanes, load_vector(from + j));
      } else if (run == 1) {
        for (int64_t i = j; i < j + lanes; ++i) to[i * stride_c] = store<T>(from[i]);
      } else {
        Vector<A> block[L] = {};
        for (int64_t i = 0; i < run; ++i) block[i] = load_vector(from + i * panel.width + j);
        transpose<A>(block);
        for (int64_t i = 0; i < lanes; ++i) store_as<A>(to + (j + i) * stride_c, run, block[i]);
      }
    }
    x += stride_c == 1 ? 1 : run;
  }
}

// ---- launchers -----------------------------------------------------------------------------------

int64_t grain_of(int64_t products_per_task) { return std::max<int64_t>(1, kTaskProducts / (products_per_task + 1)); }

// A block of channels at every tap: the terms that one tile sums in registers.
struct TermBlock {
  int64_t d, count;
  std::vector<int64_t> offsets;
};

template <class T>
std::vector<TermBlock> cut_terms(const Gather<T>& gather, const Slab<T>& slab) {
  std::vector<TermBlock> blocks;
  const Pieces cuts(gather.D, kBlockTerms / std::max<int64_t>(1, gather.taps.size()));
  for (int64_t b = 0; b < cuts.count; ++b) {
    blocks.push_back({cuts.begin(b), cuts.length(b), {}});
    slab.offsets_of_terms(cuts.begin(b), cuts.length(b), blocks.back().offsets);
  }
  return blocks;
}

// target[n, g*M + m, i, j] = bias[g*M + m] + sum over d, tap of weight[g*M + m, d, tap] * gathered source; weight_of(g)
// is the group's WeightView
template <class T, class WeightOf>
void gather_and_multiply(const Gather<T>& gather, int64_t G, int64_t M, const WeightOf& weight_of, const T* bias,
                         int64_t bias_stride, const Strided4d<T>& target) {
  using A = Accumulate<T>;
  if (gather.N * gather.I * gather.J == 0 || M == 0) return;
  const Slab<T> slab(gather);
  const std::vector<TermBlock> terms = cut_terms(gather, slab);
  const PanelCuts<A> panels(M);
  const int64_t depth = gather.terms();

  // Weights that several tasks use are packed before; else the task packs its own, a block at a time, in its cache.
  const int64_t blocks = slab.blocks();
  const bool shared = blocks > 1;
  Scratch<A> packed(shared ? G * depth * panels.padded() : 0);
  if (shared) {
    parallel_for(G * panels.count(), grain_of(depth * kPanelVectors * kLanes<A>), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t g = task / panels.count();
        const Panel panel = panels[task % panels.count()];
        A* to = packed.data() + (g * panels.padded() + panel.first) * depth;
        for (const TermBlock& block : terms) {
          pack_weight(weight_of(g), panel, gather.taps, block.d, block.count, to);
          to += block.offsets.size() * panel.width;
        }
      }
    });
  }

  const Pieces splits(panels.count(), ceil_div(panels.count(), ceil_div(kEnoughTasks, G * blocks)));
  const int64_t products = slab.most_pixels() * splits.most() * kPanelVectors * kLanes<A> * depth;
  parallel_for(G * blocks * splits.count, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<A> pixels(slab.size()), sums(slab.most_pixels() * kPanelVectors * kLanes<A>);
    Scratch<A> own_weight(shared ? 0 : std::max<int64_t>(kBlockTerms, gather.taps.size()) * kPanelVectors * kLanes<A>);
    std::vector<int64_t> offsets;
    std::vector<T*> places;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % splits.count, g = task / splits.count / blocks;
      const Block block = slab.block(task / splits.count % blocks);
      slab.fill(g, block, pixels.data());
      slab.offsets_of_pixels(block, offsets);
      target_of_pixels(target, block, places);
      for (int64_t p = splits.begin(split); p < splits.begin(split + 1); ++p) {
        const Panel panel = panels[p];
        for (int64_t j = 0; j < panel.width; ++j) {
          const bool has_bias = bias != nullptr && j < panel.count;
          sums.data()[j] = has_bias ? load(bias[(g * M + panel.first + j) * bias_stride]) : A(0);
        }
        for (int64_t x = 1; x < block.pixels(); ++x) {
          std::copy_n(sums.data(), panel.width, sums.data() + x * panel.width);
        }
        const A* columns = packed.data() + (g * panels.padded() + panel.first) * depth;
        for (const TermBlock& term : terms) {
          if (!shared) {
            pack_weight(weight_of(g), panel, gather.taps, term.d, term.count, own_weight.data());
            columns = own_weight.data();
          }
          multiply(block.pixels(), pixels.data(), offsets.data(), term.offsets, columns, panel.width, sums.data());
          columns += term.offsets.size() * panel.width;
        }
        write_pixels(sums.data(), {g * M + panel.first, panel.count, panel.width}, places, target.stride_c);
      }
    }
  });
}

// What the output's pixels read of the input.
template <class T>
Gather<T> gather_input(const Conv2dShape& shape, const Strided4d<const T>& input) {
  Gather<T> gather{input,   shape.H, shape.W,        shape.C / shape.G, shape.N,
                   shape.P, shape.Q, shape.stride_h, shape.stride_w,    {}};
  for (int64_t r = 0; r < shape.R; ++r) {
    for (int64_t s = 0; s < shape.S; ++s) {
      gather.taps.push_back({r, s, r * shape.dilation_h - shape.pad_top, s * shape.dilation_w - shape.pad_left});
    }
  }
  return gather;
}

// What the input pixels h = phase_h + i*stride_h, w = phase_w + j*stride_w read of grad. h takes part in output row p
// through tap r when p*stride_h - pad_top + r*dilation_h = h, that is when phase_h + pad_top - r*dilation_h is a
// multiple of stride_h, and then p = i + (phase_h + pad_top - r*dilation_h) / stride_h. All pixels of a phase share
// their taps.
template <class T>
Gather<T> gather_grad(const Conv2dShape& shape, const Strided4d<const T>& grad, int64_t phase_h, int64_t phase_w) {
  const int64_t I = ceil_div(shape.H - phase_h, shape.stride_h), J = ceil_div(shape.W - phase_w, shape.stride_w);
  Gather<T> gather{grad, shape.P, shape.Q, shape.K / shape.G, shape.N, I, J, 1, 1, {}};
  for (int64_t r = 0; r < shape.R; ++r) {
    const int64_t h = phase_h + shape.pad_top - r * shape.dilation_h;
    for (int64_t s = 0; s < shape.S; ++s) {
      const int64_t w = phase_w + shape.pad_left - s * shape.dilation_w;
      if (floor_mod(h, shape.stride_h) == 0 && floor_mod(w, shape.stride_w) == 0) {
        gather.taps.push_back({r, s, floor_div(h, shape.stride_h), floor_div(w, shape.stride_w)});
      }
    }
  }
  return gather;
}

// columns[x][j] = grad[pixel x of the block, g*M + first + j], 0 for the padding
template <class T>
void pack_grad(const Strided4d<const T>& grad, int64_t channel, const Panel& panel, const Block& block,
               Accumulate<T>* columns) {
  if (panel.count < panel.width) std::fill_n(columns, block.pixels() * panel.width, Accumulate<T>(0));
  const bool rows_join = block.rows == 1 || grad.stride_h == block.columns * grad.stride_w;
  const int64_t run = rows_join ? block.rows * block.columns : block.columns;
  for (int64_t n = 0; n < block.images; ++n) {
    for (int64_t i = 0; i < block.rows; i += run / block.columns) {
      copy_pixels(&grad.at(block.n + n, channel, block.i + i, block.j), grad.stride_w, grad.stride_c, run, panel.count,
                  columns, panel.width);
      columns += run * panel.width;
    }
  }
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void Direct::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                     int64_t bias_stride, Strided4d<T> output) {
  const int64_t M = shape.K / shape.G;
  gather_and_multiply(
      gather_input(shape, input), shape.G, M,
      [&](int64_t g) {
        return WeightView<const T>{weight.at(g * M, 0), weight.stride_n, weight.stride_c, weight.stride_h,
                                   weight.stride_w, shape.R, shape.S};
      },
      bias, bias_stride, output);
}

template <class T>
void Direct::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight,
                        Strided4d<T> grad_input) {
  if (shape.N == 0 || shape.C == 0) return;
  const int64_t M = shape.C / shape.G, D = shape.K / shape.G;
  const T* no_bias = nullptr;
  for (int64_t phase_h = 0; phase_h < std::min(shape.stride_h, shape.H); ++phase_h) {
    for (int64_t phase_w = 0; phase_w < std::min(shape.stride_w, shape.W); ++phase_w) {
      const Strided4d<T> pixels_of_phase = {&grad_input.at(0, 0, phase_h, phase_w), grad_input.stride_n,
                                            grad_input.stride_c, grad_input.stride_h * shape.stride_h,
                                            grad_input.stride_w * shape.stride_w};
      gather_and_multiply(
          gather_grad(shape, grad, phase_h, phase_w), shape.G, M,
          [&](int64_t g) {
            return WeightView<const T>{weight.at(g * D, 0), weight.stride_c, weight.stride_n, weight.stride_h,
                                       weight.stride_w, shape.R, shape.S};
          },
          no_bias, 0, pixels_of_phase);
    }
  }
}

// Tasks own a panel of one group's grad_weight, and one of `chunks` stretches of pixels where there would be too few
// tasks otherwise; the chunks' sums are then added in order.
template <class T>
void Direct::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                         Strided4d<T> grad_weight) {
  if (shape.C == 0) return;
  using A = Accumulate<T>;
  const Gather<T> gather = gather_input(shape, input);
  const Slab<T> slab(gather);
  const int64_t M = shape.K / shape.G, D = gather.D, terms = gather.terms();
  std::vector<int64_t> depth;
  slab.offsets_of_terms(0, D, depth);
  const PanelCuts<A> panels(M);
  const int64_t most_width = std::min<int64_t>(kPanelVectors * kLanes<A>, panels.padded());
  const int64_t blocks = slab.blocks(), tasks = shape.G * panels.count();
  const int64_t chunks = std::clamp(ceil_div(kEnoughTasks, tasks), int64_t(1), std::max<int64_t>(1, blocks));

  Scratch<A> partial(tasks * chunks * terms * most_width);
  const auto sums_of = [&](int64_t task, int64_t chunk) {
    return partial.data() + (task * chunks + chunk) * terms * most_width;
  };
  const int64_t products = blocks / chunks * slab.most_pixels() * terms * most_width;
  parallel_for(tasks * chunks, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<A> pixels(slab.size()), columns(slab.most_pixels() * most_width);
    std::vector<int64_t> offsets;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t task = index / chunks, chunk = index % chunks, g = task / panels.count();
      const Panel panel = panels[task % panels.count()];
      A* sums = sums_of(task, chunk);
      std::fill_n(sums, terms * panel.width, A(0));
      for (int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
        const Block block = slab.block(b);
        slab.fill(g, block, pixels.data());
        slab.offsets_of_pixels(block, offsets);
        pack_grad(grad, g * M + panel.first, panel, block, columns.data());
        multiply(terms, pixels.data(), depth.data(), offsets, columns.data(), panel.width, sums);
      }
    }
  });

  parallel_for(tasks, grain_of(terms * most_width * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / panels.count();
      const Panel panel = panels[task % panels.count()];
      A* sums = sums_of(task, 0);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const A* more = sums_of(task, chunk);
        for (int64_t i = 0; i < terms * panel.width; ++i) sums[i] += more[i];
      }
      const WeightView<T> view = {grad_weight.at(g * M, 0), grad_weight.stride_n, grad_weight.stride_c,
                                  grad_weight.stride_h, grad_weight.stride_w, shape.R, shape.S};
      unpack_weight(sums, panel, gather.taps, D, view);
    }
  });
}

template <class T>
void conv2d_grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) {
  constexpr int64_t kChannels = 16;  // of a task: one cache line of float in channels_last
  const int64_t pixels = shape.N * shape.P * shape.Q;
  parallel_for(ceil_div(shape.K, kChannels), grain_of(pixels * kChannels), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kChannels, count = std::min(kChannels, shape.K - first);
      double sums[kChannels] = {};
      for (int64_t n = 0; n < shape.N; ++n) {
        for (int64_t p = 0; p < shape.P; ++p) {
          // sums[k] += sum over q of grad[n, k, p, q]; the inner loop is the one that runs along memory
          const T* row = &grad.at(n, first, p, 0);
          if (grad.stride_c < grad.stride_w) {
            for (int64_t q = 0; q < shape.Q; ++q) {
              for (int64_t k = 0; k < count; ++k) sums[k] += load(row[q * grad.stride_w + k * grad.stride_c]);
            }
          } else {
            for (int64_t k = 0; k < count; ++k) {
              constexpr int64_t kParallelSums = 16;  // independent, so that they fill a vector
              Accumulate<T> lanes[kParallelSums] = {};
              int64_t q = 0;
              for (; q + kParallelSums <= shape.Q; q += kParallelSums) {
                for (int64_t x = 0; x < kParallelSums; ++x) {
                  lanes[x] += load(row[k * grad.stride_c + (q + x) * grad.stride_w]);
                }
              }
              for (; q < shape.Q; ++q) lanes[0] += load(row[k * grad.stride_c + q * grad.stride_w]);
              for (int64_t x = 0; x < kParallelSums; ++x) sums[k] += lanes[x];
            }
          }
        }
      }
      for (int64_t k = 0; k < count; ++k) grad_bias[first + k] = store<T>(Accumulate<T>(sums[k]));
    }
  });
}

#define DLKERNELS_INSTANTIATE(T)                                                                               \
  template void Direct::forward(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*, int64_t, \
                                Strided4d<T>);                                                                 \
  template void Direct::grad_input(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, Strided4d<T>);  \
  template void Direct::grad_weight(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, Strided4d<T>); \
  template void conv2d_grad_bias(const Conv2dShape&, Strided4d<const T>, T*);
DLKERNELS_INSTANTIATE(double)
DLKERNELS_INSTANTIATE(float)
DLKERNELS_INSTANTIATE(BFloat16)
DLKERNELS_INSTANTIATE(Half)
#undef DLKERNELS_INSTANTIATE

}  // namespace dlkernels
