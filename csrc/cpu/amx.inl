// Direct convolution of bfloat16 images on AMX's tile registers (Tiles). A band of input rows is copied, zero-padded, into
// [rows][W + 2][pitch]; there the pixels that a tap of 16 outputs reads are a tile as they lie, `pitch` apart.

// Channels [begin, end), begin a multiple of 4, of the row h of a masked or pooled image into row[w * pitch + c - begin]. Gradients
// are moved as bits, 16 at a time, where the ReLU was open and, for the two columns of a pool's window, where its maximum was.
static void amx_load_gradients(const Image& x, int64_t n, int64_t h, int64_t begin, int64_t end, int64_t pitch, BFloat16* row) {
  const bool pooled = x.kind == ImageKind::pooled;
  const int64_t read_h = pooled ? h / 2 : h, read_w = pooled ? x.w / 2 : x.w, bytes = (x.c + 3) / 4;
  if (pooled && (read_h >= x.h / 2 || x.w % 2 == 1)) memset(row, 0, x.w * pitch * sizeof(BFloat16));
  if (pooled && read_h >= x.h / 2) return;
  const BFloat16* g = (const BFloat16*)x.data + n * x.stride_n + read_h * x.stride_h;
  const BFloat16* y = x.y ? (const BFloat16*)x.y + n * x.y_stride_n + read_h * x.y_stride_h : nullptr;
  const uint8_t* argmax = pooled ? x.argmax + (n * (x.h / 2) + read_h) * read_w * bytes : nullptr;
  const uint32_t other_row = h % 2 == 0 ? 0xffff : 0;
  for (int64_t w = 0; w < read_w; ++w, g += x.stride_w, y += y ? x.y_stride_w : 0)
    for (int64_t c = begin; c < end; c += Vec::width) {
      const int lanes = lanes_from(c, end);
      const Mask there = Mask((1u << lanes) - 1);
      Mask open = there;
      if (y) open &= not_below_or_zero(load_lanes(y + c, lanes));
      if (!pooled) {
        _mm256_mask_storeu_epi16(row + w * pitch + c - begin, there, _mm256_maskz_loadu_epi16(open, g + c));
        continue;
      }
      const uint32_t packed = load_argmax(argmax + w * bytes + c / 4, lanes); // 2 bits a lane: row, column
      open &= Mask(_pext_u32(packed, 0xaaaaaaaa) ^ other_row);
      const Mask right = Mask(_pext_u32(packed, 0x55555555));
      BFloat16* to = row + 2 * w * pitch + c - begin;
      _mm256_mask_storeu_epi16(to, there, _mm256_maskz_loadu_epi16(Mask(open & ~right), g + c));
      _mm256_mask_storeu_epi16(to + pitch, there, _mm256_maskz_loadu_epi16(Mask(open & right), g + c));
    }
}

// One image row into row[(w + 1) * pitch + c], zero outside the image and past the last channel.
static void amx_load_row(const Image& x, int64_t n, int64_t h, const AmxShape& shape, BFloat16* row) {
  const int64_t pitch = shape.pitch;
  const bool outside = h < 0 || h >= x.h, partly = x.c < shape.channels;
  if (outside || partly) memset(row, 0, shape.row(x.w) * sizeof(BFloat16));
  if (outside) return;
  memset(row, 0, pitch * sizeof(BFloat16));
  memset(row + (x.w + 1) * pitch, 0, pitch * sizeof(BFloat16));
  row += pitch;
  if (x.kind != ImageKind::plain) return amx_load_gradients(x, n, h, 0, x.c, pitch, row);
  const BFloat16* p = (const BFloat16*)x.data + n * x.stride_n + h * x.stride_h;
  if (x.stride_c != 1 || x.c < Vec::width) {
    for (int64_t c = 0; c < x.c; ++c)
      for (int64_t w = 0; w < x.w; ++w) row[w * pitch + c] = p[c * x.stride_c + w * x.stride_w];
  } else {
    for (int64_t w = 0; w < x.w; ++w) memcpy(row + w * pitch, p + w * x.stride_w, x.c * sizeof(BFloat16));
  }
}

// Filters of one block of output channels as [steps][2 tiles][pairs of values][16 outputs][2], zero past the last channels.
static void amx_filters(const Filters& w, int64_t block, BFloat16* packed) {
  const AmxShape shape(w.in, 1);
  const int64_t k0 = block * kAmxBlock, lanes = w.out - k0 < kAmxBlock ? w.out - k0 : kAmxBlock;
  alignas(64) Taps taps[2] = {};
  static_assert(kBlock == kAmxBlock && Vec::width == 16, "taps of a block fill two tiles");
  for (int64_t c = 0; c < shape.channels; c += 2) {
    for (int i = 0; i < 2; ++i)
      if (c + i < w.in)
        gather_taps<BFloat16>(w, k0, lanes, c + i, taps[i]);
      else
        memset(taps[i], 0, sizeof(taps[i]));
    for (int tap = 0; tap < 9; ++tap) {
      const int64_t step = shape.few ? tap / 3 : c / 32 * 9 + tap, value = shape.few ? tap % 3 * shape.channels + c : c % 32;
      for (int tile = 0; tile < 2; ++tile) {
        const __m512i even = _mm512_srli_epi32(_mm512_load_si512(taps[0][tap] + 16 * tile), 16);
        const __m512i pair = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_load_si512(taps[1][tap] + 16 * tile));
        _mm512_storeu_si512(packed + (2 * step + tile) * kAmxTile + value / 2 * kAmxBlock, pair);
      }
    }
  }
}

// sums[2 rows][16 pixels][kAmxBlock] of a tile of pixels in two output rows, whose windows begin at `pixels`.
template <int tiles>
static inline void amx_multiply(const BFloat16* pixels, int64_t row_size, const AmxShape& shape, const int64_t* offsets,
                                const BFloat16* filters, float* sums) {
  constexpr int ahead = 4 * kAmxTile; // two steps
  const int64_t pixel_bytes = shape.pitch * sizeof(BFloat16);
  Tiles::zero<0>(), Tiles::zero<2>();
  if (tiles == 2) Tiles::zero<1>(), Tiles::zero<3>();
  for (int64_t step = 0; step < shape.steps; ++step, filters += 2 * kAmxTile) {
    const BFloat16* p = pixels + offsets[step];
    Tiles::load<6>(filters, 64);
    Tiles::load<4>(p, pixel_bytes);
    Tiles::multiply<0, 4, 6>();
    Tiles::load<5>(p + row_size, pixel_bytes);
    Tiles::multiply<2, 5, 6>();
    for (int i = 0; i < tiles * kAmxTile; i += 32) __builtin_prefetch(filters + ahead + i); // from L2
    if (tiles == 2) {
      Tiles::load<7>(filters + kAmxTile, 64);
      Tiles::multiply<1, 4, 7>();
      Tiles::multiply<3, 5, 7>();
    }
  }
  constexpr int64_t sum_bytes = kAmxBlock * sizeof(float);
  Tiles::store<0>(sums, sum_bytes), Tiles::store<2>(sums + 16 * kAmxBlock, sum_bytes);
  if (tiles == 2) Tiles::store<1>(sums + 16, sum_bytes), Tiles::store<3>(sums + 16 * kAmxBlock + 16, sum_bytes);
}

// Pooled results of the pixels [w, w + count) in rows h and h + 1.
static inline void amx_store_pooled(const Output& out, int64_t n, int64_t h, int64_t w, int64_t count, int64_t k0,
                                    const float* sums) {
  constexpr int64_t below = 16 * kAmxBlock;
  const int64_t pooled_w = out.w / 2, first = (n * (out.h / 2) + h / 2) * pooled_w;
  for (int64_t k = k0; k < out.c && k < k0 + kAmxBlock; k += Vec::width, sums += Vec::width) {
    const int lanes = lanes_from(k, out.c);
    const Epilogue epilogue(out, k);
    const auto result = [&](int64_t i) { return epilogue(Vec::load(sums + i)); };
    for (int64_t i = 0; i < count && w + i + 1 < out.w && h + 1 < out.h; i += 2)
      store_pooled<BFloat16>(out, first + (w + i) / 2, k, lanes, result(i * kAmxBlock), result((i + 1) * kAmxBlock),
                             result(below + i * kAmxBlock), result(below + (i + 1) * kAmxBlock));
  }
}

// Results of the pixels [w, w + count) in rows h and, where the image has it, h + 1.
static inline void amx_store(const Output& out, int64_t n, int64_t h, int64_t w, int64_t count, int64_t k0, const float* sums) {
  if (out.pool) return amx_store_pooled(out, n, h, w, count, k0, sums);
  const int lanes = lanes_from(k0, out.c);
  const int more = out.c - k0 - Vec::width <= 0 ? 0 : lanes_from(k0 + Vec::width, out.c);
  const Epilogue first(out, k0), second(out, more > 0 ? k0 + Vec::width : k0);
  for (int64_t row = 0; row < 2 && h + row < out.h; ++row) {
    BFloat16* p = (BFloat16*)out.data + ((n * out.h + h + row) * out.w + w) * out.c + k0;
    const float* sum = sums + row * 16 * kAmxBlock;
    for (int64_t i = 0; i < count && w + i < out.w; ++i, p += out.c, sum += kAmxBlock) {
      const Vec a = first(Vec::load(sum)), b = second(Vec::load(sum + Vec::width));
      if (out.stream) {
        Vec::stream_pair(a, b, p);
        continue;
      }
      store_lanes(a, p, lanes);
      if (more > 0) store_lanes(b, p + Vec::width, more);
    }
  }
}

// Output rows [h_begin, h_end) of image n and blocks [begin, end) of its channels; h_begin is even. scratch: AmxShape::floats().
static void amx_rows(const Image& x, const BFloat16* packed, const Output& out, int64_t n, int64_t h_begin, int64_t h_end,
                     int64_t begin, int64_t end, float* scratch) {
  const AmxShape shape(x.c, x.w);
  const int64_t row_size = shape.row(x.w);
  float* sums = scratch;
  int64_t* offsets = (int64_t*)(scratch + 2 * 16 * kAmxBlock);
  BFloat16* band = (BFloat16*)(offsets + round_up(shape.steps, 8));
  for (int64_t step = 0; step < shape.steps; ++step) offsets[step] = shape.offset(step, row_size);
  for (int64_t h = h_begin - 1; h <= h_begin + round_up(h_end - h_begin, 2); ++h)
    amx_load_row(x, n, h, shape, band + (h - h_begin + 1) * row_size);
  Tiles::configure(int(shape.pixels), int(shape.depth));
  for (int64_t block = begin; block < end; ++block) {
    const BFloat16* filters = packed + block * shape.steps * 2 * kAmxTile;
    const auto multiply = out.c - block * kAmxBlock > 16 ? amx_multiply<2> : amx_multiply<1>;
    for (int64_t h = h_begin; h < h_end; h += 2)
      for (int64_t w = 0; w < x.w; w += shape.pixels) {
        multiply(band + (h - h_begin) * row_size + w * shape.pitch, row_size, shape, offsets, filters, sums);
        amx_store(out, n, h, w, shape.pixels, block * kAmxBlock, sums);
      }
  }
  Tiles::release();
  if (out.stream) fence_streams();
}
