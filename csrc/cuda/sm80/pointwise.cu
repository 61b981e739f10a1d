#include "cuda/sm80/pointwise.cuh"

#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

cudaError_t find_code() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, max_pool2x2_kernel<BFloat16>);
  cudaGetLastError(); // an answer, not a failure of what comes next
  return error;
}

void max_pool2x2(const Problem& problem, const PoolPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return launch_max_pool2x2<BFloat16>(problem, pointers, stream);
  case DType::fp16:
    return launch_max_pool2x2<Float16>(problem, pointers, stream);
  case DType::tf32:
    return launch_max_pool2x2<TFloat32>(problem, pointers, stream);
  }
}

void grad_preact(const Problem& problem, const GradPreactPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return launch_grad_preact<BFloat16>(problem, pointers, stream);
  case DType::fp16:
    return launch_grad_preact<Float16>(problem, pointers, stream);
  case DType::tf32:
    return launch_grad_preact<TFloat32>(problem, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm80
