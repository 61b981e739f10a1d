// The schemas of the ops, and the Python module _C: what was built, which instruction set and algorithm run. No kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/settings.h"
#include "cpu/isa.h"
#ifdef VGGFAST_CUDA
#  include "cuda/settings.h"
#endif
#include "huge_pages.h"
#include "torch_glue.h"

// Forward ops return (y, argmax): argmax is [N, H/2, W/2, ceil(C/4)], 2 bits a channel, if asked for and pooled, else empty.
// Gradients take the saved y where a ReLU followed, and the saved argmax where a pool followed; h, w are the input's.
STABLE_TORCH_LIBRARY(vggfast, library) {
  library.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, bool relu, bool pool, bool save_argmax) -> (Tensor, Tensor)");
  library.def("conv3x3_grad_input(Tensor grad, Tensor weight, Tensor? y, Tensor? argmax, SymInt h, SymInt w) -> Tensor");
  library.def("conv3x3_grad_weight(Tensor x, Tensor grad, Tensor? y, Tensor? argmax) -> (Tensor, Tensor)");
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor");
  library.def("linear_grad_input(Tensor grad, Tensor weight, Tensor? y) -> Tensor");
  library.def("linear_grad_weight(Tensor x, Tensor grad, Tensor? y, bool in_float32) -> (Tensor, Tensor)");
  library.def("max_pool2x2(Tensor x, bool save_argmax) -> (Tensor, Tensor)");
  library.def("max_pool2x2_grad(Tensor grad, Tensor argmax, SymInt h, SymInt w) -> Tensor");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = VGGFAST_VERSION;
  info["compiler"] = __VERSION__;
  info["torch_headers"] = TORCH_VERSION;
  info["torch_minimum"] = "2.10";
  info["cuda"] = VGGFAST_CUDA_ARCHS; // empty: built without CUDA kernels
#ifdef VGGFAST_CUDA
  info["cuda_runtime"] = vggfast::cuda::runtime_version();
#endif
  return info;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  namespace cpu = vggfast::cpu;
  m.doc() = "Registers torch.ops.vggfast; describes the build and its choices.";
  m.def("build_info", &build_info,
        "What was compiled, by what: {version, compiler, torch_headers, torch_minimum, cuda, cuda_runtime}.");
  m.def("cpu_isa", [] { return std::string(cpu::kernels().name); }, "The instruction set in use.");
  m.def("cpu_isas", &cpu::runnable_isas, "The instruction sets this CPU runs, best first.");
  m.def("set_cpu_isa", &cpu::set_isa, pybind11::arg("name"), "Use the named instruction set, or the best with 'auto'.");
  m.def("conv_algo", &cpu::conv_algo, "The convolution algorithm in use: auto, winograd or direct.");
  m.def("set_conv_algo", &cpu::set_conv_algo, pybind11::arg("name"), "Use auto, winograd or direct.");
  m.def("cpu_plan", &cpu::describe_plan, pybind11::arg("step"), pybind11::arg("n"), pybind11::arg("c_in"), pybind11::arg("c_out"),
        pybind11::arg("h"), pybind11::arg("w"), pybind11::arg("dtype") = "float32",
        "The plan of 'forward', 'grad_input' or 'grad_weight' for a CPU, in words.");
  m.def("fma_peak", &cpu::fma_peak, pybind11::arg("seconds") = 0.4, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "The best fp32 GFLOP/s of multiply-adds in registers, by the instruction set in use, on all of torch's threads.");
  m.def(
      "wish_huge_pages",
      [](uintptr_t address, int64_t bytes) { vggfast::wish_huge_pages(reinterpret_cast<void*>(address), bytes); },
      pybind11::arg("address"), pybind11::arg("bytes"), "Ask Linux for the huge pages that lie wholly within these bytes.");
#ifdef VGGFAST_CUDA
  m.def("cuda_plan", &vggfast::cuda::describe_plan, pybind11::arg("step"), pybind11::arg("n"), pybind11::arg("c_in"),
        pybind11::arg("c_out"), pybind11::arg("h"), pybind11::arg("w"), pybind11::arg("pool"), pybind11::arg("dtype"),
        pybind11::arg("sm_count"), pybind11::arg("compute_capability"), pybind11::arg("kernels") = "sm80",
        "The plan of 'forward', 'grad_input', 'grad_weight' or 'max_pool' for a GPU, in words; 'aten: why' if no kernel takes it.");
  m.def("set_cuda_kernels", &vggfast::cuda::set_kernels, pybind11::arg("name"),
        "Allow the CUDA kernels up to 'sm80', 'sm90' or 'sm90patch'.");
  m.def("cuda_obstacle", &vggfast::cuda::device_obstacle, pybind11::arg("device_index"),
        "Why no kernel of this build runs on the GPU; empty if they do.");
#endif
}
