// Images as the strategies read and write them: blocks of pixels, gathered into a slab whose channels lie side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "../../conv2d.h"
#include "../simd.h"

namespace dlkernels {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kBlockPixels = 192;      // of a task: so often is a panel of weights used while it is in cache
constexpr int64_t kSlabBytes = 256 << 10;  // of a task, half a second cache or less

// ---- copies -----------------------------------------------------------------------------

template <class T>
void copy_run(const T* from, int64_t count, Accumulate<T>* to) {
  constexpr int64_t L = kLanes<Accumulate<T>>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = std::min(L, count - i);
    store_as<Accumulate<T>>(to + i, lanes, load_as<Accumulate<T>>(from + i, lanes));
  }
}

// to[i*to_stride + j] = from[i + j*stride] for i, j < a vector's lanes: with all sizes known, it stays in registers
template <class From, class To>
void transpose_block(const From* from, int64_t stride, To* to, int64_t to_stride) {
  using A = Accumulate<From>;
  constexpr int L = kLanes<A>;
  Vector<A> block[L];
  for (int j = 0; j < L; ++j) block[j] = load_as<A>(from + j * stride);
  transpose<A>(block);
  for (int i = 0; i < L; ++i) store_as<A>(to + i * to_stride, block[i]);
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
      if (row_count == L && lanes == L) {
        transpose_block(from + j * stride + i, stride, to + i * to_stride + j, to_stride);
        continue;
      }
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

// ---- gathering pixels -------------------------------------------------------------------

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
    return {images.begin(n), rows.begin(i), columns.begin(j), images.length(n), rows.length(i), columns.length(j)};
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

}  // namespace dlkernels
