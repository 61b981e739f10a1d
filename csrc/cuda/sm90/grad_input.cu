#include "cuda/sm90/grad_input.cuh"

#include "cuda/sm90/launch.h"

namespace vggfast::cuda::sm90 {

namespace {

template <class Element>
void grad_input_as(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  switch (plan.wide_tile) {
  case WideTile::m256n64:
    return launch_grad_input<Element, WideTile::m256n64>(problem, plan, pointers, stream);
  case WideTile::m256n128:
    return launch_grad_input<Element, WideTile::m256n128>(problem, plan, pointers, stream);
  case WideTile::m128n256:
    return launch_grad_input<Element, WideTile::m128n256>(problem, plan, pointers, stream);
  case WideTile::m128n128:
    return launch_grad_input<Element, WideTile::m128n128>(problem, plan, pointers, stream);
  default:
    throw no_such_tile("sm90 grad_input");
  }
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

} // namespace vggfast::cuda::sm90
