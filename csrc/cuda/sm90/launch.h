// The sm_90 kernels as host functions; what sm80/launch.h promises holds here too. `plan` comes from choose_plan_sm90 and is
// Kernel::wgmma; tensors are bf16 or fp16, in forward and grad_input also fp32.
#pragma once

#include <cuda_runtime.h>

#include "cuda/plan_sm90.h"

namespace vggfast::cuda::sm90 {

/// Pass::forward. x is dense NHWC: its strides are not read.
void forward(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream);

/// Pass::grad_input. With ReLU or pool it first writes the gradient before them to the workspace, for fp32 also a copy of the
/// filters.
void grad_input(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream);
/// The same with a plan of choose_plan_patch, Kernel::wgmma_patch; 16-bit tensors.
void forward_patch(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream);
void grad_input_patch(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream);
/// Pass::grad_weight; also grad_bias. The workspace holds partial results, then what grad_input's does.
void grad_weight(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream);

} // namespace vggfast::cuda::sm90
