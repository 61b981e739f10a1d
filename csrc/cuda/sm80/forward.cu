#include "cuda/sm80/forward.cuh"

#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

namespace {

template <class Element>
void forward_as(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  switch (plan.tile) {
  case TileId::m128n128:
    return launch_forward<Element, TileId::m128n128>(problem, plan, pointers, stream);
  case TileId::m256n64:
    return launch_forward<Element, TileId::m256n64>(problem, plan, pointers, stream);
  case TileId::m64n64:
    return launch_forward<Element, TileId::m64n64>(problem, plan, pointers, stream);
  }
  throw no_such_tile("sm80 forward");
}

} // namespace

void forward(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  switch (problem.dtype) {
  case DType::bf16:
    return forward_as<BFloat16>(problem, plan, pointers, stream);
  case DType::fp16:
    return forward_as<Float16>(problem, plan, pointers, stream);
  case DType::tf32:
    return forward_as<TFloat32>(problem, plan, pointers, stream);
  }
}

} // namespace vggfast::cuda::sm80
