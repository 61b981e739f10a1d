// Gradient of the filters on tile registers: a product over pixels. The pixels of all images follow each other with a zero between
// rows and a row of zeros between images (AmxPositions), so that a tap is a shift. Of the input the channels' pixels lie together
// (a tile is 16 channels x 32 pixels, at any pixel); of the gradients, pairs of pixels.

// Vectors of 16 pairs (even, odd) from 16 bf16 each.
static inline Vec pairs_of(__m256i even, __m256i odd) {
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)))};
}

// Columns [0, count) of `transposed` [channel][stride]: positions from `first` on, zero outside the images.
static void amx_transpose(const Image& x, const AmxPositions& positions, int64_t first, int64_t count, int64_t stride,
                          BFloat16* transposed) {
  AmxPixel p = positions.at(first);
  for (int64_t j = 0; j < count; j += 32) {
    const BFloat16* pixels[32];
    for (int i = 0; i < 32; ++i, positions.next(p)) {
      pixels[i] = positions.inside(p) ? (const BFloat16*)x.data + p.n * x.stride_n + p.h * x.stride_h + p.w * x.stride_w : nullptr;
    }
    for (int64_t c = 0; c < round_up(x.c, 32); c += 16) {
      const int64_t rest = x.c - c;
      const __mmask16 lanes = rest >= 16 ? 0xffff : rest <= 0 ? 0 : __mmask16((1u << rest) - 1);
      const auto load = [&](int i) { return pixels[i] ? _mm256_maskz_loadu_epi16(lanes, pixels[i] + c) : _mm256_setzero_si256(); };
      Vec rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) rows[i] = pairs_of(load(2 * i), load(2 * i + 1));
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) rows[i].store((float*)(transposed + (c + i) * stride + j));
    }
  }
}

// The gradient's row at `row` of the positions, channels [begin, end), as [W + 1][pitch], zero where there is none; its sums are
// added to bias.
static void amx_gradient_row(const Image& dz, const AmxPositions& positions, int64_t row, int64_t begin, int64_t end, int64_t pitch,
                             BFloat16* values, double* bias) {
  const AmxPixel at = positions.at(row * positions.row);
  const bool inside = positions.inside(at);
  if (!inside || end - begin < pitch) memset(values, 0, positions.row * pitch * sizeof(BFloat16));
  if (!inside) return;
  memset(values + dz.w * pitch, 0, pitch * sizeof(BFloat16));
  amx_load_gradients(dz, at.n, at.h, begin, end, pitch, values);
  for (int64_t c = 0; c < end - begin; c += Vec::width) {
    Vec sum = Vec::zero();
    for (int64_t w = 0; w < dz.w; ++w) sum = sum + Vec::load(values + w * pitch + c);
    float lanes[Vec::width];
    sum.store(lanes);
    for (int i = 0; i < lanes_from(c, end - begin); ++i) bias[c + i] += lanes[i];
  }
}

// Two rows of gradients, [2 * pairs][pitch], into tiles [channels / 16][all][16 channels][2] from pair `first` on.
static void amx_pair_rows(const BFloat16* values, int64_t pairs, int64_t pitch, int64_t first, int64_t all, BFloat16* tiles) {
  for (int64_t i = 0; i < pairs; ++i, values += 2 * pitch)
    for (int64_t c = 0; c < pitch; c += 16)
      pairs_of(_mm256_loadu_si256((const __m256i*)(values + c)), _mm256_loadu_si256((const __m256i*)(values + pitch + c)))
          .store((float*)(tiles + (c / 16 * all + first + i) * 32));
}

// sums[9 taps][2][2][16][16] of 32 input and 32 output channels += the products of `steps` times 32 positions.
static void amx_accumulate(const BFloat16* transposed, int64_t stride, int64_t row, const BFloat16* gradients, int64_t all,
                           int steps, bool first, float* sums) {
  const int64_t row_bytes = stride * sizeof(BFloat16);
  for (int tap = 0; tap < 9; ++tap, sums += 4 * 256) {
    if (first) {
      Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
    } else {
      Tiles::load<0>(sums, 64), Tiles::load<1>(sums + 256, 64), Tiles::load<2>(sums + 512, 64), Tiles::load<3>(sums + 768, 64);
    }
    const BFloat16 *x = transposed + tap / 3 * row + tap % 3, *g = gradients;
    for (int step = 0; step < steps; ++step, x += 32, g += kAmxTile) {
      Tiles::load<4>(x, row_bytes);
      Tiles::load<6>(g, 64);
      Tiles::multiply<0, 4, 6>();
      Tiles::load<7>(g + all * 32, 64);
      Tiles::multiply<1, 4, 7>();
      Tiles::load<5>(x + 16 * stride, row_bytes);
      Tiles::multiply<2, 5, 6>();
      Tiles::multiply<3, 5, 7>();
    }
    Tiles::store<0>(sums, 64), Tiles::store<1>(sums + 256, 64), Tiles::store<2>(sums + 512, 64), Tiles::store<3>(sums + 768, 64);
  }
}

// Adds the rows [row_begin, row_end) of the positions, row_begin even, to sums[block of outputs][block of inputs][9][2][2][16][16]
// and bias[K], for the blocks [begin, end) of outputs. They are taken `chunk` rows at a time, so that what a chunk needs stays in
// L2.
static void amx_grad_rows(const Image& x, const Image& dz, int64_t row_begin, int64_t row_end, int64_t chunk, int64_t begin,
                          int64_t end, float* sums, double* bias, float* scratch) {
  const AmxPositions positions(x.n, x.h, x.w);
  const AmxChunk size(positions, chunk, x.c, (end - begin) * kAmxBlock);
  const int64_t in_blocks = ceil_div(x.c, kAmxBlock), pitch = (end - begin) * kAmxBlock, steps = size.pairs / 16, at_once = 8;
  BFloat16 *transposed = (BFloat16*)scratch, *gradients = transposed + size.transposed, *rows = gradients + size.gradients;
  const int64_t k0 = begin * kAmxBlock, k1 = end * kAmxBlock < dz.c ? end * kAmxBlock : dz.c;
  Tiles::configure(16, 32);
  for (int64_t row = row_begin; row < row_end; row += chunk) {
    amx_transpose(x, positions, (row - 1) * positions.row - 1, size.columns, size.stride, transposed);
    memset(gradients, 0, size.gradients * sizeof(BFloat16)); // what is past the last row
    for (int64_t r = row; r < row_end && r < row + chunk; r += 2) {
      amx_gradient_row(dz, positions, r, k0, k1, pitch, rows, bias + k0);
      amx_gradient_row(dz, positions, r + 1, k0, k1, pitch, rows + positions.row * pitch, bias + k0);
      amx_pair_rows(rows, positions.row, pitch, (r - row) / 2 * positions.row, size.pairs, gradients);
    }
    for (int64_t block = begin; block < end; ++block)
      for (int64_t b = 0; b < in_blocks; ++b)
        for (int64_t step = 0; step < steps; step += at_once) // few: three taps in a row read their pixels from L1
          amx_accumulate(transposed + b * kAmxBlock * size.stride + step * 32, size.stride, positions.row,
                         gradients + ((block - begin) * 2 * size.pairs + step * 16) * 32, size.pairs,
                         int(step + at_once < steps ? at_once : steps - step), row == row_begin && step == 0,
                         sums + (block * in_blocks + b) * kAmxSums);
  }
  Tiles::release();
}

// The gradients of one block of output channels from its sums. False if one is Inf or NaN: zeros between rows have met values that
// no tap reads there, and the caller repeats the layer with the direct kernel.
static bool amx_grad_filters(const float* sums, int64_t block, const Filters& dw) {
  const int64_t lanes = dw.out - block * kAmxBlock < kAmxBlock ? dw.out - block * kAmxBlock : kAmxBlock;
  Vec spoiled = Vec::zero();
  alignas(64) Taps taps;
  for (int64_t c = 0; c < dw.in; ++c) {
    const float* of_block = sums + (block * ceil_div(dw.in, kAmxBlock) + c / kAmxBlock) * kAmxSums;
    for (int tap = 0; tap < 9; ++tap)
      for (int v = 0; v < 2; ++v) {
        const Vec value = Vec::load(of_block + ((tap * 2 + c % 32 / 16) * 2 + v) * 256 + c % 16 * 16);
        spoiled = spoiled + (value - value);
        value.store(taps[tap] + v * Vec::width);
      }
    scatter_taps<BFloat16>(dw, block * kAmxBlock, lanes, c, taps);
  }
  return all_zero(spoiled);
}
