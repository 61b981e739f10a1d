#include "cuda/sm80/grad_weight.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

void grad_weight(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  const char* name = "sm80 grad_weight";
  if (problem.dtype == DType::tf32) { // transposed operands leave no registers for the larger tile
    return with_tile<TileId::m64n64>(
        name, plan.tile, [&](auto tile) { launch_grad_weight<TFloat32, decltype(tile)::value>(problem, plan, pointers, stream); });
  }
  with_element<BFloat16, Float16>(name, problem.dtype, [&](auto element) {
    with_tile<TileId::m128n128, TileId::m64n64>(name, plan.tile, [&](auto tile) {
      launch_grad_weight<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream);
    });
  });
}

void reduce_splits(const Problem& problem, int splits, const GradWeightPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>("sm80 reduce_splits", problem.dtype, [&](auto element) {
    launch_reduce_splits<decltype(element)>(problem, splits, pointers, stream);
  });
}

} // namespace vggfast::cuda::sm80
