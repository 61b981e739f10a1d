// The persistent, warp-specialised implicit GEMM of forward and grad_input: one thread brings boxes of pixels and filters
// with the copy engine, two warpgroups multiply them. Rows of the product are pixels, columns channels; the reduction runs
// over blocks of 64 channels (of fp32 32: 128 bytes) and, inside, the nine taps. A tap is the same box at shifted coordinates: what
// the copy engine fills in outside the image is the padding.
#pragma once

#include "cuda/sm90/consumers.cuh"

namespace vggfast::cuda::sm90 {

/// How the filters lie in a stage: columns of the product as rows, or along the rows (grad_input of 16-bit elements).
enum class Filters { rows, columns };

/// The tiles of a product, in the order in which they are worked on: channels the fastest, so that blocks that run
/// together share their pixels and the weight stays in L2.
struct TileGrid {
  FastDiv tiles_channels;
  BoxWalk boxes;
  int tiles;   // of the whole product
  int n, h, w; // pixels beyond are not written
  int log2_box_w, log2_box_h;

  struct Tile {
    BoxWalk::Pixel pixel; // the first
    int channel_tile;
  };
  __device__ Tile tile(int index) const {
    const int box = tiles_channels.quotient(index);
    return {boxes.first_pixel(box), index - box * tiles_channels.divisor()};
  }
};

/// Host: the grid of a plan over [n, h, w] pixels.
inline TileGrid make_tile_grid(const Plan& plan, int64_t n, int64_t h, int64_t w) {
  const auto log2 = [](int value) {
    int result = 0;
    while (1 << result < value) {
      ++result;
    }
    return result;
  };
  return {FastDiv(static_cast<uint32_t>(plan.tiles_n)),
          make_box_walk(plan.box, h, w),
          static_cast<int>(plan.tiles_m * plan.tiles_n),
          static_cast<int>(n),
          static_cast<int>(h),
          static_cast<int>(w),
          log2(plan.box.w),
          log2(plan.box.h)};
}

/// Where the rows of a slab of a box go. With pools, boxes are 8 columns wide, so 16 rows are four pools.
struct BoxPlaces {
  const TileGrid& grid;
  BoxWalk::Pixel at;
  int first_row; // of the box

  __device__ __forceinline__ BoxWalk::Pixel place(int row) const {
    const int line = row >> grid.log2_box_w, image = line >> grid.log2_box_h;
    return {at.n + image, at.h + line - (image << grid.log2_box_h), at.w + row - (line << grid.log2_box_w)};
  }
  __device__ __forceinline__ int64_t pixel(int row) const {
    const BoxWalk::Pixel p = place(first_row + row);
    return p.n < grid.n && p.h < grid.h && p.w < grid.w ? (int64_t{p.n} * grid.h + p.h) * grid.w + p.w : -1;
  }
  /// In a plane of half the height and width.
  __device__ __forceinline__ int64_t pool(int row) const {
    const BoxWalk::Pixel p = place(first_row + row / 4 * 16 + row % 4 * 2); // the pool's first pixel
    return p.n < grid.n && p.h < grid.h && p.w < grid.w ? (int64_t{p.n} * (grid.h / 2) + p.h / 2) * (grid.w / 2) + p.w / 2 : -1;
  }
};

struct GemmParams {
  CUtensorMap source;  // [N, H, W, channels of the reduction]
  CUtensorMap filters; // [K, 9, C]; of Filters::rows [columns, 9, channels of the reduction]
  Epilogue epilogue;
  TileGrid grid;
  int stages;      // of the reduction: nine taps of every row of channels, or where a patch serves all taps a row of channels
  int splits;      // of the stages; with more than one, sums go to `partials` and a second pass has the epilogue
  float* partials; // [tiles][splits][slabs][kVectors float4], each thread's accumulators together
};

/// The epilogue's tile: 64 rows of a warpgroup, 128 bytes of columns.
template <class ElementType>
struct Slab {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  static constexpr int kColumns = swizzle_row(Element::dtype);
  static constexpr TileShape shape{64, kColumns, 4, 1, 0, 1};
  static constexpr int kThreads = kGroupThreads, kElementBytes = sizeof(Storage);
  static constexpr int kFragmentsM = 1, kFragmentsN = kColumns / 8;
  static constexpr int kVectors = 64 * kColumns / 4; // 16-byte vectors of the accumulators
  struct Accumulators {
    float values[kFragmentsM][kFragmentsN][4];
  };
  static __device__ int thread() { return threadIdx.x % kGroupThreads; }
  static __device__ void barrier() { group_barrier(); }
  static __device__ int warp_row() { return threadIdx.x / 32 % 4 * 16; }
  static __device__ int warp_column() { return 0; }
};

/// One split of one tile.
struct Work {
  TileGrid::Tile tile;
  int first_stage, stages;

  __device__ Work(const GemmParams& params, int index) {
    const int number = index / params.splits, split = index - number * params.splits;
    tile = params.grid.tile(number);
    const int per_split = (params.stages + params.splits - 1) / params.splits;
    first_stage = split * per_split;
    stages = min(per_split, params.stages - first_stage);
  }
};

/// Arithmetic of a tile of pixels, and where its sums go: kSlabs slabs of 64 rows a warpgroup, kColumns columns.
template <class ElementType, int kSlabCount, int kColumns, Filters kFilters>
struct PixelTile {
  using Element = ElementType;
  using Part = Slab<Element>;
  using Writer = TileWriter<Part, BoxPlaces>;
  static constexpr int kSlabs = kSlabCount, kN = kColumns;
  static constexpr int kDepth = swizzle_row(Element::dtype); // elements of the reduction in a stage
  static constexpr int kBlock = 64 * kRowBytes;              // 64 rows
  static constexpr int kSteps = kRowBytes / 32;
  static_assert(kFilters == Filters::rows || Element::dtype != DType::tf32, "TF32 has no transposed operands");

  struct Sums {
    float values[kSlabs][kN / 8][4];
  };

  static __device__ __forceinline__ void multiply(float (&sums)[kN / 8][4], uint64_t pixels, uint64_t filters, bool accumulate) {
    constexpr int transposed = kFilters == Filters::columns;
    if constexpr (Element::dtype == DType::tf32) {
      ptx::wgmma_tf32<kN>(sums, pixels, filters, accumulate);
    } else if constexpr (Element::dtype == DType::bf16) {
      ptx::wgmma_bf16<kN, 0, transposed>(sums, pixels, filters, accumulate);
    } else {
      ptx::wgmma_f16<kN, 0, transposed>(sums, pixels, filters, accumulate);
    }
  }

  /// Starts sums = (accumulate ? sums : 0) + kDepth channels of pixels, a descriptor a slab, times those of the filters.
  static __device__ __forceinline__ void multiply_slabs(Sums& sums, const uint64_t (&pixels)[kSlabs],
                                                        const unsigned char* filter_tile, bool accumulate) {
    const uint64_t filters = kFilters == Filters::rows ? row_descriptor(filter_tile) : column_descriptor(filter_tile, kBlock);
    constexpr uint64_t filter_step = kFilters == Filters::rows ? kRowStep : kColumnStep;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        multiply(sums.values[slab], pixels[slab] + step * kRowStep, filters + step * filter_step, accumulate || step > 0);
      }
    }
    ptx::wgmma_commit();
  }

  /// `column`: first channel of the product's columns; `reduced`: first of the reduction.
  static __device__ __forceinline__ void load_filters(unsigned char* to, const GemmParams& params, ptx::Mbarrier* full, int column,
                                                      int reduced, int tap) {
    if constexpr (kFilters == Filters::rows) {
      ptx::tma_load_3d(to, &params.filters, full, reduced, tap, column);
    } else {
      for (int part = 0; part < kN / kDepth; ++part) {
        ptx::tma_load_3d(to + part * kBlock, &params.filters, full, column + part * kDepth, 8 - tap, reduced);
      }
    }
  }

  /// To the output, or with splits to the workspace.
  static __device__ __forceinline__ void finish(const Sums& sums, unsigned char* staging, const GemmParams& params,
                                                const TileGrid::Tile& tile, int index, int group) {
    if (params.splits > 1) {
      store_partials(sums, params, index, group);
    } else {
      store(sums, staging, params, tile, group);
    }
  }

  static __device__ __forceinline__ void store_partials(const Sums& sums, const GemmParams& params, int index, int group) {
    constexpr int slabs = kConsumers * kSlabs * (kN / Part::kColumns);
    auto* to = reinterpret_cast<float4*>(params.partials) +
               (int64_t{index} * slabs + group * (slabs / kConsumers)) * Part::kVectors + threadIdx.x % kGroupThreads;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float(&v)[4] = sums.values[slab][j];
        to[(slab * (kN / 8) + j) * kGroupThreads] = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  static __device__ __forceinline__ void store(const Sums& sums, unsigned char* staging, const GemmParams& params,
                                               const TileGrid::Tile& tile, int group) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const BoxPlaces places{params.grid, tile.pixel, (group * kSlabs + slab) * 64};
#pragma unroll
      for (int part = 0; part < kN / Part::kColumns; ++part) {
        typename Part::Accumulators values;
#pragma unroll
        for (int j = 0; j < Part::kFragmentsN; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            values.values[0][j][e] = sums.values[slab][Part::kFragmentsN * part + j][e];
          }
        }
        group_barrier(); // what was staged before is stored
        Writer(params.epilogue, staging, places, tile.channel_tile * kN + part * Part::kColumns).write(values);
      }
    }
  }
};

/// Shared memory and main loop of one tile whose stages hold the pixels as one tap sees them.
template <class ElementType, WideTile kTile, Filters kFilters>
struct WideGemm {
  static constexpr WideTileShape shape = pixel_tile_shape(kTile);
  using Tile = PixelTile<ElementType, shape.group_m() / 64, shape.block_n, kFilters>;
  static constexpr int kStages = shape.stages, kN = Tile::kN;

  struct Stage {
    alignas(kPatternBytes) unsigned char pixels[shape.block_m * kRowBytes];
    alignas(kPatternBytes) unsigned char filters[shape.block_n * kRowBytes];
  };
  struct Shared {
    Stage stages[kStages];
    alignas(128) unsigned char staging[kConsumers][Tile::Writer::kStagingBytes];
    StageBarriers<kStages> barriers;
  };
  static_assert(sizeof(Shared) <= 227 * 1024);

  /// This warpgroup's rows of the stage.
  static __device__ __forceinline__ void multiply_stage(typename Tile::Sums& sums, const Stage& stage, bool accumulate) {
    const int first_row = threadIdx.x / kGroupThreads * shape.group_m();
    uint64_t pixels[Tile::kSlabs];
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      pixels[slab] = row_descriptor(stage.pixels + first_row * kRowBytes) + slab * (Tile::kBlock >> 4);
    }
    Tile::multiply_slabs(sums, pixels, stage.filters, accumulate);
  }

  /// One thread: all boxes of all the work of this block.
  static __device__ void produce(Shared& shared, const GemmParams& params) {
    ptx::prefetch_tensormap(&params.source);
    ptx::prefetch_tensormap(&params.filters);
    StageCursor<kStages> at;
    for (int index = blockIdx.x; index < params.grid.tiles * params.splits; index += gridDim.x) {
      const Work work(params, index);
      const BoxWalk::Pixel pixel = work.tile.pixel;
      for (int i = 0; i < work.stages; ++i) {
        const int block = (work.first_stage + i) / 9, tap = work.first_stage + i - block * 9;
        // A fresh barrier counts as past its odd phase: the first round does not wait.
        wait_phase(shared.barriers.empty[at.stage], at.parity ^ 1u);
        ptx::Mbarrier* full = &shared.barriers.full[at.stage];
        ptx::mbarrier_arrive_expect_tx(full, sizeof(Stage));
        Stage& stage = shared.stages[at.stage];
        ptx::tma_load_4d(stage.pixels, &params.source, full, block * Tile::kDepth, pixel.w + tap % 3 - 1, pixel.h + tap / 3 - 1,
                         pixel.n);
        Tile::load_filters(stage.filters, params, full, work.tile.channel_tile * kN, block * Tile::kDepth, tap);
        at.next();
      }
    }
  }

  /// A warpgroup: its half of the rows of all tiles of this block.
  static __device__ void consume(Shared& shared, const GemmParams& params) {
    const int group = threadIdx.x / kGroupThreads;
    StageCursor<kStages> at;
    for (int index = blockIdx.x; index < params.grid.tiles * params.splits; index += gridDim.x) {
      typename Tile::Sums sums;
      const Work work(params, index);
      consume_stages(shared.barriers, at, work.stages,
                     [&](int stage, bool accumulate) { multiply_stage(sums, shared.stages[stage], accumulate); });
      Tile::finish(sums, shared.staging[group], params, work.tile, index, group);
    }
  }
};

/// The whole kernel.
template <class Gemm>
__device__ __forceinline__ void run_implicit_gemm(const GemmParams& params) {
  run_warp_specialised<Gemm>(ptx::dynamic_shared<typename Gemm::Shared>(), params);
}

} // namespace vggfast::cuda::sm90
