// The one micro-kernel under every convolution: kVecs vectors of output channels x up to kRows rows, accumulated in registers.
//   Winograd forward:      rows are tiles,          depth is input channels
//   Winograd grad_weight:  rows are input channels, depth is tiles
//   direct:                rows are pixels,         depth is (tap column, input channel), one segment per tap row

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
  // depth, and `turn` more after every sixteen steps, which use up a line of each row; with several steps at once, never.
  struct {
    int64_t distance, step, turn;
  } ahead = {};
  // What the layer needs after these products, spread evenly over them: `row` bytes for each row of a.
  struct {
    const char* data;
    int64_t row;
  } later = {(const char*)a.data, 0};
};
static constexpr int kAhead = 24; // steps of depth: about 700 cycles, the latency of DRAM

// Accumulators start at zero, or where Start says, so that a sum may be taken up again and still be the one chain that it would
// have been: equal bits however the depth is cut.
struct StartAtZero {
  Vec operator()(int64_t, int) const { return Vec::zero(); }
};

// These two, not inlined, would pass their sums through memory.
[[gnu::always_inline]] static inline void multiply_row(float a, const Vec (&channels)[kVecs], Vec (&acc)[kVecs]) {
  const Vec x = Vec::set(a);
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) accumulate(acc[v], x, channels[v]);
}

template <int rows>
[[gnu::always_inline]] static inline void multiply_step(const Product& p, const float* a, const float* b, Vec (&acc)[rows][kVecs]) {
  Vec channels[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) channels[v] = Vec::load(b + v * Vec::width);
  // Hardware prefetchers stop at each 4 KB; the loads have room for this.
  for (int line = 0; line < kBlock; line += 16) __builtin_prefetch(b + kAhead * p.b.depth + line);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) multiply_row(a[r * p.a.row], channels, acc[r]);
}

template <int rows, int at_once, class Start, class Finish>
static void multiply_rows(const Product& p, int64_t first_row, const Start& start, const Finish& finish) {
  Vec acc[rows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = start(first_row + r, v);
  const float* ahead = p.a.data + first_row * p.a.row + p.ahead.distance;
  const char* later = p.later.data + first_row * p.later.row;
  const int64_t later_step = at_once * rows * p.later.row / p.depth;
  const float *a = nullptr, *b = nullptr;
  for (int s = 0; s < p.segments; ++s) {
    a = p.a.data + first_row * p.a.row + s * p.a.segment;
    b = p.b.data + s * p.b.segment;
    const int64_t steps = s + 1 < p.segments ? p.depth : p.depth - 1;
    for (int64_t d = 0; d < steps; ahead += p.ahead.turn) {
      const int64_t turn = at_once == 1 && d + 16 < steps ? d + 16 : steps;
      for (; d + at_once <= turn; d += at_once) {
        __builtin_prefetch(later, 0, 2);
        later += later_step;
#pragma GCC unroll 4
        for (int step = 0; step < at_once; ++step, a += p.a.depth, b += p.b.depth, ahead += p.ahead.step) {
          __builtin_prefetch(ahead, 0, 2);
          multiply_step<rows>(p, a, b, acc);
          if constexpr (at_once > 1) asm volatile("" ::: "memory"); // loads moved across steps would need registers
        }
      }
      if constexpr (at_once > 1)
        for (; d < turn; ++d, a += p.a.depth, b += p.b.depth) multiply_step<rows>(p, a, b, acc);
    }
  }
  // The last step by itself, each row finished at once: stores take twice as long as products, and would come all together.
  // Copies, since a store might have changed what others see: it would be loaded again for each vector.
  const Finish finish_row = finish;
  const int64_t a_row = p.a.row;
  Vec channels[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) channels[v] = Vec::load(b + v * Vec::width);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    multiply_row(a[r * a_row], channels, acc[r]);
    finish_row(first_row + r, acc[r]);
  }
}

template <int rows, int at_once, class Start, class Finish>
static inline void dispatch_rows(int count, const Product& p, int64_t first_row, const Start& start, const Finish& finish) {
  if (count == rows) return multiply_rows<rows, at_once>(p, first_row, start, finish);
  if constexpr (rows > 1) dispatch_rows<rows - 1, at_once>(count, p, first_row, start, finish);
}

// finish(row, acc) for every row of [0, rows), accumulators still in registers. Rows are shared out evenly over blocks, so that
// no block is nearly empty. Steps of depth are taken `at_once`, which pays where there are many.
template <int at_once = 1, class Start, class Finish>
static void for_each_row_block(int64_t rows, const Product& p, const Start& start, const Finish& finish) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t i = 0, begin = 0; i < blocks; ++i) {
    const int64_t end = rows * (i + 1) / blocks;
    dispatch_rows<kRows, at_once>(int(end - begin), p, begin, start, finish);
    begin = end;
  }
}
