// grad_input = transposed convolution of the gradient: the forward product on mirrored taps, with the weight read as it
// lies (rows along the reduction, so no transposed copy). Rows are input pixels, columns input channels, the reduction
// runs over blocks of output channels and the nine taps.
#pragma once

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/grad_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/mainloop.cuh"
#include "cuda/sm80/pixel_loader.cuh"

namespace vggfast::cuda::sm80 {

struct GradInputParams {
  GradSource source;
  const void* weight; // [K, 3, 3, C]
  Epilogue epilogue;
  PixelGrid grid;
  int c, k;
  int tiles_n;
};

/// A: the gradient at shifted pixels, through registers because ReLU and pool decide element by element.
template <class Gemm>
class GradPixelLoader {
public:
  using Element = typename Gemm::Element;
  using Storage = typename Gemm::Storage;
  static constexpr int kChunks = kStageRowBytes / 16;
  static constexpr int kRowStep = Gemm::kThreads / kChunks;
  static constexpr int kRows = Gemm::shape.block_m / kRowStep;

  /// `origin`: source index of the tile's first pool.
  __device__ GradPixelLoader(const GradSource& source, const TileRow* rows, const PixelGrid& grid, int64_t origin, int channels)
      : source_(source), origin_(origin * channels), width_(grid.pooled_source ? grid.source_w / 2 : grid.w),
        pooled_(grid.pooled_source), channels_(channels) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const TileRow entry = rows[row() + i * kRowStep];
      offsets_[i] = entry.source * channels + column();
      taps_[i] = entry.taps;
    }
  }

  __device__ __forceinline__ void fetch(const TapCursor& at) {
    const bool inside = at.channel + column() < channels_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int dh = at.tap / 3 - 1, dw = at.tap % 3 - 1, position = 0;
      if (pooled_) {
        // From the pixel's place in its pool to the neighbour's pool and its place there.
        dh += row_dh(row() + i * kRowStep);
        dw += row_dw(row() + i * kRowStep);
        position = (dh & 1) * 2 + (dw & 1);
        dh >>= 1;
        dw >>= 1;
      }
      if (inside && (taps_[i] >> at.tap & 1u)) {
        vectors_[i].load(source_, origin_ + (offsets_[i] + (dh * width_ + dw) * channels_ + at.channel), position);
      } else {
        vectors_[i].clear();
      }
    }
  }

  __device__ __forceinline__ void land(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int at = swizzle<kStageRowBytes>(row() + i * kRowStep, threadIdx.x % kChunks);
      *reinterpret_cast<uint4*>(tile + at) = vectors_[i].masked(source_).words;
    }
  }

private:
  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int column() { return threadIdx.x % kChunks * kVector<Element>; }

  const GradSource& source_;
  int64_t origin_;
  int width_;
  bool pooled_;
  int channels_;
  int offsets_[kRows];
  uint32_t taps_[kRows];
  GradVector<Element> vectors_[kRows];
};

/// B: output channels along the reduction, input channels along the row, taps mirrored.
template <class Gemm>
class FilterColumnLoader {
public:
  using Element = typename Gemm::Element;
  using Storage = typename Gemm::Storage;
  static constexpr int kChunks = Gemm::kRowBytesN / 16;
  static constexpr int kRowStep = Gemm::kThreads / kChunks;
  static constexpr int kRows = Gemm::kDepth / kRowStep;
  static_assert(kRows * kRowStep == Gemm::kDepth);

  __device__ FilterColumnLoader(const Storage* weight, int first_column, int k, int c)
      : weight_(weight), column_(first_column + chunk() * kVector<Element>), k_(k), c_(c) {}

  __device__ __forceinline__ void fetch(unsigned char* tile, const TapCursor& at) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x / kChunks + i * kRowStep, k = at.channel + row;
      const bool valid = k < k_ && column_ < c_;
      const Storage* from = valid ? weight_ + ((k * 9 + 8 - at.tap) * c_ + column_) : weight_;
      ptx::cp_async_cg_16(tile + swizzle_transposed<Element, Gemm::kRowBytesN>(row, chunk()), from, valid ? 16 : 0);
    }
  }

private:
  static __device__ int chunk() { return threadIdx.x % kChunks; }

  const Storage* weight_;
  int column_, k_, c_;
};

/// Masked: through GradPixelLoader. Otherwise the gradient is read as it is, by cp.async.
template <class Gemm, bool kMasked>
struct GradInputLoader {
  std::conditional_t<kMasked, GradPixelLoader<Gemm>, PixelLoader<Gemm>> pixels;
  FilterColumnLoader<Gemm> filters;
  TapCursor at{};

  __device__ __forceinline__ void fetch(typename Gemm::Stage& stage) {
    if constexpr (kMasked) {
      pixels.fetch(at);
    } else {
      pixels.fetch(stage.a, at);
    }
    filters.fetch(stage.b, at);
    at.next(Gemm::kDepth);
  }
  __device__ __forceinline__ void land(typename Gemm::Stage& stage) {
    if constexpr (kMasked) {
      pixels.land(stage.a);
    }
  }
};

template <class Element, TileId kTile, bool kMasked>
__global__ void __launch_bounds__(tile_shape(kTile).threads(), 2)
    grad_input_kernel(const __grid_constant__ GradInputParams params) {
  using Tile = Gemm<Element, kTile>;
  using Storage = typename Element::Storage;
  auto& shared = ptx::dynamic_shared<typename Tile::Shared>();

  const int tile_m = blockIdx.x / params.tiles_n, tile_n = blockIdx.x % params.tiles_n;
  const int pool = tile_m * (Tile::shape.block_m / 4), first_channel = tile_n * Tile::shape.block_n;
  fill_tile_rows(shared.rows, params.grid, pool);
  __syncthreads();

  const int64_t source = params.grid.source(params.grid.pool(pool));
  const FilterColumnLoader<Tile> filters(static_cast<const Storage*>(params.weight), first_channel, params.k, params.c);
  typename Tile::Accumulators sums;
  Tile::clear(sums);
  const int blocks = 9 * ((params.k + Tile::kDepth - 1) / Tile::kDepth);
  if constexpr (kMasked) {
    GradInputLoader<Tile, kMasked> loader{{params.source, shared.rows, params.grid, source, params.k}, filters};
    mainloop<Tile, Order::rows, Order::transposed>(sums, shared, loader, blocks);
  } else {
    const Storage* grad = static_cast<const Storage*>(params.source.grad) + source * params.k;
    GradInputLoader<Tile, kMasked> loader{{grad, shared.rows, params.grid.w, params.k}, filters};
    mainloop<Tile, Order::rows, Order::transposed>(sums, shared, loader, blocks);
  }

  write_pool_rows<Tile>(params.epilogue, shared, {shared.rows, params.grid.pixel(params.grid.pool(pool)), pool, params.grid.pools},
                        first_channel, sums);
}

template <class Element, TileId kTile>
void launch_grad_input(const Problem& p, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  using Tile = Gemm<Element, kTile>;
  PixelGrid grid = make_pixel_grid(p, false);
  if (p.pool) {
    grid.pooled_source = true;
    grid.source_h = static_cast<int>(p.h) / 2 * 2;
    grid.source_w = static_cast<int>(p.w) / 2 * 2;
  }
  const Epilogue epilogue{nullptr, pointers.grad_input, nullptr, static_cast<int>(p.c), false, false};
  const GradInputParams params{
      make_grad_source(p, pointers.output), pointers.weight, epilogue, grid, static_cast<int>(p.c), static_cast<int>(p.k),
      static_cast<int>(plan.tiles_n)};
  const LaunchShape shape{plan.tiles_m * plan.tiles_n, Tile::kThreads, int{sizeof(typename Tile::Shared)}};
  if (p.relu || p.pool) {
    launch_kernel("sm80 grad_input", grad_input_kernel<Element, kTile, true>, shape, stream, params);
  } else {
    launch_kernel("sm80 grad_input", grad_input_kernel<Element, kTile, false>, shape, stream, params);
  }
}

} // namespace vggfast::cuda::sm80
