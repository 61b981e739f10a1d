// The fully connected layers that have kernels, as plain values: a small batch, whose product is as fast as memory gives the
// weights.
#pragma once
#include <cstdint>

namespace vggfast {

constexpr int64_t max_linear_rows = 16; // beyond them arithmetic is the limit, which a general matrix product reaches

// y[rows][out] = x[rows][in] weight[out][in]^T + bias, in fp32.
struct Linear {
  int64_t rows, in, out;
  const float* weight; // columns adjacent
  int64_t weight_row;
  const float* bias; // [out] or null
  bool relu;
};

} // namespace vggfast
