// 16 floats in a zmm register. Included inside the ISA's namespace, after its target region begins.

using Mask = __mmask16;

struct Vec {
  static constexpr int width = 16, registers = 32;
  __m512 reg;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float f) { return {_mm512_set1_ps(f)}; }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p), p); }
  static Vec load(const Float16* p) { return widen(_mm256_loadu_si256((const __m256i*)p), p); }

  // The first n lanes (0 < n), zeros after them; never touches memory past lane n.
  static Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  template <class T>
  static Vec load_first(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), p);
  }

  void store(float* p) const { _mm512_storeu_ps(p, reg); }
  template <class T>
  void store(T* p) const {
    _mm256_storeu_si256((__m256i*)p, narrow(p));
  }
  // Past the caches; p is aligned to a vector. Call fence_streams() before another thread may read.
  void stream(float* p) const { _mm512_stream_ps(p, reg); }
  // Two vectors of bf16 that fill a line, past the caches.
  static void stream_pair(Vec first, Vec second, BFloat16* p) {
    _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(first.narrow(p)), second.narrow(p), 1));
  }
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), reg); }
  template <class T>
  void store_first(T* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow(p));
  }

  // The value as it reads back after being stored as T.
  Vec rounded(const float*) const { return *this; }
  template <class T>
  Vec rounded(const T* type) const {
    return widen(narrow(type), type);
  }

private:
  static __mmask16 first(int n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }
  static Vec widen(__m256i b, const BFloat16*) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))}; }
  static Vec widen(__m256i h, const Float16*) { return {_mm512_cvtph_ps(h)}; }
  __m256i narrow(const Float16*) const { return _mm512_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m256i narrow(const BFloat16*) const {
    const __m512i u = _mm512_castps_si512(reg);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(reg, reg, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }
};

static inline Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.reg, b.reg)};
}
static inline Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.reg, b.reg)};
}
static inline Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.reg, b.reg)};
}
static inline Vec fma(Vec a, Vec b, Vec c) { // a * b + c
  return {_mm512_fmadd_ps(a.reg, b.reg, c.reg)};
}

static inline void accumulate(Vec& sum, Vec a, Vec b) { // sum += a * b
  sum = fma(a, b, sum);
}

// As torch: relu(NaN) = NaN and relu(-0.0) = -0.0. The instruction returns its second operand in both cases.
static inline Vec at_least(Vec floor, Vec v) {
  return {_mm512_max_ps(floor.reg, v.reg)};
}
static inline Mask not_below_or_zero(Vec v) { // !(v <= 0): true for NaN
  return _mm512_cmp_ps_mask(v.reg, _mm512_setzero_ps(), _CMP_NLE_UQ);
}
static inline Mask greater_or_nan(Vec a, Vec b) { // a > b || isnan(a)
  return _mm512_cmp_ps_mask(a.reg, b.reg, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a.reg, a.reg, _CMP_UNORD_Q);
}
static inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm512_mask_mov_ps(no.reg, m, yes.reg)};
}
static inline uint32_t mask_bits(Mask m) {
  return m;
}
static inline Mask argmax_is(uint32_t packed, int position) { // lane l compares bits 2l and 2l + 1
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i lanes = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(int(packed)), shifts), _mm512_set1_epi32(3));
  return _mm512_cmpeq_epi32_mask(lanes, _mm512_set1_epi32(position));
}

// v[i] lane j <-> v[j] lane i.
static inline void transpose(Vec (&v)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) { // pairs of floats within 128 bits
    a[i] = _mm512_unpacklo_ps(v[i].reg, v[i + 1].reg);
    a[i + 1] = _mm512_unpackhi_ps(v[i].reg, v[i + 1].reg);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) { // four floats: b[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g to 4 g + 3
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) { // the 4x4 of 128-bit parts
    const __m512 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    v[c].reg = _mm512_shuffle_f32x4(low01, low23, 0x88);
    v[4 + c].reg = _mm512_shuffle_f32x4(high01, high23, 0x88);
    v[8 + c].reg = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    v[12 + c].reg = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}

static inline void fence_streams() {
  _mm_sfence();
}
