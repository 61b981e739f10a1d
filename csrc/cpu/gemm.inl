// The one micro-kernel under every convolution: kVecs vectors of output channels x up to kRows rows, accumulated in registers.
//   Winograd forward:      rows are tiles,          depth is input channels
//   Winograd grad_weight:  rows are input channels, depth is tiles
//   direct:                rows are pixels,         depth is (tap column, input channel), one segment per tap row

// What the layer needs after some products, spread evenly over them: `block` bytes for each row block, `step` for each of its
// steps.
struct Later {
  const char* data;
  int64_t block, step;
};

// sum over segments s and depth d of a[row * a.row + s * a.segment + d * a.depth] * b[s * b.segment + d * b.depth + channel]
struct Product {
  struct {
    const float* data;
    int64_t row, depth, segment;
  } a;
  struct {
    const float* data;
    int64_t depth, segment;
  } b;
  int64_t depth;
  int segments = 1;
  // What is read soon after, for prefetching: from a.data[row of the block * a.row + distance] on, `step` floats for each step of
  // depth, and `turn` more after every sixteen steps, which use up a line of each row. Several steps at once know
  // no turns: where steps lie side by side, every second one asks for a line further along the row.
  struct {
    int64_t distance, step, turn;
  } ahead = {};
  Later later = {(const char*)a.data, 0, 0};
};
static constexpr int kAhead = 24; // steps of depth: with AVX-512 on a Zen 4 about 700 cycles, the latency of DRAM

// Accumulators start at zero, or where Start says, so that a sum may be taken up again and still be the one chain that it would
// have been: equal bits however the depth is cut.
struct StartAtZero {
  Vec operator()(int64_t, int) const { return Vec::zero(); }
};

// What is known when a product is compiled: that steps of depth lie side by side in A, and B is packed in blocks; or that rows do.
enum class Adjacent { unknown, depth, rows };

// These, not inlined, would pass their sums through memory.
template <int vecs>
[[gnu::always_inline]] static inline void multiply_row(float a, const Vec (&channels)[vecs], Vec (&acc)[kVecs]) {
  const Vec x = Vec::set(a);
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) accumulate(acc[v], x, channels[v]);
}

template <int rows, int vecs, bool fetch = true>
[[gnu::always_inline]] static inline void multiply_step(const float* a, int64_t a_row, const float* b, int64_t b_depth,
                                                        Vec (&acc)[rows][kVecs]) {
  Vec channels[vecs];
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) channels[v] = Vec::load(b + v * Vec::width);
  // Hardware prefetchers stop at each 4 KB; the loads have room for this.
  for (int line = 0; fetch && line < vecs * Vec::width; line += 16) __builtin_prefetch(b + kAhead * b_depth + line);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) multiply_row(a[r * a_row], channels, acc[r]);
}

template <int rows, int vecs, class Start>
[[gnu::always_inline]] static inline void start_rows(int64_t first_row, const Start& start, Vec (&acc)[rows][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = v < vecs ? start(first_row + r, v) : Vec::zero();
}

// The last step by itself, each row finished at once: stores take twice as long as products, and would come all together.
template <int rows, int vecs, class Finish>
[[gnu::always_inline]] static inline void finish_rows(const float* a, int64_t a_row, const float* b, int64_t first_row,
                                                      const Finish& finish, Vec (&acc)[rows][kVecs]) {
  // A copy, since a store might have changed what others see: it would be loaded again for each vector.
  const Finish finish_row = finish;
  Vec channels[vecs];
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) channels[v] = Vec::load(b + v * Vec::width);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    multiply_row(a[r * a_row], channels, acc[r]);
    finish_row(first_row + r, acc[r]);
  }
}

// A row block, one step of depth at a time. It is not inlined, and all that it calls is, or sums would pass through memory: left to
// itself the compiler decides anew with each change of a caller.
template <int rows, int vecs, Adjacent adjacent, class Start, class Finish>
[[gnu::noinline, gnu::flatten]] static void multiply_rows(const Product& p, int64_t first_row, int64_t block, const Start& start,
                                                          const Finish& finish) {
  Vec acc[rows][kVecs];
  start_rows<rows, vecs>(first_row, start, acc);
  const float* ahead = p.a.data + first_row * p.a.row + p.ahead.distance;
  const char* later = p.later.data + block * p.later.block;
  const int64_t later_step = p.later.step;
  const float *a = nullptr, *b = nullptr;
  for (int s = 0; s < p.segments; ++s) {
    a = p.a.data + first_row * p.a.row + s * p.a.segment;
    b = p.b.data + s * p.b.segment;
    const int64_t steps = s + 1 < p.segments ? p.depth : p.depth - 1;
    for (int64_t d = 0; d < steps; ahead += p.ahead.turn)
      for (const int64_t turn = d + 16 < steps ? d + 16 : steps; d < turn; ++d) {
        __builtin_prefetch(later, 0, 2);
        __builtin_prefetch(ahead, 0, 2);
        multiply_step<rows, vecs>(a, adjacent == Adjacent::rows ? 1 : p.a.row, b, p.b.depth, acc);
        later += later_step, a += p.a.depth, b += p.b.depth, ahead += p.ahead.step;
      }
  }
  finish_rows<rows, vecs>(a, adjacent == Adjacent::rows ? 1 : p.a.row, b, first_row, finish, acc);
}

// The same with `at_once` steps at a time: AVX2's step is 12 products, beside which a loop's own instructions are too many;
// AVX-512's 28 are enough. Without segments. It is not inlined, or its caller's values take its loop's registers, and what is known
// of the strides saves more of them. Copies of the others, which would be loaded again after each step. fetch: B comes from afar.
template <int rows, int vecs, int at_once, Adjacent adjacent, bool fetch, class Start, class Finish>
[[gnu::noinline, gnu::flatten]] static void multiply_rows_in_steps(const Product& p, int64_t first_row, int64_t block,
                                                                   const Start& start, const Finish& finish) {
  const bool packed = adjacent == Adjacent::depth;
  const int64_t a_row = adjacent == Adjacent::rows ? 1 : p.a.row, a_depth = packed ? 1 : p.a.depth;
  const int64_t b_depth = packed ? kBlock : p.b.depth, ahead_step = packed ? 16 : p.ahead.step;
  const int fetch_every = packed ? 2 : 1; // steps: of V that is more than a row block still
  Vec acc[rows][kVecs];
  start_rows<rows, vecs>(first_row, start, acc);
  const float *a = p.a.data + first_row * a_row, *b = p.b.data, *ahead = a + p.ahead.distance;
  const char* later = p.later.data + block * p.later.block;
  const int64_t later_step = at_once * p.later.step, steps = p.depth - 1;
  int64_t d = 0;
  for (; d + at_once <= steps; d += at_once) {
    __builtin_prefetch(later, 0, 2);
    later += later_step;
#pragma GCC unroll 4
    for (int step = 0; step < at_once; ++step, a += a_depth, b += b_depth) {
      if (step % fetch_every == 0) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
      }
      multiply_step<rows, vecs, fetch>(a, a_row, b, b_depth, acc);
      asm volatile("" ::: "memory"); // loads moved across steps would need registers
    }
  }
  for (; d < steps; ++d, a += a_depth, b += b_depth) multiply_step<rows, vecs, fetch>(a, a_row, b, b_depth, acc);
  finish_rows<rows, vecs>(a, a_row, b, first_row, finish, acc);
}

template <int rows, int vecs, int at_once, Adjacent adjacent, class Start, class Finish>
static inline void dispatch_rows(int count, const Product& p, int64_t first_row, int64_t block, const Start& start,
                                 const Finish& finish) {
  if (count == rows) {
    if constexpr (at_once == 1)
      return multiply_rows<rows, vecs, adjacent>(p, first_row, block, start, finish);
    else if (first_row > 0 && adjacent == Adjacent::depth) // the first row block has brought B into a cache
      return multiply_rows_in_steps<rows, vecs, at_once, adjacent, false>(p, first_row, block, start, finish);
    else
      return multiply_rows_in_steps<rows, vecs, at_once, adjacent, true>(p, first_row, block, start, finish);
  }
  if constexpr (rows > 1) dispatch_rows<rows - 1, vecs, at_once, adjacent>(count, p, first_row, block, start, finish);
}

static inline int64_t row_blocks(int64_t rows) {
  return ceil_div(rows, kRows);
}

// `near` is asked for in place of nothing.
static inline Later spread(const Soon& soon, int64_t rows, int64_t depth, const float* near) {
  if (soon.bytes == 0) return {(const char*)near, 0, 0};
  const int64_t block = soon.bytes / row_blocks(rows);
  return {soon.data, block, block / depth};
}

// finish(row, acc) for every row of [0, rows), accumulators still in registers. Rows are shared out evenly over blocks, so that
// no block is nearly empty. Steps of depth are taken `at_once`, which pays where there are many. Where `channels`, those of the
// block of outputs that are there, are half of it or less, half of its vectors are multiplied, and the others' sums are zero;
// blocks of 8 are not worth the larger extension.
template <int at_once = 1, Adjacent adjacent = Adjacent::unknown, class Start, class Finish>
static void for_each_row_block(int64_t rows, int64_t channels, const Product& p, const Start& start, const Finish& finish) {
  constexpr int half = kBlock > 8 ? kVecs / 2 : kVecs;
  const int64_t blocks = row_blocks(rows);
  if (blocks == 0) return;
  const int64_t each = rows / blocks, longer = rows % blocks;
  for (int64_t i = 0, begin = 0; i < blocks; ++i) {
    const int64_t count = each + (i < longer);
    if (channels <= half * Vec::width)
      dispatch_rows<kRows, half, at_once, adjacent>(int(count), p, begin, i, start, finish);
    else
      dispatch_rows<kRows, kVecs, at_once, adjacent>(int(count), p, begin, i, start, finish);
    begin += count;
  }
}
