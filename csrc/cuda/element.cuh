// The three element types of the tensor-core kernels: how they sit in memory, round, and multiply.
#pragma once

#include "cuda/problem.h"
#include "cuda/ptx/sm80.cuh"

namespace vggfast::cuda {

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr DType dtype = DType::bf16;
  static __device__ float load(Storage bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  static __device__ Storage round(float value) { return static_cast<Storage>(ptx::cvt_bf16x2(value, 0.0f)); }
  static __device__ uint32_t operand(uint32_t word) { return word; }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr DType dtype = DType::fp16;
  static __device__ float load(Storage bits) { return ptx::cvt_f32_from_f16(bits); }
  static __device__ Storage round(float value) { return static_cast<Storage>(ptx::cvt_f16x2(value, 0.0f)); }
  static __device__ uint32_t operand(uint32_t word) { return word; }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  }
};

/// fp32 in memory, operands rounded to TF32 on their way into the tensor core: truncation would double the error.
struct TFloat32 {
  using Storage = float;
  static constexpr DType dtype = DType::tf32;
  static __device__ float load(Storage value) { return value; }
  static __device__ Storage round(float value) { return value; }
  static __device__ uint32_t operand(uint32_t word) { return ptx::cvt_tf32(word); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k8_tf32(d, a, b0, b1);
  }
};

/// Elements in the 16 bytes that one thread moves at a time; channel counts must be multiples of it.
template <class Element>
inline constexpr int kVector = 16 / int{sizeof(typename Element::Storage)};

/// One 16-byte vector seen as elements.
template <class Element>
union Vector {
  uint4 words;
  typename Element::Storage elements[kVector<Element>];
};

} // namespace vggfast::cuda
