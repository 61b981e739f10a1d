// The sm_80 kernels as host functions: each enqueues its work on `stream` and returns. No synchronisation, no allocation;
// pointers are device memory, 16-byte aligned; `plan` comes from choose_plan for the same problem and pass.
// A refused launch throws std::runtime_error with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include "cuda/plan.h"

namespace vggfast::cuda::sm80 {

void forward(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream);

}  // namespace vggfast::cuda::sm80
