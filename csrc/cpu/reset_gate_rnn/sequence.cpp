// reset_gate_rnn on the CPU: the whole sequence in one call.
//
// Who owns what: sequences do not know each other, and neither do columns within a step. So the work of a step is cut
// either into slices of the batch, each going through all of time on its own (weights that fit a core's cache), or into
// blocks of H, whose threads go through the steps together (large weights, of which each thread then keeps a part in
// its cache; small batches). Which of them, and how many slices: no sum is made in another order, the bits are the
// same. Passes over memory: weights are packed once; x W_ih^T is made for a chunk of steps at once, so that a step is
// left with h W_hh^T. The backward writes u, the gradients before sigmoid and tanh, of a chunk of steps; grad_x and the
// weights' gradients are then products over all of the chunk's rows.
#include "sequence.h"

#include <algorithm>

#include "../activations.h"
#include "../gemm.h"
#include "../lockstep.h"
#include "../parallel.h"
#include "../simd.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kTaskWork = 1 << 17;       // multiply-adds, 2.4 us, below which a second thread does not pay
constexpr int64_t kMoveWork = 16;            // multiply-adds in the time in which a number is moved
constexpr int64_t kStepWork = 1 << 15;       // multiply-adds between two meetings of threads that share a step
constexpr int64_t kSharedWork = 1 << 21;     // multiply-adds of all steps, 20 us, that pay for the first meeting
constexpr int64_t kLeastSlice = 2;           // sequences of a slice: a weight must serve two once it is loaded
constexpr int64_t kBlockRows = 128;          // rows of x, or of u, multiplied at once
constexpr int64_t kGateElements = 1 << 16;   // of a chunk of steps, for each thread: they stay in its second cache
constexpr int64_t kChunkWork = 1 << 26;      // multiply-adds of each product of a chunk, that pay for its meetings
constexpr int64_t kChunkElements = 1 << 20;  // gradients of gates of a chunk: 4 MiB, the workspace's bound
constexpr int64_t kProductRows = 256;        // of a weight's gradient, summed before memory is touched
constexpr int64_t kBiasRows = 128;           // summed before their sum goes on: long sums are made of short ones

// ---- kernels: what forward and backward share ------------------------------------------------------

// A run of steps, and where the rows of each are in the chunk's buffers: those of step s, of the sequences [b_begin,
// b_end), are row(s) .. row(s + 1).
class Chunk {
 public:
  Chunk(const ResetGateRnnShape& shape, int64_t begin, int64_t end, int64_t b_begin, int64_t b_end)
      : begin(begin), end(end), shape_(shape), b_begin_(b_begin), b_end_(b_end), first_{0} {
    for (int64_t s = begin; s < end; ++s) first_.push_back(first_.back() + sequences(s));
  }

  const int64_t begin, end;  // steps, in the order they are computed in

  int64_t rows() const { return first_.back(); }
  int64_t row(int64_t s) const { return first_[s - begin]; }
  // How many of its sequences have step s, counted from b_begin.
  int64_t sequences(int64_t s) const {
    return std::clamp<int64_t>(shape_.rows(shape_.time(s)) - b_begin_, 0, b_end_ - b_begin_);
  }

  // run(row, t, b) for every row of [begin, end): its time and its sequence
  template <class Run>
  void for_rows(int64_t begin_row, int64_t end_row, const Run& run) const {
    int64_t s = std::upper_bound(first_.begin(), first_.end(), begin_row) - first_.begin() - 1;
    for (int64_t row = begin_row; row < end_row; ++row) {
      while (row >= first_[s + 1]) ++s;
      run(row, shape_.time(begin + s), b_begin_ + row - first_[s]);
    }
  }

 private:
  const ResetGateRnnShape& shape_;
  int64_t b_begin_, b_end_;
  Ints first_;
};

// `count` filled up to whole vectors, and by one line more where rows of that length would lie a multiple of 1 KiB
// apart: those of a tile would compete for a few sets of the first cache (1 to 3 % of the time).
template <class A>
int64_t padded(int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(A), kSameSet = 1024 / sizeof(A);
  const int64_t width = ceil_div(count, kLanes<A>) * kLanes<A>;
  return width % kSameSet == 0 ? width + kLine : width;
}

// Steps of a chunk of so many rows.
int64_t steps_of_chunk(const ResetGateRnnShape& shape, int64_t rows) {
  return std::clamp<int64_t>(ceil_div(rows, std::max<int64_t>(1, shape.B)), 1, std::max<int64_t>(1, shape.T));
}

int64_t grain_of(int64_t work) { return std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, work)); }

// The same for items of so many numbers that are moved, not multiplied.
int64_t grain_of_moves(int64_t numbers) { return grain_of(numbers * kMoveWork); }

// How the work of the steps is cut.
struct Plan {
  bool by_columns;   // else by sequences
  Ints slices;       // where slices of the sequences begin, and B
  bool few_rows;     // of a slice
  int most_vectors;  // of a panel of recurrent weights
  int64_t sharing;   // threads that share the panels

  // `threads` decides on speed alone: sums do not depend on how the work is cut.
  Plan(const ResetGateRnnShape& shape, int64_t element_size) {
    const int64_t threads = thread_count(), weights = 2 * shape.H * shape.H, step = shape.B * weights;
    const bool large = weights * element_size > kCoreCacheBytes, narrow = shape.B < kLeastSlice * threads;
    const int64_t meetings = shape.reset == Reset::before ? 2 : 1;  // a step, for its phases
    by_columns = threads > 1 && step >= meetings * kStepWork && shape.T * step >= kSharedWork && (large || narrow);
    sharing = by_columns ? threads : 1;
    const int64_t grain = std::max(kLeastSlice, grain_of(shape.T * weights));
    slices = cut(shape, by_columns ? 1 : std::min(threads, ceil_div(shape.B, grain)));
    const int64_t slice = ceil_div(shape.B, int64_t(slices.size()) - 1);
    few_rows = slice <= kFewRows;
    most_vectors = few_rows ? kFewRowsVectors : kTileVectors;
  }

 private:
  // Slices of about the same number of rows: of packed sequences, the first are the longest.
  static Ints cut(const ResetGateRnnShape& shape, int64_t count) {
    Ints begins{0};
    int64_t rows = 0, length = shape.T;
    for (int64_t b = 0; b < shape.B; ++b) {
      while (length > 0 && shape.rows(length - 1) <= b) --length;
      rows += length;
      const int64_t slice = begins.size();
      if (slice < count && rows * count >= shape.rows() * slice) begins.push_back(b + 1);
    }
    begins.push_back(shape.B);
    return begins;
  }
};

// Calls work(b_begin, b_end) for all slices of the sequences.
template <class Work>
void for_slices(const Ints& slices, const Work& work) {
  parallel_for(int64_t(slices.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(slices[i], slices[i + 1]);
  });
}

// Calls work(step, block) for all steps in order, blocks < `blocks`: together where the plan is by columns.
template <class Work>
void in_lockstep(int64_t steps, int64_t blocks, const Work& work) {
  if (steps == 0 || blocks == 0) return;
  Lockstep lockstep(steps, blocks);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) { lockstep.join(begin, end, work); });
}

// The transpose of both gates' weights W (2H, depth) in panels, for blocks of the H columns: a panel for each gate or,
// `together`, one for both, in which n's columns follow r's. With few rows that gives every chain of sums others to run
// beside.
template <class A>
class GatePanels {
 public:
  template <class T>
  GatePanels(const T* weight, int64_t H, int64_t depth, int most_vectors, int64_t threads = 1, bool together = false)
      : H_(H),
        depth_(depth),
        r_(together ? both(H, depth, most_vectors, threads) : Panels<A>(depth, H, most_vectors, threads)) {
    if (!together) n_.emplace(depth, H, most_vectors, threads);
    parallel_for(2 * count(), grain_of_moves(ceil_div(H, std::max<int64_t>(1, count())) * depth),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) pack(i / 2, i % 2, weight + i % 2 * H * depth);
                 });
  }

  int64_t count() const { return r_.count(); }
  int64_t first_column(int64_t block) const { return r_.first_column(block) / (n_ ? 1 : 2); }
  int64_t end_column(int64_t block) const { return r_.end_column(block) / (n_ ? 1 : 2); }

  // sums[m] = start + rows[m] W^T for the block's columns: r's at sums, n's `to_n` behind, and so in start, one row
  void multiply(int64_t block, int64_t row_count, const RowMajor<A>& rows, const A* start, A* sums, int64_t stride,
                int64_t to_n) const {
    r_.multiply(block, depth_, row_count, rows, {start, 0}, sums, stride);
    if (n_) n_->multiply(block, depth_, row_count, rows, {start + to_n, 0}, sums + to_n, stride);
  }

  // sums[m] += rows[m] W^T of one gate, where they are not together.
  void add_r(int64_t block, int64_t row_count, const RowMajor<A>& rows, A* sums, int64_t stride) const {
    r_.multiply(block, depth_, row_count, rows, {sums, stride}, sums, stride);
  }
  void add_n(int64_t block, int64_t row_count, const RowMajor<A>& rows, A* sums, int64_t stride) const {
    n_->multiply(block, depth_, row_count, rows, {sums, stride}, sums, stride);
  }

 private:
  // Blocks of the same number of vectors, so that a panel's halves are those of the gates.
  static Panels<A> both(int64_t H, int64_t depth, int most_vectors, int64_t threads) {
    const int64_t vectors = ceil_div(H, kLanes<A>);
    int64_t blocks = ceil_div(2 * vectors, most_vectors);
    while (blocks < vectors && (vectors % blocks != 0 || blocks % threads != 0)) ++blocks;
    return Panels<A>(depth, 2 * vectors * kLanes<A>, most_vectors, threads, std::min(vectors, blocks));
  }

  template <class T>
  void pack(int64_t block, int64_t gate, const T* weight) {
    const int64_t first = first_column(block), width = end_column(block) - first;
    Panels<A>& panels = gate > 0 && n_ ? *n_ : r_;
    panels.pack_transposed(block, gate > 0 && !n_ ? width : 0, std::min(width, H_ - first), weight + first * depth_,
                           depth_);
  }

  int64_t H_, depth_;
  Panels<A> r_;  // or both gates'
  std::optional<Panels<A>> n_;
};

// ... and W as it stands: W (2H, columns), r's rows and n's.
template <class A>
struct RowPanels {
  Panels<A> r, n;

  template <class T>
  RowPanels(const T* weight, int64_t H, int64_t columns, int most_vectors, int64_t threads = 1)
      : r(H, columns, most_vectors, threads), n(H, columns, most_vectors, threads) {
    parallel_for(H, grain_of_moves(2 * columns), [&](int64_t begin, int64_t end) {
      Scratch<A> row(columns);
      for (int64_t l = begin; l < end; ++l) {
        for (Panels<A>* panels : {&r, &n}) {
          const T* from = weight + (panels == &r ? l : H + l) * columns;
          panels->pack_row(l, as_sums(from, columns, row.data()));
        }
      }
    });
  }
};

// ---- kernels: forward --------------------------------------------------------------------------------

template <class T>
class Forward {
  using A = Accumulate<T>;
  static constexpr int L = kLanes<A>;

 public:
  Forward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in, const ResetGateRnnResult<T>& result)
      : shape_(shape),
        in_(in),
        result_(result),
        plan_(shape, sizeof(A)),
        Hp_(padded<A>(shape.H)),
        ih_(in.weight_ih, shape.H, shape.I, kTileVectors),
        hh_(in.weight_hh, shape.H, shape.H, plan_.most_vectors, plan_.sharing,
            plan_.few_rows && shape.reset != Reset::before),
        bias_(2 * Hp_),
        recurrent_bias_(2 * Hp_),
        state_{Scratch<A>(shape.B * Hp_), Scratch<A>(shape.B * Hp_)},
        recurrent_(shape.B * 2 * Hp_) {
    // r has the sum of its biases in a_r, and so has n in a_n; but in "after" b_hn belongs to what h' gives
    std::fill_n(bias_.data(), 2 * Hp_, A(0));
    std::fill_n(recurrent_bias_.data(), 2 * Hp_, A(0));
    const auto at = [&](const T* bias, int64_t i) { return bias == nullptr ? A(0) : A(load(bias[i])); };
    for (int64_t j = 0; j < shape.H; ++j) bias_.data()[j] = at(in.bias_ih, j) + at(in.bias_hh, j);
    for (int64_t block = 0; block < hh_.count(); ++block) {
      const int64_t first = hh_.first_column(block), end = hh_.end_column(block);
      for (int64_t j = first; j < std::min(end, shape.H); ++j) {
        const A b_in = at(in.bias_ih, shape.H + j), b_hn = at(in.bias_hh, shape.H + j);
        const bool after = shape.reset == Reset::after;
        bias_.data()[Hp_ + j] = after ? b_in : b_in + b_hn;
        if (after) recurrent_bias_.data()[end + j] = b_hn;  // at 2 first, behind r's end - first columns
      }
    }
    // a sequence that has not begun has h0 in both: steps read one and write the other
    for (int64_t b = 0; b < shape.B; ++b) {
      for (A* h : {state_[0].data() + b * Hp_, state_[1].data() + b * Hp_}) {
        convert_row(in.h0 + b * shape.H, shape.H, h);
      }
    }
  }

  void run() {
    const bool one_slice = plan_.slices.size() == 2;
    const int64_t rows = thread_count() * kGateElements / std::max<int64_t>(1, 2 * Hp_);
    const int64_t length = steps_of_chunk(shape_, std::max(kBlockRows, rows));
    for_slices(plan_.slices, [&](int64_t b_begin, int64_t b_end) {
      for (int64_t s = 0; s < shape_.T; s += length) {
        Part part(*this, s, std::min(shape_.T, s + length), b_begin, b_end);
        const int64_t grain = std::max(kBlockRows / 4, grain_of(2 * shape_.I * shape_.H));
        parallel_for(part.chunk.rows(), one_slice ? grain : part.chunk.rows(),
                     [&](int64_t begin, int64_t end) { part.multiply_input(begin, end); });
        part.walk();
      }
    });
    for (int64_t b = 0; b < shape_.B; ++b) {
      const int64_t row = shape_.last_row(b);
      std::copy_n(row < 0 ? in_.h0 + b * shape_.H : result_.output + row * shape_.H, shape_.H,
                  result_.h_n + b * shape_.H);
    }
  }

 private:
  // In "before", all of q must be there before n: a step has two phases.
  int phases() const { return shape_.reset == Reset::before ? 2 : 1; }

  // A chunk of steps of some sequences.
  struct Part {
    Forward& f;
    Chunk chunk;
    int64_t b_begin;
    Scratch<A> gates;  // (rows, 2 Hp): a_r and a_n, then the sums that go into sigmoid and tanh

    Part(Forward& f, int64_t begin, int64_t end, int64_t b_begin, int64_t b_end)
        : f(f), chunk(f.shape_, begin, end, b_begin, b_end), b_begin(b_begin), gates(chunk.rows() * 2 * f.Hp_) {}

    // gates[row] = [a_r | a_n] for the rows [begin, end)
    void multiply_input(int64_t begin, int64_t end) {
      const int64_t I = f.shape_.I, Ip = padded<A>(I), Hp = f.Hp_;
      Scratch<A> x(std::min(kBlockRows, end - begin) * Ip);
      for (int64_t first = begin; first < end; first += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - first);
        chunk.for_rows(first, first + count, [&](int64_t row, int64_t t, int64_t b) {
          convert_row(f.in_.input.row(t, b), I, x.data() + (row - first) * Ip);
        });
        A* sums = gates.data() + first * 2 * Hp;
        const RowMajor<A> rows{x.data(), Ip};
        for (int64_t block = 0; block < f.ih_.count(); ++block) {
          const int64_t j = f.ih_.first_column(block);
          f.ih_.multiply(block, count, rows, f.bias_.data() + j, sums + j, 2 * Hp, Hp);
        }
      }
    }

    // All steps, together where the plan is by columns.
    void walk() {
      const int64_t phases = f.phases(), blocks = f.hh_.count(), turns = (chunk.end - chunk.begin) * phases;
      const auto turn = [&](int64_t i, int64_t block) { step(chunk.begin + i / phases, int(i % phases), block); };
      if (f.plan_.by_columns) return in_lockstep(turns, blocks, turn);
      for (int64_t i = 0; i < turns; ++i) {
        for (int64_t block = 0; block < blocks; ++block) turn(i, block);
      }
    }

    // One block of columns of step s, for all sequences that have it.
    void step(int64_t s, int phase, int64_t block) {
      const int64_t count = chunk.sequences(s);
      if (count == 0) return;
      switch (f.shape_.reset) {
        case Reset::after:
          return after(s, block, count);
        case Reset::before:
          return phase == 0 ? before_r(s, block, count) : before_n(s, block, count);
        case Reset::output:
          return output(s, block, count);
      }
    }

    A* sums_of(int64_t s) { return gates.data() + chunk.row(s) * 2 * f.Hp_; }
    A* rows_of(Scratch<A>& buffer) { return buffer.data() + b_begin * f.Hp_; }
    RowMajor<A> h_before(int64_t s) { return {rows_of(f.state_[s & 1]), f.Hp_}; }

    // One sequence's row of a step, a vector of columns j .. j + count at a time.
    struct Row {
      int64_t b, H, Hp;  // sequence b_begin + b
      const A* sums;     // a_r, and a_n Hp behind
      A* state;          // h, which the next step reads
      T *output, *saved;

      Vector<A> a_r(int64_t j) const { return load_vector(sums + j); }
      Vector<A> a_n(int64_t j) const { return load_vector(sums + Hp + j); }

      // h, rounded to T
      void keep(int64_t j, int64_t count, Vector<A> h) const {
        store_as<A>(output + j, count, h);
        store_vector(state + j, rounded<T, A>(h));
      }

      // for the backward
      void save(int gate, int64_t j, int64_t count, Vector<A> value) const {
        if (saved != nullptr) store_as<A>(saved + gate * H + j, count, value);
      }
    };

    // work(row, j, count) for the block's columns of the first `count` sequences
    template <class Work>
    void for_vectors(int64_t s, int64_t block, int64_t count, const Work& work) {
      const int64_t H = f.shape_.H, Hp = f.Hp_, wide = f.shape_.saved() * H;
      const int64_t first_row = f.shape_.first[f.shape_.time(s)] + b_begin;
      const int64_t first = f.hh_.first_column(block), end = f.hh_.end_column(block);
      const A* sums = sums_of(s);
      A* state = rows_of(f.state_[(s + 1) & 1]);
      T* output = f.result_.output + first_row * H;
      T* saved = f.result_.gates == nullptr ? nullptr : f.result_.gates + first_row * wide;
      for (int64_t b = 0; b < count; ++b) {
        const Row row{
            b, H, Hp, sums + b * 2 * Hp, state + b * Hp, output + b * H, saved == nullptr ? nullptr : saved + b * wide};
        for (int64_t j = first; j < end; j += L) work(row, j, std::min<int64_t>(L, H - j));
      }
    }

    // What a step adds to a_r and a_n, or in "after" g, of one block: rows [W_hr h' | W_hn h'] of `width` columns each.
    struct Recurrent {
      const A* rows;
      int64_t width, stride;

      Vector<A> r(int64_t b, int64_t j) const { return load_vector(rows + b * stride + j); }
      Vector<A> n(int64_t b, int64_t j) const { return load_vector(rows + b * stride + width + j); }
    };

    // Asks for the block's sums of step s: they come while h' is multiplied.
    void fetch_sums(int64_t s, int64_t block, int64_t count) {
      const int64_t first = f.hh_.first_column(block), end = f.hh_.end_column(block);
      for (int64_t b = 0; b < count; ++b) {
        const A* sums = sums_of(s) + b * 2 * f.Hp_;
        for (int64_t j = first; j < end; j += L) {
          __builtin_prefetch(sums + j, 0, 2);
          __builtin_prefetch(sums + f.Hp_ + j, 0, 2);
        }
      }
    }

    Recurrent multiply_state(int64_t s, int64_t block, int64_t count) {
      const int64_t Hp = f.Hp_, first = f.hh_.first_column(block), width = f.hh_.end_column(block) - first;
      A* rows = f.recurrent_.data() + b_begin * 2 * Hp + 2 * first;
      fetch_sums(s, block, count);
      f.hh_.multiply(block, count, h_before(s), f.recurrent_bias_.data() + 2 * first, rows, 2 * Hp, width);
      return {rows - first, width, 2 * Hp};
    }

    // h = tanh(a_n + r * g), g = b_hn + W_hn h'
    void after(int64_t s, int64_t block, int64_t count) {
      const Recurrent recurrent = multiply_state(s, block, count);
      for_vectors(s, block, count, [recurrent](const Row& row, int64_t j, int64_t columns) {
        const Vector<A> r = sigmoid<A>(row.a_r(j) + recurrent.r(row.b, j)), g = recurrent.n(row.b, j);
        row.save(0, j, columns, r);
        row.save(1, j, columns, g);
        row.keep(j, columns, tanh<A>(row.a_n(j) + r * g));
      });
    }

    // q = r * h'
    void before_r(int64_t s, int64_t block, int64_t count) {
      const int64_t Hp = f.Hp_;
      A* q = rows_of(f.recurrent_);
      const RowMajor<A> h = h_before(s);
      fetch_sums(s, block, count);
      f.hh_.add_r(block, count, h, sums_of(s) + f.hh_.first_column(block), 2 * Hp);
      for_vectors(s, block, count, [=](const Row& row, int64_t j, int64_t columns) {
        const Vector<A> r = sigmoid<A>(row.a_r(j));
        row.save(0, j, columns, r);
        store_vector(q + row.b * Hp + j, r * load_vector(h.from(row.b, j).data));
      });
    }

    // h = tanh(a_n + b_hn + W_hn q)
    void before_n(int64_t s, int64_t block, int64_t count) {
      const RowMajor<A> q{rows_of(f.recurrent_), f.Hp_};
      f.hh_.add_n(block, count, q, sums_of(s) + f.Hp_ + f.hh_.first_column(block), 2 * f.Hp_);
      for_vectors(s, block, count,
                  [](const Row& row, int64_t j, int64_t columns) { row.keep(j, columns, tanh<A>(row.a_n(j))); });
    }

    // h = r * n, n = tanh(a_n + b_hn + W_hn h')
    void output(int64_t s, int64_t block, int64_t count) {
      const Recurrent recurrent = multiply_state(s, block, count);
      for_vectors(s, block, count, [recurrent](const Row& row, int64_t j, int64_t columns) {
        const Vector<A> r = sigmoid<A>(row.a_r(j) + recurrent.r(row.b, j));
        const Vector<A> n = tanh<A>(row.a_n(j) + recurrent.n(row.b, j));
        row.save(0, j, columns, r);
        row.save(1, j, columns, n);
        row.keep(j, columns, r * n);
      });
    }
  };

  const ResetGateRnnShape& shape_;
  const ResetGateRnnInput<T>& in_;
  const ResetGateRnnResult<T>& result_;
  const Plan plan_;
  const int64_t Hp_;  // H padded
  GatePanels<A> ih_, hh_;
  Scratch<A> bias_;            // (2 Hp): of a_r and a_n
  Scratch<A> recurrent_bias_;  // (2 Hp): what the rows of recurrent_ begin from
  Scratch<A> state_[2];        // (B, Hp) each: h' and h, by turns
  Scratch<A> recurrent_;       // (B, 2 Hp): what h' gives to both gates, block by block; in "before" q (B, Hp)
};

// ---- kernels: backward -------------------------------------------------------------------------------

template <class T>
class Backward {
  using A = Accumulate<T>;
  static constexpr int L = kLanes<A>;

 public:
  Backward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in, const ResetGateRnnGrad<T>& grad,
           const ResetGateRnnGradients<T>& wanted)
      : shape_(shape),
        in_(in),
        grad_(grad),
        wanted_(wanted),
        plan_(shape, sizeof(A)),
        Hp_(padded<A>(shape.H)),
        Ip_(padded<A>(shape.I)),
        width_((shape.reset == Reset::after ? 3 : 2) * Hp_),
        hh_(in.weight_hh, shape.H, shape.H, plan_.most_vectors, plan_.sharing),
        dh_(shape.B * Hp_),
        direct_(shape.reset == Reset::before ? shape.B * Hp_ : 0),
        weight_ih_(wanted.weight_ih, 2 * shape.H, shape.I),
        weight_hh_(wanted.weight_hh, 2 * shape.H, shape.H),
        bias_(width_) {
    std::fill_n(dh_.data(), shape.B * Hp_, A(0));
    for (int64_t b = 0; grad.grad_h_n != nullptr && b < shape.B; ++b) {
      convert_row(grad.grad_h_n + b * shape.H, shape.H, dh_.data() + b * Hp_);
    }
    std::fill_n(bias_.data(), width_, A(0));
    if (wanted.input != nullptr) ih_.emplace(in.weight_ih, shape.H, shape.I, kTileVectors);
  }

  void run() {
    const int64_t work = shape_.H * (shape_.H + shape_.I);  // a row's, in each product
    const int64_t rows =
        std::min(kChunkWork / std::max<int64_t>(1, work), kChunkElements / std::max<int64_t>(1, width_));
    const int64_t length = steps_of_chunk(shape_, std::max(kProductRows, rows));
    for (int64_t end = shape_.T; end > 0; end -= std::min(end, length)) {
      Part part(*this, std::max<int64_t>(0, end - length), end);
      part.walk();
      if (wanted_.input != nullptr) part.multiply_input();
      if (wanted_.weight_ih != nullptr) part.add_weight_ih();
      if (wanted_.weight_hh != nullptr) part.add_weight_hh();
      if (wanted_.bias_ih != nullptr || wanted_.bias_hh != nullptr) part.add_bias();
    }
    finish();
  }

 private:
  int64_t n_part() const { return Hp_; }                                           // u_n's columns in u
  int64_t h_part() const { return shape_.reset == Reset::after ? 2 * Hp_ : Hp_; }  // u_h's: u_g or u_n

  // h' of sequence b at step s
  const T* h_before(int64_t t, int64_t b) const {
    const int64_t before = shape_.reverse ? t + 1 : t - 1;
    const bool has = before >= 0 && before < shape_.T && b < shape_.rows(before);
    return has ? grad_.output + (shape_.first[before] + b) * shape_.H : in_.h0 + b * shape_.H;
  }

  // Where the sums of a weight's gradient are made: in the gradient itself where its rows are whole vectors of them.
  struct WeightSums {
    T* wanted;
    int64_t rows, columns, stride;
    bool in_place;
    Scratch<A> own;

    WeightSums(T* wanted, int64_t rows, int64_t columns)
        : wanted(wanted),
          rows(rows),
          columns(columns),
          stride(ceil_div(columns, L) * L),
          in_place(std::is_same_v<T, A> && columns == stride),
          own(wanted == nullptr || in_place ? 0 : rows * stride) {}
    A* data() {
      if constexpr (std::is_same_v<T, A>) return in_place ? wanted : own.data();
      return own.data();
    }
  };

  // A chunk of steps of all sequences.
  struct Part {
    Backward& f;
    Chunk chunk;
    Scratch<A> u;  // (rows, width): u_r, u_n, and u_g in "after"

    Part(Backward& f, int64_t begin, int64_t end)
        : f(f), chunk(f.shape_, begin, end, 0, f.shape_.B), u(chunk.rows() * f.width_) {}

    // u of all rows, and dh of what came before the chunk. In turn k, dh' of the step of turn k - 1 becomes dh, then u
    // of the next step is made of it; in "before" in two phases.
    void walk() {
      const int64_t phases = f.shape_.reset == Reset::before ? 2 : 1, steps = chunk.end - chunk.begin;
      const int64_t turns = steps * phases + 1, blocks = f.hh_.r.count();
      if (f.plan_.by_columns) {
        in_lockstep(turns, blocks,
                    [&](int64_t i, int64_t block) { turn(i / phases, int(i % phases), block, 0, f.shape_.B); });
        return;
      }
      for_slices(f.plan_.slices, [&](int64_t b_begin, int64_t b_end) {
        for (int64_t i = 0; i < turns; ++i) {
          for (int64_t block = 0; block < blocks; ++block) turn(i / phases, int(i % phases), block, b_begin, b_end);
        }
      });
    }

    A* u_of(int64_t s, int64_t b) { return u.data() + (chunk.row(s) + b) * f.width_; }

    void turn(int64_t k, int phase, int64_t block, int64_t b_begin, int64_t b_end) {
      const int64_t s = chunk.end - 1 - k;
      if (phase == 0 && k > 0) pass_on(s + 1, block, b_begin, std::min(b_end, chunk.sequences(s + 1)));
      if (s < chunk.begin) return;
      const int64_t end = std::min(b_end, chunk.sequences(s));
      if (b_begin >= end) return;
      switch (f.shape_.reset) {
        case Reset::after:
          return after(s, block, b_begin, end);
        case Reset::before:
          return phase == 0 ? before_n(s, block, b_begin, end) : before_r(s, block, b_begin, end);
        case Reset::output:
          return output(s, block, b_begin, end);
      }
    }

    // dh = W_hr^T u_r + W_hn^T u_h of step s; in "before" W_hr^T u_r + dq r, the latter having been kept
    void pass_on(int64_t s, int64_t block, int64_t b_begin, int64_t b_end) {
      if (b_begin >= b_end) return;
      const int64_t H = f.shape_.H, Hp = f.Hp_, first = f.hh_.r.first_column(block);
      A* dh = f.dh_.data() + b_begin * Hp + first;
      const RowMajor<A> rows{u_of(s, b_begin), f.width_};
      if (f.shape_.reset == Reset::before) {
        return f.hh_.r.multiply(block, H, b_end - b_begin, rows, {f.direct_.data() + b_begin * Hp + first, Hp}, dh, Hp);
      }
      f.hh_.r.multiply(block, H, b_end - b_begin, rows, {}, dh, Hp);
      f.hh_.n.multiply(block, H, b_end - b_begin, rows.from(0, f.h_part()), {dh, Hp}, dh, Hp);
    }

    // One sequence's row of a step, as the backward needs it, a vector of columns j .. j + count at a time.
    struct Row {
      int64_t b, H;
      const T *gates, *output, *before, *grad_output;  // before: h'; grad_output: null for zeros
      const A* carried;                                // what the step after gives to dh

      Vector<A> gate(int i, int64_t j, int64_t count) const { return load_as<A>(gates + i * H + j, count); }
      Vector<A> h(int64_t j, int64_t count) const { return load_as<A>(output + j, count); }
      Vector<A> h_before(int64_t j, int64_t count) const { return load_as<A>(before + j, count); }
      Vector<A> dh(int64_t j, int64_t count) const {
        const Vector<A> dh = load_vector(carried + j);
        return grad_output == nullptr ? dh : dh + load_as<A>(grad_output + j, count);
      }
    };

    Row row_of(int64_t t, int64_t b) const {
      const int64_t H = f.shape_.H, row = f.shape_.first[t] + b;
      const bool has_grad = f.grad_.grad_output.data != nullptr;
      return {b,
              H,
              f.grad_.gates + row * f.shape_.saved() * H,
              f.grad_.output + row * H,
              f.h_before(t, b),
              has_grad ? f.grad_.grad_output.row(t, b) : nullptr,
              f.dh_.data() + b * f.Hp_};
    }

    // work(row, j, count, u) for the block's columns, u being the vector's place in the row's u_r
    template <class Work>
    void for_vectors(int64_t s, int64_t block, int64_t b_begin, int64_t b_end, const Work& work) {
      const int64_t t = f.shape_.time(s), H = f.shape_.H;
      const int64_t first = f.hh_.r.first_column(block), end = f.hh_.r.end_column(block);
      for (int64_t b = b_begin; b < b_end; ++b) {
        const Row row = row_of(t, b);
        A* u = u_of(s, b);
        for (int64_t j = first; j < end; j += L) work(row, j, std::min<int64_t>(L, H - j), u + j);
      }
    }

    void after(int64_t s, int64_t block, int64_t b_begin, int64_t b_end) {
      const int64_t Hp = f.Hp_;
      for_vectors(s, block, b_begin, b_end, [Hp](const Row& row, int64_t j, int64_t count, A* u) {
        const Vector<A> r = row.gate(0, j, count), g = row.gate(1, j, count), n = row.h(j, count);
        const Vector<A> u_n = row.dh(j, count) * (A(1) - n * n);
        store_vector(u, u_n * g * (r * (A(1) - r)));
        store_vector(u + Hp, u_n);
        store_vector(u + 2 * Hp, u_n * r);
      });
    }

    void before_n(int64_t s, int64_t block, int64_t b_begin, int64_t b_end) {
      const int64_t Hp = f.Hp_;
      for_vectors(s, block, b_begin, b_end, [Hp](const Row& row, int64_t j, int64_t count, A* u) {
        const Vector<A> n = row.h(j, count);
        store_vector(u + Hp, row.dh(j, count) * (A(1) - n * n));
      });
    }

    // dq = W_hn^T u_n
    void before_r(int64_t s, int64_t block, int64_t b_begin, int64_t b_end) {
      const int64_t Hp = f.Hp_, first = f.hh_.n.first_column(block);
      const RowMajor<A> rows{u_of(s, b_begin) + f.n_part(), f.width_};
      f.hh_.n.multiply(block, f.shape_.H, b_end - b_begin, rows, {}, f.direct_.data() + b_begin * Hp + first, Hp);
      A* direct = f.direct_.data();
      for_vectors(s, block, b_begin, b_end, [=](const Row& row, int64_t j, int64_t count, A* u) {
        const Vector<A> r = row.gate(0, j, count), dq = load_vector(direct + row.b * Hp + j);
        store_vector(u, dq * row.h_before(j, count) * (r * (A(1) - r)));
        store_vector(direct + row.b * Hp + j, dq * r);
      });
    }

    void output(int64_t s, int64_t block, int64_t b_begin, int64_t b_end) {
      const int64_t Hp = f.Hp_;
      for_vectors(s, block, b_begin, b_end, [Hp](const Row& row, int64_t j, int64_t count, A* u) {
        const Vector<A> r = row.gate(0, j, count), n = row.gate(1, j, count), dh = row.dh(j, count);
        store_vector(u, dh * n * (r * (A(1) - r)));
        store_vector(u + Hp, dh * r * (A(1) - n * n));
      });
    }

    // grad_x = u_r W_ir + u_n W_in
    void multiply_input() {
      const int64_t H = f.shape_.H, I = f.shape_.I, Ip = f.Ip_;
      parallel_for(chunk.rows(), std::max(kBlockRows / 4, grain_of(2 * H * I)), [&](int64_t begin, int64_t end) {
        Scratch<A> sums(kBlockRows * Ip);
        for (int64_t first = begin; first < end; first += kBlockRows) {
          const int64_t count = std::min(kBlockRows, end - first);
          const RowMajor<A> rows{u.data() + first * f.width_, f.width_};
          for (int64_t p = 0; p < f.ih_->r.count(); ++p) {
            A* to = sums.data() + f.ih_->r.first_column(p);
            f.ih_->r.multiply(p, H, count, rows, {}, to, Ip);
            f.ih_->n.multiply(p, H, count, rows.from(0, f.n_part()), {to, Ip}, to, Ip);
          }
          chunk.for_rows(first, first + count, [&](int64_t row, int64_t t, int64_t b) {
            convert_row(sums.data() + (row - first) * Ip, I, f.wanted_.input + (f.shape_.first[t] + b) * I);
          });
        }
      });
    }

    // [grad_W_ir; grad_W_in] += sum over rows of [u_r | u_n]^T x
    void add_weight_ih() {
      add_products(
          {0, f.n_part()}, f.shape_.I, f.weight_ih_.data(), f.weight_ih_.stride,
          [&](int64_t, int64_t t, int64_t b, A* to) { return as_sums(f.in_.input.row(t, b), f.shape_.I, to); });
    }

    // [grad_W_hr; grad_W_hn] += sum over rows of [u_r | u_h]^T h'; in "before" u_n meets q = r h'
    void add_weight_hh() {
      const int64_t H = f.shape_.H;
      const auto h = [&](int64_t, int64_t t, int64_t b, A* to) { return as_sums(f.h_before(t, b), H, to); };
      if (f.shape_.reset != Reset::before)
        return add_products({0, f.h_part()}, H, f.weight_hh_.data(), f.weight_hh_.stride, h);
      add_products({0}, H, f.weight_hh_.data(), f.weight_hh_.stride, h);
      add_products({f.n_part()}, H, f.weight_hh_.data() + H * f.weight_hh_.stride, f.weight_hh_.stride,
                   [&](int64_t, int64_t t, int64_t b, A* to) -> const A* {
                     const T* h = f.h_before(t, b);
                     const T* r = f.grad_.gates + (f.shape_.first[t] + b) * H;
                     for (int64_t j = 0; j < H; j += L) {
                       const int64_t count = std::min<int64_t>(L, H - j);
                       store_as<A>(to + j, count, load_as<A>(r + j, count) * load_as<A>(h + j, count));
                     }
                     return to;
                   });
    }

    // sums[p*H + m][j] += sum over rows of u[row][parts[p] + m] * right(row)[j], the parts being H columns wide
    //   right(row, t, b, buffer) is a row of N, in the buffer or elsewhere; the first chunk begins the sums
    template <class Right>
    void add_products(const Ints& parts, int64_t N, A* sums, int64_t sum_stride, const Right& right) {
      const int64_t H = f.shape_.H, tiles = ceil_div(H, kTileRows), rows = chunk.rows();
      parallel_for(int64_t(parts.size()) * tiles, grain_of(rows * kTileRows * N), [&](int64_t begin, int64_t end) {
        Scratch<A> left((end - begin) * kProductRows * kTileRows), buffer(N);
        Panels<A> panels(kProductRows, N, kTileVectors);
        for (int64_t first = 0; first < rows; first += kProductRows) {
          const int64_t depth = std::min(kProductRows, rows - first);
          chunk.for_rows(first, first + depth, [&](int64_t row, int64_t t, int64_t b) {
            panels.pack_row(row - first, right(row, t, b, buffer.data()));
          });
          for (int64_t i = begin; i < end; ++i) {
            const int64_t m = i % tiles * kTileRows, count = std::min<int64_t>(kTileRows, H - m);
            const A* from = u.data() + first * f.width_ + parts[i / tiles] + m;
            A* to = left.data() + (i - begin) * kProductRows * kTileRows;
            for (int64_t l = 0; l < depth; ++l, from += f.width_, to += kTileRows) {
              if (count == kTileRows) {
                std::copy_n(from, kTileRows, to);  // of known size: a move, not a call
              } else {
                std::copy_n(from, count, to);
              }
            }
          }
          for (int64_t p = 0; p < panels.count(); ++p) {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t m = i % tiles * kTileRows, row = i / tiles * H + m;
              const Interleaved<A> tile{left.data() + (i - begin) * kProductRows * kTileRows};
              A* to = sums + row * sum_stride + panels.first_column(p);
              const bool begun = first > 0 || chunk.end < f.shape_.T;
              panels.multiply(p, depth, std::min<int64_t>(kTileRows, H - m), tile,
                              begun ? Start<A>{to, sum_stride} : Start<A>{}, to, sum_stride);
            }
          }
        }
      });
    }

    // bias[j] += sum over rows of u[row][j]
    void add_bias() {
      const int64_t rows = chunk.rows();
      parallel_for(f.width_ / L, grain_of_moves(rows), [&](int64_t begin, int64_t end) {
        for (int64_t j = begin * L; j < end * L; j += L) {
          A* bias = f.bias_.data() + j;
          for (int64_t first = 0; first < rows; first += kBiasRows) {
            Vector<A> sum = {};
            for (int64_t row = first; row < std::min(rows, first + kBiasRows); ++row) {
              sum += load_vector(u.data() + row * f.width_ + j);
            }
            store_vector(bias, load_vector(bias) + sum);
          }
        }
      });
    }
  };

  void finish() {
    const int64_t H = shape_.H;
    store_rows(shape_.B, H, dh_.data(), Hp_, wanted_.h0);
    for (WeightSums* sums : {&weight_ih_, &weight_hh_}) {
      if (sums->wanted == nullptr) continue;
      if (shape_.rows() == 0) std::fill_n(sums->data(), sums->rows * sums->stride, A(0));
      if (!sums->in_place) store_rows(sums->rows, sums->columns, sums->data(), sums->stride, sums->wanted);
    }
    for (int64_t part = 0; part < 2; ++part) {
      store_rows(1, H, bias_.data() + part * n_part(), Hp_, wanted_.bias_ih, part * H);
      store_rows(1, H, bias_.data() + part * h_part(), Hp_, wanted_.bias_hh, part * H);
    }
  }

  // to (rows, columns) = from, whose rows are `stride` apart
  void store_rows(int64_t rows, int64_t columns, const A* from, int64_t stride, T* to, int64_t offset = 0) const {
    if (to == nullptr) return;
    to += offset;
    parallel_for(rows, grain_of_moves(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        convert_row(from + row * stride, columns, to + row * columns);
      }
    });
  }

  const ResetGateRnnShape& shape_;
  const ResetGateRnnInput<T>& in_;
  const ResetGateRnnGrad<T>& grad_;
  const ResetGateRnnGradients<T>& wanted_;
  const Plan plan_;
  const int64_t Hp_, Ip_;  // H and I padded
  const int64_t width_;    // of a row of u
  RowPanels<A> hh_;
  std::optional<RowPanels<A>> ih_;
  Scratch<A> dh_;      // (B, Hp): the gradient of each sequence's current h
  Scratch<A> direct_;  // (B, Hp), "before": dq r
  WeightSums weight_ih_, weight_hh_;
  Scratch<A> bias_;  // sums so far (width)
};

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------

template <class T>
void reset_gate_rnn_forward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in,
                            const ResetGateRnnResult<T>& result) {
  Forward<T>(shape, in, result).run();
}

template <class T>
void reset_gate_rnn_backward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in,
                             const ResetGateRnnGrad<T>& grad, const ResetGateRnnGradients<T>& wanted) {
  Backward<T>(shape, in, grad, wanted).run();
}

#define DLKERNELS_INSTANTIATE(T)                                                               \
  template void reset_gate_rnn_forward(const ResetGateRnnShape&, const ResetGateRnnInput<T>&,  \
                                       const ResetGateRnnResult<T>&);                          \
  template void reset_gate_rnn_backward(const ResetGateRnnShape&, const ResetGateRnnInput<T>&, \
                                        const ResetGateRnnGrad<T>&, const ResetGateRnnGradients<T>&);
DLKERNELS_INSTANTIATE(double)
DLKERNELS_INSTANTIATE(float)
DLKERNELS_INSTANTIATE(BFloat16)
DLKERNELS_INSTANTIATE(Half)
#undef DLKERNELS_INSTANTIATE

}  // namespace dlkernels
