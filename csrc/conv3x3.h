// The problem every convolution kernel solves, as plain values: no torch, no CUDA.
#pragma once
#include <cstdint>

namespace vggfast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// What a kernel reads as its input image [N, C, H, W].
//   plain:  data itself
//   masked: the gradient before a ReLU: data where !(y <= 0), else 0 (NaN in y lets the gradient through, as torch has it)
//   pooled: the gradient before a 2x2 max-pool (and a ReLU, if y is given): data sits at the position argmax names, else 0
// data and y have channel stride 1 unless `stride_c` says otherwise, which only the direct kernels and plain images accept.
enum class ImageKind : int { plain = 0, masked = 1, pooled = 2 };

struct Image {
  ImageKind kind = ImageKind::plain;
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0;                             // the image as the kernel sees it (before pooling)
  const void* data = nullptr;                                     // pooled: [N, H/2, W/2, C]
  int64_t stride_n = 0, stride_c = 1, stride_h = 0, stride_w = 0; // in elements
  const void* y = nullptr;                                        // same size as data
  int64_t y_stride_n = 0, y_stride_h = 0, y_stride_w = 0;
  const uint8_t* argmax = nullptr; // [N, H/2, W/2, ceil(C/4)], contiguous; 2 bits a channel, dh * 2 + dw
};

// Filters [out, in, 3, 3] with any strides. grad_input runs the forward kernel on filters with in and out swapped and both
// taps mirrored: that is another set of strides, not another kernel.
struct Filters {
  DType dtype = DType::f32;
  int64_t out = 0, in = 0;
  const void* data = nullptr; // element (0, 0, 0, 0)
  int64_t stride_out = 0, stride_in = 0, stride_r = 0, stride_s = 0;
};

// Where results go: NHWC-contiguous [N, H, W, C], or [N, H/2, W/2, C] with pool.
struct Output {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0; // before pooling
  void* data = nullptr;
  uint8_t* argmax = nullptr;   // [N, H/2, W/2, ceil(C/4)] or null
  const float* bias = nullptr; // [C rounded up to 64] or null
  bool relu = false, pool = false;
  bool stream = false; // store past the caches: data aligned to 64 bytes; fp32 and c a multiple of 16, or by AMX's kernels
                       // unpooled bf16 and c a multiple of 32
};

} // namespace vggfast
