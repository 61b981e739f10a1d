// The fully connected layers that have kernels, as plain values: a small batch, whose product is as fast as memory gives the
// weights.
#pragma once
#include "conv3x3.h"

namespace vggfast {

constexpr int64_t max_linear_rows = 16; // beyond them arithmetic is the limit, which a general matrix product reaches

// y[rows][out] = x[rows][in] weight[out][in]^T + bias, in fp32. The weights alone come as they are stored: they are nearly all of
// the memory.
struct Linear {
  int64_t rows, in, out;
  DType dtype;        // of the weights, or of their gradient
  const void* weight; // columns adjacent
  int64_t weight_row;
  const float* bias; // [out] or null
  bool relu;
};

} // namespace vggfast
