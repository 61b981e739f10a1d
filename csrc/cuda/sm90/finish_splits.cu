#include "cuda/sm90/finish_splits.cuh"

#include "cuda/instantiate.h"
#include "cuda/sm90/launch_splits.cuh"

namespace vggfast::cuda::sm90 {

void finish_splits(DType dtype, const Plan& plan, const GemmParams& params, cudaStream_t stream) {
  const WideTileShape shape = pixel_tile_shape(plan.wide_tile);
  const FinishParams finish{params.partials, params.epilogue, params.grid, params.splits, shape.block_m, shape.block_n};
  with_element<BFloat16, Float16, TFloat32>("sm90 finish_splits", dtype,
                                            [&](auto element) { launch_finish_splits<decltype(element)>(finish, stream); });
}

} // namespace vggfast::cuda::sm90
