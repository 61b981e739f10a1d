// Storage types of the CPU kernels and their scalar conversions. Arithmetic is always fp32.
#pragma once
#include <cstdint>
#include <cstring>

#include "conv3x3.h"

namespace vggfast::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float to_float(float f) {
  return f;
}
static inline float to_float(BFloat16 b) {
  return bits_float(uint32_t(b.bits) << 16);
}
static inline float to_float(Float16 h) {
  // Mantissa and exponent shift into fp32's place. A subnormal gets an exponent to be taken off again: as a subnormal float it
  // would be zero where the CPU flushes those.
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = uint32_t(h.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return bits_float(sign | rest | 0x7f800000);
  if (rest >= 0x00800000) return bits_float(sign | (rest + 0x38000000));
  return bits_float(sign | float_bits(bits_float(rest + 0x38800000) - 0x1p-14f));
}

static inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// body(a null pointer to the type that `dtype` names).
template <class Body>
static inline auto with_type(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body((float*)nullptr);
  if (dtype == DType::bf16) return body((BFloat16*)nullptr);
  return body((Float16*)nullptr);
}

// Round to nearest even, NaN stays NaN.
static inline void from_float(float f, float* out) {
  *out = f;
}
static inline void from_float(float f, BFloat16* out) {
  const uint32_t u = float_bits(f);
  out->bits = f != f ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void from_float(float f, Float16* out) {
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) { // rounds to 65520 or more: infinity
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) { // below 2^-14: a subnormal half; adding 0.5 aligns and rounds the mantissa
    const float aligned = bits_float(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (float_bits(aligned) - float_bits(0.5f)));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out->bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
  }
}

} // namespace vggfast::cpu
