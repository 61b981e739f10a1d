// Products of floats on AMX's tile registers. A float is the sum of three bfloat16, its pieces: the leading eight bits of its
// significand, the next eight, and the last. Of the nine products of two floats' pieces three are left out, 2^-22 of the whole and
// less together; the other six take less than half the time of the vectors' multiply-adds.
//
// Both operands are packed as pieces where they stay in L2, a panel of 32 rows or columns as [step][piece][2 tiles][16][32]. A step
// is 32 terms of the sums, of which term i and term i + 16 lie side by side.

static constexpr int kPieces = 3, kStep = 32;
static constexpr int64_t kPanelStep = kPieces * 2 * kAmxTile; // elements

// 32 floats as three lines, a pair of tiles apart. What two pieces leave has eight bits, and so the third is exact. Of an Inf NaN
// is left.
static inline void store_pieces(Vec low, Vec high, BFloat16* p) {
  const __m512i leading = _mm512_set1_epi32(int(0xffff0000));
  const auto rest = [&](Vec v) { return v - Vec{_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v.reg), leading))}; };
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i, p += 2 * kAmxTile) {
    _mm512_store_si512(p, side_by_side(low, high));
    if (i + 1 < kPieces) low = rest(low), high = rest(high);
  }
}

// Up to 32 rows of the left operand, whose terms lie side by side. Rows past them are left as they are: so are their sums.
static void pack_left(const float* a, int64_t row, int64_t rows, int64_t steps, BFloat16* panel) {
  for (int64_t r = 0; r < rows; ++r, a += row) {
    BFloat16* to = panel + r / 16 * kAmxTile + r % 16 * kStep;
    for (int64_t step = 0; step < steps; ++step)
      store_pieces(Vec::load(a + step * kStep), Vec::load(a + step * kStep + 16), to + step * kPanelStep);
  }
}

// Term t of 16 rows or columns; zero past the last term.
static inline Vec load_term(const float* p, int64_t term, int64_t t, int64_t terms) {
  return t < terms ? Vec::load(p + t * term) : Vec::zero();
}

// 32 rows of the left operand, which lie side by side.
static void pack_left_transposed(const float* a, int64_t term, int64_t terms, BFloat16* panel) {
  for (int64_t t = 0; t < terms; t += kStep, panel += kPanelStep)
    for (int tile = 0; tile < 2; ++tile) {
      Vec low[16], high[16];
      for (int i = 0; i < 16; ++i) {
        low[i] = load_term(a + 16 * tile, term, t + i, terms);
        high[i] = load_term(a + 16 * tile, term, t + i + 16, terms);
      }
      transpose(low), transpose(high);
      for (int r = 0; r < 16; ++r) store_pieces(low[r], high[r], panel + tile * kAmxTile + r * kStep);
    }
}

// A block of columns of the right operand.
static void pack_right(const float* b, int64_t term, int64_t terms, BFloat16* panel) {
  for (int64_t t = 0; t < terms; t += kStep, panel += kPanelStep)
    for (int i = 0; i < 16; ++i)
      for (int tile = 0; tile < 2; ++tile) {
        const float* p = b + 16 * tile;
        store_pieces(load_term(p, term, t + i, terms), load_term(p, term, t + i + 16, terms), panel + tile * kAmxTile + i * kStep);
      }
}

// What is read next, asked for a few lines with each step.
struct LinesAhead {
  const float* data;
  int64_t lines;
  void step() {
    for (int64_t i = 0; i < lines; ++i, data += 16) __builtin_prefetch(data, 0, 2);
  }
};

// sums[16 or 32 rows][kBlock] of two panels, or += with `add`. Six pairs of pieces; each changes one of the two operands' tiles.
// A tile that is stored 0.8 microseconds after the one before takes a third of one longer, as though what stores tiles had gone to
// sleep; so one is stored every 48 products, for nothing.
template <int tiles>
static void multiply_panels(const BFloat16* a, const BFloat16* b, int64_t steps, float* sums, int64_t row, bool add,
                            LinesAhead& ahead) {
  const int64_t row_bytes = row * sizeof(float);
  float* below = sums + 16 * row;
  if (add) {
    Tiles::load<0>(sums, row_bytes), Tiles::load<1>(sums + 16, row_bytes);
    if (tiles == 2) Tiles::load<2>(below, row_bytes), Tiles::load<3>(below + 16, row_bytes);
  } else {
    Tiles::zero<0>(), Tiles::zero<1>();
    if (tiles == 2) Tiles::zero<2>(), Tiles::zero<3>();
  }
  const auto left = [&](int piece) {
    Tiles::load<4>(a + piece * 2 * kAmxTile, 64);
    if (tiles == 2) Tiles::load<5>(a + (piece * 2 + 1) * kAmxTile, 64);
  };
  const auto right = [&](int piece) {
    Tiles::load<6>(b + piece * 2 * kAmxTile, 64);
    Tiles::load<7>(b + (piece * 2 + 1) * kAmxTile, 64);
  };
  const auto multiply = [] {
    Tiles::multiply<0, 4, 6>(), Tiles::multiply<1, 4, 7>();
    if (tiles == 2) Tiles::multiply<2, 5, 6>(), Tiles::multiply<3, 5, 7>();
  };
  for (int64_t step = 0; step < steps; ++step, a += kPanelStep, b += kPanelStep) {
    left(0), right(2), multiply();
    right(1), multiply();
    left(1), multiply();
    ahead.step();
    right(0), multiply();
    left(2), multiply();
    left(0), multiply();
    if (step % 2 == 1) Tiles::store<0>(sums, row_bytes);
  }
  Tiles::store<0>(sums, row_bytes), Tiles::store<1>(sums + 16, row_bytes);
  if (tiles == 2) Tiles::store<2>(below, row_bytes), Tiles::store<3>(below + 16, row_bytes);
}

// M[tiles][blocks][kBlock] = V U at one of the 36 points; blocks of U are `u_block` apart. scratch: pieces_scratch() floats.
static void pieces_multiply(const float* v, int64_t v_row, int64_t tiles, int64_t in, const float* u, int64_t u_block,
                            int64_t blocks, float* m, int64_t m_row, float* scratch) {
  const int64_t steps = in / kStep, panel = steps * kPanelStep;
  float* rest = scratch;
  BFloat16 *left = (BFloat16*)(rest + 32 * kBlock), *right = left + panel;
  Tiles::configure(16, kStep);
  for (int64_t block = 0; block < blocks; ++block) pack_right(u + block * u_block, kBlock, in, right + block * panel);
  for (int64_t t = 0; t < tiles; t += 32) {
    const int64_t rows = tiles - t < 32 ? tiles - t : 32;
    pack_left(v + t * v_row, v_row, rows, steps, left);
    LinesAhead ahead{v + (t + 32) * v_row, ceil_div(2 * v_row, steps * blocks)};
    for (int64_t block = 0; block < blocks; ++block) {
      const BFloat16* b = right + block * panel;
      float* sums = m + t * m_row + block * kBlock;
      if (rows == 32) {
        multiply_panels<2>(left, b, steps, sums, m_row, false, ahead);
        continue;
      }
      const auto multiply = rows > 16 ? multiply_panels<2> : multiply_panels<1>;
      multiply(left, b, steps, rest, kBlock, false, ahead);
      for (int64_t r = 0; r < rows; ++r)
        for (int k = 0; k < kBlock; k += Vec::width) Vec::load(rest + r * kBlock + k).store(sums + r * m_row + k);
    }
  }
  Tiles::release();
}

// S[blocks][in][kBlock] += V^T Z at one of the 36 points; blocks of S are `s_block` apart.
static void pieces_accumulate(const float* v, int64_t v_row, int64_t in, const float* z, int64_t z_row, int64_t tiles,
                              int64_t blocks, bool first, float* s, int64_t s_block, float* scratch) {
  const int64_t steps = ceil_div(tiles, kStep), panel = steps * kPanelStep;
  BFloat16 *left = (BFloat16*)scratch, *right = left + panel;
  Tiles::configure(16, kStep);
  for (int64_t block = 0; block < blocks; ++block) pack_right(z + block * kBlock, z_row, tiles, right + block * panel);
  for (int64_t c = 0; c < in; c += 32) {
    pack_left_transposed(v + c, v_row, tiles, left);
    for (int64_t block = 0; block < blocks; ++block) {
      float* sums = s + block * s_block + c * kBlock;
      LinesAhead ahead{sums + 32 * kBlock, first ? 0 : ceil_div(32 * kBlock / 16, steps)};
      multiply_panels<2>(left, right + block * panel, steps, sums, kBlock, !first, ahead);
    }
  }
  Tiles::release();
}
