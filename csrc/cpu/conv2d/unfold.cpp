// conv2d of few pixels and many weights: the pixels are unfolded, the weights read as they lie.
//
//   unfolded[l, x] = input[x + l], zero outside of it                   x: n, p, q   l: (c, r, s)
//
//   output     [k, x] = bias[k] + sum over l of weight[k, l] * unfolded[l, x]
//   grad_weight[k, l] =           sum over x of grad[k, x] * unfolded[l, x]
//   folded     [x, l] =           sum over k of grad[k, x] * weight[k, l]
//   grad_input        = folded, every [x, l] added to its place x + l
//
// Unfolding repeats a pixel for every tap that reads it, which the other strategies avoid; they pack the weights
// instead, in the order of their vectors. But 512 x 512 kernels of 3 x 3 are 9 MiB, and an image of 4 x 4 pixels and
// 512 channels, unfolded, 288 KiB: where a weight is used sixteen times, to copy it costs more than to use it.
//
// Who owns what: a panel of pixels at a time, tasks own some k (forward) or some l. Passes over memory: the weights, or
// their gradient, once for each panel of pixels.
#include "unfold.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "panels.h"
#include "slab.h"

namespace dlkernels {
namespace {

// ---- kernels: terms and pixels -------------------------------------------------------------------

// The terms l of a group's kernels, in the order of the weights' memory.
class Terms {
 public:
  template <class T>
  Terms(const Conv2dShape& shape, const Strided4d<T>& weight)
      : channels_(shape.C / shape.G), taps_(shape.R * shape.S), offsets_(channels_ * taps_) {
    channels_inside_ = weight.stride_c == 1 && taps_ > 1;
    for (int64_t t = 0; t < taps_; ++t) {
      const int64_t tap = t / shape.S * weight.stride_h + t % shape.S * weight.stride_w;
      for (int64_t d = 0; d < channels_; ++d) offsets_[index(d, t)] = d * weight.stride_c + tap;
    }
  }

  int64_t count() const { return channels_ * taps_; }
  int64_t index(int64_t d, int64_t t) const { return channels_inside_ ? t * channels_ + d : d * taps_ + t; }
  // of the weights
  const std::vector<int64_t>& offsets() const { return offsets_; }
  // whether they lie side by side
  bool side_by_side(const Panel& panel) const {
    for (int64_t j = 1; j < panel.count; ++j) {
      if (offsets_[panel.first + j] != offsets_[panel.first] + j) return false;
    }
    return true;
  }

 private:
  int64_t channels_, taps_;
  bool channels_inside_;
  std::vector<int64_t> offsets_;
};

// Pixels of a panel in one row of an image: lanes [lane, lane + count), the first being pixel (n, i, j).
struct Run {
  int64_t lane, count;
  int64_t n, i, j;
};

std::vector<Run> runs_of(const Panel& pixels, int64_t I, int64_t J) {
  std::vector<Run> runs;
  for (int64_t lane = 0; lane < pixels.count; lane += runs.back().count) {
    const int64_t x = pixels.first + lane, j = x % J;
    runs.push_back({lane, std::min(J - j, pixels.count - lane), x / J / I, x / J % I, j});
  }
  return runs;
}

// Where the panel's pixels lie in images.
template <class T>
std::vector<int64_t> places_of(const std::vector<Run>& runs, const Strided4d<T>& images) {
  std::vector<int64_t> places;
  for (const Run& run : runs) {
    const int64_t first = run.n * images.stride_n + run.i * images.stride_h + run.j * images.stride_w;
    for (int64_t x = 0; x < run.count; ++x) places.push_back(first + x * images.stride_w);
  }
  return places;
}

// What a tap reads of the source for the panel's pixels: lanes [lane, lane + count) from `place` on. Others read the
// padding.
struct Read {
  int64_t lane, count, place;
};

template <class T>
std::vector<Read> reads_of(const Gather<T>& gather, const std::vector<Run>& runs, const Tap& tap) {
  std::vector<Read> reads;
  for (const Run& run : runs) {
    const int64_t h = run.i * gather.step_h + tap.h, w = run.j * gather.step_w + tap.w;
    if (h < 0 || h >= gather.H) continue;
    const int64_t begin = std::clamp<int64_t>(ceil_div(-w, gather.step_w), 0, run.count);
    const int64_t end = std::clamp<int64_t>(ceil_div(gather.W - w, gather.step_w), begin, run.count);
    const Strided4d<const T>& source = gather.source;
    const int64_t place = run.n * source.stride_n + h * source.stride_h + (w + begin * gather.step_w) * source.stride_w;
    if (begin < end) reads.push_back({run.lane + begin, end - begin, place});
  }
  return reads;
}

// ---- kernels: unfolding --------------------------------------------------------------------------

// columns[l][x] for channels [d, d + count) of a tap
template <class T>
void unfold_planes(const Gather<T>& gather, int64_t channel, int64_t d, int64_t count, int64_t t, const Terms& terms,
                   const std::vector<Read>& reads, int64_t width, T* columns) {
  const int64_t step = gather.step_w * gather.source.stride_w;
  for (int64_t i = d; i < d + count; ++i) {
    const T* plane = gather.source.data + (channel + i) * gather.source.stride_c;
    T* row = columns + terms.index(i, t) * width;
    for (int64_t x = 0; x < width; x += kLanes<T>) store_vector(row + x, Vector<T>{});
    for (const Read& read : reads) copy_pixels(plane + read.place, step, 1, read.count, 1, row + read.lane, 1);
  }
}

// The same for at most a vector of channels that lie side by side.
template <class T>
void unfold_channels(const Gather<T>& gather, int64_t channel, int64_t d, int64_t count, int64_t t, const Terms& terms,
                     const std::vector<Read>& reads, int64_t width, T* columns) {
  constexpr int64_t L = kLanes<T>;
  const int64_t step = gather.step_w * gather.source.stride_w;
  const T* first = gather.source.data + channel + d;
  auto read = reads.begin();
  for (int64_t x = 0; x < width; x += L) {
    Vector<T> block[L] = {};
    for (; read != reads.end() && read->lane < x + L; ++read) {
      const int64_t begin = std::max(read->lane, x), end = std::min(read->lane + read->count, x + L);
      for (int64_t lane = begin; lane < end; ++lane) {
        block[lane - x] = load_as<T>(first + read->place + (lane - read->lane) * step, count);
      }
      if (read->lane + read->count > x + L) break;  // the rest of it belongs to the next block
    }
    transpose<T>(block);
    for (int64_t i = 0; i < count; ++i) store_vector(columns + terms.index(d + i, t) * width + x, block[i]);
  }
}

// columns[l][x] = the source's channel + d at x + tap, for l = (d, tap); columns (terms, pixels.width)
template <class T>
void unfold(const Gather<T>& gather, int64_t channel, const Terms& terms, const Panel& pixels,
            const std::vector<Run>& runs, T* columns) {
  const Pieces channels(gather.D, kLanes<T>);
  parallel_for(
      int64_t(gather.taps.size()) * channels.count, grain_of(kLanes<T> * pixels.width * kMoveProducts),
      [&](int64_t begin, int64_t end) {
        std::vector<Read> reads;
        for (int64_t task = begin, last = -1; task < end; ++task) {
          const int64_t t = task / channels.count, block = task % channels.count;
          if (t != last) reads = reads_of(gather, runs, gather.taps[t]);
          last = t;
          (gather.source.stride_c == 1 ? unfold_channels<T> : unfold_planes<T>)(gather, channel, channels.begin(block),
                                                                                channels.length(block), t, terms, reads,
                                                                                pixels.width, columns);
        }
      });
}

// ---- kernels: folding ----------------------------------------------------------------------------

// images[channel + d] += folded[x][l], for channels [d, d + count) of a tap, at most a vector of them, at the places
// that it reads; folded (pixels, stride)
template <class T>
void fold(const T* folded, int64_t stride, int64_t channel, int64_t d, int64_t count, int64_t t, const Terms& terms,
          const std::vector<Read>& reads, int64_t step_w, const Strided4d<T>& images) {
  const int64_t step = step_w * images.stride_w;
  const bool side_by_side = images.stride_c == 1 && terms.index(d + count - 1, t) == terms.index(d, t) + count - 1;
  for (const Read& read : reads) {
    const T* from = folded + read.lane * stride + terms.index(d, t);
    T* to = images.data + (channel + d) * images.stride_c + read.place;
    if (side_by_side) {
      for (int64_t x = 0; x < read.count; ++x, to += step, from += stride) {
        store_as<T>(to, count, load_as<T>(to, count) + load_as<T>(from, count));
      }
      continue;
    }
    for (int64_t i = 0; i < count; ++i, to += images.stride_c) {
      from = folded + read.lane * stride + terms.index(d + i, t);
      for (int64_t x = 0; x < read.count; ++x) to[x * step] += from[x * stride];
    }
  }
}

// folded (the panel's pixels, terms) added to the images' places that they were unfolded from; as gather.source says
template <class T>
void fold_all(const Gather<T>& gather, const std::vector<Run>& runs, int64_t channel, const Terms& terms,
              const T* folded, int64_t stride, const Strided4d<T>& images) {
  const Pieces channels(gather.D, kLanes<T>);
  const int64_t taps = gather.taps.size(), moves = kLanes<T> * taps * int64_t(runs.size()) * gather.J;
  parallel_for(channels.count, grain_of(moves * kMoveProducts), [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < taps; ++t) {
      const std::vector<Read> reads = reads_of(gather, runs, gather.taps[t]);
      for (int64_t block = begin; block < end; ++block) {
        fold(folded, stride, channel, channels.begin(block), channels.length(block), t, terms, reads, gather.step_w,
             images);
      }
    }
  });
}

// ---- kernels: products ---------------------------------------------------------------------------

// Calls work(g, pixels, runs) for each group and panel of the output's pixels.
template <class T, class Work>
void for_each_panel(const Conv2dShape& shape, const Work& work) {
  const PanelCuts<T> panels(shape.N * shape.P * shape.Q);
  for (int64_t g = 0; g < shape.G; ++g) {
    for (int64_t p = 0; p < panels.count(); ++p) work(g, panels[p], runs_of(panels[p], shape.P, shape.Q));
  }
}

// to[k][j] = weight[k][l] for l = panel.first + j, k < count, 0 for the padding; weight: the first k's
template <class T>
void copy_weights(const T* weight, int64_t stride_k, int64_t count, const Terms& terms, const Panel& panel,
                  bool side_by_side, T* to) {
  const int64_t* offset = terms.offsets().data() + panel.first;
  for (int64_t k = 0; k < count; ++k, weight += stride_k, to += panel.width) {
    if (side_by_side) {
      copy_run(weight + *offset, panel.count, to);
    } else {
      for (int64_t j = 0; j < panel.count; ++j) to[j] = weight[offset[j]];
    }
    std::fill(to + panel.count, to + panel.width, T(0));
  }
}

// weight[k][l] = sums[k][j] for l = panel.first + j, k < count, or += where it is begun
template <class T>
void write_weights(const T* sums, bool begun, const Terms& terms, const Panel& panel, int64_t count, int64_t stride_k,
                   T* weight) {
  const int64_t* offset = terms.offsets().data() + panel.first;
  for (int64_t k = 0; k < count; ++k, weight += stride_k, sums += panel.width) {
    for (int64_t j = 0; j < panel.count; ++j) weight[offset[j]] = begun ? weight[offset[j]] + sums[j] : sums[j];
  }
}

std::vector<int64_t> multiples(int64_t step, int64_t begin, int64_t end) {
  std::vector<int64_t> offsets;
  for (int64_t i = begin; i < end; ++i) offsets.push_back(i * step);
  return offsets;
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void Unfold::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                     int64_t bias_stride, Strided4d<T> output) {
  const Gather<T> gather = gather_input(shape, input);
  const Terms terms(shape, weight);
  const Pixels<T> target = {output, shape.P, shape.Q, 1, 1};
  const int64_t M = shape.K / shape.G, L = terms.count();
  for_each_panel<T>(shape, [&](int64_t g, const Panel& pixels, const std::vector<Run>& runs) {
    const int64_t width = pixels.width;
    Scratch<T> columns(L * width);
    unfold(gather, g * gather.D, terms, pixels, runs, columns.data());
    const Pieces cuts(L, kBlockTerms * kPanelVectors * kLanes<T> / width);  // whose columns fit the first cache
    const Pieces splits = split_evenly(M, 1);
    parallel_for(splits.count, grain_of(splits.most() * L * width), [&](int64_t begin, int64_t end) {
      Scratch<T> sums(splits.most() * width);
      const std::vector<int64_t> kernels = multiples(weight.stride_n, 0, splits.most());
      std::vector<T*> rows;
      for (int64_t m = 0; m < splits.most(); ++m) rows.push_back(sums.data() + m * width);
      for (int64_t split = begin; split < end; ++split) {
        const int64_t channel = g * M + splits.begin(split), channels = splits.length(split);
        for (int64_t m = 0; m < channels; ++m) {
          std::fill_n(rows[m], width, bias != nullptr ? bias[(channel + m) * bias_stride] : T(0));
        }
        for (int64_t b = 0; b < cuts.count; ++b) {
          const auto offset = terms.offsets().begin();
          multiply<T>(channels, weight.at(channel, 0), kernels.data(),
                      std::vector<int64_t>(offset + cuts.begin(b), offset + cuts.begin(b + 1)),
                      columns.data() + cuts.begin(b) * width, width, width, nullptr, rows.data(), {.rows = true});
        }
        unpack_pixels(sums.data(), channel, channels, pixels, target);
      }
    });
  });
}

template <class T>
void Unfold::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                        int64_t bias_stride, Strided4d<T> grad_input) {
  const Gather<T> gather = gather_input<T>(
      shape, {grad_input.data, grad_input.stride_n, grad_input.stride_c, grad_input.stride_h, grad_input.stride_w});
  const Terms terms(shape, weight);
  const PanelCuts<T> panels(terms.count());
  const int64_t M = shape.K / shape.G, stride = panels.padded();
  const int64_t most_width = std::min<int64_t>(kPanelVectors * kLanes<T>, stride);
  const Pieces cuts(M, kBlockTerms);
  fill_with_bias(shape, bias, bias_stride, grad_input);
  for_each_panel<T>(shape, [&](int64_t g, const Panel& pixels, const std::vector<Run>& runs) {
    const std::vector<int64_t> places = places_of(runs, grad);
    Scratch<T> folded(pixels.count * stride);
    parallel_for(panels.count(), grain_of(M * most_width * pixels.count), [&](int64_t begin, int64_t end) {
      Scratch<T> columns(cuts.most() * most_width);
      const T zeros[kPanelVectors * kLanes<T>] = {};
      std::vector<T*> rows(pixels.count);
      for (int64_t p = begin; p < end; ++p) {
        const Panel panel = panels[p];
        const bool side_by_side = terms.side_by_side(panel);
        for (int64_t x = 0; x < pixels.count; ++x) rows[x] = folded.data() + x * stride + panel.first;
        for (int64_t b = 0; b < cuts.count; ++b) {
          copy_weights(weight.at(g * M + cuts.begin(b), 0), weight.stride_n, cuts.length(b), terms, panel, side_by_side,
                       columns.data());
          multiply<T>(pixels.count, grad.at(0, g * M), places.data(),
                      multiples(grad.stride_c, cuts.begin(b), cuts.begin(b + 1)), columns.data(), panel.width,
                      panel.width, b == 0 ? zeros : nullptr, rows.data());
        }
      }
    });
    fold_all(gather, runs, g * gather.D, terms, folded.data(), stride, grad_input);
  });
}

template <class T>
void Unfold::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                         Strided4d<T> grad_weight) {
  const Gather<T> gather = gather_input(shape, input);
  const Terms terms(shape, grad_weight);
  const PanelCuts<T> panels(terms.count());
  const int64_t M = shape.K / shape.G, most_width = std::min<int64_t>(kPanelVectors * kLanes<T>, panels.padded());
  const std::vector<int64_t> channels = multiples(grad.stride_c, 0, M);
  for_each_panel<T>(shape, [&](int64_t g, const Panel& pixels, const std::vector<Run>& runs) {
    const bool begun = pixels.first > 0;
    const std::vector<int64_t> places = places_of(runs, grad);
    Scratch<T> unfolded(terms.count() * pixels.width);
    unfold(gather, g * gather.D, terms, pixels, runs, unfolded.data());
    parallel_for(panels.count(), grain_of(M * most_width * pixels.count), [&](int64_t begin, int64_t end) {
      Scratch<T> columns(pixels.count * most_width), sums(M * most_width);
      const T zeros[kPanelVectors * kLanes<T>] = {};
      std::vector<T*> rows(M);
      for (int64_t p = begin; p < end; ++p) {
        const Panel panel = panels[p];
        const bool in_place = panel.count == panel.width && terms.side_by_side(panel);
        T* of_group = grad_weight.at(g * M, 0);
        for (int64_t k = 0; k < M; ++k) {
          rows[k] = in_place ? of_group + k * grad_weight.stride_n + terms.offsets()[panel.first]
                             : sums.data() + k * panel.width;
        }
        if (panel.count < panel.width) std::fill_n(columns.data(), pixels.count * panel.width, T(0));
        copy_transposed(unfolded.data() + panel.first * pixels.width, pixels.width, pixels.count, panel.count,
                        columns.data(), panel.width);
        multiply<T>(M, grad.at(0, g * M), channels.data(), places, columns.data(), panel.width, panel.width,
                    in_place && begun ? nullptr : zeros, rows.data(), {.sums = in_place});
        if (!in_place) write_weights(sums.data(), begun, terms, panel, M, grad_weight.stride_n, of_group);
      }
    });
  });
}

template void Unfold::forward(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*, int64_t,
                              Strided4d<float>);
template void Unfold::grad_input(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                 int64_t, Strided4d<float>);
template void Unfold::grad_weight(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, Strided4d<float>);

}  // namespace dlkernels
