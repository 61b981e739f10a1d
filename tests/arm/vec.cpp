// Every operation of csrc/cpu/vec_neon.h against its definition, one lane at a time. Exit status 0 if all agree.
#include <arm_neon.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/dtypes.h"

namespace vggfast::cpu {
#include "cpu/vec_neon.h"

namespace {

constexpr int width = Vec::width;

bool same(float a, float b) { // NaN is NaN; -0 is not 0
  return (a != a && b != b) || float_bits(a) == float_bits(b);
}

void expect(const char* what, float got, float expected) {
  if (same(got, expected)) return;
  printf("%s: expected %a, got %a\n", what, double(expected), double(got));
  exit(1);
}

float lane(Vec v, int i) {
  float lanes[width];
  v.store(lanes);
  return lanes[i];
}

// Special values, and others of all sizes, as many as whole vectors take.
std::vector<float> values() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> all = {0.f,    -0.f,    1.f,     -1.f,    inf,     -inf,     nan, -nan,
                            1e-45f, -1e-45f, 65504.f, 65520.f, 3.4e38f, -3.4e38f, 2.f, 0.5f};
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 48; ++i) all.push_back(normal(random) * std::ldexp(1.f, i - 24));
  return all;
}

template <class T>
void check_storage(const char* name) {
  for (uint32_t first = 0; first < 1 << 16; first += width) { // every value of T
    T stored[width];
    for (int i = 0; i < width; ++i) stored[i].bits = uint16_t(first + i);
    for (int i = 0; i < width; ++i) expect(name, lane(Vec::load(stored), i), to_float(stored[i]));
  }
  std::mt19937 random(5);
  for (uint32_t step = 0; step < 1 << 20; ++step) { // values between two of T, exactly in the middle, and any bits
    float floats[width];
    for (int i = 0; i < width; ++i) {
      const uint32_t bits = uint32_t(random());
      floats[i] = bits_float(step % 3 == 0 ? bits : step % 3 == 1 ? (bits & 0xffff0000) | 0x8000 : (bits & 0xffffe000) | 0x1000);
      if (step % 3 == 2 && step % 2) floats[i] = std::ldexp(floats[i], -112); // to half's range, and its subnormals
    }
    T got[width];
    const Vec v = Vec::load(floats);
    v.store(got);
    for (int i = 0; i < width; ++i) {
      T expected;
      from_float(floats[i], &expected);
      expect(name, to_float(got[i]), to_float(expected));
      expect(name, lane(v.rounded(got), i), to_float(expected));
    }
  }
}

template <class T>
void check_first_lanes(const char* name) {
  for (int n = 1; n <= width; ++n) {
    T from[width], to[width];
    for (int i = 0; i < width; ++i) from_float(float(i + 1), from + i), from_float(-1.f, to + i);
    const Vec v = Vec::load_first(from, n);
    Vec::load(from).store_first(to, n);
    for (int i = 0; i < width; ++i) {
      expect(name, lane(v, i), i < n ? float(i + 1) : 0.f);
      expect(name, to_float(to[i]), i < n ? float(i + 1) : -1.f);
    }
  }
}

void check_pair(Vec a, Vec b, const float* x, const float* y) {
  const Vec yes = Vec::set(7.f), no = Vec::set(9.f);
  const Vec greater = select(greater_or_nan(a, b), yes, no), open = select(not_below_or_zero(a), yes, no);
  Vec sum = b;
  accumulate(sum, a, b);
  for (int i = 0; i < width; ++i) {
    expect("+", lane(a + b, i), x[i] + y[i]);
    expect("-", lane(a - b, i), x[i] - y[i]);
    expect("*", lane(a * b, i), x[i] * y[i]);
    expect("fma", lane(fma(a, b, a), i), std::fma(x[i], y[i], x[i]));
    expect("accumulate", lane(sum, i), std::fma(x[i], y[i], y[i]));
    expect("at_least", lane(at_least(a, b), i), y[i] < x[i] ? x[i] : y[i]);
    expect("greater_or_nan", lane(greater, i), x[i] > y[i] || x[i] != x[i] ? 7.f : 9.f);
    expect("not_below_or_zero", lane(open, i), !(x[i] <= 0) ? 7.f : 9.f);
  }
}

void check_masks() {
  for (uint32_t bits = 0; bits < 1 << width; ++bits) {
    float lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = bits >> i & 1 ? 1.f : -1.f;
    expect("mask_bits", float(mask_bits(not_below_or_zero(Vec::load(lanes)))), float(bits));
  }
  for (uint32_t packed = 0; packed < 1 << 2 * width; ++packed)
    for (int position = 0; position < 4; ++position) {
      const Vec found = select(argmax_is(packed, position), Vec::set(1.f), Vec::zero());
      for (int i = 0; i < width; ++i) expect("argmax_is", lane(found, i), int(packed >> 2 * i & 3) == position ? 1.f : 0.f);
    }
}

void check_transpose() {
  Vec rows[width];
  for (int i = 0; i < width; ++i) {
    float lanes[width];
    for (int j = 0; j < width; ++j) lanes[j] = float(10 * i + j);
    rows[i] = Vec::load(lanes);
  }
  transpose(rows);
  for (int i = 0; i < width; ++i)
    for (int j = 0; j < width; ++j) expect("transpose", lane(rows[i], j), float(10 * j + i));
}

} // namespace
} // namespace vggfast::cpu

int main() {
  using namespace vggfast::cpu;
  check_storage<BFloat16>("bfloat16");
  check_storage<Float16>("float16");
  check_first_lanes<float>("first lanes of float");
  check_first_lanes<BFloat16>("first lanes of bfloat16");
  check_first_lanes<Float16>("first lanes of float16");
  const std::vector<float> all = values();
  for (size_t i = 0; i + width <= all.size(); ++i)
    for (size_t j = 0; j + width <= all.size(); ++j) check_pair(Vec::load(&all[i]), Vec::load(&all[j]), &all[i], &all[j]);
  check_masks();
  check_transpose();
  puts("all agree");
}
