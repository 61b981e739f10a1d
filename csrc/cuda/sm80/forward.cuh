// y = maxpool2x2?(relu?(conv3x3(x, weight) + bias)) as an NHWC implicit GEMM: rows are output pixels, columns output
// channels, the reduction runs over blocks of input channels and, inside, the nine taps (so that L1 serves eight of
// the nine reads of a pixel).
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/mainloop.cuh"
#include "cuda/sm80/pixel_loader.cuh"

namespace vggfast::cuda::sm80 {

struct ForwardParams {
  const void* x;      // [N, H, W, C]
  const void* weight; // [K, 3, 3, C]
  Epilogue epilogue;
  PixelGrid grid;
  int c, k;
  int tiles_n;
};

/// B: output channels as rows, input channels along the row.
template <class Gemm>
class FilterRowLoader {
public:
  using Storage = typename Gemm::Storage;
  static constexpr int kChunks = kStageRowBytes / 16;
  static constexpr int kRowStep = Gemm::kThreads / kChunks;
  static constexpr int kRows = Gemm::shape.block_n / kRowStep;

  __device__ FilterRowLoader(const Storage* weight, int first_row, int k, int c)
      : weight_(weight + (first_row + row()) * 9 * c + column()), origin_(weight), rows_left_(k - first_row - row()), c_(c) {}

  __device__ __forceinline__ void fetch(unsigned char* tile, const TapCursor& at) {
    const Storage* from = weight_ + at.tap * c_ + at.channel;
    const bool inside = at.channel + column() < c_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool valid = inside && i * kRowStep < rows_left_;
      ptx::cp_async_cg_16(tile + swizzle<kStageRowBytes>(row() + i * kRowStep, threadIdx.x % kChunks),
                          valid ? from + i * kRowStep * 9 * c_ : origin_, valid ? 16 : 0);
    }
  }

private:
  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int column() { return threadIdx.x % kChunks * kVector<typename Gemm::Element>; }
  const Storage* weight_;
  const Storage* origin_; // a readable address for copies of zero bytes
  int rows_left_, c_;
};

template <class Gemm>
struct ForwardLoader {
  PixelLoader<Gemm> pixels;
  FilterRowLoader<Gemm> filters;
  TapCursor at{};

  __device__ __forceinline__ void fetch(typename Gemm::Stage& stage) {
    pixels.fetch(stage.a, at);
    filters.fetch(stage.b, at);
    at.next(Gemm::kDepth);
  }
  __device__ __forceinline__ void land(typename Gemm::Stage&) {}
};

template <class Element, TileId kTile>
__global__ void __launch_bounds__(tile_shape(kTile).threads(), 2) forward_kernel(const __grid_constant__ ForwardParams params) {
  using Tile = Gemm<Element, kTile>;
  using Storage = typename Element::Storage;
  auto& shared = ptx::dynamic_shared<typename Tile::Shared>();

  // Column tiles are the fastest: blocks that run together share their pixels, and the weight stays in L2.
  const int tile_m = blockIdx.x / params.tiles_n, tile_n = blockIdx.x % params.tiles_n;
  const int pool = tile_m * (Tile::shape.block_m / 4), first_channel = tile_n * Tile::shape.block_n;
  fill_tile_rows(shared.rows, params.grid, pool);
  __syncthreads();

  const int pixel = params.grid.pixel(params.grid.pool(pool));
  const Storage* source = static_cast<const Storage*>(params.x) + int64_t{pixel} * params.c;
  ForwardLoader<Tile> loader{{source, shared.rows, params.grid.w, params.c},
                             {static_cast<const Storage*>(params.weight), first_channel, params.k, params.c}};
  typename Tile::Accumulators sums;
  Tile::clear(sums);
  const int blocks = 9 * ((params.c + Tile::kDepth - 1) / Tile::kDepth);
  mainloop<Tile, Order::rows, Order::rows>(sums, shared, loader, blocks);

  write_pool_rows<Tile>(params.epilogue, shared, {shared.rows, pixel, pool, params.grid.pools}, first_channel, sums);
}

template <class Element, TileId kTile>
void launch_forward(const Problem& p, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  using Tile = Gemm<Element, kTile>;
  const Epilogue epilogue{pointers.bias, pointers.y, pointers.argmax, static_cast<int>(p.k), p.relu, p.pool};
  const ForwardParams params{pointers.x,
                             pointers.weight,
                             epilogue,
                             make_pixel_grid(p, p.pool),
                             static_cast<int>(p.c),
                             static_cast<int>(p.k),
                             static_cast<int>(plan.tiles_n)};
  const LaunchShape shape{plan.tiles_m * plan.tiles_n, Tile::kThreads, int{sizeof(typename Tile::Shared)}};
  launch_kernel("sm80 forward", forward_kernel<Element, kTile>, shape, stream, params);
}

} // namespace vggfast::cuda::sm80
