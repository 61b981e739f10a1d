// The persistent, warp-specialised implicit GEMM of forward and grad_input: one thread brings boxes of pixels and filters
// with the copy engine, two warpgroups multiply them. Rows of the product are pixels, columns channels; the reduction runs
// over blocks of 64 channels and, inside, the nine taps. A tap is the same box at shifted coordinates: what the copy
// engine fills in outside the image is the padding.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/plan_sm90.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/tensor_map.h"

namespace vggfast::cuda::sm90 {

inline constexpr int kGroupThreads = 128; // a warpgroup
inline constexpr int kConsumers = 2;      // warpgroups that multiply
inline constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
inline constexpr int kConsumerWarps = kConsumers * kGroupThreads / 32;
// Of 64 K registers; at launch every thread has 168.
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kGroupThreads * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

/// How the filters lie in a stage: output channels of the layer as rows (forward), or along the reduction (grad_input).
enum class Filters { rows, columns };

/// The tiles of a product, in the order in which they are worked on: channels the fastest, so that blocks that run
/// together share their pixels and the weight stays in L2.
struct TileGrid {
  FastDiv tiles_channels, tiles_w, tiles_h;
  int tiles; // of the whole product
  PixelBox box;
  int n, h, w; // pixels beyond are not written

  struct Tile {
    int n, h, w; // first pixel
    int channel_tile;
  };
  __device__ Tile tile(int index) const {
    const int boxes = tiles_channels.quotient(index);
    const int rows = tiles_w.quotient(boxes);
    const int images = tiles_h.quotient(rows);
    return {images * box.n, (rows - images * tiles_h.divisor()) * box.h, (boxes - rows * tiles_w.divisor()) * box.w,
            index - boxes * tiles_channels.divisor()};
  }
};

/// Host: the grid of a plan over [n, h, w] pixels.
inline TileGrid make_tile_grid(const Plan& plan, int64_t n, int64_t h, int64_t w) {
  const auto tiles = [](int64_t extent, int box) { return FastDiv(static_cast<uint32_t>((extent + box - 1) / box)); };
  return {FastDiv(static_cast<uint32_t>(plan.tiles_n)),
          tiles(w, plan.box.w),
          tiles(h, plan.box.h),
          static_cast<int>(plan.tiles_m * plan.tiles_n),
          plan.box,
          static_cast<int>(n),
          static_cast<int>(h),
          static_cast<int>(w)};
}

/// Where the rows of a slab of a box go: 8 columns wide, so 16 rows are four pools.
struct BoxPlaces {
  const TileGrid& grid;
  TileGrid::Tile at;
  int first_row; // of the box

  __device__ __forceinline__ int64_t pixel(int row) const {
    const int line = (first_row + row) / 8, image = line / grid.box.h;
    const int n = at.n + image, h = at.h + line - image * grid.box.h, w = at.w + row % 8;
    return n < grid.n && h < grid.h && w < grid.w ? (int64_t{n} * grid.h + h) * grid.w + w : -1;
  }
  /// In a plane of half the height and width.
  __device__ __forceinline__ int64_t pool(int row) const {
    const int line = first_row / 8 + row / 4 * 2, image = line / grid.box.h;
    const int n = at.n + image, h = (at.h + line - image * grid.box.h) / 2, w = at.w / 2 + row % 4;
    const int pools_h = grid.h / 2, pools_w = grid.w / 2;
    return n < grid.n && h < pools_h && w < pools_w ? (int64_t{n} * pools_h + h) * pools_w + w : -1;
  }
};

struct GemmParams {
  CUtensorMap source;  // [N, H, W, channels of the reduction]
  CUtensorMap filters; // [K, 9, C]
  Epilogue epilogue;
  TileGrid grid;
  int blocks; // of 64 channels in the reduction
};

/// The epilogue's tile: 64 rows of a warpgroup, 64 columns.
template <class ElementType>
struct Slab {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  static constexpr TileShape shape{64, 64, 4, 1, 0};
  static constexpr int kThreads = kGroupThreads, kElementBytes = sizeof(Storage);
  static constexpr int kFragmentsM = 1, kFragmentsN = 8;
  struct Accumulators {
    float values[kFragmentsM][kFragmentsN][4];
  };
  static __device__ int thread() { return threadIdx.x % kGroupThreads; }
  static __device__ void barrier() { ptx::named_barrier_sync<kGroupThreads>(1 + threadIdx.x / kGroupThreads); }
  static __device__ int warp_row() { return threadIdx.x / 32 % 4 * 16; }
  static __device__ int warp_column() { return 0; }
};

/// Sizes, shared memory and arithmetic of one tile.
template <class ElementType, WideTile kTile, Filters kFilters>
struct WideGemm {
  using Element = ElementType;
  using Writer = TileWriter<Slab<Element>, BoxPlaces>;
  static constexpr WideTileShape shape = wide_tile_shape(kTile);
  static constexpr int kStages = shape.stages, kN = shape.block_n;
  static constexpr int kSlabs = shape.group_m() / 64;                                 // of 64 rows: one wgmma
  static constexpr int kRowBytes = 2 * kSwizzleRow, kBlock = kSwizzleRow * kRowBytes; // 64 rows
  static constexpr int kSteps = kSwizzleRow / 16;

  struct Stage {
    alignas(kPatternBytes) unsigned char pixels[shape.block_m * kRowBytes];
    alignas(kPatternBytes) unsigned char filters[shape.block_n * kRowBytes];
  };
  struct Shared {
    Stage stages[kStages];
    alignas(128) unsigned char staging[kConsumers][Writer::kStagingBytes];
    StageBarriers<kStages> barriers;
  };
  static_assert(sizeof(Stage) == shape.stage_bytes() && sizeof(Shared) <= 227 * 1024);

  struct Sums {
    float values[kSlabs][kN / 8][4];
  };

  static __device__ __forceinline__ void multiply(float (&sums)[kN / 8][4], uint64_t pixels, uint64_t filters, bool accumulate) {
    constexpr int transposed = kFilters == Filters::columns;
    if constexpr (Element::dtype == DType::bf16) {
      ptx::wgmma_bf16<kN, 0, transposed>(sums, pixels, filters, accumulate);
    } else {
      ptx::wgmma_f16<kN, 0, transposed>(sums, pixels, filters, accumulate);
    }
  }

  /// Starts sums = (accumulate ? sums : 0) + this warpgroup's rows of the stage.
  static __device__ __forceinline__ void multiply_stage(Sums& sums, const Stage& stage, bool accumulate) {
    const int first_row = threadIdx.x / kGroupThreads * shape.group_m();
    const uint64_t pixels = row_descriptor(stage.pixels + first_row * kRowBytes);
    const uint64_t filters = kFilters == Filters::rows ? row_descriptor(stage.filters) : column_descriptor(stage.filters, kBlock);
    constexpr uint64_t filter_step = kFilters == Filters::rows ? kRowStep : kColumnStep;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        multiply(sums.values[slab], pixels + slab * (kBlock >> 4) + step * kRowStep, filters + step * filter_step,
                 accumulate || step > 0);
      }
    }
    ptx::wgmma_commit();
  }

  /// One thread: all boxes of all tiles of this block.
  static __device__ void produce(Shared& shared, const GemmParams& params) {
    StageCursor<kStages> at;
    for (int index = blockIdx.x; index < params.grid.tiles; index += gridDim.x) {
      const TileGrid::Tile tile = params.grid.tile(index);
      for (int block = 0; block < params.blocks; ++block) {
        for (int tap = 0; tap < 9; ++tap) {
          // A fresh barrier counts as past its odd phase: the first round does not wait.
          wait_phase(shared.barriers.empty[at.stage], at.parity ^ 1u);
          ptx::Mbarrier* full = &shared.barriers.full[at.stage];
          ptx::mbarrier_arrive_expect_tx(full, sizeof(Stage));
          Stage& stage = shared.stages[at.stage];
          ptx::tma_load_4d(stage.pixels, &params.source, full, block * kSwizzleRow, tile.w + tap % 3 - 1, tile.h + tap / 3 - 1,
                           tile.n);
          load_filters(stage, params, full, tile.channel_tile * kN, block * kSwizzleRow, tap);
          at.next();
        }
      }
    }
  }

  /// `column`: first channel of the product's columns; `reduced`: first of the reduction.
  static __device__ __forceinline__ void load_filters(Stage& stage, const GemmParams& params, ptx::Mbarrier* full, int column,
                                                      int reduced, int tap) {
    if constexpr (kFilters == Filters::rows) {
      ptx::tma_load_3d(stage.filters, &params.filters, full, reduced, tap, column);
    } else {
      for (int part = 0; part < kN / kSwizzleRow; ++part) {
        ptx::tma_load_3d(stage.filters + part * kBlock, &params.filters, full, column + part * kSwizzleRow, 8 - tap, reduced);
      }
    }
  }

  /// A warpgroup: its half of the rows of all tiles of this block.
  static __device__ void consume(Shared& shared, const GemmParams& params) {
    const int group = threadIdx.x / kGroupThreads;
    StageCursor<kStages> at;
    for (int index = blockIdx.x; index < params.grid.tiles; index += gridDim.x) {
      Sums sums;
      const int stages = 9 * params.blocks;
      int before = 0;
      for (int i = 0; i < stages; ++i) {
        wait_phase(shared.barriers.full[at.stage], at.parity);
        multiply_stage(sums, shared.stages[at.stage], i > 0);
        // While these products run, the stage before them is done and can be filled again.
        ptx::wgmma_wait<1>();
        if (i > 0) {
          release(shared.barriers.empty[before]);
        }
        before = at.stage;
        at.next();
      }
      ptx::wgmma_wait<0>();
      release(shared.barriers.empty[before]);
      store(sums, shared.staging[group], params, params.grid.tile(index), group);
    }
  }

  static __device__ __forceinline__ void release(ptx::Mbarrier& empty) {
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(&empty);
    }
  }

  static __device__ __forceinline__ void store(const Sums& sums, unsigned char* staging, const GemmParams& params,
                                               const TileGrid::Tile& tile, int group) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const BoxPlaces places{params.grid, tile, group * shape.group_m() + slab * 64};
#pragma unroll
      for (int part = 0; part < kN / 64; ++part) {
        typename Slab<Element>::Accumulators values;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            values.values[0][j][e] = sums.values[slab][8 * part + j][e];
          }
        }
        Slab<Element>::barrier(); // what was staged before is stored
        Writer(params.epilogue, staging, places, tile.channel_tile * kN + part * 64).write(values);
      }
    }
  }
};

/// The whole kernel.
template <class Gemm>
__device__ __forceinline__ void run_implicit_gemm(const GemmParams& params) {
  auto& shared = ptx::dynamic_shared<typename Gemm::Shared>();
  if (threadIdx.x == 0) {
    shared.barriers.init(kConsumerWarps);
  }
  __syncthreads();
  if (threadIdx.x / kGroupThreads == kConsumers) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x % kGroupThreads == 0) {
      ptx::prefetch_tensormap(&params.source);
      ptx::prefetch_tensormap(&params.filters);
      Gemm::produce(shared, params);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Gemm::consume(shared, params);
  }
}

} // namespace vggfast::cuda::sm90
