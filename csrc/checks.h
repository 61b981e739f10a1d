// What every backend's ops demand of their arguments, checked once. vggfast/ops.py sends only calls that pass; these guard the raw
// ops.
#pragma once
#include <string>

#include "linear.h"
#include "torch_glue.h"

namespace vggfast {

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Sizes and offsets are computed in 64 bits with factors of up to a few thousand; an expanded tensor can have more elements than
// any memory.
constexpr int64_t max_elements = int64_t(1) << 40;

// A tensor outlives its memory where the storage was resized, as sharded training does between uses.
inline void check_memory(const Tensor& t, const char* name) {
  const int64_t elements = t.numel();
  STD_TORCH_CHECK(elements <= max_elements, name, ": expected at most ", max_elements, " elements, got ", shape_of(t));
  if (elements == 0) return;
  int64_t last = t.storage_offset(), bytes = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t needed = (last + 1) * int64_t(t.element_size());
  STD_TORCH_CHECK(needed <= bytes, name, ": expected a storage of at least ", needed, " bytes for ", shape_of(t), ", got ", bytes,
                  ": it was resized after the tensor was made");
}

inline void check_image(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", shape_of(t));
  for (int i = 1; i < 4; ++i) STD_TORCH_CHECK(t.size(i) > 0, name, ": expected C, H, W of at least 1, got ", shape_of(t));
  dtype_of(t);
  check_memory(t, name);
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "cpu" : "another";
}

inline void check_same_kind(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  STD_TORCH_CHECK(t.scalar_type() == as.scalar_type(), name, ": expected the dtype of ", as_name, ", ", as.scalar_type(), ", got ",
                  t.scalar_type());
  STD_TORCH_CHECK(t.device() == as.device(), name, ": expected on the device of ", as_name, ", ", device_of(as), ", got ",
                  device_of(t));
}

inline void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.size(0) > 0 && weight.size(1) > 0,
                  "weight: expected [C_out, C_in, 3, 3], got ", shape_of(weight));
  check_memory(weight, "weight");
}

inline void check_pooled_image(const Tensor& x) {
  check_image(x, "x");
  STD_TORCH_CHECK(x.size(2) >= 2 && x.size(3) >= 2, "x: expected H and W of at least 2 to pool, got ", shape_of(x));
}

inline void check_conv3x3(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool pool) {
  check_image(x, "x");
  check_weight(weight);
  check_same_kind(weight, "weight", x, "x");
  STD_TORCH_CHECK(x.size(1) == weight.size(1), "x: expected ", weight.size(1), " channels, as weight ", shape_of(weight),
                  " has, got ", shape_of(x));
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias: expected [", weight.size(0), "], got ",
                    shape_of(*bias));
    check_same_kind(*bias, "bias", x, "x");
    check_memory(*bias, "bias");
  }
  if (pool) check_pooled_image(x);
}

// A gradient of [n, c, h, w], or of that after a 2x2 pool, with what the forward pass saved about it.
inline void check_gradient(const Tensor& grad, const MaybeTensor& y, const MaybeTensor& argmax, int64_t h, int64_t w) {
  check_image(grad, "grad");
  const int64_t gh = argmax ? h / 2 : h, gw = argmax ? w / 2 : w;
  STD_TORCH_CHECK(grad.size(2) == gh && grad.size(3) == gw, "grad: expected height and width ", gh, " x ", gw, ", got ",
                  shape_of(grad));
  if (y) {
    check_same_kind(*y, "y", grad, "grad");
    bool same = y->dim() == 4;
    for (int i = 0; same && i < 4; ++i) same = y->size(i) == grad.size(i);
    STD_TORCH_CHECK(same, "y: expected the size of grad, ", shape_of(grad), ", got ", shape_of(*y));
    check_memory(*y, "y");
  }
  if (argmax) {
    STD_TORCH_CHECK(argmax->defined(), "argmax: expected a tensor, got None");
    const bool fits = argmax->dim() == 4 && argmax->size(0) == grad.size(0) && argmax->size(1) == gh && argmax->size(2) == gw &&
                      argmax->size(3) == (grad.size(1) + 3) / 4;
    STD_TORCH_CHECK(fits && argmax->scalar_type() == torch::headeronly::ScalarType::Byte && argmax->is_contiguous() &&
                        argmax->device() == grad.device(),
                    "argmax: expected contiguous uint8 [N, H/2, W/2, ceil(C/4)] for grad ", shape_of(grad), " on its device, got ",
                    argmax->scalar_type(), " ", shape_of(*argmax));
    check_memory(*argmax, "argmax");
  }
}

inline void check_grad_input(const Tensor& grad, const Tensor& weight, const MaybeTensor& y, const MaybeTensor& argmax, int64_t h,
                             int64_t w) {
  check_gradient(grad, y, argmax, h, w);
  check_weight(weight);
  check_same_kind(weight, "weight", grad, "grad");
  STD_TORCH_CHECK(grad.size(1) == weight.size(0), "grad: expected ", weight.size(0), " channels, got ", shape_of(grad));
}

inline void check_grad_weight(const Tensor& x, const Tensor& grad, const MaybeTensor& y, const MaybeTensor& argmax) {
  check_image(x, "x");
  check_gradient(grad, y, argmax, x.size(2), x.size(3));
  check_same_kind(grad, "grad", x, "x");
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "grad: expected batch ", x.size(0), ", got ", shape_of(grad));
}

inline void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) > 0 && t.size(1) > 0, name, ": expected a matrix with elements, got ", shape_of(t));
  dtype_of(t);
  check_memory(t, name);
}

// One of the small matrices, a row for each image of the batch.
inline void check_rows(const Tensor& t, const char* name, int64_t columns) {
  check_matrix(t, name);
  STD_TORCH_CHECK(t.size(0) <= max_linear_rows && t.size(1) == columns, name, ": expected at most ", max_linear_rows, " rows of ",
                  columns, ", got ", shape_of(t));
}

// Weights may be kept in float32 beside images, and gradients, of fewer bits.
inline void check_linear_weight(const Tensor& weight, const Tensor& as, const char* as_name) {
  if (weight.scalar_type() != torch::headeronly::ScalarType::Float || weight.device() != as.device())
    check_same_kind(weight, "weight", as, as_name);
}

inline void check_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  check_matrix(weight, "weight");
  check_rows(x, "x", weight.size(1));
  check_linear_weight(weight, x, "x");
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias: expected [", weight.size(0), "], got ",
                  shape_of(*bias));
  check_same_kind(*bias, "bias", weight, "weight");
  check_memory(*bias, "bias");
}

// The gradient of a layer's output, and the output where a ReLU was its last step.
inline void check_linear_grad(const Tensor& grad, int64_t outputs, const MaybeTensor& y) {
  check_rows(grad, "grad", outputs);
  if (!y) return;
  check_rows(*y, "y", outputs);
  check_same_kind(*y, "y", grad, "grad");
  STD_TORCH_CHECK(y->size(0) == grad.size(0), "y: expected the size of grad, ", shape_of(grad), ", got ", shape_of(*y));
}

inline void check_linear_grad_input(const Tensor& grad, const Tensor& weight, const MaybeTensor& y) {
  check_matrix(weight, "weight");
  check_linear_grad(grad, weight.size(0), y);
  check_linear_weight(weight, grad, "grad");
}

inline void check_linear_grad_weight(const Tensor& x, const Tensor& grad, const MaybeTensor& y) {
  check_matrix(grad, "grad");
  check_matrix(x, "x");
  check_rows(x, "x", x.size(1));
  check_linear_grad(grad, grad.size(1), y);
  check_same_kind(grad, "grad", x, "x");
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "grad: expected ", x.size(0), " rows, as x has, got ", shape_of(grad));
  STD_TORCH_CHECK(grad.size(1) <= max_elements / x.size(1), "weight: expected at most ", max_elements, " elements, got ",
                  shape_of(grad), " outputs of ", shape_of(x));
}

} // namespace vggfast
