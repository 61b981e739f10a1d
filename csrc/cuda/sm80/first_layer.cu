#include "cuda/sm80/first_layer.cuh"

#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

void first_layer(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return launch_first_layer<BFloat16>(problem, plan, pointers, stream);
  case DType::fp16:
    return launch_first_layer<Float16>(problem, plan, pointers, stream);
  case DType::tf32:
    return launch_first_layer<TFloat32>(problem, plan, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm80
