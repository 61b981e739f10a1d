// The kernels' host functions behind a C interface for Python: an error comes back as a string, null is success.
#include <cstring>
#include <sstream>
#include <string>

#include "cuda/fast_div.h"
#include "cuda/sm80/launch.h"
#include "cuda/plan_patch.h"
#include "cuda/sm90/launch.h"

namespace {

using namespace vggfast::cuda;

std::string message;

cudaStream_t stream() {
  return emulator::callers_stream(emulator::current_device());
}

template <class Function>
const char* guarded(Function&& function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

} // namespace

extern "C" {

void emu_plan(int pass, const Problem* problem, const Device* device, Plan* plan) {
  *plan = choose_plan(static_cast<Pass>(pass), *problem, *device);
}
void emu_plan_sm90(int pass, const Problem* problem, const Device* device, Plan* plan) {
  *plan = choose_plan_sm90(static_cast<Pass>(pass), *problem, *device);
}
void emu_plan_patch(int pass, const Problem* problem, const Device* device, Plan* plan) {
  *plan = choose_plan_patch(static_cast<Pass>(pass), *problem, *device);
}
int emu_quotient(int n, uint32_t divisor) {
  return FastDiv(divisor).quotient(n);
}
const char* emu_plan_text(const Plan* plan) {
  std::ostringstream text;
  text << *plan;
  message = text.str();
  return message.c_str();
}

const char* emu_forward(const Problem* problem, const Plan* plan, const ForwardPointers* pointers) {
  // Called one by one, not through a pointer: a library may be linked without some of them.
  return guarded([&] {
    if (plan->kernel == Kernel::first_layer) return sm80::first_layer(*problem, *plan, *pointers, stream());
    if (plan->kernel == Kernel::wgmma) return sm90::forward(*problem, *plan, *pointers, stream());
    if (plan->kernel == Kernel::wgmma_patch) return sm90::forward_patch(*problem, *plan, *pointers, stream());
    sm80::forward(*problem, *plan, *pointers, stream());
  });
}
const char* emu_grad_input(const Problem* problem, const Plan* plan, const GradInputPointers* pointers) {
  return guarded([&] {
    if (plan->kernel == Kernel::wgmma) return sm90::grad_input(*problem, *plan, *pointers, stream());
    if (plan->kernel == Kernel::wgmma_patch) return sm90::grad_input_patch(*problem, *plan, *pointers, stream());
    sm80::grad_input(*problem, *plan, *pointers, stream());
  });
}
const char* emu_grad_weight(const Problem* problem, const Plan* plan, const GradWeightPointers* pointers) {
  return guarded([&] {
    if (plan->kernel == Kernel::wgmma) return sm90::grad_weight(*problem, *plan, *pointers, stream());
    sm80::grad_weight(*problem, *plan, *pointers, stream());
  });
}
const char* emu_max_pool2x2(const Problem* problem, const PoolPointers* pointers) {
  return guarded([&] { sm80::max_pool2x2(*problem, *pointers, stream()); });
}
const char* emu_grad_preact(const Problem* problem, const GradPreactPointers* pointers) {
  return guarded([&] { sm80::grad_preact(*problem, *pointers, stream()); });
}
}
