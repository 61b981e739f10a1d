// The CUDA ops themselves (csrc/cuda/conv3x3.cpp: what they check, copy, allocate, plan and launch) over torch's CPU tensors, as
// torch.ops.vggfast_emulated. Stands in for what a CUDA build of torch brings: the device guard and the current stream.
#include "torch_glue.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, device, library) _STABLE_TORCH_LIBRARY_IMPL(vggfast_emulated, CPU, library, C10_UID)
#include "cuda/conv3x3.cpp"

#include "machine.h"

extern "C" {

/// torch's own idea of the current device, which is not the kernels' CUDA runtime's.
static int32_t torch_device = 0;

struct CUDAGuardOpaque {
  int32_t before;
};
AOTITorchError aoti_torch_create_cuda_guard(int32_t device, CUDAGuardHandle* guard) {
  *guard = new CUDAGuardOpaque{torch_device};
  torch_device = device;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard) {
  torch_device = guard->before;
  delete guard;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = emulator::callers_stream(device);
  return AOTI_TORCH_SUCCESS;
}

int32_t emu_torch_device() {
  return torch_device;
}
void emu_set_kernels(const char* kernels) {
  vggfast::cuda::set_kernels(kernels);
}
/// torch's tensors lie in the host's memory.
void emu_use_host_memory(int use) {
  emulator::Machine::get().global.host_too = use != 0;
}
}
