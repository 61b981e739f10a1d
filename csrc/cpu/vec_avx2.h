// 8 floats in a ymm register. Included inside the ISA's namespace, after its target region begins.

using Mask = __m256;

struct Vec {
  static constexpr int width = 8, registers = 16;
  __m256 reg;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float f) { return {_mm256_set1_ps(f)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  template <class T>
  static Vec load(const T* p) {
    return widen(_mm_loadu_si128((const __m128i*)p), p);
  }

  // The first n lanes (0 < n), zeros after them; never touches memory past lane n.
  static Vec load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  template <class T>
  static Vec load_first(const T* p, int n) {
    T lanes[8] = {};
    memcpy(lanes, p, sizeof(T) * (n < 8 ? n : 8));
    return load(lanes);
  }

  void store(float* p) const { _mm256_storeu_ps(p, reg); }
  template <class T>
  void store(T* p) const {
    _mm_storeu_si128((__m128i*)p, narrow(p));
  }
  // Past the caches; p is aligned to a vector. Call fence_streams() before another thread may read.
  void stream(float* p) const { _mm256_stream_ps(p, reg); }
  void store_first(float* p, int n) const { _mm256_maskstore_ps(p, first(n), reg); }
  template <class T>
  void store_first(T* p, int n) const {
    T lanes[8];
    store(lanes);
    memcpy(p, lanes, sizeof(T) * (n < 8 ? n : 8));
  }

  // The value as it reads back after being stored as T.
  Vec rounded(const float*) const { return *this; }
  template <class T>
  Vec rounded(const T* type) const {
    return widen(narrow(type), type);
  }

private:
  static __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static Vec widen(__m128i b, const BFloat16*) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))}; }
  static Vec widen(__m128i h, const Float16*) { return {_mm256_cvtph_ps(h)}; }
  __m128i narrow(const Float16*) const { return _mm256_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m128i narrow(const BFloat16*) const {
    const __m256i u = _mm256_castps_si256(reg);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(reg, reg, _CMP_UNORD_Q));
    const __m256i lanes = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  }
};

static inline Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.reg, b.reg)};
}
static inline Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.reg, b.reg)};
}
static inline Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.reg, b.reg)};
}
static inline Vec fma(Vec a, Vec b, Vec c) { // a * b + c
  return {_mm256_fmadd_ps(a.reg, b.reg, c.reg)};
}
// sum += a * b. Left to itself the compiler takes forms that overwrite a factor, and copies it first.
static inline void accumulate(Vec& sum, Vec a, Vec b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.reg) : "x"(a.reg), "x"(b.reg));
}

// As torch: relu(NaN) = NaN and relu(-0.0) = -0.0. The instruction returns its second operand in both cases.
static inline Vec at_least(Vec floor, Vec v) {
  return {_mm256_max_ps(floor.reg, v.reg)};
}
static inline Mask not_below_or_zero(Vec v) { // !(v <= 0): true for NaN
  return _mm256_cmp_ps(v.reg, _mm256_setzero_ps(), _CMP_NLE_UQ);
}
static inline Mask greater_or_nan(Vec a, Vec b) { // a > b || isnan(a)
  return _mm256_or_ps(_mm256_cmp_ps(a.reg, b.reg, _CMP_GT_OQ), _mm256_cmp_ps(a.reg, a.reg, _CMP_UNORD_Q));
}
static inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.reg, yes.reg, m)};
}
static inline uint32_t mask_bits(Mask m) {
  return uint32_t(_mm256_movemask_ps(m));
}
static inline Mask argmax_is(uint32_t packed, int position) { // lane l compares bits 2l and 2l + 1
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i lanes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(int(packed)), shifts), _mm256_set1_epi32(3));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(position)));
}

// v[i] lane j <-> v[j] lane i.
static inline void transpose(Vec (&v)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) { // pairs of floats within 128 bits
    a[i] = _mm256_unpacklo_ps(v[i].reg, v[i + 1].reg);
    a[i + 1] = _mm256_unpackhi_ps(v[i].reg, v[i + 1].reg);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) { // four floats: b[4 g + c] holds columns c and c + 4 of rows 4 g to 4 g + 3
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c].reg = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    v[4 + c].reg = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

static inline void fence_streams() {
  _mm_sfence();
}
