#include "cuda/sm90/grad_weight.cuh"

#include "cuda/sm90/launch.h"

namespace vggfast::cuda::sm90 {

namespace {

template <class Element>
void grad_weight_as(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  switch (plan.wide_tile) {
  case WideTile::m128n128:
    return launch_grad_weight<Element, WideTile::m128n128>(problem, plan, pointers, stream);
  case WideTile::m128n64:
    return launch_grad_weight<Element, WideTile::m128n64>(problem, plan, pointers, stream);
  case WideTile::m64n64:
    return launch_grad_weight<Element, WideTile::m64n64>(problem, plan, pointers, stream);
  default:
    throw no_such_tile("sm90 grad_weight");
  }
}

} // namespace

void grad_weight(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  if (problem.dtype == DType::bf16) {
    grad_weight_as<BFloat16>(problem, plan, pointers, stream);
  } else {
    grad_weight_as<Float16>(problem, plan, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm90
