#include "cuda/sm90/forward.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm90/launch.h"

namespace vggfast::cuda::sm90 {

void forward(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>("sm90 forward", problem.dtype, [&](auto element) {
    with_tile<WideTile::m256n64, WideTile::m256n128, WideTile::m128n256, WideTile::m128n128>(
        "sm90 forward", plan.wide_tile,
        [&](auto tile) { launch_forward<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream); });
  });
}

} // namespace vggfast::cuda::sm90
