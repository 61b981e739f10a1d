#include "cuda/sm80/grad_weight.cuh"

#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

namespace {

template <class Element>
void grad_weight_as(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  if constexpr (Element::dtype != DType::tf32) {
    if (plan.tile == TileId::m128n128) {
      return launch_grad_weight<Element, TileId::m128n128>(problem, plan, pointers, stream);
    }
  }
  if (plan.tile == TileId::m64n64) {
    return launch_grad_weight<Element, TileId::m64n64>(problem, plan, pointers, stream);
  }
  throw no_such_tile("sm80 grad_weight");
}

} // namespace

void grad_weight(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return grad_weight_as<BFloat16>(problem, plan, pointers, stream);
  case DType::fp16:
    return grad_weight_as<Float16>(problem, plan, pointers, stream);
  case DType::tf32:
    return grad_weight_as<TFloat32>(problem, plan, pointers, stream);
  }
}

void reduce_splits(const Problem& problem, int splits, const GradWeightPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return launch_reduce_splits<BFloat16>(problem, splits, pointers, stream);
  case DType::fp16:
    return launch_reduce_splits<Float16>(problem, splits, pointers, stream);
  case DType::tf32:
    return launch_reduce_splits<TFloat32>(problem, splits, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm80
