// 4 floats through the compiler's vector extension: SSE2 on x86-64, NEON on Arm. Included inside the ISA's namespace.

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

struct Vec {
  static constexpr int width = 4, registers = 16;
  Float4 reg;

  static Vec zero() { return set(0); }
  static Vec set(float f) { return {Float4{f, f, f, f}}; }

  template <class T>
  static Vec load(const T* p) {
    return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  static Vec load(const float* p) {
    Vec v;
    memcpy(&v.reg, p, 16);
    return v;
  }
  // The first n lanes (0 < n), zeros after them; never touches memory past lane n.
  template <class T>
  static Vec load_first(const T* p, int n) {
    T lanes[4] = {};
    memcpy(lanes, p, sizeof(T) * (n < 4 ? n : 4));
    return load(lanes);
  }

  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 4; ++i) from_float(reg[i], p + i);
  }
  void store(float* p) const { memcpy(p, &reg, 16); }
  void stream(float* p) const { store(p); }
  template <class T>
  void store_first(T* p, int n) const {
    T lanes[4];
    store(lanes);
    memcpy(p, lanes, sizeof(T) * (n < 4 ? n : 4));
  }

  // The value as it reads back after being stored as T.
  template <class T>
  Vec rounded(const T*) const {
    T lanes[4];
    store(lanes);
    return load(lanes);
  }
};

static inline Vec operator+(Vec a, Vec b) {
  return {a.reg + b.reg};
}
static inline Vec operator-(Vec a, Vec b) {
  return {a.reg - b.reg};
}
static inline Vec operator*(Vec a, Vec b) {
  return {a.reg * b.reg};
}
static inline Vec fma(Vec a, Vec b, Vec c) { // a * b + c, rounded twice where the baseline has no FMA
  return {a.reg * b.reg + c.reg};
}
static inline void accumulate(Vec& sum, Vec a, Vec b) { // sum += a * b
  sum = fma(a, b, sum);
}

static inline Mask not_below_or_zero(Vec v) { // !(v <= 0): true for NaN
  return ~(v.reg <= Vec::zero().reg);
}
static inline Mask greater_or_nan(Vec a, Vec b) { // a > b || isnan(a)
  return (a.reg > b.reg) | (a.reg != a.reg);
}
static inline Vec select(Mask m, Vec yes, Vec no) {
  return {(Float4)((m & (Mask)yes.reg) | (~m & (Mask)no.reg))};
}
static inline uint32_t mask_bits(Mask m) {
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}
static inline Mask argmax_is(uint32_t packed, int position) { // lane l compares bits 2l and 2l + 1
  const int p = int(packed);
  return (Mask{p, p >> 2, p >> 4, p >> 6} & 3) == position;
}
// As torch: relu(NaN) = NaN and relu(-0.0) = -0.0.
static inline Vec at_least(Vec floor, Vec v) {
  return select(v.reg < floor.reg, floor, v);
}

// v[i] lane j <-> v[j] lane i.
static inline void transpose(Vec (&v)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float other = v[i].reg[j];
      v[i].reg[j] = v[j].reg[i];
      v[j].reg[i] = other;
    }
}

static inline void fence_streams() {}
