// Winograd F(4x4, 3x3): Y = A^T [ (G g G^T) * (B^T d B) ] A over interpolation points 0, +-sqrt(1/2), +-sqrt(2), infinity.
// These points keep the fp32 error near a direct convolution's (about 2x; the usual 0, +-1, +-2 cost 4-5x).
// One 4x4 output tile needs a 6x6 input patch; the product becomes 36 independent GEMMs over channels.

static constexpr float kA = 0.70710678118654752f; // sqrt(1/2)
static constexpr float kB = 1.41421356237309505f; // sqrt(2)

// B^T d, one dimension.
static inline void input_1d(const Vec (&d)[6], Vec (&out)[6]) {
  const Vec five_halves = Vec::set(-2.5f);
  out[0] = fma(five_halves, d[2], d[0] + d[4]);
  out[5] = fma(five_halves, d[3], d[1] + d[5]);
  const Vec even1 = fma(Vec::set(-2.f), d[2], d[4]), odd1 = Vec::set(kA) * fma(Vec::set(-2.f), d[1], d[3]);
  const Vec even2 = fma(Vec::set(-.5f), d[2], d[4]), odd2 = Vec::set(kB) * fma(Vec::set(-.5f), d[1], d[3]);
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
}

// A^T m, one dimension: six products to four outputs.
static inline void output_1d(const Vec (&m)[6], Vec (&out)[4]) {
  const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  out[0] = m[0] + s1 + s2;
  out[1] = fma(Vec::set(kA), d1, Vec::set(kB) * d2);
  out[2] = fma(Vec::set(.5f), s1, Vec::set(2.f) * s2);
  out[3] = fma(Vec::set(kA / 2), d1, fma(Vec::set(2 * kB), d2, m[5]));
}

// A g, one dimension: four output gradients to six points (the transpose of output_1d).
static inline void grad_output_1d(const Vec (&g)[4], Vec (&out)[6]) {
  out[0] = g[0];
  const Vec even1 = fma(Vec::set(.5f), g[2], g[0]), odd1 = Vec::set(kA) * fma(Vec::set(.5f), g[3], g[1]);
  const Vec even2 = fma(Vec::set(2.f), g[2], g[0]), odd2 = Vec::set(kB) * fma(Vec::set(2.f), g[3], g[1]);
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = g[3];
}

// G g, one dimension: three taps to six points.
static inline void filter_1d(const Vec (&g)[3], Vec (&out)[6]) {
  out[0] = g[0];
  const Vec even1 = Vec::set(-2.f / 3) * fma(Vec::set(.5f), g[2], g[0]), odd1 = Vec::set(-2.f / 3 * kA) * g[1];
  const Vec even2 = Vec::set(1.f / 6) * fma(Vec::set(2.f), g[2], g[0]), odd2 = Vec::set(kB / 6) * g[1];
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = g[2];
}

// G^T s, one dimension: six points to three taps (the transpose of filter_1d).
static inline void grad_filter_1d(const Vec (&s)[6], Vec (&out)[3]) {
  const Vec s1 = s[1] + s[2], d1 = s[1] - s[2], s2 = s[3] + s[4], d2 = s[3] - s[4];
  out[0] = fma(Vec::set(-2.f / 3), s1, fma(Vec::set(1.f / 6), s2, s[0]));
  out[1] = fma(Vec::set(-2.f / 3 * kA), d1, Vec::set(kB / 6) * d2);
  out[2] = fma(Vec::set(-1.f / 3), s1, fma(Vec::set(1.f / 3), s2, s[5]));
}

// Apply a one-dimensional transform to the columns, then to the rows: out = M in M^T.
template <int from, int to, class Transform>
static inline void both_dimensions(const Vec (&in)[from][from], Vec (&out)[to][to], const Transform& transform) {
  Vec half[to][from];
#pragma GCC unroll 6
  for (int j = 0; j < from; ++j) {
    Vec column[from], result[to];
    for (int i = 0; i < from; ++i) column[i] = in[i][j];
    transform(column, result);
    for (int i = 0; i < to; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < to; ++i) transform(half[i], out[i]);
}

// V[36][tile][v_row] of the tiles' input patches.
template <class T>
static void winograd_input(const Image& x, const TileRange& tiles, const Points& v) {
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const Tile tile = tiles.grid.at(t);
    for (int64_t c = 0; c < x.c; c += Vec::width) {
      Vec patch[6][6], points[6][6];
      load_any_patch<T>(x, tile.n, 4 * tile.row - 1, 4 * tile.col - 1, c, lanes_from(c, x.c), patch);
      both_dimensions(patch, points, [](const Vec(&d)[6], Vec(&out)[6]) { input_1d(d, out); });
      float* p = v.data + (t - tiles.begin) * v.row + c;
      for (int i = 0; i < 36; ++i) points[i / 6][i % 6].store(p + i * v.position);
    }
  }
}

// Z[36][tile][z_row] of the tiles' output gradients, zero up to a whole block of channels; bias_sum[c] = their sums.
template <class T>
static void winograd_grad_output(const Image& dz, const TileRange& tiles, const Points& z, float* bias_sum) {
  const int64_t padded = round_up(dz.c, kBlock);
  memset(bias_sum, 0, padded * sizeof(float));
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const Tile tile = tiles.grid.at(t);
    for (int64_t c = 0; c < padded; c += Vec::width) {
      float* p = z.data + (t - tiles.begin) * z.row + c;
      if (c >= dz.c) {
        for (int i = 0; i < 36; ++i) Vec::zero().store(p + i * z.position);
        continue;
      }
      Vec patch[4][4], points[6][6];
      load_any_patch<T>(dz, tile.n, 4 * tile.row, 4 * tile.col, c, lanes_from(c, dz.c), patch);
      Vec sum = Vec::zero();
      for (int i = 0; i < 4; ++i) sum = sum + ((patch[i][0] + patch[i][1]) + (patch[i][2] + patch[i][3]));
      (Vec::load(bias_sum + c) + sum).store(bias_sum + c);
      both_dimensions(patch, points, [](const Vec(&g)[4], Vec(&out)[6]) { grad_output_1d(g, out); });
      for (int i = 0; i < 36; ++i) points[i / 6][i % 6].store(p + i * z.position);
    }
  }
}

// U[36][in][kBlock] of one block of output channels, zero past the last one.
template <class T>
static void winograd_filters(const Filters& w, int64_t block, float* u) {
  const int64_t k0 = block * kBlock, lanes = w.out - k0 < kBlock ? w.out - k0 : kBlock;
  float taps[9][kBlock] = {};
  for (int64_t c = 0; c < w.in; ++c) {
    gather_taps<T>(w, k0, lanes, c, taps);
    for (int v = 0; v < kBlock; v += Vec::width) {
      Vec g[3][3], points[6][6];
      for (int i = 0; i < 9; ++i) g[i / 3][i % 3] = Vec::load(taps[i] + v);
      both_dimensions(g, points, [](const Vec(&taps)[3], Vec(&out)[6]) { filter_1d(taps, out); });
      for (int i = 0; i < 36; ++i) points[i / 6][i % 6].store(u + (i * w.in + c) * kBlock + v);
    }
  }
}

// M[36][tiles][kBlock] = V U for one block of output channels.
static void winograd_multiply(const Points& v, int64_t tiles, int64_t in, const float* u, float* m) {
  for (int i = 0; i < 36; ++i) {
    float* out = m + i * tiles * kBlock;
    const Product product{v.data + i * v.position, v.row, 1, 0, u + i * in * kBlock, kBlock, 0, in, 1};
    for_each_row_block(tiles, product, [&](int64_t t, const Vec(&acc)[kVecs]) {
      for (int k = 0; k < kVecs; ++k) acc[k].store(out + t * kBlock + k * Vec::width);
    });
  }
}

// Bias, ReLU, pool and argmax of one tile and one vector of channels, from registers to memory.
template <class T>
static inline void store_tile(const Output& out, const Tile& tile, int64_t k, int lanes, Vec (&y)[4][4]) {
  for (int i = 0; i < 16; ++i) y[i / 4][i % 4] = finish_pixel(out, k, y[i / 4][i % 4]);
  T* data = (T*)out.data;
  const int64_t h = 4 * tile.row, w = 4 * tile.col;
  if (!out.pool) {
    for (int i = 0; i < 4 && h + i < out.h; ++i)
      for (int j = 0; j < 4 && w + j < out.w; ++j)
        store_lanes(y[i][j], data + ((tile.n * out.h + h + i) * out.w + w + j) * out.c + k, lanes);
    return;
  }
  const int64_t pooled_h = out.h / 2, pooled_w = out.w / 2;
  for (int i = 0; i < 2 && h / 2 + i < pooled_h; ++i)
    for (int j = 0; j < 2 && w / 2 + j < pooled_w; ++j)
      store_pooled<T>(out, (tile.n * pooled_h + h / 2 + i) * pooled_w + w / 2 + j, k, lanes, y[2 * i][2 * j], y[2 * i][2 * j + 1],
                      y[2 * i + 1][2 * j], y[2 * i + 1][2 * j + 1]);
}

// Y of one block of output channels. False if any result is Inf or NaN: the transforms spread one such input over a whole tile
// (and may overflow where the convolution does not), so the caller then repeats the layer with the direct kernel.
template <class T>
static bool winograd_output(const float* m, const TileRange& tiles, int64_t block, const Output& out) {
  const int64_t count = tiles.end - tiles.begin;
  Vec spoiled = Vec::zero();
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tiles.grid.at(tiles.begin + t);
    for (int v = 0; v < kBlock; v += Vec::width) {
      const int64_t k = block * kBlock + v;
      if (k >= out.c) break;
      Vec points[6][6], y[4][4];
      for (int i = 0; i < 36; ++i) points[i / 6][i % 6] = Vec::load(m + (i * count + t) * kBlock + v);
      both_dimensions(points, y, [](const Vec(&p)[6], Vec(&o)[4]) { output_1d(p, o); });
      Vec sum = Vec::zero();
      for (int i = 0; i < 4; ++i) sum = sum + ((y[i][0] + y[i][1]) + (y[i][2] + y[i][3]));
      spoiled = spoiled + (sum - sum); // 0 for finite values, NaN otherwise
      store_tile<T>(out, tile, k, lanes_from(k, out.c), y);
    }
  }
  return all_zero(spoiled);
}

// S[in][kBlock] += V^T Z at one of the 36 points, for one block of output channels.
static void winograd_accumulate(const float* v, int64_t v_row, int64_t in, const float* z, int64_t z_row, int64_t tiles, bool first,
                                float* s) {
  const Product product{v, 1, v_row, 0, z, z_row, 0, tiles, 1};
  for_each_row_block(in, product, [&](int64_t c, const Vec(&acc)[kVecs]) {
    for (int k = 0; k < kVecs; ++k) {
      float* p = s + c * kBlock + k * Vec::width;
      (first ? acc[k] : Vec::load(p) + acc[k]).store(p);
    }
  });
}

// dW = G^T S G for one block of output channels; S is [36][in][kBlock]. False if any result is Inf or NaN.
template <class T>
static bool winograd_grad_filters(const float* s, int64_t block, const Filters& dw) {
  const int64_t k0 = block * kBlock, lanes = dw.out - k0 < kBlock ? dw.out - k0 : kBlock;
  Vec spoiled = Vec::zero();
  float taps[9][kBlock];
  for (int64_t c = 0; c < dw.in; ++c) {
    for (int v = 0; v < kBlock; v += Vec::width) {
      Vec points[6][6], g[3][3];
      for (int i = 0; i < 36; ++i) points[i / 6][i % 6] = Vec::load(s + (i * dw.in + c) * kBlock + v);
      both_dimensions(points, g, [](const Vec(&p)[6], Vec(&o)[3]) { grad_filter_1d(p, o); });
      for (int i = 0; i < 9; ++i) {
        g[i / 3][i % 3].store(taps[i] + v);
        spoiled = spoiled + (g[i / 3][i % 3] - g[i / 3][i % 3]);
      }
    }
    scatter_taps<T>(dw, k0, lanes, c, taps);
  }
  return all_zero(spoiled);
}
