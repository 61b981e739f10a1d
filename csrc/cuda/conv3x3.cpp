// The CUDA ops: validate, allocate, plan, launch on torch's current stream. vggfast/ops.py sends only calls that a kernel takes.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/plan_patch.h"
#include "cuda/settings.h"
#include "cuda/sm80/launch.h"
#include "cuda/sm90/launch.h"
#include "torch_glue.h"

// Only a CUDA build of torch defines these. Weak, they are null under a CPU build, where no CUDA tensor can reach them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak aoti_torch_create_cuda_guard
#pragma weak aoti_torch_delete_cuda_guard

namespace vggfast::cuda {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

// torch's device guard: while it lives, the device is current.
class Guard {
public:
  explicit Guard(int32_t index) {
    STD_TORCH_CHECK(aoti_torch_create_cuda_guard && aoti_torch_get_current_cuda_stream, "vggfast: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &handle_));
  }
  ~Guard() { aoti_torch_delete_cuda_guard(handle_); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

private:
  CUDAGuardHandle handle_ = nullptr;
};

// Makes a tensor's device current while it lives, and knows that device's stream and size.
class OnDevice {
public:
  explicit OnDevice(const Tensor& t) : OnDevice(t.get_device_index()) {}
  explicit OnDevice(int32_t index) : index_(index), guard_(index) {
    // torch's CUDA runtime is another one than that linked in here, and each keeps its own idea of the current device.
    check(cudaSetDevice(index), "(device)");
  }

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  Device device() const {
    return {attribute(cudaDevAttrMultiProcessorCount),
            attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor)};
  }

private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "(device properties)");
    return value;
  }

  int32_t index_;
  Guard guard_;
};

DType element_type(const Tensor& t) {
  const vggfast::DType dtype = dtype_of(t);
  return dtype == vggfast::DType::f32 ? DType::tf32 : dtype == vggfast::DType::bf16 ? DType::bf16 : DType::fp16;
}

// Dense NHWC memory at a 16-byte boundary, which the kernels' vector loads need; a copy where t is anything else. Strides are
// compared one by one, because torch calls a tensor with size-1 dimensions channels_last whatever their strides are.
Tensor dense_nhwc(const Tensor& t) {
  const int64_t order[4] = {1, 3, 2, 0}; // innermost first
  bool as_needed = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  int64_t stride = 1;
  for (const int64_t d : order) {
    as_needed = as_needed && (t.size(d) == 1 || t.stride(d) == stride);
    stride *= t.size(d);
  }
  if (as_needed) return t;
  Tensor copy = empty_nhwc(t, t.size(0), t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(copy, t);
  return copy;
}
MaybeTensor dense_nhwc(const MaybeTensor& t) {
  return t ? MaybeTensor(dense_nhwc(*t)) : std::nullopt;
}
// Checked to be contiguous; read by two bytes at a time.
MaybeTensor aligned_argmax(const MaybeTensor& t) {
  if (!t || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 2 == 0) return t;
  return torch::stable::clone(*t);
}
MaybeTensor dense_vector(const MaybeTensor& t) {
  if (!t || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

using Chooser = Plan (*)(Pass, const Problem&, const Device&);

// Who plans with the kernels up to those of this name; null for another name.
Chooser chooser(const std::string& kernels) {
  return kernels == "sm80"        ? choose_plan
         : kernels == "sm90"      ? choose_plan_up_to_sm90
         : kernels == "sm90patch" ? choose_plan_up_to_patch
                                  : nullptr;
}

// The one in use.
std::atomic<Chooser>& chosen() {
  const char* named = std::getenv("VGGFAST_CUDA_PLAN");
  static std::atomic<Chooser> current = named != nullptr && chooser(named) != nullptr ? chooser(named) : choose_plan;
  return current;
}

Plan plan_or_throw(Pass pass, const Problem& problem, const OnDevice& on) {
  const Plan plan = chosen().load()(pass, problem, on.device());
  STD_TORCH_CHECK(plan.kernel != Kernel::aten,
                  "vggfast: expected a convolution that a CUDA kernel takes, got one for aten: ", plan.reason);
  return plan;
}

GradOutput grad_output(const Tensor& grad, const MaybeTensor& y, const MaybeTensor& argmax) {
  return {grad.const_data_ptr(), y ? y->const_data_ptr() : nullptr,
          argmax ? static_cast<const uint8_t*>(argmax->const_data_ptr()) : nullptr};
}

uint8_t* bytes_or_null(const Tensor& argmax) {
  return argmax.numel() ? static_cast<uint8_t*>(argmax.mutable_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> conv3x3(const Tensor& x_any, const Tensor& weight_any, const MaybeTensor& bias_any, bool relu, bool pool,
                                   bool save_argmax) {
  check_conv3x3(x_any, weight_any, bias_any, pool);
  const OnDevice on(x_any);
  const int64_t n = x_any.size(0), c = x_any.size(1), h = x_any.size(2), w = x_any.size(3), k = weight_any.size(0);
  Tensor y = pool ? empty_nhwc(x_any, n, k, h / 2, w / 2) : empty_nhwc(x_any, n, k, h, w);
  const Tensor argmax = empty_argmax(x_any, pool && save_argmax, n, k, h, w);
  if (n == 0) return {y, argmax};

  const Problem problem{n, h, w, c, k, element_type(x_any), relu, pool};
  const Plan plan = plan_or_throw(Pass::forward, problem, on);
  const bool first = plan.kernel == Kernel::first_layer; // reads any strides
  const Tensor x = first ? x_any : dense_nhwc(x_any), weight = dense_nhwc(weight_any);
  const MaybeTensor bias = dense_vector(bias_any);
  const Tensor workspace = empty_of(x, {plan.workspace_bytes}, ScalarType::Byte);
  const ForwardPointers pointers{x.const_data_ptr(),
                                 weight.const_data_ptr(),
                                 bias ? bias->const_data_ptr() : nullptr,
                                 y.mutable_data_ptr(),
                                 bytes_or_null(argmax),
                                 workspace.mutable_data_ptr(),
                                 x.stride(0),
                                 x.stride(2),
                                 x.stride(3),
                                 x.stride(1)};
  const auto run = first                                ? sm80::first_layer
                   : plan.kernel == Kernel::wgmma       ? sm90::forward
                   : plan.kernel == Kernel::wgmma_patch ? sm90::forward_patch
                                                        : sm80::forward;
  run(problem, plan, pointers, on.stream());
  return {y, argmax};
}

Tensor conv3x3_grad_input(const Tensor& grad_any, const Tensor& weight_any, const MaybeTensor& y_any, const MaybeTensor& argmax_any,
                          int64_t h, int64_t w) {
  check_grad_input(grad_any, weight_any, y_any, argmax_any, h, w);
  const OnDevice on(grad_any);
  Tensor gx = empty_nhwc(grad_any, grad_any.size(0), weight_any.size(1), h, w);
  if (gx.numel() == 0) return gx;

  const Problem problem{
      grad_any.size(0),      h, w, weight_any.size(1), weight_any.size(0), element_type(grad_any), y_any.has_value(),
      argmax_any.has_value()};
  const Plan plan = plan_or_throw(Pass::grad_input, problem, on);
  const Tensor grad = dense_nhwc(grad_any), weight = dense_nhwc(weight_any);
  const MaybeTensor y = dense_nhwc(y_any), argmax = aligned_argmax(argmax_any);
  const Tensor workspace = empty_of(grad, {plan.workspace_bytes}, ScalarType::Byte);
  (plan.kernel == Kernel::wgmma         ? sm90::grad_input
   : plan.kernel == Kernel::wgmma_patch ? sm90::grad_input_patch
                                        : sm80::grad_input)(
      problem, plan, {grad_output(grad, y, argmax), weight.const_data_ptr(), gx.mutable_data_ptr(), workspace.mutable_data_ptr()},
      on.stream());
  return gx;
}

std::tuple<Tensor, Tensor> conv3x3_grad_weight(const Tensor& x_any, const Tensor& grad_any, const MaybeTensor& y_any,
                                               const MaybeTensor& argmax_any) {
  check_grad_weight(x_any, grad_any, y_any, argmax_any);
  const OnDevice on(x_any);
  const int64_t n = x_any.size(0), c = x_any.size(1), k = grad_any.size(1);
  Tensor gw = empty_nhwc(x_any, k, c, 3, 3);
  Tensor gb = empty_of(x_any, {k}, x_any.scalar_type());
  if (n == 0) return {torch::stable::contiguous(torch::stable::zero_(gw)), torch::stable::zero_(gb)};

  const Problem problem{n, x_any.size(2), x_any.size(3), c, k, element_type(x_any), y_any.has_value(), argmax_any.has_value()};
  const Plan plan = plan_or_throw(Pass::grad_weight, problem, on);
  const Tensor x = dense_nhwc(x_any), grad = dense_nhwc(grad_any);
  const MaybeTensor y = dense_nhwc(y_any), argmax = aligned_argmax(argmax_any);
  const Tensor workspace = empty_of(x, {plan.workspace_bytes}, ScalarType::Byte);
  (plan.kernel == Kernel::wgmma ? sm90::grad_weight
                                : sm80::grad_weight)(problem, plan,
                                                     {grad_output(grad, y, argmax), x.const_data_ptr(),
                                                      workspace.mutable_data_ptr(), gw.mutable_data_ptr(), gb.mutable_data_ptr()},
                                                     on.stream());
  return {torch::stable::contiguous(gw), gb}; // the kernel writes [K, 3, 3, C]; parameters are [K, C, 3, 3] in memory
}

std::tuple<Tensor, Tensor> max_pool2x2(const Tensor& x_any, bool save_argmax) {
  check_pooled_image(x_any);
  const OnDevice on(x_any);
  const int64_t n = x_any.size(0), c = x_any.size(1), h = x_any.size(2), w = x_any.size(3);
  Tensor y = empty_nhwc(x_any, n, c, h / 2, w / 2);
  const Tensor argmax = empty_argmax(x_any, save_argmax, n, c, h, w);
  if (n == 0) return {y, argmax};
  const Problem problem{n, h, w, c, c, element_type(x_any), false, true};
  plan_or_throw(Pass::max_pool, problem, on);
  const Tensor x = dense_nhwc(x_any);
  sm80::max_pool2x2(problem, {x.const_data_ptr(), y.mutable_data_ptr(), bytes_or_null(argmax)}, on.stream());
  return {y, argmax};
}

Tensor max_pool2x2_grad(const Tensor& grad_any, const Tensor& argmax_any, int64_t h, int64_t w) {
  check_gradient(grad_any, std::nullopt, argmax_any, h, w);
  const OnDevice on(grad_any);
  const int64_t n = grad_any.size(0), c = grad_any.size(1);
  Tensor gx = empty_nhwc(grad_any, n, c, h, w);
  if (n == 0) return gx;
  const Problem problem{n, h, w, c, c, element_type(grad_any), false, true};
  plan_or_throw(Pass::max_pool, problem, on);
  const Tensor grad = dense_nhwc(grad_any);
  const MaybeTensor argmax = aligned_argmax(argmax_any);
  sm80::grad_preact(problem, {grad_output(grad, std::nullopt, argmax), gx.mutable_data_ptr()}, on.stream());
  return gx;
}

} // namespace

static Chooser checked_chooser(const std::string& kernels) {
  const Chooser found = chooser(kernels);
  if (found == nullptr) {
    throw std::invalid_argument("kernels: expected sm80, sm90 or sm90patch, got '" + kernels + "'");
  }
  return found;
}

void set_kernels(const std::string& kernels) {
  chosen() = checked_chooser(kernels);
}

std::string describe_plan(const std::string& step, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, bool pool,
                          const std::string& dtype, int sm_count, int compute_capability, const std::string& kernels) {
  const DType element = dtype == "float32"    ? DType::tf32
                        : dtype == "bfloat16" ? DType::bf16
                        : dtype == "float16"
                            ? DType::fp16
                            : throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
  const Pass pass =
      step == "forward"       ? Pass::forward
      : step == "grad_input"  ? Pass::grad_input
      : step == "grad_weight" ? Pass::grad_weight
      : step == "max_pool"
          ? Pass::max_pool
          : throw std::invalid_argument("step: expected forward, grad_input, grad_weight or max_pool, got '" + step + "'");
  std::ostringstream text;
  text << checked_chooser(kernels)(pass, {n, h, w, in, out, element, true, pool}, {sm_count, compute_capability});
  return text.str();
}

std::string runtime_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string device_obstacle(int index) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is loaded";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the NVIDIA driver is for CUDA " + std::to_string(driver / 1000) + ", these kernels need one for CUDA " +
           std::to_string(CUDART_VERSION / 1000);
  }
  const OnDevice on(index);
  const cudaError_t error = sm80::find_code();
  return error == cudaSuccess ? "" : std::string("this build holds no code for the GPU: ") + cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY_IMPL(vggfast, CUDA, library) {
  library.impl("conv3x3", TORCH_BOX(&conv3x3));
  library.impl("conv3x3_grad_input", TORCH_BOX(&conv3x3_grad_input));
  library.impl("conv3x3_grad_weight", TORCH_BOX(&conv3x3_grad_weight));
  library.impl("max_pool2x2", TORCH_BOX(&max_pool2x2));
  library.impl("max_pool2x2_grad", TORCH_BOX(&max_pool2x2_grad));
}

} // namespace vggfast::cuda
