#include "cuda/sm80/grad_input.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

void grad_input(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>("sm80 grad_input", problem.dtype, [&](auto element) {
    with_tile<TileId::m128n128, TileId::m256n64, TileId::m64n64>("sm80 grad_input", plan.tile, [&](auto tile) {
      launch_grad_input<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream);
    });
  });
}

} // namespace vggfast::cuda::sm80
