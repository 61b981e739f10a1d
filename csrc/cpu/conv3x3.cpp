// The CPU ops: validate, allocate, plan, run on torch's threads.
#include "cpu/settings.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "checks.h"
#include "cpu/bias.h"
#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"
#include "torch_glue.h"

namespace vggfast::cpu {
namespace {

Algorithm parse_algo(const std::string& name) {
  if (name.empty() || name == "auto") return Algorithm::automatic;
  if (name == "winograd") return Algorithm::winograd;
  if (name == "direct") return Algorithm::direct;
  throw std::invalid_argument("VGGFAST_CONV_ALGO: expected auto, winograd or direct, got '" + name + "'");
}

std::atomic<Algorithm>& algo() {
  static std::atomic<Algorithm> chosen{parse_algo(std::getenv("VGGFAST_CONV_ALGO") ? std::getenv("VGGFAST_CONV_ALGO") : "")};
  return chosen;
}

Machine this_machine(const Kernels& k) {
  return machine(k, int(torch::stable::get_num_threads()));
}

Image plain_image(const Tensor& t) {
  Image image;
  image.dtype = dtype_of(t);
  image.n = t.size(0), image.c = t.size(1), image.h = t.size(2), image.w = t.size(3);
  image.data = t.const_data_ptr();
  image.stride_n = t.stride(0), image.stride_h = t.stride(2), image.stride_w = t.stride(3);
  image.stride_c = image.c == 1 ? 1 : t.stride(1);
  return image;
}

// The gradient before ReLU and pool. The tensors must outlive the image and have adjacent channels.
Image gradient_image(const Tensor& grad, const MaybeTensor& y, const MaybeTensor& argmax, int64_t h, int64_t w) {
  Image image = plain_image(grad);
  image.kind = argmax ? ImageKind::pooled : y ? ImageKind::masked : ImageKind::plain;
  image.h = h, image.w = w;
  if (y) {
    image.y = y->const_data_ptr();
    image.y_stride_n = y->stride(0), image.y_stride_h = y->stride(2), image.y_stride_w = y->stride(3);
  }
  if (argmax) image.argmax = static_cast<const uint8_t*>(argmax->const_data_ptr());
  return image;
}

Output output_of(const Tensor& y, int64_t h, int64_t w) {
  Output out;
  out.dtype = dtype_of(y);
  out.n = y.size(0), out.c = y.size(1), out.h = h, out.w = w;
  out.data = y.mutable_data_ptr();
  return out;
}

Filters filters_of(const Tensor& w) {
  return {dtype_of(w), w.size(0), w.size(1), w.const_data_ptr(), w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

// Filters of the convolution that maps output gradients to input gradients: channels swapped, taps mirrored.
Filters mirrored(const Filters& w) {
  const int64_t size = bytes_of(w.dtype);
  const char* last_tap = static_cast<const char*>(w.data) + 2 * (w.stride_r + w.stride_s) * size;
  return {w.dtype, w.in, w.out, last_tap, w.stride_in, w.stride_out, -w.stride_r, -w.stride_s};
}

// A result that the threads' L2 caches do not keep would be read, line by line, only to be overwritten.
bool streams_output(const Output& out, const Plan& plan, const Machine& m) {
  const int64_t pixels = out.pool ? out.n * (out.h / 2) * (out.w / 2) : out.n * out.h * out.w;
  const bool lines = plan.algorithm == Algorithm::amx ? !out.pool && out.c % 32 == 0 : out.dtype == DType::f32 && out.c % 16 == 0;
  return lines && reinterpret_cast<uintptr_t>(out.data) % 64 == 0 &&
         pixels * out.c * bytes_of(out.dtype) >= std::min<int64_t>(m.threads * (512 << 10), 4 << 20);
}

// Kernels and plan are chosen once a call: another thread may switch instruction set and algorithm meanwhile.
Plan forward_plan(const Kernels& k, DType dtype, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w) {
  return choose_plan(dtype, n, in, out, h, w, this_machine(k), algo());
}

void run_forward(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, Output out) {
  out.stream = streams_output(out, plan, this_machine(k));
  const Workspace workspace(forward_workspace(k, plan, x, w));
  forward(k, plan, x, w, out, workspace.data(), parallel_jobs);
}

std::tuple<Tensor, Tensor> conv3x3(const Tensor& x_any, const Tensor& weight, const MaybeTensor& bias, bool relu, bool pool,
                                   bool save_argmax) {
  check_conv3x3(x_any, weight, bias, pool);
  const int64_t n = x_any.size(0), c = weight.size(0), h = x_any.size(2), w = x_any.size(3);
  Tensor y = pool ? empty_nhwc(x_any, n, c, h / 2, w / 2) : empty_nhwc(x_any, n, c, h, w);
  Tensor argmax = empty_argmax(x_any, pool && save_argmax, n, c, h, w);
  if (n == 0) return {y, argmax};
  const Kernels& k = kernels();
  const Plan plan = forward_plan(k, dtype_of(x_any), n, x_any.size(1), c, h, w);
  // Direct kernels read the few channels of a first layer from any layout; everything else wants channels adjacent.
  const bool any_layout = plan.algorithm != Algorithm::winograd && x_any.size(1) <= 4;
  const Tensor x = any_layout ? x_any : with_adjacent_channels(x_any);
  const std::vector<float> values = bias_values(bias);
  Output out = output_of(y, h, w);
  out.relu = relu, out.pool = pool;
  out.bias = values.empty() ? nullptr : values.data();
  out.argmax = pool && save_argmax ? static_cast<uint8_t*>(argmax.mutable_data_ptr()) : nullptr;
  run_forward(k, plan, plain_image(x), filters_of(weight), out);
  return {y, argmax};
}

Tensor conv3x3_grad_input(const Tensor& grad_any, const Tensor& weight, const MaybeTensor& y_any, const MaybeTensor& argmax,
                          int64_t h, int64_t w) {
  check_grad_input(grad_any, weight, y_any, argmax, h, w);
  Tensor gx = empty_nhwc(grad_any, grad_any.size(0), weight.size(1), h, w);
  if (gx.numel() == 0) return gx;
  const Tensor grad = with_adjacent_channels(grad_any);
  const MaybeTensor y = y_any ? MaybeTensor(with_adjacent_channels(*y_any)) : std::nullopt;
  const Image image = gradient_image(grad, y, argmax, h, w);
  const Filters filters = mirrored(filters_of(weight));
  const Kernels& k = kernels();
  run_forward(k, forward_plan(k, image.dtype, image.n, image.c, filters.out, h, w), image, filters, output_of(gx, h, w));
  return gx;
}

std::tuple<Tensor, Tensor> conv3x3_grad_weight(const Tensor& x_any, const Tensor& grad_any, const MaybeTensor& y_any,
                                               const MaybeTensor& argmax) {
  check_grad_weight(x_any, grad_any, y_any, argmax);
  const int64_t h = x_any.size(2), w = x_any.size(3), in = x_any.size(1), out = grad_any.size(1);
  Tensor gw = empty_of(x_any, {out, in, 3, 3}, x_any.scalar_type());
  Tensor gb = empty_of(x_any, {out}, x_any.scalar_type());
  if (x_any.size(0) == 0) return {torch::stable::zero_(gw), torch::stable::zero_(gb)};

  const Kernels& k = kernels();
  const Plan plan = choose_grad_weight_plan(dtype_of(x_any), x_any.size(0), in, out, h, w, this_machine(k), algo());
  const Tensor x = in <= 4 && plan.algorithm == Algorithm::direct ? x_any : with_adjacent_channels(x_any);
  const Tensor grad = with_adjacent_channels(grad_any);
  const MaybeTensor y = y_any ? MaybeTensor(with_adjacent_channels(*y_any)) : std::nullopt;
  const Image image = plain_image(x), dz = gradient_image(grad, y, argmax, h, w);
  const Workspace workspace(grad_weight_workspace(k, plan, image, dz));
  std::vector<float> bias(out);
  grad_weight(k, plan, image, dz, filters_of(gw), bias.data(), workspace.data(), parallel_jobs);
  for (int64_t i = 0; i < out; ++i) {
    void* p = gb.mutable_data_ptr();
    if (image.dtype == DType::f32) from_float(bias[i], static_cast<float*>(p) + i);
    if (image.dtype == DType::bf16) from_float(bias[i], static_cast<BFloat16*>(p) + i);
    if (image.dtype == DType::f16) from_float(bias[i], static_cast<Float16*>(p) + i);
  }
  return {gw, gb};
}

std::tuple<Tensor, Tensor> max_pool2x2(const Tensor& x_any, bool save_argmax) {
  check_pooled_image(x_any);
  const int64_t n = x_any.size(0), c = x_any.size(1), h = x_any.size(2), w = x_any.size(3);
  Tensor y = empty_nhwc(x_any, n, c, h / 2, w / 2);
  Tensor argmax = empty_argmax(x_any, save_argmax, n, c, h, w);
  const Tensor x = with_adjacent_channels(x_any);
  Output out = output_of(y, h, w);
  out.argmax = save_argmax ? static_cast<uint8_t*>(argmax.mutable_data_ptr()) : nullptr;
  max_pool(kernels(), plain_image(x), out, parallel_jobs);
  return {y, argmax};
}

Tensor max_pool2x2_grad(const Tensor& grad_any, const Tensor& argmax, int64_t h, int64_t w) {
  check_gradient(grad_any, std::nullopt, argmax, h, w);
  Tensor gx = empty_nhwc(grad_any, grad_any.size(0), grad_any.size(1), h, w);
  const Tensor grad = with_adjacent_channels(grad_any);
  max_pool_grad(kernels(), gradient_image(grad, std::nullopt, argmax, h, w), output_of(gx, h, w), parallel_jobs);
  return gx;
}

} // namespace

std::string conv_algo() {
  const Algorithm a = algo();
  return a == Algorithm::automatic ? "auto" : a == Algorithm::winograd ? "winograd" : "direct";
}

void set_conv_algo(const std::string& name) {
  algo() = parse_algo(name);
}

std::string describe_plan(const std::string& step, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w,
                          const std::string& dtype) {
  for (int64_t size : {n, in, out, h, w})
    if (size < 1 || size > max_elements) throw std::invalid_argument("sizes: expected 1 ... 2^40, got " + std::to_string(size));
  // In floating point, since the products of such sizes pass 64 bits.
  const double image = double(n) * double(h) * double(w) * double(std::max(in, out)), weight = 9. * double(in) * double(out);
  if (std::max(image, weight) > double(max_elements))
    throw std::invalid_argument("sizes: expected tensors of at most 2^40 elements, got " + std::to_string(n) + " images of " +
                                std::to_string(h) + " x " + std::to_string(w) + " with " + std::to_string(in) + " and " +
                                std::to_string(out) + " channels");
  const DType type = dtype == "float32"    ? DType::f32
                     : dtype == "bfloat16" ? DType::bf16
                     : dtype == "float16"
                         ? DType::f16
                         : throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
  const Kernels& k = kernels();
  if (step == "forward") return to_string(forward_plan(k, type, n, in, out, h, w));
  if (step == "grad_input") return to_string(forward_plan(k, type, n, out, in, h, w));
  if (step == "grad_weight") return to_string(choose_grad_weight_plan(type, n, in, out, h, w, this_machine(k), algo()));
  throw std::invalid_argument("step: expected forward, grad_input or grad_weight, got '" + step + "'");
}

STABLE_TORCH_LIBRARY_IMPL(vggfast, CPU, library) {
  library.impl("conv3x3", TORCH_BOX(&conv3x3));
  library.impl("conv3x3_grad_input", TORCH_BOX(&conv3x3_grad_input));
  library.impl("conv3x3_grad_weight", TORCH_BOX(&conv3x3_grad_weight));
  library.impl("max_pool2x2", TORCH_BOX(&max_pool2x2));
  library.impl("max_pool2x2_grad", TORCH_BOX(&max_pool2x2_grad));
}

} // namespace vggfast::cpu
