#include "cuda/sm80/grad_input.cuh"

#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

namespace {

template <class Element>
void grad_input_as(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  switch (plan.tile) {
  case TileId::m128n128:
    return launch_grad_input<Element, TileId::m128n128>(problem, plan, pointers, stream);
  case TileId::m256n64:
    return launch_grad_input<Element, TileId::m256n64>(problem, plan, pointers, stream);
  case TileId::m64n64:
    return launch_grad_input<Element, TileId::m64n64>(problem, plan, pointers, stream);
  }
  throw no_such_tile("sm80 grad_input");
}

} // namespace

void grad_input(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return grad_input_as<BFloat16>(problem, plan, pointers, stream);
  case DType::fp16:
    return grad_input_as<Float16>(problem, plan, pointers, stream);
  case DType::tf32:
    return grad_input_as<TFloat32>(problem, plan, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm80
