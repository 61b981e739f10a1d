// 4 floats in a NEON register. Included inside the ISA's namespace.

using Mask = uint32x4_t;

struct Vec {
  static constexpr int width = 4, registers = 32;
  float32x4_t reg;

  static Vec zero() { return set(0); }
  static Vec set(float f) { return {vdupq_n_f32(f)}; }

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  template <class T>
  static Vec load(const T* p) {
    uint16x4_t bits;
    memcpy(&bits, p, 8);
    return widen(bits, p);
  }
  // The first n lanes (0 < n), zeros after them; never touches memory past lane n.
  template <class T>
  static Vec load_first(const T* p, int n) {
    T lanes[4] = {};
    for (int i = 0; i < 4 && i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }

  void store(float* p) const { vst1q_f32(p, reg); }
  template <class T>
  void store(T* p) const {
    const uint16x4_t bits = narrow(p);
    memcpy(p, &bits, 8);
  }
  void stream(float* p) const { store(p); }
  template <class T>
  void store_first(T* p, int n) const {
    T lanes[4];
    store(lanes);
    for (int i = 0; i < 4 && i < n; ++i) p[i] = lanes[i];
  }

  // The value as it reads back after being stored as T.
  Vec rounded(const float*) const { return *this; }
  template <class T>
  Vec rounded(const T* type) const {
    return widen(narrow(type), type);
  }

private:
  static Vec widen(uint16x4_t b, const BFloat16*) { return {vreinterpretq_f32_u32(vshll_n_u16(b, 16))}; }
  static Vec widen(uint16x4_t h, const Float16*) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }
  uint16x4_t narrow(const Float16*) const { return vreinterpret_u16_f16(vcvt_f16_f32(reg)); }
  uint16x4_t narrow(const BFloat16*) const {
    const uint32x4_t u = vreinterpretq_u32_f32(reg), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t even = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(reg, reg), even, vdupq_n_u32(0x7fc00000)), 16);
  }
};

static inline Vec operator+(Vec a, Vec b) {
  return {vaddq_f32(a.reg, b.reg)};
}
static inline Vec operator-(Vec a, Vec b) {
  return {vsubq_f32(a.reg, b.reg)};
}
static inline Vec operator*(Vec a, Vec b) {
  return {vmulq_f32(a.reg, b.reg)};
}
static inline Vec fma(Vec a, Vec b, Vec c) { // a * b + c
  return {vfmaq_f32(c.reg, a.reg, b.reg)};
}
static inline void accumulate(Vec& sum, Vec a, Vec b) { // sum += a * b
  sum = fma(a, b, sum);
}

// As torch: relu(NaN) = NaN and relu(-0.0) = -0.0, which is not what vmaxq_f32 returns.
static inline Vec at_least(Vec floor, Vec v) {
  return {vbslq_f32(vcltq_f32(v.reg, floor.reg), floor.reg, v.reg)};
}
static inline Mask not_below_or_zero(Vec v) { // !(v <= 0): true for NaN
  return vmvnq_u32(vclezq_f32(v.reg));
}
static inline Mask greater_or_nan(Vec a, Vec b) { // a > b || isnan(a)
  return vorrq_u32(vcgtq_f32(a.reg, b.reg), vmvnq_u32(vceqq_f32(a.reg, a.reg)));
}
static inline Vec select(Mask m, Vec yes, Vec no) {
  return {vbslq_f32(m, yes.reg, no.reg)};
}
static inline uint32_t mask_bits(Mask m) {
  return vaddvq_u32(vandq_u32(m, uint32x4_t{1, 2, 4, 8}));
}
static inline Mask argmax_is(uint32_t packed, int position) { // lane l compares bits 2l and 2l + 1
  const uint32x4_t lanes = vandq_u32(vshlq_u32(vdupq_n_u32(packed), int32x4_t{0, -2, -4, -6}), vdupq_n_u32(3));
  return vceqq_u32(lanes, vdupq_n_u32(uint32_t(position)));
}

// v[i] lane j <-> v[j] lane i.
static inline void transpose(Vec (&v)[4]) {
  const float32x4_t a = vtrn1q_f32(v[0].reg, v[1].reg), b = vtrn2q_f32(v[0].reg, v[1].reg);
  const float32x4_t c = vtrn1q_f32(v[2].reg, v[3].reg), d = vtrn2q_f32(v[2].reg, v[3].reg);
  const auto low = [](float32x4_t x, float32x4_t y) {
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  };
  const auto high = [](float32x4_t x, float32x4_t y) {
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  };
  v[0].reg = low(a, c), v[1].reg = low(b, d), v[2].reg = high(a, c), v[3].reg = high(b, d);
}

static inline void fence_streams() {}
