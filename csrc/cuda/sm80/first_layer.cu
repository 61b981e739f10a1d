#include "cuda/sm80/first_layer.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm80 {

void first_layer(const Problem& problem, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  with_element<BFloat16, Float16, TFloat32>("sm80 first_layer", problem.dtype, [&](auto element) {
    launch_first_layer<decltype(element)>(problem, plan, pointers, stream);
  });
}

} // namespace vggfast::cuda::sm80
