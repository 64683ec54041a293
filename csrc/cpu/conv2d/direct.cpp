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
#include <memory>
#include <utility>
#include <vector>

#include "../parallel.h"
#include "panels.h"
#include "slab.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kGradTerms = 640;        // of a task's part of grad_weight, which stays in the second cache
constexpr int64_t kGradBytes = 192 << 10;  // ... of all panels of a task
constexpr int64_t kGradPixels = 96;     // summed before a sum goes to memory: with their rows, they fit the first cache
constexpr int64_t kFewPixels = 32;      // of a block at least, if there are so many
constexpr int64_t kSharedPixels = 256;  // that all tasks read, instead of all weights, where kernels are 1 x 1
constexpr int64_t kManyPanels = 4;      // of weights, from which on sharing pixels is worth it
constexpr int64_t kManyWeights = 1 << 18;     // elements, more than half a second cache
constexpr int64_t kTurnedElements = 1 << 20;  // of grad_input before it is turned into planes, some images at a time
constexpr int64_t kTurnedPixels = 64;         // turned at once

// ---- launchers -----------------------------------------------------------------------------------

// A block of channels at every tap, which are gathered together: all terms, cut into runs, whose weights are packed
// together, and these into what one tile sums in registers.
struct Terms {
  struct Run {
    int64_t d, count;                          // channels, counted from the group's first
    std::vector<std::vector<int64_t>> pieces;  // offsets of the terms (tap, channel)
  };
  int64_t d, count;
  std::vector<Run> runs;
};

// Channels of a run: as many as all taps leave room for. Where that is less than a cache line of them, the taps are
// cut, too, or each line would be read by one run after the other.
template <class T>
int64_t channels_of_run(const Gather<T>& gather) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return std::max(kLine, kBlockTerms / std::max<int64_t>(1, gather.taps.size()));
}

// The channels cut so that a block of pixels fits the slab, as whole runs if possible.
template <class T>
Pieces cut_channels(const Gather<T>& gather, int64_t block_pixels) {
  const int64_t run = channels_of_run(gather);
  return Pieces(gather.D, std::max(run, slab_channels(gather, block_pixels) / run * run));
}

template <class T>
std::vector<Terms> cut_terms(const Gather<T>& gather, const Pieces& channels, const Slab<T>& slab) {
  std::vector<Terms> all;
  for (int64_t b = 0; b < channels.count; ++b) {
    const Pieces runs(channels.length(b), channels_of_run(gather));
    const Pieces taps(gather.taps.size(), kBlockTerms / std::max<int64_t>(1, runs.most()));
    all.push_back({channels.begin(b), channels.length(b), {}});
    for (int64_t r = 0; r < runs.count; ++r) {
      Terms::Run run{channels.begin(b) + runs.begin(r), runs.length(r), {}};
      for (int64_t t = 0; t < taps.count; ++t) {
        run.pieces.push_back(slab.offsets_of_terms(taps.begin(t), taps.length(t), runs.begin(r), runs.length(r)));
      }
      all.back().runs.push_back(std::move(run));
    }
  }
  if (all.empty()) all.push_back({0, 0, {{0, 0, {{}}}}});  // a sum of nothing is the bias
  return all;
}

// Where the sums of the block's pixels are made, rows[x]: in the target where a panel is all there and lies there side
// by side (true), else in `sums` (pixels, width).
template <class T>
bool rows_of_sums(const std::vector<T*>& places, const Panel& channels, int64_t stride_c, T* sums,
                  std::vector<T*>& rows) {
  if (stride_c == 1 && channels.count == channels.width) {
    for (size_t x = 0; x < places.size(); ++x) rows[x] = places[x] + channels.first;
    return true;
  }
  for (size_t x = 0; x < places.size(); ++x) rows[x] = sums + int64_t(x) * channels.width;
  return false;
}

// The weights of all terms: those of group g and panel p at packed + (g * panels.padded() + p's first column) * terms.
template <class T, class WeightOf>
void pack_weights(const Gather<T>& gather, int64_t G, const std::vector<Terms>& terms, const PanelCuts<T>& panels,
                  const WeightOf& weight_of, T* packed) {
  std::vector<const Terms::Run*> runs;
  for (const Terms& some : terms) {
    for (const Terms::Run& run : some.runs) runs.push_back(&run);
  }
  const int64_t count = runs.size(), depth = gather.terms(), taps = gather.taps.size();
  const int64_t products = depth / count * kPanelVectors * kLanes<T>;
  parallel_for(G * panels.count() * count, grain_of(products), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Terms::Run& run = *runs[task % count];
      const int64_t g = task / count / panels.count();
      const Panel panel = panels[task / count % panels.count()];
      T* to = packed + (g * panels.padded() + panel.first) * depth + run.d * taps * panel.width;
      pack_weight(weight_of(g), panel, gather.taps, run.d, run.count, to);
    }
  });
}

// Few pixels are cut into more blocks: sharing panels instead, tasks would gather the same pixels. With a single tap
// they hardly need to be gathered: there tasks share panels, and each packs its own weights. And where weights are more
// than a cache holds, blocks are larger, for each reads all of them.
template <class T>
int64_t pixels_of_block(const Gather<T>& gather, int64_t M) {
  const int64_t pixels = gather.N * gather.I * gather.J, panels = PanelCuts<T>(M).count();
  if (gather.taps.size() == 1 && pixels <= kSharedPixels && panels >= kManyPanels) return kSharedPixels;
  const bool many_weights = M * gather.terms() > kManyWeights;
  const int64_t blocks = many_weights ? ceil_div(kEnoughTasks, panels) : kEnoughTasks;
  const int64_t scale = many_weights ? 2 : 1;
  return std::clamp(pixels / blocks, scale * kFewPixels, scale * kBlockPixels);
}

// target[n, g*M + m, i, j] = bias[g*M + m] + sum over d, tap of weight[g*M + m, d, tap] * gathered source; weight_of(g)
// is the group's WeightView
template <class T, class WeightOf>
void gather_and_multiply(const Gather<T>& gather, int64_t G, int64_t M, const WeightOf& weight_of, const T* bias,
                         int64_t bias_stride, const Strided4d<T>& target) {
  if (gather.N * gather.I * gather.J == 0 || M == 0) return;
  const int64_t block_pixels = pixels_of_block(gather, M);
  const Pieces channel_cuts = cut_channels(gather, block_pixels);
  const Gather<T> part = with_depth(gather, channel_cuts.most());
  const Slab<T> slab(part, block_pixels);
  const std::vector<Terms> terms = cut_terms(gather, channel_cuts, slab);
  const PanelCuts<T> panels(M);
  const int64_t depth = gather.terms();

  // Weights that several tasks use are packed before; else the task packs its own, a run at a time, in its cache.
  const int64_t blocks = slab.blocks();
  const bool shared = blocks > 1;
  Scratch<T> packed(shared ? G * depth * panels.padded() : 0);
  if (shared) pack_weights(gather, G, terms, panels, weight_of, packed.data());

  const Pieces splits = split_evenly(panels.count(), G * blocks);
  const int64_t products = slab.most_pixels() * splits.most() * kPanelVectors * kLanes<T> * depth;
  parallel_for(G * blocks * splits.count, grain_of(products), [&](int64_t begin, int64_t end) {
    const int64_t most_sums = slab.most_pixels() * kPanelVectors * kLanes<T>;  // of a panel
    Scratch<T> memory(slab.size()), sums((terms.size() > 1 ? splits.most() : 1) * most_sums);
    const int64_t run_terms = std::min(gather.D, channels_of_run(gather)) * int64_t(gather.taps.size());
    Scratch<T> own_weight(shared ? 0 : run_terms * kPanelVectors * kLanes<T>);
    T start[kPanelVectors * kLanes<T>];
    std::vector<int64_t> offsets;
    std::vector<T*> places;
    std::vector<T*> rows(slab.most_pixels());
    for (int64_t task = begin; task < end; ++task) {
      // blocks first: they differ in size more than splits do, and each thread gets about as many of each
      const int64_t split = task / blocks % splits.count, g = task / blocks / splits.count;
      const Block block = slab.block(task % blocks);
      const int64_t pixels = block.pixels();
      slab.offsets_of_pixels(block, offsets);
      target_of_pixels(target, block, places);
      int64_t done = 0;  // terms
      for (const Terms& some : terms) {
        const T* source = slab.gather(g * gather.D + some.d, some.count, block, memory.data());
        for (int64_t p = splits.begin(split); p < splits.begin(split + 1); ++p) {
          const Panel panel = panels[p];
          const Panel channels = {g * M + panel.first, panel.count, panel.width};
          for (int64_t j = 0; j < panel.width; ++j) {
            start[j] = bias != nullptr && j < panel.count ? bias[(channels.first + j) * bias_stride] : T(0);
          }
          T* sums_of_panel = sums.data() + (terms.size() > 1 ? p - splits.begin(split) : 0) * most_sums;
          const bool in_place = rows_of_sums(places, channels, target.stride_c, sums_of_panel, rows);
          const T* columns = packed.data() + (g * panels.padded() + panel.first) * depth + done * panel.width;
          const T* begin_from = &some == &terms.front() ? start : nullptr;
          for (const Terms::Run& run : some.runs) {
            if (!shared) {
              pack_weight(weight_of(g), panel, gather.taps, run.d, run.count, own_weight.data());
              columns = own_weight.data();
            }
            for (const std::vector<int64_t>& piece : run.pieces) {
              multiply(
                  pixels, source, offsets.data(), piece, columns, panel.width, panel.width, begin_from, rows.data(),
                  {.rows = slab.in_place() && p == splits.begin(split), .sums = begin_from != nullptr && in_place});
              columns += piece.size() * panel.width;
              begin_from = nullptr;
            }
          }
          if (!in_place && &some == &terms.back()) write_pixels(sums_of_panel, channels, places, target.stride_c);
        }
        done += some.count * int64_t(gather.taps.size());
      }
    }
  });
}

// Pixels [begin, end) of a grid's rows or columns; the others read nothing but the padding.
struct Inside {
  int64_t begin, end;

  Inside(const std::vector<Tap>& taps, int64_t Tap::* position, int64_t step, int64_t size, int64_t pixels) {
    const SlabAxis axis(taps, position, step);
    begin = std::clamp<int64_t>(ceil_div(-axis.last, step), 0, pixels);
    end = std::clamp<int64_t>(ceil_div(size - axis.first, step), begin, pixels);
  }
  int64_t size() const { return end - begin; }
  bool has(int64_t pixel) const { return pixel >= begin && pixel < end; }
};

template <class T>
Inside inside_rows(const Gather<T>& gather) {
  return Inside(gather.taps, &Tap::h, gather.step_h, gather.H, gather.I);
}
template <class T>
Inside inside_columns(const Gather<T>& gather) {
  return Inside(gather.taps, &Tap::w, gather.step_w, gather.W, gather.J);
}

// The grid without its other pixels.
template <class T>
Gather<T> inside_of(Gather<T> gather, const Inside& rows, const Inside& columns) {
  for (Tap& tap : gather.taps) {
    tap.h += rows.begin * gather.step_h;
    tap.w += columns.begin * gather.step_w;
  }
  gather.I = rows.size(), gather.J = columns.size();
  if (gather.I * gather.J == 0) gather.N = 0, gather.I = gather.J = 1;  // no pixels, as of no images
  return gather;
}
template <class T>
Strided4d<T> inside_of(const Strided4d<T>& images, const Inside& rows, const Inside& columns) {
  T* first = images.data + rows.begin * images.stride_h + columns.begin * images.stride_w;
  return {first, images.stride_n, images.stride_c, images.stride_h, images.stride_w};
}

// target[n, m, i, j] = bias[m] for the M channels of the pixels outside of rows and columns
template <class T>
void fill_outside(const Gather<T>& gather, const Inside& rows, const Inside& columns, int64_t M, const T* bias,
                  int64_t bias_stride, const Strided4d<T>& target) {
  const auto fill = [&](int64_t n, int64_t i, int64_t first, int64_t count) {
    fill_row_with_bias(M, bias, bias_stride, target, n, i, first, count);
  };
  parallel_for(gather.N * gather.I, grain_of(kMoveProducts * gather.J * M), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / gather.I, i = row % gather.I;
      const bool some_inside = rows.has(i) && columns.size() > 0;
      fill(n, i, 0, some_inside ? columns.begin : gather.J);
      if (some_inside) fill(n, i, columns.end, gather.J - columns.end);
    }
  });
}

// gather_and_multiply for the pixels that read something; for the others, there is the bias.
template <class T, class WeightOf>
void multiply_inside(const Gather<T>& gather, int64_t G, int64_t M, const WeightOf& weight_of, const T* bias,
                     int64_t bias_stride, const Strided4d<T>& target) {
  const Inside rows = inside_rows(gather), columns = inside_columns(gather);
  const bool all = rows.size() == gather.I && columns.size() == gather.J;
  if (!all) fill_outside(gather, rows, columns, G * M, bias, bias_stride, target);
  gather_and_multiply(inside_of(gather, rows, columns), G, M, weight_of, bias, bias_stride,
                      inside_of(target, rows, columns));
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
  if (gather.taps.empty()) gather.D = 0;  // nothing is read
  return gather;
}

// A matrix in memory, rows `stride` apart.
template <class T>
struct Columns {
  const T* data;
  int64_t stride;
};

// columns[x][j] = grad[pixel x of the block, channel + j], 0 for the padding: packed into `columns`, or grad itself
// where it is such a matrix
template <class T>
Columns<T> grad_columns(const Strided4d<const T>& grad, int64_t channel, const Panel& panel, const Block& block,
                        T* columns) {
  const Columns<T> packed = {columns, panel.width};
  const bool rows_join = block.rows == 1 || grad.stride_h == block.columns * grad.stride_w;
  const bool images_join = block.images == 1 || grad.stride_n == block.rows * block.columns * grad.stride_w;
  if (grad.stride_c == 1 && rows_join && images_join && panel.count == panel.width) {
    return {&grad.at(block.n, channel, block.i, block.j), grad.stride_w};
  }
  if (panel.count < panel.width) std::fill_n(columns, block.pixels() * panel.width, T(0));
  const int64_t run = rows_join ? block.rows * block.columns : block.columns;
  for (int64_t n = 0; n < block.images; ++n) {
    for (int64_t i = 0; i < block.rows; i += run / block.columns) {
      copy_pixels(&grad.at(block.n + n, channel, block.i + i, block.j), grad.stride_w, grad.stride_c, run, panel.count,
                  columns, panel.width);
      columns += run * panel.width;
    }
  }
  return packed;
}

// grad_input, one phase after the other; those without taps are the bias.
template <class T>
void grad_of_phases(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& weight,
                    const T* bias, int64_t bias_stride, const Strided4d<T>& grad_input) {
  const int64_t M = shape.C / shape.G, D = shape.K / shape.G;
  for (int64_t phase_h = 0; phase_h < std::min(shape.stride_h, shape.H); ++phase_h) {
    for (int64_t phase_w = 0; phase_w < std::min(shape.stride_w, shape.W); ++phase_w) {
      const Strided4d<T> pixels_of_phase = {&grad_input.at(0, 0, phase_h, phase_w), grad_input.stride_n,
                                            grad_input.stride_c, grad_input.stride_h * shape.stride_h,
                                            grad_input.stride_w * shape.stride_w};
      multiply_inside(
          gather_grad(shape, grad, phase_h, phase_w), shape.G, M,
          [&](int64_t g) {
            return WeightView<const T>{weight.at(g * D, 0), weight.stride_c, weight.stride_n, weight.stride_h,
                                       weight.stride_w,     shape.R,         shape.S};
          },
          bias, bias_stride, pixels_of_phase);
    }
  }
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void Direct::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                     int64_t bias_stride, Strided4d<T> output) {
  const int64_t M = shape.K / shape.G;
  multiply_inside(
      gather_input(shape, input), shape.G, M,
      [&](int64_t g) {
        return WeightView<const T>{weight.at(g * M, 0), weight.stride_n, weight.stride_c, weight.stride_h,
                                   weight.stride_w,     shape.R,         shape.S};
      },
      bias, bias_stride, output);
}

template <class T>
void Direct::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                        int64_t bias_stride, Strided4d<T> grad_input) {
  if (shape.N == 0 || shape.C == 0) return;
  const bool planes = grad_input.stride_c != 1 && grad_input.stride_h == shape.W && grad_input.stride_w == 1;
  if (shape.stride_w == 1 || !planes) return grad_of_phases(shape, grad, weight, bias, bias_stride, grad_input);
  // In planes, the columns of a phase would be written one by one, stride_w apart. So the gradient is made with its
  // channels side by side, some images at a time, and then turned.
  const int64_t pixels = shape.H * shape.W, image = pixels * shape.C;
  const Pieces images(shape.N, std::max<int64_t>(1, kTurnedElements / image)), blocks(pixels, kTurnedPixels);
  Scratch<T> turned(images.most() * image);
  for (int64_t piece = 0; piece < images.count; ++piece) {
    Conv2dShape some = shape;
    some.N = images.length(piece);
    const Strided4d<const T> some_grad = {grad.at(images.begin(piece), 0), grad.stride_n, grad.stride_c, grad.stride_h,
                                          grad.stride_w};
    grad_of_phases(some, some_grad, weight, bias, bias_stride, {turned.data(), image, 1, shape.W * shape.C, shape.C});
    parallel_for(some.N * blocks.count, grain_of(kMoveProducts * blocks.most() * shape.C),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t n = task / blocks.count, x = blocks.begin(task % blocks.count);
                     copy_pixels(turned.data() + n * image + x * shape.C, 1, shape.C, shape.C,
                                 blocks.length(task % blocks.count), grad_input.at(images.begin(piece) + n, 0) + x,
                                 grad_input.stride_c);
                   }
                 });
  }
}

// Channels [first, first + gather.D) of each group at every tap: the rows of a task's part of grad_weight.
template <class T>
struct GradPart {
  int64_t first;
  Gather<T> gather;
  Slab<T> slab;
  std::vector<int64_t> terms;

  GradPart(int64_t first, int64_t D, const Gather<T>& all)
      : first(first),
        gather(with_depth(all, D)),
        slab(gather, kGradPixels),
        terms(slab.offsets_of_terms(0, gather.taps.size(), 0, D)) {}
  GradPart(const GradPart&) = delete;
};

// How many panels of grad_weight a task owns: as many as its sums' share of the second cache, because they read the
// same pixels; one where pixels alone, `blocks` of them, make too few tasks.
inline int64_t panels_of_task(int64_t panel_bytes, int64_t blocks) {
  return blocks < kEnoughTasks ? 1 : std::max<int64_t>(1, kGradBytes / std::max<int64_t>(1, panel_bytes));
}

// Tasks own some channels of some panels of one group's grad_weight, and one of `chunks` stretches of pixels where
// there would be too few tasks otherwise; the chunks' sums are then added in order.
template <class T>
void Direct::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                         Strided4d<T> grad_weight) {
  if (shape.C == 0) return;
  const Gather<T> all = gather_input(shape, input);
  const Inside rows_inside = inside_rows(all), columns_inside = inside_columns(all);
  const Gather<T> gather = inside_of(all, rows_inside, columns_inside);
  grad = inside_of(grad, rows_inside, columns_inside);
  const int64_t M = shape.K / shape.G;
  const Pieces cuts(gather.D, kGradTerms / int64_t(gather.taps.size()));
  std::vector<std::unique_ptr<GradPart<T>>> parts;
  for (int64_t i = 0; i < cuts.count; ++i) {
    parts.push_back(std::make_unique<GradPart<T>>(cuts.begin(i), cuts.length(i), gather));
  }
  const PanelCuts<T> panels(M);
  const int64_t most_width = std::min<int64_t>(kPanelVectors * kLanes<T>, panels.padded());
  const int64_t most_terms = cuts.most() * int64_t(gather.taps.size()), most_sums = most_terms * most_width;
  int64_t blocks = parts[0]->slab.blocks();
  for (const auto& part : parts) blocks = std::min(blocks, part->slab.blocks());
  const int64_t owners = shape.G * cuts.count;  // tasks, if each owned all panels
  const Pieces shares(panels.count(), panels_of_task(most_sums * sizeof(T), owners * blocks));
  const int64_t tasks = owners * shares.count;
  const int64_t chunks = std::clamp(ceil_div(kEnoughTasks, tasks), int64_t(1), std::max<int64_t>(1, blocks));
  const auto finish = [&](int64_t g, int64_t p, const GradPart<T>& part, const T* sums) {
    const WeightView<T> view = {grad_weight.at(g * M, part.first),
                                grad_weight.stride_n,
                                grad_weight.stride_c,
                                grad_weight.stride_h,
                                grad_weight.stride_w,
                                shape.R,
                                shape.S};
    unpack_weight(sums, panels[p], gather.taps, part.gather.D, view);
  };

  // (group, panel, cut, chunk): the sums of each
  Scratch<T> partial(chunks > 1 ? owners * panels.count() * chunks * most_sums : 0);
  const int64_t products = ceil_div(gather.N * gather.I * gather.J, chunks) * shares.most() * most_sums;
  parallel_for(tasks * chunks, grain_of(products), [&](int64_t begin, int64_t end) {
    int64_t most_memory = 0, most_pixels = 0;
    for (const auto& part : parts) {
      most_memory = std::max(most_memory, part->slab.size());
      most_pixels = std::max(most_pixels, part->slab.most_pixels());
    }
    Scratch<T> memory(most_memory), columns(most_pixels * most_width), own(chunks > 1 ? 0 : shares.most() * most_sums);
    const T zeros[kPanelVectors * kLanes<T>] = {};
    std::vector<int64_t> offsets;
    std::vector<T*> rows(shares.most() * most_terms);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, cut = task / chunks % cuts.count;
      const int64_t share = task / chunks / cuts.count % shares.count, g = task / chunks / cuts.count / shares.count;
      const GradPart<T>& part = *parts[cut];
      const int64_t terms = part.terms.size(), first_panel = shares.begin(share);
      const auto sums_of = [&](int64_t p) {
        if (chunks == 1) return own.data() + (p - first_panel) * most_sums;
        return partial.data() + (((g * panels.count() + p) * cuts.count + cut) * chunks + chunk) * most_sums;
      };
      for (int64_t p = first_panel; p < shares.begin(share + 1); ++p) {
        for (int64_t l = 0; l < terms; ++l) rows[(p - first_panel) * terms + l] = sums_of(p) + l * panels[p].width;
        if (blocks == 0) std::fill_n(sums_of(p), terms * panels[p].width, T(0));
      }
      const int64_t blocks_of_part = part.slab.blocks(), first = blocks_of_part * chunk / chunks;
      for (int64_t b = first; b < blocks_of_part * (chunk + 1) / chunks; ++b) {
        const Block block = part.slab.block(b);
        const T* source = part.slab.gather(g * gather.D + part.first, part.gather.D, block, memory.data());
        part.slab.offsets_of_pixels(block, offsets);
        for (int64_t p = first_panel; p < shares.begin(share + 1); ++p) {
          const auto of_grad = grad_columns(grad, g * M + panels[p].first, panels[p], block, columns.data());
          const bool in_memory = part.slab.in_place() && input.stride_c != 1 && p == first_panel;
          multiply(terms, source, part.terms.data(), offsets, of_grad.data, of_grad.stride, panels[p].width,
                   b == first ? zeros : nullptr, rows.data() + (p - first_panel) * terms, {.rows = in_memory});
        }
      }
      for (int64_t p = first_panel; chunks == 1 && p < shares.begin(share + 1); ++p) finish(g, p, part, sums_of(p));
    }
  });
  if (chunks == 1) return;
  parallel_for(owners * panels.count(), grain_of(most_sums * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t cut = index % cuts.count, p = index / cuts.count % panels.count();
      T* sums = partial.data() + index * chunks * most_sums;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const T* more = sums + chunk * most_sums;
        for (int64_t i = 0; i < int64_t(parts[cut]->terms.size()) * panels[p].width; ++i) sums[i] += more[i];
      }
      finish(index / cuts.count / panels.count(), p, *parts[cut], sums);
    }
  });
}

// ---- kernels: the bias's gradient ------------------------------------------------------------------

namespace {

// sum over x of row[x*stride]: in vectors where the pixels lie side by side
template <class T>
Accumulate<T> sum_of_run(const T* row, int64_t stride, int64_t count) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  A sum = 0;
  if (stride == 1) {
    Vector<A> sums[2] = {};  // two chains of additions run beside each other
    int64_t x = 0;
    for (; x + 2 * L <= count; x += 2 * L) {
      sums[0] += load_as<A>(row + x);
      sums[1] += load_as<A>(row + x + L);
    }
    for (; x < count; x += L) sums[0] += load_as<A>(row + x, std::min(L, count - x));
    sum = sum_of_lanes<A>(sums[0] + sums[1]);
  } else {
    for (int64_t x = 0; x < count; ++x) sum += load(row[x * stride]);
  }
  return sum;
}

// sums[k] += sum over x of row[x*stride + k] for k < count <= a vector's lanes, x < pixels
template <class T>
void add_channels(const T* row, int64_t stride, int64_t pixels, int64_t count, double* sums) {
  using A = Accumulate<T>;
  Vector<A> sum[2] = {};
  int64_t x = 0;
  for (; x + 2 <= pixels; x += 2) {
    sum[0] += load_as<A>(row + x * stride, count);
    sum[1] += load_as<A>(row + (x + 1) * stride, count);
  }
  if (x < pixels) sum[0] += load_as<A>(row + x * stride, count);
  sum[0] += sum[1];
  for (int64_t k = 0; k < count; ++k) sums[k] += sum[0][k];
}

// sums[k] += sum over p, q of grad[n, first + k, p, q] for k < count <= a vector's lanes. Short sums are made in
// Accumulate<T>, and added in double.
template <class T>
void add_image(const Conv2dShape& shape, const Strided4d<const T>& grad, int64_t n, int64_t first, int64_t count,
               double* sums) {
  constexpr int64_t kRun = 1024, kPixelsRun = 64;  // pixels of a short sum: some tens for each lane of its vectors
  const bool rows_join = grad.stride_h == shape.Q * grad.stride_w;
  const bool channels_last = grad.stride_c == 1 && shape.K > 1;
  const int64_t rows = rows_join ? 1 : shape.P, length = rows_join ? shape.P * shape.Q : shape.Q;
  const int64_t run = channels_last ? kPixelsRun : kRun;
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t q = 0; q < length; q += run) {
      const T* row = &grad.at(n, first, p, 0) + q * grad.stride_w;
      const int64_t pixels = std::min(run, length - q);
      if (channels_last) {
        add_channels(row, grad.stride_w, pixels, count, sums);
      } else {
        for (int64_t k = 0; k < count; ++k) sums[k] += sum_of_run(row + k * grad.stride_c, grad.stride_w, pixels);
      }
    }
  }
}

}  // namespace

// Tasks own some channels, and one of `chunks` stretches of images where there would be too few tasks otherwise; the
// chunks' sums are then added in order.
template <class T>
void conv2d_grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) {
  constexpr int64_t kChannels = kLanes<Accumulate<T>>, kTaskPixels = 1 << 14;  // numbers that a thread adds in 2 us
  const int64_t K = shape.K, blocks = ceil_div(K, kChannels);
  const Pieces images(shape.N, ceil_div(shape.N, ceil_div(kEnoughTasks, std::max<int64_t>(1, blocks))));
  const int64_t chunks = std::max<int64_t>(1, images.count);
  std::vector<double> sums(K * chunks);
  const int64_t task_pixels = images.most() * shape.P * shape.Q * kChannels;
  parallel_for(blocks * images.count, 1 + kTaskPixels / (task_pixels + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / images.count * kChannels, chunk = task % images.count;
      double* to = sums.data() + chunk * K + first;
      for (int64_t n = images.begin(chunk); n < images.begin(chunk + 1); ++n) {
        add_image(shape, grad, n, first, std::min(kChannels, K - first), to);
      }
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    double sum = sums[k];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += sums[chunk * K + k];
    grad_bias[k] = store<T>(Accumulate<T>(sum));
  }
}

#define DLKERNELS_INSTANTIATE(T)                                                                                  \
  template void Direct::forward(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*, int64_t,    \
                                Strided4d<T>);                                                                    \
  template void Direct::grad_input(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*, int64_t, \
                                   Strided4d<T>);                                                                 \
  template void Direct::grad_weight(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, Strided4d<T>);
DLKERNELS_INSTANTIATE(double)
DLKERNELS_INSTANTIATE(float)
#undef DLKERNELS_INSTANTIATE

template void conv2d_grad_bias(const Conv2dShape&, Strided4d<const double>, double*);
template void conv2d_grad_bias(const Conv2dShape&, Strided4d<const float>, float*);
template void conv2d_grad_bias(const Conv2dShape&, Strided4d<const BFloat16>, BFloat16*);
template void conv2d_grad_bias(const Conv2dShape&, Strided4d<const Half>, Half*);

}  // namespace dlkernels
