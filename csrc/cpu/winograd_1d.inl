// The transforms of Winograd F(4, 3) over the points 0, +-sqrt(1/2), +-sqrt(2), infinity, and of F(2, 3) over four of these.
// Their fp32 error is half of what the usual 0, +-1, +-2 would give. docs/guide.md makes the matrices from the points.

static constexpr float kA = 0.70710678118654752f; // sqrt(1/2)
static constexpr float kB = 1.41421356237309505f; // sqrt(2)

// B^T d, one dimension.
static inline void input_1d(const Vec (&d)[6], Vec (&out)[6]) {
  const Vec five_halves = Vec::set(-2.5f);
  out[0] = fma(five_halves, d[2], d[0] + d[4]);
  out[5] = fma(five_halves, d[3], d[1] + d[5]);
  const Vec even1 = fma(Vec::set(-2.f), d[2], d[4]), odd1 = Vec::set(kA) * fma(Vec::set(-2.f), d[1], d[3]);
  const Vec even2 = fma(Vec::set(-.5f), d[2], d[4]), odd2 = Vec::set(kB) * fma(Vec::set(-.5f), d[1], d[3]);
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
}

// In one dimension, which of F(4)'s points is the i-th of `points`.
template <int points>
static constexpr int place_of_point(int i) {
  return i == 0 ? 0 : i + 6 - points; // of F(2): 0, 3, 4, 5, as in edges_have_point
}

// B^T d of F(2), one dimension: points 0, +-sqrt(2), infinity, scaled to meet the filters of F(4).
static inline void input_1d(const Vec (&d)[4], Vec (&out)[4]) {
  const Vec even = Vec::set(1.5f) * d[2], odd = Vec::set(1.5f * kB) * d[1];
  out[0] = fma(Vec::set(-.5f), d[2], d[0]);
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = fma(Vec::set(-2.f), d[1], d[3]);
}

// A^T m, one dimension: six products to four outputs.
static inline void output_1d(const Vec (&m)[6], Vec (&out)[4]) {
  const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  out[0] = m[0] + s1 + s2;
  out[1] = fma(Vec::set(kA), d1, Vec::set(kB) * d2);
  out[2] = fma(Vec::set(.5f), s1, Vec::set(2.f) * s2);
  out[3] = fma(Vec::set(kA / 2), d1, fma(Vec::set(2 * kB), d2, m[5]));
}

// A^T m of F(2), one dimension: four products to two outputs.
static inline void output_1d(const Vec (&m)[4], Vec (&out)[2]) {
  out[0] = m[0] + (m[1] + m[2]);
  out[1] = fma(Vec::set(kB), m[1] - m[2], m[3]);
}

// A g, one dimension: four output gradients to six points (the transpose of output_1d).
static inline void grad_output_1d(const Vec (&g)[4], Vec (&out)[6]) {
  out[0] = g[0];
  const Vec even1 = fma(Vec::set(.5f), g[2], g[0]), odd1 = Vec::set(kA) * fma(Vec::set(.5f), g[3], g[1]);
  const Vec even2 = fma(Vec::set(2.f), g[2], g[0]), odd2 = Vec::set(kB) * fma(Vec::set(2.f), g[3], g[1]);
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = g[3];
}

// A g of F(2), one dimension: two output gradients to four points.
static inline void grad_output_1d(const Vec (&g)[2], Vec (&out)[4]) {
  const Vec odd = Vec::set(kB) * g[1];
  out[0] = g[0];
  out[1] = g[0] + odd;
  out[2] = g[0] - odd;
  out[3] = g[1];
}

// G g, one dimension: three taps to six points.
static inline void filter_1d(const Vec (&g)[3], Vec (&out)[6]) {
  out[0] = g[0];
  const Vec even1 = Vec::set(-2.f / 3) * fma(Vec::set(.5f), g[2], g[0]), odd1 = Vec::set(-2.f / 3 * kA) * g[1];
  const Vec even2 = Vec::set(1.f / 6) * fma(Vec::set(2.f), g[2], g[0]), odd2 = Vec::set(kB / 6) * g[1];
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = g[2];
}

// G^T s, one dimension: six points to three taps (the transpose of filter_1d).
static inline void grad_filter_1d(const Vec (&s)[6], Vec (&out)[3]) {
  const Vec s1 = s[1] + s[2], d1 = s[1] - s[2], s2 = s[3] + s[4], d2 = s[3] - s[4];
  out[0] = fma(Vec::set(-2.f / 3), s1, fma(Vec::set(1.f / 6), s2, s[0]));
  out[1] = fma(Vec::set(-2.f / 3 * kA), d1, Vec::set(kB / 6) * d2);
  out[2] = fma(Vec::set(-1.f / 3), s1, fma(Vec::set(1.f / 3), s2, s[5]));
}
