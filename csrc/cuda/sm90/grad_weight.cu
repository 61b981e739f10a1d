#include "cuda/sm90/grad_weight.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm90/launch.h"

namespace vggfast::cuda::sm90 {

void grad_weight(const Problem& problem, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16>("sm90 grad_weight", problem.dtype, [&](auto element) {
    with_tile<WideTile::m128n128, WideTile::m128n64, WideTile::m64n64>("sm90 grad_weight", plan.wide_tile, [&](auto tile) {
      launch_grad_weight<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream);
    });
  });
}

} // namespace vggfast::cuda::sm90
