// C++ twins of csrc/cuda/ptx/sm80.cuh: the same names and signatures, carried out by the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace vggfast::cuda::ptx {

template <class T>
T& dynamic_shared() {
  static_assert(alignof(T) <= 1024);
  return *static_cast<T*>(emulator::dynamic_shared());
}

inline void cp_async_cg_16(void* shared, const void* global, int source_bytes) {
  emulator::cp_async(shared, global, 16, source_bytes);
}

template <int kBytes>
void cp_async_ca(void* shared, const void* global, int source_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async.ca copies 4, 8 or 16 bytes");
  emulator::cp_async(shared, global, kBytes, source_bytes);
}

inline void cp_async_commit() {
  emulator::cp_async_commit();
}

template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0);
  emulator::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
  emulator::ldmatrix_x4(matrices, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row) {
  emulator::ldmatrix_x4(matrices, row, true);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(emulator::MmaType::bf16, d, a, b0, b1);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(emulator::MmaType::f16, d, a, b0, b1);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(emulator::MmaType::tf32, d, a, b0, b1);
}

inline uint32_t round_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) {
    return 0x7fff;
  }
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t cvt_bf16x2(float low, float high) {
  return round_bf16(high) << 16 | round_bf16(low);
}

inline uint32_t round_f16(float value) {
  if (std::isnan(value)) {
    return 0x7fff;
  }
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint32_t cvt_f16x2(float low, float high) {
  return round_f16(high) << 16 | round_f16(low);
}

inline float cvt_f32_from_f16(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

/// Ties away from zero; infinities and NaN keep their upper bits.
inline uint32_t cvt_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

} // namespace vggfast::cuda::ptx
