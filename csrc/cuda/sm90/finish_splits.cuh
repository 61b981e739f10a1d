// The second pass of forward and grad_input where the reduction is split: adds the splits' fp32 sums in order and runs the
// epilogue. One block a slab.
#pragma once

#include "cuda/sm90/implicit_gemm.cuh"

namespace vggfast::cuda::sm90 {

struct FinishParams {
  const float* partials;
  Epilogue epilogue;
  TileGrid grid;
  int splits;
  int block_m, block_n;
};

template <class Element>
__global__ void __launch_bounds__(kGroupThreads) finish_splits_kernel(const __grid_constant__ FinishParams params) {
  using Part = Slab<Element>;
  using Writer = TileWriter<Part, BoxPlaces>;
  struct Shared {
    alignas(128) unsigned char staging[Writer::kStagingBytes];
  };
  auto& shared = ptx::dynamic_shared<Shared>();
  const int parts = params.block_n / Part::kColumns, slabs = params.block_m / 64 * parts; // of a tile
  const int index = blockIdx.x / slabs, slab = blockIdx.x - index * slabs;
  typename Part::Accumulators sums{};
  for (int split = 0; split < params.splits; ++split) {
    const auto* from = reinterpret_cast<const float4*>(params.partials) +
                       ((int64_t{index} * params.splits + split) * slabs + slab) * Part::kVectors + threadIdx.x;
#pragma unroll
    for (int j = 0; j < Part::kFragmentsN; ++j) {
      const float4 value = from[j * kGroupThreads];
      sums.values[0][j][0] += value.x;
      sums.values[0][j][1] += value.y;
      sums.values[0][j][2] += value.z;
      sums.values[0][j][3] += value.w;
    }
  }
  const TileGrid::Tile tile = params.grid.tile(index);
  const BoxPlaces places{params.grid, tile.pixel, slab / parts * 64};
  Writer(params.epilogue, shared.staging, places, tile.channel_tile * params.block_n + slab % parts * Part::kColumns).write(sums);
}

template <class Element>
void launch_finish_splits(const FinishParams& params, cudaStream_t stream) {
  using Part = Slab<Element>;
  const int64_t slabs = int64_t{params.block_m / 64} * (params.block_n / Part::kColumns);
  const LaunchShape shape{params.grid.tiles * slabs, kGroupThreads, TileWriter<Part, BoxPlaces>::kStagingBytes};
  launch_kernel("sm90 finish_splits", finish_splits_kernel<Element>, shape, stream, params);
}

} // namespace vggfast::cuda::sm90
