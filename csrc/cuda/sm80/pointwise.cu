#include "cuda/sm80/pointwise.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

cudaError_t find_code() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, max_pool2x2_kernel<BFloat16>);
  cudaGetLastError(); // an answer, not a failure of what comes next
  return error;
}

void max_pool2x2(const Problem& problem, const PoolPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>(
      "sm80 max_pool2x2", problem.dtype, [&](auto element) { launch_max_pool2x2<decltype(element)>(problem, pointers, stream); });
}

void grad_preact(const Problem& problem, const GradPreactPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>(
      "sm80 grad_preact", problem.dtype, [&](auto element) { launch_grad_preact<decltype(element)>(problem, pointers, stream); });
}

} // namespace vggfast::cuda::sm80
