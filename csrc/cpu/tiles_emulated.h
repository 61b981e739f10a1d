// The registers of tiles_amx.h in memory, so that the kernels over them can be tested on CPUs that have none. Included inside the
// ISA's namespace.

struct Tiles {
  struct Registers {
    int rows, depth;
    float sums[4][16][16];
    BFloat16 operands[8][16][32]; // 4 and 5: [pixel][channel]; 6 and 7: [pair of channels][2 x output channel]
  };
  static Registers& registers() {
    thread_local Registers kept;
    return kept;
  }
  // A register that is read before it is written gives NaN.
  static void configure(int rows, int depth) {
    Registers& r = registers();
    memset(&r, 0xff, sizeof(r));
    r.rows = rows, r.depth = depth;
  }
  static void release() { registers().rows = 0; }
  template <int tile>
  static void zero() {
    memset(registers().sums[tile], 0, sizeof(registers().sums[tile]));
  }
  template <int tile>
  static void load(const void* p, int64_t row_bytes) {
    Registers& r = registers();
    if constexpr (tile < 4) {
      for (int i = 0; i < r.rows; ++i) memcpy(r.sums[tile][i], (const char*)p + i * row_bytes, 64);
      return;
    }
    const int rows = tile < 6 ? r.rows : r.depth / 2, bytes = tile < 6 ? 2 * r.depth : 64;
    for (int i = 0; i < rows; ++i) memcpy(r.operands[tile][i], (const char*)p + i * row_bytes, bytes);
  }
  template <int tile>
  static void store(float* p, int64_t row_bytes) {
    for (int i = 0; i < registers().rows; ++i) memcpy((char*)p + i * row_bytes, registers().sums[tile][i], 64);
  }
  // The instruction takes denormals for zero, as operands and as results.
  template <int sums, int pixels, int filters>
  static void multiply() {
    Registers& r = registers();
    const __m512 tiny = _mm512_set1_ps(0x1p-126f);
    const auto flushed = [&](__m512 v) {
      const __mmask16 denormal = _mm512_cmp_ps_mask(_mm512_abs_ps(v), tiny, _CMP_LT_OQ);
      return _mm512_mask_mov_ps(v, denormal, _mm512_setzero_ps());
    };
    for (int i = 0; i < r.rows; ++i) {
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int pair = 0; pair < r.depth / 2; ++pair) {
        const __m512i both = _mm512_loadu_si512(r.operands[filters][pair]);
        const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
        const BFloat16* x = r.operands[pixels][i] + 2 * pair;
        even = flushed(_mm512_fmadd_ps(flushed(_mm512_set1_ps(to_float(x[0]))), flushed(w0), even));
        odd = flushed(_mm512_fmadd_ps(flushed(_mm512_set1_ps(to_float(x[1]))), flushed(w1), odd));
      }
      float* sum = r.sums[sums][i];
      _mm512_storeu_ps(sum, flushed(_mm512_add_ps(_mm512_loadu_ps(sum), flushed(_mm512_add_ps(even, odd)))));
    }
  }
};
