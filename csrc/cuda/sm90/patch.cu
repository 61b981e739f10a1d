#include "cuda/instantiate.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/patch_gemm.cuh"

namespace vggfast::cuda::sm90 {

void forward_patch(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16>("sm90 forward_patch", problem.dtype, [&](auto element) {
    with_tile<WideTile::m256n64, WideTile::m256n128, WideTile::m128n128>("sm90 forward_patch", plan.wide_tile, [&](auto tile) {
      launch_forward_patch<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream);
    });
  });
}

void grad_input_patch(const Problem& problem, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16>("sm90 grad_input_patch", problem.dtype, [&](auto element) {
    with_tile<WideTile::m256n64, WideTile::m256n128, WideTile::m128n128>("sm90 grad_input_patch", plan.wide_tile, [&](auto tile) {
      launch_grad_input_patch<decltype(element), decltype(tile)::value>(problem, plan, pointers, stream);
    });
  });
}

} // namespace vggfast::cuda::sm90
