// Images as the strategies read them: blocks of pixels, gathered into a slab that is padded with zeros.
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
void copy_run(const T* from, int64_t count, T* to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = std::min(L, count - i);
    store_as<T>(to + i, lanes, load_as<T>(from + i, lanes));
  }
}

// to[i*to_stride + j] = from[i + j*stride] for i, j < a vector's lanes: with all sizes known, it stays in registers
template <class T>
void transpose_block(const T* from, int64_t stride, T* to, int64_t to_stride) {
  constexpr int L = kLanes<T>;
  Vector<T> block[L];
  for (int j = 0; j < L; ++j) block[j] = load_as<T>(from + j * stride);
  transpose<T>(block);
  for (int i = 0; i < L; ++i) store_as<T>(to + i * to_stride, block[i]);
}

// to[i*to_stride + j] = from[i + j*stride] for i < count, j < rows
template <class T>
void copy_transposed(const T* from, int64_t stride, int64_t count, int64_t rows, T* to, int64_t to_stride) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t j = 0; j < rows; j += L) {
    const int64_t row_count = std::min(L, rows - j);
    for (int64_t i = 0; i < count; i += L) {
      const int64_t lanes = std::min(L, count - i);
      if (row_count == L && lanes == L) {
        transpose_block(from + j * stride + i, stride, to + i * to_stride + j, to_stride);
        continue;
      }
      Vector<T> block[L] = {};
      for (int64_t row = 0; row < row_count; ++row) block[row] = load_as<T>(from + (j + row) * stride + i, lanes);
      transpose<T>(block);
      for (int64_t lane = 0; lane < lanes; ++lane) store_as<T>(to + (i + lane) * to_stride + j, row_count, block[lane]);
    }
  }
}

// to[x*to_stride + c] = from[x*stride_x + c*stride_c] for x < pixels, c < channels
template <class T>
void copy_pixels(const T* from, int64_t stride_x, int64_t stride_c, int64_t pixels, int64_t channels, T* to,
                 int64_t to_stride) {
  constexpr int64_t kFewChannels = 6;  // are copied faster one by one than by transposes of sixteen
  if (channels == to_stride && channels == stride_x && (stride_c == 1 || channels == 1)) {
    copy_run(from, pixels * channels, to);
  } else if (stride_c == 1 && channels > 1) {
    for (int64_t x = 0; x < pixels; ++x) copy_run(from + x * stride_x, channels, to + x * to_stride);
  } else if (stride_x == 1 && channels > kFewChannels) {
    copy_transposed(from, stride_c, pixels, channels, to, to_stride);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < pixels; ++x) to[x * to_stride + c] = from[x * stride_x + c * stride_c];
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

template <class T>
Gather<T> with_depth(Gather<T> gather, int64_t D) {
  gather.D = D;
  return gather;
}

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
  // whether `pixels` pixels read only positions that a source of `size` has
  bool inside(int64_t pixels, int64_t size) const { return first >= 0 && (pixels - 1) * step + last < size; }
};

// How many channels of blocks of so many pixels fit into kSlabBytes.
template <class T>
int64_t slab_channels(const Gather<T>& gather, int64_t block_pixels) {
  const SlabAxis rows(gather.taps, &Tap::h, gather.step_h), columns(gather.taps, &Tap::w, gather.step_w);
  const int64_t J = Pieces(gather.J, block_pixels).most(), I = Pieces(gather.I, block_pixels / J).most();
  const int64_t images = I < gather.I ? 1 : std::clamp<int64_t>(block_pixels / (I * J), 1, gather.N);
  return kSlabBytes / int64_t(sizeof(T)) / (images * rows.slots(I) * columns.slots(J));
}

// The source as blocks of the grid read it: gathered into memory of its own, or, where nothing has to be padded or
// moved, the source itself.
template <class T>
class Slab {
 public:
  explicit Slab(const Gather<T>& gather, int64_t block_pixels = kBlockPixels)
      : gather_(gather),
        block_pixels_(block_pixels),
        rows_(gather.taps, &Tap::h, gather.step_h),
        columns_(gather.taps, &Tap::w, gather.step_w),
        column_cuts_(gather.J, most_columns()),
        row_cuts_(gather.I, most_rows()),
        image_cuts_(gather.N, row_cuts_.count > 1 ? 1 : most_images()),
        planes_(gather.taps.size() == 1 && gather.source.stride_c != 1 && gather.source.stride_w == 1),
        in_place_(gather.D > 0 && (gather.source.stride_c == 1 || planes_) && rows_.inside(gather.I, gather.H) &&
                  columns_.inside(gather.J, gather.W) && near_enough()) {
    const Strided4d<const T>& source = gather.source;
    const int64_t width = columns_.slots(column_cuts_.most()), height = rows_.slots(row_cuts_.most());
    if (in_place_) {
      stride_c_ = source.stride_c, stride_w_ = columns_.slot_step * source.stride_w;
      stride_h_ = rows_.slot_step * source.stride_h, stride_n_ = source.stride_n;
    } else if (planes_) {
      stride_c_ = odd_lines(height * width), stride_w_ = 1, stride_h_ = width, stride_n_ = gather.D * stride_c_;
    } else {
      stride_c_ = 1, stride_w_ = gather.D, stride_h_ = width * gather.D, stride_n_ = height * stride_h_;
    }
  }

  bool in_place() const { return in_place_; }
  // of the memory that `gather` needs
  int64_t size() const { return in_place_ ? 0 : image_cuts_.most() * stride_n_; }
  int64_t blocks() const { return image_cuts_.count * row_cuts_.count * column_cuts_.count; }
  int64_t most_pixels() const { return image_cuts_.most() * row_cuts_.most() * column_cuts_.most(); }

  Block block(int64_t index) const {
    const int64_t j = index % column_cuts_.count, i = index / column_cuts_.count % row_cuts_.count;
    const int64_t n = index / column_cuts_.count / row_cuts_.count;
    return {image_cuts_.begin(n),  row_cuts_.begin(i),  column_cuts_.begin(j),
            image_cuts_.length(n), row_cuts_.length(i), column_cuts_.length(j)};
  }

  // The block's slab of channels [channel, channel + count), at most D: slab[x + l] is what pixel x reads through term
  // l.
  const T* gather(int64_t channel, int64_t count, const Block& block, T* memory) const {
    if (in_place_) {
      return &gather_.source.at(block.n, channel, rows_.source(block.i, 0), columns_.source(block.j, 0));
    }
    fill(channel, count, block, memory);
    return memory;
  }
  void offsets_of_pixels(const Block& block, std::vector<int64_t>& offsets) const {
    offsets.resize(block.pixels());
    int64_t* offset = offsets.data();
    const int64_t step = columns_.step / columns_.slot_step * stride_w_;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t i = 0; i < block.rows; ++i, offset += block.columns) {
        const int64_t row = n * stride_n_ + rows_.of_pixel(i) * stride_h_;
        for (int64_t j = 0; j < block.columns; ++j) offset[j] = row + j * step;
      }
    }
  }
  // of channels [d, d + count) at taps [tap, tap + tap_count)
  std::vector<int64_t> offsets_of_terms(int64_t tap, int64_t tap_count, int64_t d, int64_t count) const {
    std::vector<int64_t> offsets;
    for (int64_t t = tap; t < tap + tap_count; ++t) {
      const Tap& at = gather_.taps[t];
      const int64_t first = rows_.of_tap(at.h) * stride_h_ + columns_.of_tap(at.w) * stride_w_;
      for (int64_t i = d; i < d + count; ++i) offsets.push_back(first + i * stride_c_);
    }
    return offsets;
  }

 private:
  // `count` elements in whole cache lines, an odd number of them: one line of many such planes fills the first cache
  // evenly, where a power of two would meet in one of its sets.
  static int64_t odd_lines(int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return (ceil_div(count, kLine) | 1) * kLine;
  }

  // slab (images, height, width, D), or (images, D, height, width) as planes, zero outside the source
  void fill(int64_t channel, int64_t count, const Block& block, T* slab) const {
    if (count == 0) return;
    const int64_t slots = columns_.slots(block.columns), step = columns_.slot_step;
    const int64_t w = columns_.source(block.j, 0);
    const int64_t begin = std::clamp(ceil_div(std::max<int64_t>(-w, 0), step), int64_t(0), slots);
    const int64_t end = gather_.W > w ? std::clamp(ceil_div(gather_.W - w, step), begin, slots) : begin;
    const int64_t planes = planes_ ? count : 1, channels = planes_ ? 1 : count;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t plane = 0; plane < planes; ++plane) {
        for (int64_t row = 0; row < rows_.slots(block.rows); ++row) {
          T* to = slab + n * stride_n_ + plane * stride_c_ + row * stride_h_;
          const int64_t h = rows_.source(block.i, row);
          const int64_t first = h < 0 || h >= gather_.H ? slots : begin, last = std::max(first, end);
          std::fill(to, to + first * stride_w_, T(0));
          if (first < last) {
            copy_pixels(&gather_.source.at(block.n + n, channel + plane, h, w + first * step),
                        step * gather_.source.stride_w, gather_.source.stride_c, last - first, channels,
                        to + first * stride_w_, stride_w_);
          }
          std::fill(to + last * stride_w_, to + slots * stride_w_, T(0));
        }
      }
    }
  }

  // What a pixel reads is in a cache when the next one reads it; taps further apart are gathered.
  bool near_enough() const {
    const int64_t span = (rows_.last - rows_.first + 1) * gather_.source.stride_h * int64_t(sizeof(T));
    return gather_.taps.size() <= 1 || span <= kSlabBytes;
  }

  int64_t elements() const { return kSlabBytes / int64_t(sizeof(T)); }
  int64_t most_columns() const {
    const int64_t fit = elements() / std::max<int64_t>(1, rows_.slots(1) * gather_.D);
    return std::min(block_pixels_, (fit - (columns_.last - columns_.first)) / gather_.step_w);
  }
  int64_t most_rows() const {
    const int64_t row = columns_.slots(column_cuts_.most()) * gather_.D;
    const int64_t fit = elements() / std::max<int64_t>(1, row);
    return std::min(block_pixels_ / column_cuts_.most(), (fit - (rows_.last - rows_.first)) / gather_.step_h);
  }
  int64_t most_images() const {
    const int64_t image = rows_.slots(gather_.I) * columns_.slots(gather_.J) * gather_.D;
    return std::min(block_pixels_ / (gather_.I * gather_.J), elements() / std::max<int64_t>(1, image));
  }

  const Gather<T>& gather_;
  const int64_t block_pixels_;
  SlabAxis rows_, columns_;
  Pieces column_cuts_, row_cuts_, image_cuts_;  // in this order: each so that what the others leave room for fits
  bool planes_, in_place_;
  int64_t stride_n_, stride_c_, stride_h_, stride_w_;  // of channels and slots
};

}  // namespace dlkernels
