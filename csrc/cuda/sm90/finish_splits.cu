#include "cuda/sm90/finish_splits.cuh"

#include "cuda/sm90/launch_splits.cuh"

namespace vggfast::cuda::sm90 {

void finish_splits(DType dtype, const Plan& plan, const GemmParams& params, cudaStream_t stream) {
  const WideTileShape shape = pixel_tile_shape(plan.wide_tile);
  const FinishParams finish{params.partials, params.epilogue, params.grid, params.splits, shape.block_m, shape.block_n};
  switch (dtype) {
  case DType::bf16:
    return launch_finish_splits<BFloat16>(finish, stream);
  case DType::fp16:
    return launch_finish_splits<Float16>(finish, stream);
  case DType::tf32:
    return launch_finish_splits<TFloat32>(finish, stream);
  }
}

} // namespace vggfast::cuda::sm90
