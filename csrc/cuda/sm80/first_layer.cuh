// The forward pass for 3 input channels or fewer, from any strides (NCHW images are read where they lie). The whole
// reduction, 9 C <= 27, is one padded step: the block gathers its pixels' neighbourhoods into shared memory itself.
// Bound by the stores of y, so tiles are small and many blocks share an SM.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"

namespace vggfast::cuda::sm80 {

struct FirstLayerParams {
  const void* x; // [N, H, W, C] by strides
  int64_t stride_n, stride_h, stride_w, stride_c;
  const void* weight; // [K, 3, 3, C]
  Epilogue epilogue;
  PixelGrid grid;
  int c, k;
  int tiles_m, tiles_n;
};

template <class Element>
struct FirstLayer {
  using Tile = Gemm<Element, TileId::m64n64>;
  using Storage = typename Element::Storage;
  static constexpr int kDepth = 32;                                // 9 C padded
  static constexpr int kStages = kDepth / Tile::kDepth;            // 1 for 16-bit elements, 2 for fp32
  static constexpr int kFirstStage = Tile::shape.stages - kStages; // the epilogue's tile lies in the stages before
  static constexpr int kTilesPerBlock = 4;                         // share one copy of the weights
  static_assert(Tile::shape.block_m * Tile::kRowBytesN <= kFirstStage * int{sizeof(typename Tile::Stage)});

  /// Reduction index j stands for channel j % C of tap j / C.
  struct Term {
    int64_t offset; // elements from the pixel's own first channel
    uint32_t tap;   // its bit; none past 9 C
  };
  struct Shared {
    typename Tile::Shared tile;
    Term terms[kDepth];
  };
};

template <class Element>
__device__ __forceinline__ void fill_terms(typename FirstLayer<Element>::Shared& shared, const FirstLayerParams& params) {
  const int j = threadIdx.x;
  if (j < FirstLayer<Element>::kDepth) {
    const int tap = j / params.c, channel = j % params.c;
    auto& term = shared.terms[j];
    term.offset = (tap / 3 - 1) * params.stride_h + (tap % 3 - 1) * params.stride_w + channel * params.stride_c;
    term.tap = tap < 9 ? 1u << tap : 0u;
  }
}

/// B: row k holds the 9 C weights of channel k, in memory order, then zeros.
template <class Element>
__device__ __forceinline__ void load_filters(typename FirstLayer<Element>::Shared& shared, const FirstLayerParams& params,
                                             int first_channel) {
  using Layer = FirstLayer<Element>;
  using Tile = typename Layer::Tile;
  constexpr int vector = kVector<Element>, chunks = Layer::kDepth / vector;
  const auto* weight = static_cast<const typename Element::Storage*>(params.weight);
  for (int item = threadIdx.x; item < Tile::shape.block_n * chunks; item += Tile::kThreads) {
    const int row = item / chunks, chunk = item % chunks, channel = first_channel + row;
    Vector<Element> values{};
#pragma unroll
    for (int e = 0; e < vector; ++e) {
      const int j = chunk * vector + e;
      if (channel < params.k && j < 9 * params.c) {
        values.elements[e] = weight[channel * 9 * params.c + j];
      }
    }
    auto& stage = shared.tile.stages[Layer::kFirstStage + chunk / 4];
    *reinterpret_cast<uint4*>(stage.b + swizzle<kStageRowBytes>(row, chunk % 4)) = values.words;
  }
}

/// A: row m holds the neighbourhood of pixel m. Consecutive threads take consecutive pixels, which lie together in NCHW.
template <class Element>
__device__ __forceinline__ void gather_pixels(typename FirstLayer<Element>::Shared& shared, const FirstLayerParams& params,
                                              int pool) {
  using Layer = FirstLayer<Element>;
  using Tile = typename Layer::Tile;
  constexpr int vector = kVector<Element>, chunks = Layer::kDepth / vector;
  const auto* x = static_cast<const typename Element::Storage*>(params.x);
  for (int item = threadIdx.x; item < Tile::shape.block_m * chunks; item += Tile::kThreads) {
    const int row = item % Tile::shape.block_m, chunk = item / Tile::shape.block_m;
    const uint32_t taps = shared.tile.rows[row].taps;
    const PixelGrid::Pool p = params.grid.pool(min(pool + row_pool(row), params.grid.pools - 1));
    const int h = 2 * p.row + row_dh(row), w = 2 * p.column + row_dw(row);
    const auto* pixel = x + (p.n * params.stride_n + h * params.stride_h + w * params.stride_w);
    Vector<Element> values{};
#pragma unroll
    for (int e = 0; e < vector; ++e) {
      const typename Layer::Term term = shared.terms[chunk * vector + e];
      if (taps & term.tap) {
        values.elements[e] = pixel[term.offset];
      }
    }
    auto& stage = shared.tile.stages[Layer::kFirstStage + chunk / 4];
    *reinterpret_cast<uint4*>(stage.a + swizzle<kStageRowBytes>(row, chunk % 4)) = values.words;
  }
}

template <class Element>
__global__ void __launch_bounds__(tile_shape(TileId::m64n64).threads(), 4)
    first_layer_kernel(const __grid_constant__ FirstLayerParams params) {
  using Layer = FirstLayer<Element>;
  using Tile = typename Layer::Tile;
  auto& shared = ptx::dynamic_shared<typename Layer::Shared>();
  const int group = blockIdx.x / params.tiles_n, first_channel = blockIdx.x % params.tiles_n * Tile::shape.block_n;
  const int last = min((group + 1) * Layer::kTilesPerBlock, params.tiles_m);
  fill_terms<Element>(shared, params);
  load_filters<Element>(shared, params, first_channel);

  for (int tile_m = group * Layer::kTilesPerBlock; tile_m < last; ++tile_m) {
    const int pool = tile_m * (Tile::shape.block_m / 4);
    __syncthreads(); // the tile before is stored: its rows and its staged values may be overwritten
    fill_tile_rows(shared.tile.rows, params.grid, pool);
    __syncthreads();
    gather_pixels<Element>(shared, params, pool);
    __syncthreads();
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    for (int stage = Layer::kFirstStage; stage < Tile::shape.stages; ++stage) {
      Tile::template multiply<Order::rows, Order::rows>(sums, shared.tile.stages[stage]);
    }
    write_pool_rows<Tile>(params.epilogue, shared.tile,
                          {shared.tile.rows, params.grid.pixel(params.grid.pool(pool)), pool, params.grid.pools}, first_channel,
                          sums);
  }
}

template <class Element>
void launch_first_layer(const Problem& p, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  using Layer = FirstLayer<Element>;
  const Epilogue epilogue{pointers.bias, pointers.y, pointers.argmax, static_cast<int>(p.k), p.relu, p.pool};
  const FirstLayerParams params{pointers.x,
                                pointers.stride_n,
                                pointers.stride_h,
                                pointers.stride_w,
                                pointers.stride_c,
                                pointers.weight,
                                epilogue,
                                make_pixel_grid(p, p.pool),
                                static_cast<int>(p.c),
                                static_cast<int>(p.k),
                                static_cast<int>(plan.tiles_m),
                                static_cast<int>(plan.tiles_n)};
  const int64_t groups = (plan.tiles_m + Layer::kTilesPerBlock - 1) / Layer::kTilesPerBlock;
  const LaunchShape shape{groups * plan.tiles_n, Layer::Tile::kThreads, int{sizeof(typename Layer::Shared)}};
  launch_kernel("sm80 first_layer", first_layer_kernel<Element>, shape, stream, params);
}

} // namespace vggfast::cuda::sm80
