#include "cuda/sm90/grad_input.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm90/launch.h"

namespace vggfast::cuda::sm90 {

void grad_input(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>("sm90 grad_input", problem.dtype, [&](auto element) {
    with_tile<WideTile::m256n64, WideTile::m256n128, WideTile::m128n256, WideTile::m128n128>(
        "sm90 grad_input", plan.wide_tile,
        [&](auto tile) { launch_grad_input<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream); });
  });
}

} // namespace vggfast::cuda::sm90
