// Tensor maps, which tell the copy engine how a tensor lies in memory. Host only.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/plan_sm90.h"

namespace vggfast::cuda::sm90 {

/// One dimension of a tensor and of the boxes that are copied out of it, in elements.
struct MapDimension {
  int64_t extent;
  int64_t stride; // 1 in the first
  int box;
};

/// The driver's encoder. Asked for through the runtime, because nothing here links against the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned since_cuda = 12000;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, since_cuda, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("vggfast: cuTensorMapEncodeTiled: expected a driver of CUDA 12.0 or newer, got one without it");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

/// fp32 is rounded to TF32 on its way to shared memory: the tensor cores would cut its low bits off, which doubles the error.
constexpr CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::bf16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : dtype == DType::fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
}

/// A map whose boxes arrive in the 128-byte swizzle, zeros outside the tensor. Innermost dimension first; its box is a row of the
/// swizzle. Throws std::runtime_error with `name` where the driver refuses.
template <int kRank>
CUtensorMap make_tensor_map(const char* name, DType dtype, const void* base, const MapDimension (&dimensions)[kRank]) {
  static const auto encode = tensor_map_encoder();
  cuuint64_t extents[kRank], strides[kRank];
  cuuint32_t box[kRank], element_strides[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(dimensions[i].extent);
    strides[i] = static_cast<cuuint64_t>(dimensions[i].stride) * static_cast<cuuint64_t>(element_bytes(dtype));
    box[i] = static_cast<cuuint32_t>(dimensions[i].box);
    element_strides[i] = 1;
  }
  CUtensorMap map;
  const CUresult result = encode(&map, map_type(dtype), kRank, const_cast<void*>(base), extents, strides + 1, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("vggfast: tensor map of ") + name + ": cuTensorMapEncodeTiled refused it with error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

inline constexpr int kRowBytes = 128; // of the swizzle

/// Of the first h rows and w columns of a dense [N, H, W, C] tensor, in boxes of a row of channels of the pixels of `box`.
inline CUtensorMap make_image_map(const char* name, DType dtype, const void* base, int64_t n, int64_t h, int64_t w, int64_t c,
                                  const PixelBox& box, int64_t whole_h, int64_t whole_w) {
  const MapDimension dimensions[] = {
      {c, 1, swizzle_row(dtype)}, {w, c, box.w}, {h, whole_w * c, box.h}, {n, whole_h * whole_w * c, box.n}};
  return make_tensor_map(name, dtype, base, dimensions);
}

/// Of a weight [K, 9, C], in boxes of a row of input channels of one tap of `box_k` output channels.
inline CUtensorMap make_filter_map(DType dtype, const void* base, int64_t k, int64_t c, int box_k) {
  const MapDimension dimensions[] = {{c, 1, swizzle_row(dtype)}, {9, c, 1}, {k, 9 * c, box_k}};
  return make_tensor_map("weight", dtype, base, dimensions);
}

} // namespace vggfast::cuda::sm90
