#include "cuda/sm90/launch.h"
#include "cuda/sm90/patch_gemm.cuh"

namespace vggfast::cuda::sm90 {

namespace {

template <class Element>
void forward_as(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  switch (plan.wide_tile) {
  case WideTile::m256n64:
    return launch_forward_patch<Element, WideTile::m256n64>(problem, plan, pointers, stream);
  case WideTile::m256n128:
    return launch_forward_patch<Element, WideTile::m256n128>(problem, plan, pointers, stream);
  case WideTile::m128n128:
    return launch_forward_patch<Element, WideTile::m128n128>(problem, plan, pointers, stream);
  default:
    throw no_such_tile("sm90 forward_patch");
  }
}

template <class Element>
void grad_input_as(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  switch (plan.wide_tile) {
  case WideTile::m256n64:
    return launch_grad_input_patch<Element, WideTile::m256n64>(problem, plan, pointers, stream);
  case WideTile::m256n128:
    return launch_grad_input_patch<Element, WideTile::m256n128>(problem, plan, pointers, stream);
  case WideTile::m128n128:
    return launch_grad_input_patch<Element, WideTile::m128n128>(problem, plan, pointers, stream);
  default:
    throw no_such_tile("sm90 grad_input_patch");
  }
}

} // namespace

void forward_patch(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  if (problem.dtype == DType::bf16) {
    forward_as<BFloat16>(problem, plan, pointers, stream);
  } else {
    forward_as<Float16>(problem, plan, pointers, stream);
  }
}

void grad_input_patch(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  if (problem.dtype == DType::bf16) {
    grad_input_as<BFloat16>(problem, plan, pointers, stream);
  } else {
    grad_input_as<Float16>(problem, plan, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm90
