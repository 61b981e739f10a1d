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

// The leading 16 bits of two vectors of floats, which are bfloat16 values: low[i] and high[i] side by side.
static inline __m512i side_by_side(Vec low, Vec high) {
  const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(low.reg), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_castps_si512(high.reg));
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
        const __m512i pair = side_by_side(Vec::load(taps[0][tap] + 16 * tile), Vec::load(taps[1][tap] + 16 * tile));
        _mm512_storeu_si512(packed + (2 * step + tile) * kAmxTile + value / 2 * kAmxBlock, pair);
      }
    }
  }
}

// The results of one tile of pixels in two output rows, made of its sums, [2 rows][16 pixels][kAmxBlock], two pixels of each row at
// a time.
class AmxResults {
public:
  // The pixels [w, w + count) in rows h and h + 1, as far as the image has them, and a block of channels from k on.
  AmxResults(const Output& out, const float* sums, int64_t n, int64_t h, int64_t w, int64_t count, int64_t k)
      : out(out), sums(sums), k(k), second(out.c - k > Vec::width), first_epilogue(out, k),
        second_epilogue(out, second ? k + Vec::width : k), rows(h + 2 <= out.h ? 2 : 1),
        columns(w + count <= out.w ? count : out.w - w) {
    if (out.pool) {
      columns = rows == 2 ? columns / 2 * 2 : 0;
      pixel = (n * (out.h / 2) + h / 2) * (out.w / 2) + w / 2;
    } else {
      pixel = (n * out.h + h) * out.w + w;
    }
  }
  int64_t count() const { return columns; }

  void store(int64_t column) const { // and the one after it
    if (out.pool) {
      store_window(pixel + column / 2, k, first_epilogue, sums + column * kAmxBlock);
      if (second) store_window(pixel + column / 2, k + Vec::width, second_epilogue, sums + column * kAmxBlock + Vec::width);
      return;
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = column; i < column + 2 && i < columns; ++i)
        store_pixel((BFloat16*)out.data + (pixel + row * out.w + i) * out.c + k, sums + (row * 16 + i) * kAmxBlock);
  }

private:
  void store_window(int64_t to, int64_t channel, const Epilogue& epilogue, const float* p) const {
    constexpr int64_t right = kAmxBlock, below = 16 * kAmxBlock;
    store_pooled<BFloat16>(out, to, channel, lanes_from(channel, out.c), epilogue(Vec::load(p)), epilogue(Vec::load(p + right)),
                           epilogue(Vec::load(p + below)), epilogue(Vec::load(p + below + right)));
  }
  void store_pixel(BFloat16* to, const float* p) const {
    const Vec a = first_epilogue(Vec::load(p));
    if (!second) return store_lanes(a, to, lanes_from(k, out.c));
    const Vec b = second_epilogue(Vec::load(p + Vec::width));
    if (out.stream) return Vec::stream_pair(a, b, to);
    a.store(to);
    store_lanes(b, to + Vec::width, lanes_from(k + Vec::width, out.c));
  }

  const Output& out;
  const float* sums;
  int64_t k;
  bool second; // vector of channels
  Epilogue first_epilogue, second_epilogue;
  int64_t rows, columns, pixel;
};

// What a job reads next from beyond L2.
struct AmxNext {
  const void* data;
  int64_t bytes;
};

// While it multiplies by the filters of `block`: where a layer has many, the next block's; else what the next job takes of the
// image.
static AmxNext amx_next(const Image& x, const Filters& w, const BFloat16* packed, const AmxShape& shape, const AmxJob& job,
                        int64_t block) {
  const int64_t size = shape.filters(), bytes = size * sizeof(BFloat16), blocks = job.end - job.begin;
  const int64_t next = block + 1 < job.end ? block + 1 : job.begin;
  if (!packed) {
    const int64_t k0 = next * kAmxBlock, lanes = w.out - k0 < kAmxBlock ? w.out - k0 : kAmxBlock;
    const bool together = w.stride_out == 9 * w.in && next > block;
    return {(const BFloat16*)w.data + k0 * w.stride_out, together ? lanes * w.stride_out * int64_t(sizeof(BFloat16)) : 0};
  }
  if (bytes * blocks > 512 * 1024) return {packed + next * size, bytes};
  const bool last = job.h_end == x.h, dense = x.stride_c == 1 && x.stride_w == x.c && x.stride_h == x.w * x.c;
  if (x.kind != ImageKind::plain || !dense || (last && job.n_end == x.n)) return {nullptr, 0};
  const int64_t first = last ? job.n_end * x.stride_n : (job.n_end - 1) * x.stride_n + (job.h_end + 1) * x.stride_h;
  const int64_t part = (job.h_end - job.h_begin) * x.stride_h / blocks;
  return {(const BFloat16*)x.data + first + (block - job.begin) * part, part * int64_t(sizeof(BFloat16))};
}

// What the vector units do while the tile registers multiply, a little with each step: they store the results of the tile before,
// and ask for what is read next.
struct AmxMeanwhile {
  const char* next = nullptr;
  int64_t lines = 0; // of it, a step
  std::optional<AmxResults> results = {};
  int64_t stored = 0, due = 0;

  void ask_for(const AmxNext& what, int64_t steps) {
    next = (const char*)what.data;
    lines = ceil_div(what.bytes, 64 * steps);
  }

  void begin(const AmxResults& next) {
    results.emplace(next);
    stored = 0, due = 0;
  }
  void step(int64_t steps) {
    for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    if (!results) return;
    for (due += results->count(); due >= 2 * steps && stored < results->count(); due -= 2 * steps, stored += 2)
      results->store(stored);
  }
  void finish() {
    if (!results) return;
    for (; stored < results->count(); stored += 2) results->store(stored);
  }
};

// sums of a tile of pixels in two output rows, whose windows begin at `pixels`.
template <int tiles>
static inline void amx_multiply(const BFloat16* pixels, int64_t row_size, const AmxShape& shape, const int64_t* offsets,
                                const BFloat16* filters, float* sums, AmxMeanwhile& meanwhile) {
  const int64_t pixel_bytes = shape.pitch * sizeof(BFloat16), steps = shape.steps;
  Tiles::zero<0>(), Tiles::zero<2>();
  if (tiles == 2) Tiles::zero<1>(), Tiles::zero<3>();
  for (int64_t step = 0; step < steps; ++step, filters += 2 * kAmxTile) {
    const BFloat16* p = pixels + offsets[step];
    Tiles::load<6>(filters, 64);
    Tiles::load<4>(p, pixel_bytes);
    Tiles::multiply<0, 4, 6>();
    Tiles::load<5>(p + row_size, pixel_bytes);
    Tiles::multiply<2, 5, 6>();
    if (tiles == 2) {
      Tiles::load<7>(filters + kAmxTile, 64);
      Tiles::multiply<1, 4, 7>();
      Tiles::multiply<3, 5, 7>();
    }
    meanwhile.step(steps);
  }
  constexpr int64_t sum_bytes = kAmxBlock * sizeof(float);
  Tiles::store<0>(sums, sum_bytes), Tiles::store<2>(sums + 16 * kAmxBlock, sum_bytes);
  if (tiles == 2) Tiles::store<1>(sums + 16, sum_bytes), Tiles::store<3>(sums + 16 * kAmxBlock + 16, sum_bytes);
}

// scratch: AmxShape::floats(). Filters are packed, or made here if that is null.
static void amx_rows(const Image& x, const Filters& w, const BFloat16* packed, const Output& out, const AmxJob& job,
                     float* scratch) {
  const AmxShape shape(x.c, x.w);
  const int64_t row_size = shape.row(x.w), size = shape.filters(), height = job.h_end - job.h_begin;
  float *sums = scratch, *last_sums = sums + kAmxResults;
  int64_t* offsets = (int64_t*)(scratch + 2 * kAmxResults);
  BFloat16 *own = (BFloat16*)(offsets + round_up(shape.steps, 8)), *bands = packed ? own : own + size;
  const auto band_of = [&](int64_t n) { return bands + (n - job.n_begin) * shape.band(height, x.w); };
  for (int64_t step = 0; step < shape.steps; ++step) offsets[step] = shape.offset(step, row_size);
  for (int64_t n = job.n_begin; n < job.n_end; ++n)
    for (int64_t row = 0; row < round_up(height, 2) + 2; ++row)
      amx_load_row(x, n, job.h_begin + row - 1, shape, band_of(n) + row * row_size);
  Tiles::configure(int(shape.pixels), int(shape.depth));
  const int64_t tiles = (job.n_end - job.n_begin) * ceil_div(height, 2) * shape.columns;
  AmxMeanwhile meanwhile;
  for (int64_t block = job.begin; block < job.end; ++block) {
    if (!packed) amx_filters(w, block, own);
    const BFloat16* filters = packed ? packed + block * size : own;
    meanwhile.ask_for(amx_next(x, w, packed, shape, job, block), tiles * shape.steps);
    const auto multiply = out.c - block * kAmxBlock > 16 ? amx_multiply<2> : amx_multiply<1>;
    for (int64_t n = job.n_begin; n < job.n_end; ++n)
      for (int64_t h = job.h_begin; h < job.h_end; h += 2)
        for (int64_t column = 0; column < x.w; column += shape.pixels) {
          const BFloat16* pixels = band_of(n) + (h - job.h_begin) * row_size + column * shape.pitch;
          multiply(pixels, row_size, shape, offsets, filters, sums, meanwhile);
          meanwhile.finish();
          meanwhile.begin({out, sums, n, h, column, shape.pixels, block * kAmxBlock});
          std::swap(sums, last_sums);
        }
  }
  meanwhile.finish();
  Tiles::release();
  if (out.stream) fence_streams();
}
