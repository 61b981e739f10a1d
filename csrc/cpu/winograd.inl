// Winograd F(4x4, 3x3): Y = A^T [ (G g G^T) * (B^T d B) ] A over interpolation points 0, +-sqrt(1/2), +-sqrt(2), infinity.
// One 4x4 output tile needs a 6x6 input patch; the product becomes 36 independent GEMMs over channels.
// A tile of 2 pixels in a dimension has four of the six points there, and the others' places in V and M stay unused.

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

// Past the caches: to memory that other threads read next. The caller fences.
template <bool stream>
static inline void put(Vec v, float* p) {
  if constexpr (stream)
    v.stream(p);
  else
    v.store(p);
}

// B^T d B of the patch whose pixel (i, j) is at d + i * row + j * column. Points are made a pair of rows at a time, from pixels
// that are loaded again for each pair: loads are cheap beside the stores, and a whole 6x6 of vectors would not fit the registers.
// What is `next` floats further on is transformed next: its lines are asked for meanwhile, or each load would wait for L2.
template <bool stream>
static inline void input_tile(const float* d, int64_t row, int64_t column, float* v, int64_t position, int64_t next) {
  const int64_t columns[6] = {0, column, 2 * column, 3 * column, 4 * column, 5 * column};
  const float *d0 = d, *d1 = d0 + row, *d2 = d1 + row, *d3 = d2 + row, *d4 = d3 + row, *d5 = d4 + row;
  const auto store_row = [&](int i, const Vec(&half)[6]) {
    Vec out[6];
    input_1d(half, out);
    float* p = v + 6 * i * position;
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j, p += position) put<stream>(out[j], p);
  };
  const auto outer_row = [&](int i, const float* a, const float* b, const float* c) { // points 0 and infinity
    Vec half[6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      half[j] = fma(Vec::set(-2.5f), Vec::load(b + columns[j]), Vec::load(a + columns[j]) + Vec::load(c + columns[j]));
      __builtin_prefetch(a + columns[j] + next);
      __builtin_prefetch(b + columns[j] + next);
      __builtin_prefetch(c + columns[j] + next);
    }
    store_row(i, half);
  };
  const auto inner_rows = [&](int i, float inverse, float root) { // points +-root
    Vec plus[6], minus[6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      const Vec even = fma(Vec::set(inverse), Vec::load(d2 + columns[j]), Vec::load(d4 + columns[j]));
      const Vec odd = Vec::set(root) * fma(Vec::set(inverse), Vec::load(d1 + columns[j]), Vec::load(d3 + columns[j]));
      plus[j] = even + odd, minus[j] = even - odd;
    }
    store_row(i, plus);
    store_row(i + 1, minus);
  };
  outer_row(0, d0, d2, d4);
  inner_rows(1, -2.f, kA);
  inner_rows(3, -.5f, kB);
  outer_row(5, d1, d3, d5);
}

// The same of the first rows x columns pixels of a patch, for a tile of F(2) in one dimension or both: its points alone.
template <int rows, int columns, bool stream>
static inline void edge_input_tile(Patch<6>& d, float* v, int64_t position) {
  Vec half[rows][columns];
#pragma GCC unroll 6
  for (int j = 0; j < columns; ++j) {
    Vec column[rows], points[rows];
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) column[i] = Vec::load(d.at(i, j));
    input_1d(column, points);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) half[i][j] = points[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
    Vec points[columns];
    input_1d(half[i], points);
    float* p = v + 6 * place_of_point<rows>(i) * position;
#pragma GCC unroll 6
    for (int j = 0; j < columns; ++j) put<stream>(points[j], p + place_of_point<columns>(j) * position);
  }
}

// body(t, tile) for those of a range's tiles that are of one region; t counts from the range's begin.
template <class Body>
static inline void for_each_tile(const TileRange& tiles, const TileRegion& region, const Body& body) {
  const TileRange some = tiles.in(region);
  if (some.count() == 0) return;
  Tile tile = region.at(some.begin);
  for (int64_t t = some.begin; t < some.end; ++t, region.next(tile)) body(t - tiles.begin, tile);
}

template <class T, bool stream>
static void whole_input(const Image& x, const TileRange& tiles, const Points& v) {
  const int64_t whole = std::is_same_v<T, float> && x.kind == ImageKind::plain ? x.c / Vec::width * Vec::width : 0;
  for_each_tile(tiles, tiles.grid.whole(), [&](int64_t t, const Tile& tile) {
    const int64_t h = 4 * tile.row - 1, w = 4 * tile.col - 1;
    float* p = v.data + t * v.row;
    const bool inside = h >= 0 && w >= 0 && h + 6 <= x.h && w + 6 <= x.w;
    int64_t c = 0;
    for (; inside && c < whole; c += Vec::width) { // straight from the image
      // The same pixels' next channels, or the first of the tile to the right. It may lie past the image: it is only asked for.
      const int64_t next = c + Vec::width < whole ? Vec::width : 4 * x.stride_w - c;
      input_tile<stream>((const float*)x.data + tile.n * x.stride_n + h * x.stride_h + w * x.stride_w + c, x.stride_h, x.stride_w,
                         p + c, v.position, next);
    }
    for (; c < x.c; c += Vec::width) {
      Patch<6> patch;
      load_any_patch<T>(x, tile.n, h, w, c, lanes_from(c, x.c), patch);
      input_tile<stream>(patch.data, 6 * Vec::width, Vec::width, p + c, v.position, 0);
    }
  });
}

// Of tiles that are height x width pixels.
template <class T, bool stream, int height, int width>
static void edge_input(const Image& x, const TileRange& tiles, const TileRegion& region, const Points& v) {
  for_each_tile(tiles, region, [&](int64_t t, const Tile& tile) {
    for (int64_t c = 0; c < x.c; c += Vec::width) {
      Patch<6> patch;
      load_any_patch<T>(x, tile.n, 4 * tile.row - 1, 4 * tile.col - 1, c, lanes_from(c, x.c), patch);
      edge_input_tile<height + 2, width + 2, stream>(patch, v.data + t * v.row + c, v.position);
    }
  });
}

template <class T, bool stream>
static void transform_input(const Image& x, const TileRange& tiles, const Points& v) {
  edge_input<T, stream, 4, 2>(x, tiles, tiles.grid.last_column(), v);
  whole_input<T, stream>(x, tiles, v);
  edge_input<T, stream, 2, 4>(x, tiles, tiles.grid.last_row(), v);
  edge_input<T, stream, 2, 2>(x, tiles, tiles.grid.corner(), v);
}

// V[36][tile][v_row] of the tiles' input patches.
template <class T>
static void winograd_input(const Image& x, const TileRange& tiles, const Points& v, bool stream) {
  if (!stream || Vec::width < 16) return transform_input<T, false>(x, tiles, v); // parts of lines would be written one by one
  transform_input<T, true>(x, tiles, v);
  fence_streams();
}

// G g G^T of a vector of filters; tap (i, j) is at taps + (3 * i + j) * tap.
template <bool stream>
static inline void filter_tile(const float* taps, int tap, float* u, int64_t position) {
  Vec half[6][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Vec column[3] = {Vec::load(taps + j * tap), Vec::load(taps + (3 + j) * tap), Vec::load(taps + (6 + j) * tap)};
    Vec points[6];
    filter_1d(column, points);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) half[i][j] = points[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    Vec points[6];
    filter_1d(half[i], points);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j, u += position) put<stream>(points[j], u);
  }
}

// U[36][in][kBlock] of one block of output channels, zero past the last one.
template <class T, bool stream>
static void transform_filters(const Filters& w, int64_t block, float* u) {
  const int64_t k0 = block * kBlock, lanes = w.out - k0 < kBlock ? w.out - k0 : kBlock, position = filters_position(w.in, kBlock);
  int64_t c = 0;
  if (lanes == kBlock && channels_together(w)) {
    alignas(64) float taps[Vec::width * 9 * Vec::width];
    for (; c + Vec::width <= w.in; c += Vec::width)
      for (int v = 0; v < kBlock; v += Vec::width) {
        gather_channels<T>(w, k0 + v, c, taps);
        for (int i = 0; i < Vec::width; ++i)
          filter_tile<stream>(taps + i * 9 * Vec::width, Vec::width, u + (c + i) * kBlock + v, position);
      }
  }
  alignas(64) Taps taps = {};
  for (; c < w.in; ++c) {
    gather_taps<T>(w, k0, lanes, c, taps);
    for (int v = 0; v < kBlock; v += Vec::width) filter_tile<stream>(taps[0] + v, kBlock, u + c * kBlock + v, position);
  }
}

template <class T>
static void winograd_filters(const Filters& w, int64_t block, float* u, bool stream) {
  if (!stream || Vec::width < 16) return transform_filters<T, false>(w, block, u); // as in winograd_input
  transform_filters<T, true>(w, block, u);
  fence_streams();
}

// M[point][tiles][kBlock] = V U, or += V U with `add`, for one block of output channels, of which the first `channels` are needed.
static void winograd_multiply(const Points& v, int64_t tiles, int64_t in, const float* u, int64_t channels, const Points& m,
                              int point, bool add, const Soon& soon) {
  float *a = v.data + point * v.position, *out = m.data + point * m.position;
  // Ahead is the next rows' V: a line of each, then their next lines.
  const Product product{{a, v.row, 1, 0},
                        {u + point * filters_position(in, kBlock), kBlock, 0},
                        in,
                        1,
                        {kRows * v.row, v.row, 16 - 16 * v.row},
                        spread(soon, tiles, in, a)};
  const auto finish = [out, row = m.row](int64_t t, const Vec(&acc)[kVecs]) {
    for (int k = 0; k < kVecs; ++k) acc[k].store(out + t * row + k * Vec::width);
  };
  if (add)
    for_each_row_block<kSteps, Adjacent::depth>(
        tiles, channels, product, [&](int64_t t, int k) { return Vec::load(out + t * m.row + k * Vec::width); }, finish);
  else
    for_each_row_block<kSteps, Adjacent::depth>(tiles, channels, product, StartAtZero(), finish);
}

// A^T M A of one tile and one vector of channels; point (i, j) of M is at m + (6 * i + j) * position.
template <int height, int width>
static inline void output_tile(const float* m, int64_t position, Vec (&y)[height][width]) {
  Vec half[height][width + 2];
#pragma GCC unroll 6
  for (int j = 0; j < width + 2; ++j) {
    Vec column[height + 2], result[height];
    const float* p = m + place_of_point<width + 2>(j) * position;
#pragma GCC unroll 6
    for (int i = 0; i < height + 2; ++i) column[i] = Vec::load(p + 6 * place_of_point<height + 2>(i) * position);
    output_1d(column, result);
#pragma GCC unroll 4
    for (int i = 0; i < height; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < height; ++i) output_1d(half[i], y[i]);
}

// Vectors of channels that a tile's results are stored in: a cache line where a block has one, since lines that pass the caches in
// halves are put together in memory.
static constexpr int kLine = Vec::width < 16 && kVecs > 1 ? 2 : 1;

// Pool and argmax of one tile and up to kLine vectors of channels from k on, to memory.
template <class T, int height, int width>
static inline void store_tile(const Output& out, const Tile& tile, int64_t k, const Vec (&y)[kLine][height][width]) {
  T* data = (T*)out.data;
  const int64_t h = 4 * tile.row, w = 4 * tile.col;
  if (out.pool) {
    const int64_t pooled_h = out.h / 2, pooled_w = out.w / 2;
    for (int i = 0; i < height / 2 && h / 2 + i < pooled_h; ++i)
      for (int j = 0; j < width / 2 && w / 2 + j < pooled_w; ++j)
        for (int v = 0; v < kLine && k + v * Vec::width < out.c; ++v)
          store_pooled<T>(out, (tile.n * pooled_h + h / 2 + i) * pooled_w + w / 2 + j, k + v * Vec::width,
                          lanes_from(k + v * Vec::width, out.c), y[v][2 * i][2 * j], y[v][2 * i][2 * j + 1], y[v][2 * i + 1][2 * j],
                          y[v][2 * i + 1][2 * j + 1]);
    return;
  }
  T* corner = data + ((tile.n * out.h + h) * out.w + w) * out.c + k;
  if (k + kLine * Vec::width <= out.c && h + height <= out.h && w + width <= out.w) {
    const auto store = [&](const auto& one) {
#pragma GCC unroll 4
      for (int i = 0; i < height; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < width; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < kLine; ++v) one(y[v][i][j], corner + (i * out.w + j) * out.c + v * Vec::width);
    };
    if constexpr (std::is_same_v<T, float>) {
      if (out.stream) return store([](Vec value, float* p) { value.stream(p); });
    }
    return store([](Vec value, T* p) { value.store(p); });
  }
  for (int i = 0; i < height && h + i < out.h; ++i)
    for (int j = 0; j < width && w + j < out.w; ++j)
      for (int v = 0; v < kLine && k + v * Vec::width < out.c; ++v)
        store_lanes(y[v][i][j], corner + (i * out.w + j) * out.c + v * Vec::width, lanes_from(k + v * Vec::width, out.c));
}

// Y of tiles that are height x width pixels, for kLine vectors of output channels from k on, whose M is at m.data. The result is
// NaN in the lanes that met an Inf or NaN, else 0.
template <class T, int height, int width>
static Vec output_region(const Points& m, const TileRange& tiles, const TileRegion& region, int64_t k, const Output& out) {
  const Epilogue epilogues[2] = {Epilogue(out, k), Epilogue(out, k + (kLine - 1) * Vec::width)};
  Vec spoiled = Vec::zero();
  for_each_tile(tiles, region, [&](int64_t t, const Tile& tile) {
    Vec y[kLine][height][width];
#pragma GCC unroll 4
    for (int v = 0; v < kLine; ++v) {
      Vec sum = Vec::zero();
      output_tile(m.data + t * m.row + v * Vec::width, m.position, y[v]);
#pragma GCC unroll 4
      for (int i = 0; i < height; ++i) {
        Vec row = y[v][i][0] + y[v][i][1];
        if constexpr (width == 4) row = row + (y[v][i][2] + y[v][i][3]);
        sum = sum + row;
#pragma GCC unroll 4
        for (int j = 0; j < width; ++j) y[v][i][j] = epilogues[v](y[v][i][j]);
      }
      spoiled = spoiled + (sum - sum);
    }
    store_tile<T>(out, tile, k, y);
  });
  return spoiled;
}

// Y of one block of output channels. False if any result is Inf or NaN: the transforms spread one such input over a whole tile
// (and may overflow where the convolution does not), so the caller then repeats the layer with the direct kernel.
template <class T>
static bool winograd_output(const Points& m, const TileRange& tiles, int64_t block, const Output& out) {
  constexpr int64_t line = kLine * Vec::width;
  static_assert(kBlock % line == 0);
  Vec spoiled = Vec::zero();
  for (int64_t v = 0, k = block * kBlock; v < kBlock && k < out.c; v += line, k += line) {
    const Points these{m.data + v, m.row, m.position};
    spoiled = spoiled + output_region<T, 4, 2>(these, tiles, tiles.grid.last_column(), k, out);
    spoiled = spoiled + output_region<T, 4, 4>(these, tiles, tiles.grid.whole(), k, out);
    spoiled = spoiled + output_region<T, 2, 4>(these, tiles, tiles.grid.last_row(), k, out);
    spoiled = spoiled + output_region<T, 2, 2>(these, tiles, tiles.grid.corner(), k, out);
  }
  if (out.stream) fence_streams();
  return all_zero(spoiled);
}
