// How forward and grad_input are launched: the product, and where the reduction is split its second pass. Host only.
#pragma once

#include "cuda/sm90/implicit_gemm.cuh"

namespace vggfast::cuda::sm90 {

/// Adds the splits' sums and runs the epilogue.
void finish_splits(DType dtype, const Plan& plan, const GemmParams& params, cudaStream_t stream);

template <class Gemm>
void launch_with_splits(const char* name, void (*kernel)(GemmParams), DType dtype, const Plan& plan, const GemmParams& params,
                        cudaStream_t stream) {
  launch_kernel(name, kernel, {plan.blocks, kThreads, int{sizeof(typename Gemm::Shared)}}, stream, params);
  if (params.splits > 1) {
    finish_splits(dtype, plan, params, stream);
  }
}

} // namespace vggfast::cuda::sm90
