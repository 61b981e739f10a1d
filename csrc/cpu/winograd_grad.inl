// Winograd's gradient of the filters, the transpose of the forward pass in the filters: dW = G^T [ sum over tiles of
// (B^T d B) * (A dY A^T) ] G. The 36 points are as many products over tiles.

// A dY A^T of the first height x width pixels of a patch of output gradients, at the points of such a tile; returns their sum.
template <int height, int width>
static inline Vec grad_output_tile(Patch<4>& patch, float* z, int64_t position) {
  Vec half[height + 2][width], sum = Vec::zero();
#pragma GCC unroll 4
  for (int j = 0; j < width; ++j) {
    Vec column[height], points[height + 2];
#pragma GCC unroll 4
    for (int i = 0; i < height; ++i) column[i] = Vec::load(patch.at(i, j));
    Vec pixels = column[0] + column[1];
    if constexpr (height == 4) pixels = pixels + (column[2] + column[3]);
    sum = sum + pixels;
    grad_output_1d(column, points);
#pragma GCC unroll 6
    for (int i = 0; i < height + 2; ++i) half[i][j] = points[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < height + 2; ++i) {
    Vec points[width + 2];
    grad_output_1d(half[i], points);
    float* p = z + 6 * place_of_point<height + 2>(i) * position;
#pragma GCC unroll 6
    for (int j = 0; j < width + 2; ++j) points[j].store(p + place_of_point<width + 2>(j) * position);
  }
  return sum;
}

// Of tiles that are height x width pixels.
template <class T, int height, int width>
static void grad_output_region(const Image& dz, const TileRange& tiles, const TileRegion& region, int64_t begin, int64_t end,
                               const Points& z, float* bias_sum) {
  for_each_tile(tiles, region, [&](int64_t t, const Tile& tile) {
    for (int64_t c = begin; c < end; c += Vec::width) {
      float *p = z.data + t * z.row + c - begin, *sum = bias_sum + c - begin;
      if (c >= dz.c) {
        for (int i = 0; i < 36; ++i) Vec::zero().store(p + i * z.position);
        continue;
      }
      Patch<4> patch;
      load_any_patch<T>(dz, tile.n, 4 * tile.row, 4 * tile.col, c, lanes_from(c, dz.c), patch);
      (Vec::load(sum) + grad_output_tile<height, width>(patch, p, z.position)).store(sum);
    }
  });
}

// Z[36][tile][z_row] of the tiles' output gradients in channels [begin, end), whole blocks of them, zero past the last channel;
// bias_sum[c] = their sums.
template <class T>
static void winograd_grad_output(const Image& dz, const TileRange& tiles, int64_t begin, int64_t end, const Points& z,
                                 float* bias_sum) {
  memset(bias_sum, 0, (end - begin) * sizeof(float));
  grad_output_region<T, 4, 2>(dz, tiles, tiles.grid.last_column(), begin, end, z, bias_sum);
  grad_output_region<T, 4, 4>(dz, tiles, tiles.grid.whole(), begin, end, z, bias_sum);
  grad_output_region<T, 2, 4>(dz, tiles, tiles.grid.last_row(), begin, end, z, bias_sum);
  grad_output_region<T, 2, 2>(dz, tiles, tiles.grid.corner(), begin, end, z, bias_sum);
}

// S[in][kBlock] of one of the 36 points and one block of output channels = V^T Z, or += if that is not the first. Of the block the
// first `channels` are there, and Z and S of the others zero.
static void winograd_accumulate(const float* v, int64_t v_row, int64_t in, const float* z, int64_t z_row, int64_t tiles,
                                int64_t channels, bool first, float* s, const Soon& soon) {
  const Product product{{v, 1, v_row, 0}, {z, z_row, 0}, tiles, 1, {kAhead * v_row, v_row, 0}, spread(soon, in, tiles, v)};
  for_each_row_block<kSteps, Adjacent::rows>(in, channels, product, StartAtZero(), [s, first](int64_t c, const Vec(&acc)[kVecs]) {
    for (int k = 0; k < kVecs; ++k) {
      float* p = s + c * kBlock + k * Vec::width;
      (first ? acc[k] : Vec::load(p) + acc[k]).store(p);
    }
  });
}

// G^T S G of a vector of filters, whose points are `position` apart, to taps `tap` apart. NaN in the lanes that met an Inf or NaN,
// else 0.
static inline Vec grad_filter_tile(const float* s, int64_t position, float* taps, int tap) {
  Vec points[6][6], g[3][3], spoiled = Vec::zero();
#pragma GCC unroll 36
  for (int i = 0; i < 36; ++i) points[i / 6][i % 6] = Vec::load(s + i * position);
  both_dimensions(points, g, [](const Vec(&p)[6], Vec(&o)[3]) { grad_filter_1d(p, o); });
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) {
    const Vec value = g[i / 3][i % 3];
    value.store(taps + i * tap);
    spoiled = spoiled + (value - value);
  }
  return spoiled;
}

// dW of one block of output channels; S is [36][in][kBlock], filters_position() apart. False if any result is Inf or NaN. stream:
// past the caches, what fills lines.
template <class T, bool stream>
static bool transform_grad_filters(const float* s, int64_t block, const Filters& dw) {
  const int64_t k0 = block * kBlock, lanes = dw.out - k0 < kBlock ? dw.out - k0 : kBlock,
                position = filters_position(dw.in, kBlock);
  Vec spoiled = Vec::zero();
  int64_t c = 0;
  if (lanes == kBlock) {
    constexpr int size = Vec::width * 9 * Vec::width;
    alignas(64) float taps[kVecs * size];
    for (; c + Vec::width <= dw.in; c += Vec::width) {
      for (int i = 0; i < Vec::width; ++i) // all of a line of S at once
        for (int v = 0; v < kVecs; ++v)
          spoiled = spoiled + grad_filter_tile(s + (c + i) * kBlock + v * Vec::width, position,
                                               taps + v * size + i * 9 * Vec::width, Vec::width);
      for (int v = 0; v < kVecs; ++v) scatter_channels<T, stream>(dw, k0 + v * Vec::width, c, taps + v * size);
    }
  }
  alignas(64) Taps taps;
  for (; c < dw.in; ++c) {
    for (int v = 0; v < kBlock; v += Vec::width)
      spoiled = spoiled + grad_filter_tile(s + c * kBlock + v, position, taps[0] + v, kBlock);
    scatter_taps<T>(dw, k0, lanes, c, taps);
  }
  return all_zero(spoiled);
}

template <class T>
static bool winograd_grad_filters(const float* s, int64_t block, const Filters& dw, bool stream) {
  if (!stream || Vec::width < 16) return transform_grad_filters<T, false>(s, block, dw); // as in winograd_input
  const bool finite = transform_grad_filters<T, true>(s, block, dw);
  fence_streams();
  return finite;
}
