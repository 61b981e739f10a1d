// Fully connected layers of few rows (a small batch): memory is the limit, so every weight is read, or written, once.
//   rows are packed by vectors of columns: [in / width][rows][width], zero past the last column

static constexpr int kSums = Vec::registers / 4 * 3; // accumulators that leave registers for the operands
static constexpr int kChain = 32;                    // steps summed before their sum is added to the total: short chains round less
static constexpr int kFetch = 2048;                  // bytes of each row of weights asked for ahead: hardware stops at each 4 KB
// Into L1, or into L2 alone where so many rows are read in turn that those lines would have left L1 again.
static constexpr int kFetchLevel = Vec::width == 16 ? 3 : 2;

static inline float sum_of(Vec v) {
  alignas(64) float lanes[Vec::width];
  v.store(lanes);
  for (int half = Vec::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Rows whose sums are in registers at a time, so that each of x serves three outputs or more.
template <int rows>
static constexpr int kRowsAtOnce = 3 * rows > kSums ? (rows + 1) / 2 : rows;

// total[o][r] += x[r] . weight[o] over the vectors [begin, end) of columns, for rows [first, last) of x.
template <class T, int outs, int rows, int first, int last>
static inline void add_chain(const Linear& l, const float* x, const T* weight, int64_t begin, int64_t end, Vec (*total)[rows]) {
  Vec chain[outs][last - first];
#pragma GCC unroll 8
  for (int o = 0; o < outs; ++o)
#pragma GCC unroll 8
    for (int r = 0; r < last - first; ++r) chain[o][r] = Vec::zero();
  for (int64_t i = begin; i < end; ++i) {
    Vec w[outs];
#pragma GCC unroll 8
    for (int o = 0; o < outs; ++o) {
      const T* p = weight + o * l.weight_row + i * Vec::width;
      w[o] = Vec::load(p);
      if constexpr (first == 0) __builtin_prefetch((const char*)p + kFetch, 0, kFetchLevel);
    }
#pragma GCC unroll 8
    for (int r = 0; r < last - first; ++r) {
      const Vec v = Vec::load(x + (i * rows + first + r) * Vec::width);
#pragma GCC unroll 8
      for (int o = 0; o < outs; ++o) chain[o][r] = fma(v, w[o], chain[o][r]);
    }
  }
  for (int o = 0; o < outs; ++o)
    for (int r = 0; r < last - first; ++r) total[o][first + r] = total[o][first + r] + chain[o][r];
}

// sums[o][r] = x[r] . weight[o], for `count` rows of weights, which `outs` divides, and all rows of x.
template <class T, int outs, int rows>
static inline void dot_rows(const Linear& l, const float* x, const T* weight, int count, float (*sums)[rows]) {
  constexpr int at_once = kRowsAtOnce<rows>;
  const int64_t whole = l.in / Vec::width;
  Vec total[kLinearOuts][rows];
  for (int o = 0; o < count; ++o)
    for (Vec& t : total[o]) t = Vec::zero();
  for (int64_t begin = 0; begin < whole; begin += kChain) {
    const int64_t end = begin + kChain < whole ? begin + kChain : whole;
    for (int o = 0; o < count; o += outs) {
      add_chain<T, outs, rows, 0, at_once>(l, x, weight + o * l.weight_row, begin, end, total + o);
      if constexpr (at_once < rows) add_chain<T, outs, rows, at_once, rows>(l, x, weight + o * l.weight_row, begin, end, total + o);
    }
  }
  const int rest = int(l.in - whole * Vec::width);
  for (int o = 0; o < count; ++o)
    for (int r = 0; r < rows; ++r) {
      if (rest)
        total[o][r] = fma(Vec::load(x + (whole * rows + r) * Vec::width),
                          Vec::load_first(weight + o * l.weight_row + whole * Vec::width, rest), total[o][r]);
      sums[o][r] = sum_of(total[o][r]);
    }
}

template <class T, int outs, int rows>
static inline void linear_block(const Linear& l, const float* x, int64_t o, int count, float* y) {
  float sums[kLinearOuts][rows];
  dot_rows<T, outs, rows>(l, x, (const T*)l.weight + o * l.weight_row, count, sums);
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < rows; ++r) {
      const float v = sums[i][r] + (l.bias ? l.bias[o + i] : 0.f);
      y[r * l.out + o + i] = l.relu && v < 0.f ? 0.f : v; // NaN and -0.0 stay, as torch has it
    }
}

template <class T, int rows>
static void linear_rows(const Linear& l, const float* x, int64_t begin, int64_t end, int together, float* y) {
  constexpr int at_once = kRowsAtOnce<rows>, outs = kSums / at_once > 8 ? 8 : kSums / at_once;
  static_assert(outs <= kLinearOuts);
  const int most = rows > 4 && together > outs ? together / outs * outs : outs; // of few rows a piece of x is in L1 anyway
  int64_t o = begin;
  for (int count = most; o + outs <= end; o += count) {
    if (end - o < count) count = int(end - o) / outs * outs;
    linear_block<T, outs, rows>(l, x, o, count, y);
  }
  for (; o < end; ++o) linear_block<T, 1, rows>(l, x, o, 1, y);
}

// y[rows][out] of outputs [begin, end); rows is 1 to kLinearRows. together: outputs that share a piece of x, kLinearOuts or less.
template <class T, int rows = kLinearRows>
static void linear(const Linear& l, const float* x, int64_t begin, int64_t end, int together, float* y) {
  if (l.rows == rows) return linear_rows<T, rows>(l, x, begin, end, together, y);
  if constexpr (rows > 1) linear<T, rows - 1>(l, x, begin, end, together, y);
}

// dx[rows][kLinearColumns] of at most so many columns [begin, end); grad is [out][rows]. As many floats behind dx are for sums: on
// a thread's stack they would be 64 KB, which is more than all of what OMP_STACKSIZE may leave it. Nothing else is where they are,
// and l is a copy: else a store of sums might have changed any of it, and all would be loaded again.
template <class T>
static void linear_grad_input(const Linear l, const float* __restrict__ grad, int64_t begin, int64_t end, float* __restrict__ dx) {
  constexpr int step = 4, chain = 256; // rows of weights at once; and in one chain
  float* __restrict__ const sums = dx + l.rows * kLinearColumns;
  const int64_t vecs = (end - begin + Vec::width - 1) / Vec::width;
  for (int64_t first = 0; first < l.out; first += chain) {
    const int64_t last = first + chain < l.out ? first + chain : l.out;
    memset(sums, 0, l.rows * kLinearColumns * sizeof(float));
    for (int64_t o = first; o < last; o += step) {
      const int64_t outs = o + step < last ? step : last - o;
      for (int64_t i = 0; i < vecs; ++i) {
        const int64_t column = begin + i * Vec::width;
        const int lanes = lanes_from(column, end);
        Vec w[step];
#pragma GCC unroll 4
        for (int s = 0; s < step; ++s) {
          const T* p = (const T*)l.weight + (o + s) * l.weight_row + column;
          w[s] = s < outs ? load_lanes(p, lanes) : Vec::zero();
          __builtin_prefetch(p + 2 * step * l.weight_row);
        }
        for (int64_t r = 0; r < l.rows; ++r) {
          float* p = sums + (i * l.rows + r) * Vec::width;
          Vec sum = Vec::load(p);
#pragma GCC unroll 4
          for (int s = 0; s < step; ++s) sum = fma(Vec::set(grad[(o + s) * l.rows + r]), w[s], sum);
          sum.store(p);
        }
      }
    }
    for (int64_t r = 0; r < l.rows; ++r)
      for (int64_t i = 0; i < vecs; ++i) {
        float* p = dx + r * kLinearColumns + i * Vec::width;
        const Vec sum = Vec::load(sums + (i * l.rows + r) * Vec::width);
        (first ? Vec::load(p) + sum : sum).store(p);
      }
  }
}

// dw[out][in] of outputs [begin, end) = grad^T x; grad is [out][rows].
template <class T>
static void linear_grad_weight(const Linear& l, const float* x, const float* grad, int64_t begin, int64_t end, T* dw) {
  constexpr int step = 8;
  // Larger than the caches: they need not read it first.
  const bool stream = std::is_same_v<T, float> && l.in % 16 == 0 && (uintptr_t)dw % 64 == 0;
  for (int64_t o = begin; o < end; o += step) {
    const int64_t outs = o + step < end ? step : end - o;
    for (int64_t column = 0; column < l.in; column += Vec::width) {
      Vec sums[step];
#pragma GCC unroll 8
      for (int s = 0; s < step; ++s) sums[s] = Vec::zero();
      for (int64_t r = 0; r < l.rows; ++r) {
        const Vec v = Vec::load(x + column * l.rows + r * Vec::width);
#pragma GCC unroll 8
        for (int s = 0; s < step; ++s) sums[s] = fma(Vec::set(grad[(o + s) * l.rows + r]), v, sums[s]);
      }
      for (int s = 0; s < outs; ++s) {
        T* p = dw + (o + s) * l.in + column;
        if constexpr (std::is_same_v<T, float>) {
          if (stream) {
            sums[s].stream(p);
            continue;
          }
        }
        store_lanes(sums[s], p, lanes_from(column, l.in));
      }
    }
  }
  if (stream) fence_streams();
}
