// Direct convolution. A band of input rows is copied, zero-padded and widened to fp32, into [rows][W + 2][C]; then the products
// over (tap column, channel) are contiguous in it, and a row of outputs is three GEMMs of depth 3C, one per tap row.

template <class T>
static void load_pooled_row(const Image& x, int64_t n, int64_t h, float* row) {
  const int64_t pooled_h = x.h / 2, pooled_w = x.w / 2, bytes = (x.c + 3) / 4;
  memset(row, 0, x.w * x.c * sizeof(float));
  if (h / 2 >= pooled_h) return;
  for (int64_t pw = 0; pw < pooled_w; ++pw)
    for (int64_t c = 0; c < x.c; c += Vec::width) {
      const int lanes = lanes_from(c, x.c);
      const Vec g = load_masked<T>(x, n, h / 2, pw, c, lanes);
      const uint32_t argmax = load_argmax(x.argmax + ((n * pooled_h + h / 2) * pooled_w + pw) * bytes + c / 4, lanes);
      for (int j = 0; j < 2; ++j)
        store_lanes(select(argmax_is(argmax, int(h % 2) * 2 + j), g, Vec::zero()), row + (2 * pw + j) * x.c + c, lanes);
    }
}

// One image row into row[(w + 1) * C + c], zero for rows outside the image; the two border pixels are zero.
template <class T>
static void load_row(const Image& x, int64_t n, int64_t h, float* row) {
  if (h < 0 || h >= x.h) {
    memset(row, 0, (x.w + 2) * x.c * sizeof(float));
    return;
  }
  memset(row, 0, x.c * sizeof(float));
  memset(row + (x.w + 1) * x.c, 0, x.c * sizeof(float));
  row += x.c;
  if (x.kind == ImageKind::pooled) return load_pooled_row<T>(x, n, h, row);
  const T* p = (const T*)x.data + n * x.stride_n + h * x.stride_h;
  if (x.kind == ImageKind::plain && (x.stride_c != 1 || x.c < Vec::width) && !(x.stride_c == 1 && x.stride_w == x.c)) {
    for (int64_t c = 0; c < x.c; ++c)
      for (int64_t w = 0; w < x.w; ++w) row[w * x.c + c] = to_float(p[c * x.stride_c + w * x.stride_w]);
  } else if (x.kind == ImageKind::plain && x.stride_w == x.c) { // dense pixels: one long vector
    for (int64_t i = 0; i < x.w * x.c; i += Vec::width)
      store_lanes(load_lanes(p + i, lanes_from(i, x.w * x.c)), row + i, lanes_from(i, x.w * x.c));
  } else {
    for (int64_t w = 0; w < x.w; ++w)
      for (int64_t c = 0; c < x.c; c += Vec::width) {
        const int lanes = lanes_from(c, x.c);
        store_lanes(load_masked<T>(x, n, h, w, c, lanes), row + w * x.c + c, lanes);
      }
  }
}

// Packed filters [3 rows][3 columns][in][kBlock] of one block of output channels, zero past the last one.
template <class T>
static void direct_filters(const Filters& w, int64_t block, float* packed) {
  const int64_t k0 = block * kBlock, lanes = w.out - k0 < kBlock ? w.out - k0 : kBlock;
  alignas(64) Taps taps = {};
  for (int64_t c = 0; c < w.in; ++c) {
    gather_taps<T>(w, k0, lanes, c, taps);
    for (int i = 0; i < 9; ++i) memcpy(packed + (i * w.in + c) * kBlock, taps[i], sizeof(taps[i]));
  }
}

static constexpr int64_t kDirectChain = 256; // products summed before their sum is added to the rest: long chains round more

// The sums of one output row and one block of output channels, [W][kBlock], in several chains.
static void direct_chains(const float* rows, int64_t width, int64_t in, const float* packed, int64_t channels, float* sums) {
  const int64_t row_size = (width + 2) * in, depth = 3 * in, chains = (depth + kDirectChain - 1) / kDirectChain;
  for (int64_t i = 0; i < 3 * chains; ++i) {
    const int64_t r = i / chains, begin = depth * (i % chains) / chains, end = depth * (i % chains + 1) / chains;
    const Product product{{rows + r * row_size + begin, in, 1, 0}, {packed + (r * depth + begin) * kBlock, kBlock, 0}, end - begin};
    for_each_row_block(width, channels, product, StartAtZero(), [sums, i](int64_t w, const Vec(&acc)[kVecs]) {
      for (int v = 0; v < kVecs; ++v) {
        float* sum = sums + w * kBlock + v * Vec::width;
        (i == 0 ? acc[v] : Vec::load(sum) + acc[v]).store(sum);
      }
    });
  }
}

// finish(pixel, sums) for one output row and one block of output channels, of which `channels` are there; sums: [W][kBlock] floats
// for those of several chains, which do not meet each kind of finish in products of its own: they would be most of the extension.
template <class Finish>
static inline void direct_row(const float* rows, int64_t width, int64_t in, const float* packed, int64_t channels, float* sums,
                              const Finish& finish) {
  const int64_t row_size = (width + 2) * in, depth = 3 * in;
  if (3 * depth <= kDirectChain + 32) { // to 32 channels: one chain
    const Product product{{rows, in, 1, row_size}, {packed, kBlock, depth * kBlock}, depth, 3};
    return for_each_row_block(width, channels, product, StartAtZero(), finish);
  }
  direct_chains(rows, width, in, packed, channels, sums);
  for (int64_t w = 0; w < width; ++w) {
    Vec acc[kVecs];
    for (int v = 0; v < kVecs; ++v) acc[v] = Vec::load(sums + w * kBlock + v * Vec::width);
    finish(w, acc);
  }
}

// A finish: bias and ReLU, and a whole block to pixels `pixel` values apart. One for float rows of all dtypes, pooled or not.
template <class T>
static inline auto to_blocks(const Epilogue (&epilogue)[kVecs], T* line, int64_t pixel) {
  return [=](int64_t w, const Vec(&acc)[kVecs]) {
    for (int v = 0; v < kVecs; ++v) epilogue[v](acc[v]).store(line + w * pixel + v * Vec::width);
  };
}

// Pools two rows of fp32 pixels [2][W][channels ...] into row ph of the output, channels [k0, k0 + count).
template <class T>
static void pool_row(const Output& out, const float* rows, int64_t row_size, int64_t pixel_size, int64_t n, int64_t ph, int64_t k0,
                     int64_t count) {
  const int64_t pooled_w = out.w / 2;
  for (int64_t pw = 0; pw < pooled_w; ++pw)
    for (int64_t k = k0; k < k0 + count && k < out.c; k += Vec::width) {
      const float* p = rows + 2 * pw * pixel_size + (k - k0);
      store_pooled<T>(out, (n * (out.h / 2) + ph) * pooled_w + pw, k, lanes_from(k, out.c), Vec::load(p), Vec::load(p + pixel_size),
                      Vec::load(p + row_size), Vec::load(p + row_size + pixel_size));
    }
}

// Output rows [h_begin, h_end) of image n; h_begin is even with pool. scratch: a padded band of input rows, one row of sums, two
// rows to pool.
template <class T>
static void direct_rows(const Image& x, const float* packed, const Output& out, int64_t n, int64_t h_begin, int64_t h_end,
                        float* scratch) {
  const int64_t row_size = (x.w + 2) * x.c;
  for (int64_t h = h_begin - 1; h <= h_end; ++h) load_row<T>(x, n, h, scratch + (h - h_begin + 1) * row_size);
  float* sums = scratch + (h_end - h_begin + 2) * row_size;
  float* full = sums + x.w * kBlock; // [2][W][kBlock], before pooling
  for (int64_t block = 0; block * kBlock < out.c; ++block) {
    const int64_t k0 = block * kBlock, rest = out.c - k0;
    const float* filters = packed + block * 9 * x.c * kBlock;
    Epilogue epilogue[kVecs];
    for (int v = 0; v < kVecs; ++v) epilogue[v] = Epilogue(out, k0 + v * Vec::width);
    for (int64_t h = h_begin; h < h_end; ++h) {
      const float* rows = scratch + (h - h_begin) * row_size;
      if (!out.pool) {
        T* line = (T*)out.data + (n * out.h + h) * out.w * out.c + k0;
        const int64_t pixel = out.c;
        if constexpr (std::is_same_v<T, float>) {
          if (out.stream) {
            direct_row(rows, x.w, x.c, filters, rest, sums, [=](int64_t w, const Vec(&acc)[kVecs]) {
              for (int v = 0; v < kVecs && v * Vec::width < rest; ++v)
                epilogue[v](acc[v]).stream(line + w * pixel + v * Vec::width);
            });
            continue;
          }
        }
        if (rest >= kBlock) // a vector cut short may be a call, for which all sums would have to leave their registers
          direct_row(rows, x.w, x.c, filters, kBlock, sums, to_blocks(epilogue, line, pixel));
        else
          direct_row(rows, x.w, x.c, filters, rest, sums, [=](int64_t w, const Vec(&acc)[kVecs]) {
            for (int v = 0; v < kVecs && v * Vec::width < rest; ++v)
              store_lanes(epilogue[v](acc[v]), line + w * pixel + v * Vec::width, lanes_from(v * Vec::width, rest));
          });
        continue;
      }
      if (h / 2 >= out.h / 2) continue; // an odd last row is in no window
      float* line = full + h % 2 * x.w * kBlock;
      direct_row(rows, x.w, x.c, filters, rest, sums, to_blocks(epilogue, line, kBlock));
      if (h % 2 == 1) pool_row<T>(out, full, x.w * kBlock, kBlock, n, h / 2, k0, kBlock);
    }
  }
  if (out.stream) fence_streams();
}

// ---- few output channels (the gradient of an image): a block of the micro-kernel is all nine taps of them side by side ----

static inline int64_t few_columns(int64_t out) {
  return round_up(9 * out, kBlock);
}

// [block][in][kBlock]: column (3 * r + s) * out + k is tap (r, s) of output channel k; zero past the last.
template <class T>
static void few_filters(const Filters& w, float* packed) {
  memset(packed, 0, few_columns(w.out) * w.in * sizeof(float));
  for (int64_t k = 0; k < w.out; ++k)
    for (int64_t c = 0; c < w.in; ++c)
      for (int tap = 0; tap < 9; ++tap) {
        const int64_t column = tap * w.out + k;
        packed[(column / kBlock * w.in + c) * kBlock + column % kBlock] =
            to_float(((const T*)w.data)[k * w.stride_out + c * w.stride_in + tap / 3 * w.stride_r + tap % 3 * w.stride_s]);
      }
}

// Of a row of pixels [pixels][in] with the filters of all taps, to [pixels][columns].
static void few_products(const float* row, int64_t pixels, int64_t in, const float* packed, int64_t columns, float* products) {
  for (int64_t k = 0; k < columns; k += kBlock)
    for (int64_t c = 0; c < in; c += kDirectChain) {
      const int64_t depth = in - c < kDirectChain ? in - c : kDirectChain;
      const Product product{{row + c, in, 1, 0}, {packed + k * in + c * kBlock, kBlock, 0}, depth, 1, {kRows * in, 16, 0}};
      for_each_row_block(pixels, kBlock, product, StartAtZero(), [=](int64_t w, const Vec(&acc)[kVecs]) {
        for (int v = 0; v < kVecs; ++v) {
          float* p = products + w * columns + k + v * Vec::width;
          (c ? Vec::load(p) + acc[v] : acc[v]).store(p);
        }
      });
    }
}

// Output rows [h_begin, h_end) of image n; h_begin is even. scratch: an input row, the products of three, two rows to pool.
template <class T>
static void few_rows(const Image& x, const float* packed, const Output& out, int64_t n, int64_t h_begin, int64_t h_end,
                     float* scratch) {
  const int64_t pixels = x.w + 2, columns = few_columns(out.c), row_size = pixels * columns;
  float *row = scratch, *products = scratch + round_up(pixels * x.c, 16), *full = products + 3 * row_size;
  for (int64_t h = h_begin - 1; h <= h_end; ++h) {
    load_row<T>(x, n, h, row);
    float* of_row = products + (h + 3) % 3 * row_size;
    few_products(row, pixels, x.c, packed, columns, of_row);
    if (h <= h_begin) continue; // output row h - 1 needs the rows around it
    const int64_t y = h - 1;
    for (int64_t k = 0; k < out.c; k += Vec::width) {
      const int lanes = lanes_from(k, out.c);
      const Epilogue epilogue(out, k);
      const float* rows[3]; // of products whose sums are output row y
      for (int r = 0; r < 3; ++r) rows[r] = products + (y - 1 + r + 3) % 3 * row_size + 3 * r * out.c + k;
      for (int64_t w = 0; w < out.w; ++w) {
        Vec sum = Vec::zero();
        for (int r = 0; r < 3; ++r)
          for (int s = 0; s < 3; ++s) sum = sum + load_lanes(rows[r] + (w + s) * columns + s * out.c, lanes);
        sum = epilogue(sum);
        if (out.pool)
          sum.store(full + (y % 2 * out.w + w) * kBlock + k);
        else
          store_lanes(sum, (T*)out.data + ((n * out.h + y) * out.w + w) * out.c + k, lanes);
      }
    }
    if (out.pool && y % 2 == 1) pool_row<T>(out, full, out.w * kBlock, kBlock, n, y / 2, 0, kBlock);
  }
}

static constexpr int64_t bias_pixels = 16; // whose gradients are summed in fp32 before the sums are added in double

// One gradient row, [W][padded] with zeros past the last channel; its sum over W is added to bias, where there is one. scratch:
// (W + 2) * C floats.
template <class T>
static void load_gradient_row(const Image& dz, int64_t n, int64_t h, int64_t padded, float* row, double* bias, float* scratch) {
  load_row<T>(dz, n, h, scratch);
  for (int64_t c = 0; c < padded; c += Vec::width)
    for (int64_t begin = 0; begin < dz.w; begin += bias_pixels) {
      Vec sum = Vec::zero();
      for (int64_t w = begin; w < dz.w && w < begin + bias_pixels; ++w) {
        const Vec g = c < dz.c ? load_lanes(scratch + (w + 1) * dz.c + c, lanes_from(c, dz.c)) : Vec::zero();
        g.store(row + w * padded + c);
        sum = sum + g;
      }
      if (!bias) continue;
      float lanes[Vec::width];
      sum.store(lanes);
      for (int i = 0; i < Vec::width; ++i) bias[c + i] += lanes[i];
    }
}

// Adds the products of a padded row of pixels and one of gradients, of `channels` of a block, to sum[3][in][kBlock].
static void direct_grad_products(const float* row, int64_t in, const float* gradient, int64_t pixel, int64_t width,
                                 int64_t channels, float* sum) {
  const Product product{{row, 1, in, 0}, {gradient, pixel, 0}, width};
  for_each_row_block(3 * in, channels, product, StartAtZero(), [sum](int64_t tap, const Vec(&acc)[kVecs]) {
    float* p = sum + tap * kBlock;
    for (int v = 0; v < kVecs; ++v) (Vec::load(p + v * Vec::width) + acc[v]).store(p + v * Vec::width);
  });
}

// Adds the rows [begin, end) of N * H to sum[block][9][in][kBlock] of the blocks [block_begin, block_end) of output channels, and
// to bias[K padded to whole blocks], which may be null. scratch: 3 input rows, one gradient row [W][K padded], one unpadded
// gradient row.
template <class T>
static void direct_grad_rows(const Image& x, const Image& dz, int64_t begin, int64_t end, int64_t block_begin, int64_t block_end,
                             float* sum, double* bias, float* scratch) {
  const int64_t padded = round_up(dz.c, kBlock), row_size = (x.w + 2) * x.c;
  float *gradient = scratch + 3 * row_size, *unpadded = gradient + x.w * padded;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / x.h, h = i % x.h;
    // Row r lives in slot (r + 3) % 3, so the next output row finds two of its three input rows in place.
    for (int64_t r = i == begin || h == 0 ? h - 1 : h + 1; r <= h + 1; ++r) load_row<T>(x, n, r, scratch + (r + 3) % 3 * row_size);
    load_gradient_row<T>(dz, n, h, padded, gradient, bias, unpadded);
    for (int r = 0; r < 3; ++r)
      for (int64_t block = block_begin; block < block_end; ++block) {
        const float* row = scratch + (h - 1 + r + 3) % 3 * row_size;
        direct_grad_products(row, x.c, gradient + block * kBlock, padded, x.w, dz.c - block * kBlock,
                             sum + (block * 9 + r * 3) * x.c * kBlock);
      }
  }
}
