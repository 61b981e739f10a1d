// The sm_80 kernels as host functions: each enqueues its work on `stream` and returns. No synchronisation, no allocation;
// pointers are device memory, 16-byte aligned; `plan` comes from choose_plan for the same problem and pass.
// A refused launch throws std::runtime_error with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include "cuda/plan.h"

namespace vggfast::cuda::sm80 {

/// Whether this build holds code that the current device runs, as machine code or as PTX: cudaSuccess, or what CUDA says.
cudaError_t find_code();

/// Kernel::implicit_gemm of Pass::forward.
void forward(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream);
/// Kernel::first_layer of Pass::forward.
void first_layer(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream);
/// Kernel::implicit_gemm of Pass::grad_input.
void grad_input(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream);
/// Kernel::implicit_gemm of Pass::grad_weight; also grad_bias.
void grad_weight(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream);
/// The second pass of grad_weight: adds `splits` partial results [9 C K sums of grad_weight, K of grad_bias] in fp32.
void reduce_splits(const Problem& problem, int splits, const GradWeightPointers& pointers, cudaStream_t stream);
/// 2x2 max pooling of x [N, H, W, C]; relu, pool and k of the problem are not read. C a multiple of 16 bytes.
void max_pool2x2(const Problem& problem, const PoolPointers& pointers, cudaStream_t stream);
/// Gradient of the convolution's output from that of the fused output; K a multiple of 16 bytes. With relu off and pool
/// on it is the backward pass of max_pool2x2 over [N, H, W, K].
void grad_preact(const Problem& problem, const GradPreactPointers& pointers, cudaStream_t stream);

} // namespace vggfast::cuda::sm80
