// The sizes and pointers of one 3x3 convolution (stride 1, padding 1) as the CUDA kernels see them. Plain host C++.
//
// Memory orders, all dense:
//   x, grad_input            [N, H, W, C]
//   weight, grad_weight      [K, 3, 3, C]   (a torch weight [K, C, 3, 3] in channels_last)
//   y, grad_output           [N, Ho, Wo, K] (Ho, Wo = H, W, or their halves rounded down when pool is set)
//   argmax                   [N, Ho, Wo, ceil(K / 4)] bytes; channel c in bits 2 (c % 4) of byte c / 4, value 2 dh + dw
#pragma once

#include <cstdint>

namespace vggfast::cuda {

/// Type of the tensors in memory; tf32 stands for fp32 tensors whose products are taken in TF32.
enum class DType : int { bf16, fp16, tf32 };

constexpr int element_bytes(DType dtype) {
  return dtype == DType::tf32 ? 4 : 2;
}

struct Problem {
  int64_t n, h, w; // images, input rows, input columns
  int64_t c, k;    // input channels, output channels
  DType dtype;
  bool relu; // the forward pass applied ReLU
  bool pool; // the forward pass applied a 2x2 max pool after it (floor mode)
};

struct ForwardPointers {
  const void* x;
  const void* weight;
  const void* bias; // [K] or null
  void* y;
  uint8_t* argmax; // null where no gradient will be asked for; only read when pool is set
  void* workspace; // Plan::workspace_bytes, 16-byte aligned; null where that is 0
  // Strides of x in elements; only the first-layer kernel reads other than dense NHWC.
  int64_t stride_n, stride_h, stride_w, stride_c;
};

/// The gradient that arrives, and what says which of it goes through: y where relu is set, argmax where pool is set.
struct GradOutput {
  const void* grad;
  const void* y;
  const uint8_t* argmax;
};

struct GradInputPointers {
  GradOutput output;
  const void* weight;
  void* grad_input;
  void* workspace; // Plan::workspace_bytes, 16-byte aligned; null where that is 0
};

struct GradWeightPointers {
  GradOutput output;
  const void* x;
  void* workspace; // Plan::workspace_bytes, 16-byte aligned
  void* grad_weight;
  void* grad_bias; // [K] or null
};

/// 2x2 max pooling of [N, H, W, C] on its own, floor mode.
struct PoolPointers {
  const void* x;
  void* y;
  uint8_t* argmax; // or null
};

/// From the gradient of the fused op's output to that of the convolution's own output.
struct GradPreactPointers {
  GradOutput output;
  void* grad_preact; // [N, H, W, K]
};

} // namespace vggfast::cuda
