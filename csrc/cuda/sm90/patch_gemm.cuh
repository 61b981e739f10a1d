// The implicit GEMM of forward and grad_input over patches: the copy engine brings a box of pixels with its halo once for 64
// channels, and a tap is the same patch read from another row on. Rows of the patch are pixels of 128 bytes, ten to a line;
// eight pixels of a line are the eight rows of the swizzle's pattern that a descriptor counts as one group, and the next
// group is a line further. The swizzle is made of the address's own bits, so it does not matter at which row a descriptor starts.
#pragma once

#include "cuda/plan_patch.h"
#include "cuda/sm90/grad_preact.h"
#include "cuda/sm90/launch_splits.cuh"

namespace vggfast::cuda::sm90 {

/// Barriers of both rings.
template <int kPatches, int kStages>
struct PatchBarriers {
  StageBarriers<kPatches> patches;
  StageBarriers<kStages> filters;

  __device__ void init(int readers) {
    patches.init(readers);
    filters.init(readers);
  }
};

inline constexpr int kPixelBytes = kRowBytes, kPatchLineBytes = kPatchWidth * kPixelBytes;

/// 64 pixels as eight lines of eight, from `pixel` of the patch on. The base offset stays 0: the pattern itself starts at a
/// 1024-byte boundary, only the matrix does not.
__device__ __forceinline__ uint64_t patch_descriptor(const unsigned char* patch, int pixel) {
  return swizzled_descriptor(patch + pixel * kPixelBytes, 16, kPatchLineBytes);
}

/// Of the patch that 64 rows of a tile read, the first pixel at the first tap.
__device__ __forceinline__ int slab_pixel(int slab, int log2_box_h) {
  const int line = 8 * slab, image = line >> log2_box_h;
  return kPatchWidth * (line + 2 * image);
}

template <class ElementType, WideTile kTile, Filters kFilters>
struct PatchGemm {
  static constexpr PatchTileShape shape = patch_tile_shape(kTile);
  using Tile = PixelTile<ElementType, shape.group_m() / 64, shape.block_n, kFilters>;
  static constexpr int kN = Tile::kN, kSlabs = Tile::kSlabs, kStages = shape.stages, kPatches = shape.patches;

  struct Shared {
    alignas(kPatternBytes) unsigned char patches[kPatches][shape.most_rows() * kPixelBytes];
    alignas(kPatternBytes) unsigned char filters[kStages][kN * kPixelBytes];
    alignas(128) unsigned char staging[kConsumers][Tile::Writer::kStagingBytes];
    PatchBarriers<kPatches, kStages> barriers;
  };
  static_assert(sizeof(Shared) <= 227 * 1024 && shape.most_rows() * kPixelBytes % kPatternBytes == 0);

  static __device__ bool stay(const GemmParams& params) {
    return filters_stay(kStages, params.stages, params.grid.tiles_channels.divisor());
  }

  /// One thread: the patches of all the work of this block, and the filters of their taps.
  static __device__ void produce(Shared& shared, const GemmParams& params) {
    ptx::prefetch_tensormap(&params.source);
    ptx::prefetch_tensormap(&params.filters);
    const int patch_bytes = patch_rows(params.grid.boxes.box) * kPixelBytes;
    StageCursor<kPatches> patch;
    StageCursor<kStages> at;
    for (int index = blockIdx.x; index < params.grid.tiles * params.splits; index += gridDim.x) {
      const Work work(params, index);
      const BoxWalk::Pixel pixel = work.tile.pixel;
      for (int i = 0; i < work.stages; ++i) {
        const int channel = (work.first_stage + i) * Tile::kDepth;
        wait_phase(shared.barriers.patches.empty[patch.stage], patch.parity ^ 1u);
        ptx::Mbarrier* full = &shared.barriers.patches.full[patch.stage];
        ptx::mbarrier_arrive_expect_tx(full, patch_bytes);
        ptx::tma_load_4d(shared.patches[patch.stage], &params.source, full, channel, pixel.w - 1, pixel.h - 1, pixel.n);
        patch.next();
        if (!stay(params) || index == static_cast<int>(blockIdx.x)) {
          produce_filters(shared, params, at, work.tile.channel_tile * kN, channel);
        }
      }
    }
  }

  static __device__ __forceinline__ void produce_filters(Shared& shared, const GemmParams& params, StageCursor<kStages>& at,
                                                         int column, int channel) {
    for (int tap = 0; tap < 9; ++tap) {
      wait_phase(shared.barriers.filters.empty[at.stage], at.parity ^ 1u);
      ptx::Mbarrier* full = &shared.barriers.filters.full[at.stage];
      ptx::mbarrier_arrive_expect_tx(full, kN * kPixelBytes);
      Tile::load_filters(shared.filters[at.stage], params, full, column, channel, tap);
      at.next();
    }
  }

  /// Where a warpgroup is in both rings, and what the products in flight read.
  struct Cursors {
    StageCursor<kPatches> patch;
    StageCursor<kStages> filters;
    int patch_before = -1, filters_before = -1;
  };

  /// Lets go of what was read by products that are done by now.
  static __device__ __forceinline__ void release_before(Shared& shared, Cursors& at, bool filters) {
    if (filters && at.filters_before >= 0) {
      release(shared.barriers.filters.empty[at.filters_before]);
    }
    if (at.patch_before >= 0) {
      release(shared.barriers.patches.empty[at.patch_before]);
    }
    at.filters_before = at.patch_before = -1;
  }

  /// Nine taps of the next patch.
  static __device__ __forceinline__ void multiply_patch(typename Tile::Sums& sums, Shared& shared, const GemmParams& params,
                                                        Cursors& at, bool accumulate) {
    const int first_slab = threadIdx.x / kGroupThreads * kSlabs;
    const bool stays = stay(params);
    wait_phase(shared.barriers.patches.full[at.patch.stage], at.patch.parity);
    for (int tap = 0; tap < 9; ++tap) {
      // Filters that stay are in the stage of their tap, whose first phase is over for good once it is over.
      wait_phase(shared.barriers.filters.full[at.filters.stage], stays ? 0u : at.filters.parity);
      const int shift = tap / 3 * kPatchWidth + tap % 3;
      uint64_t pixels[kSlabs];
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        pixels[slab] =
            patch_descriptor(shared.patches[at.patch.stage], slab_pixel(first_slab + slab, params.grid.log2_box_h) + shift);
      }
      Tile::multiply_slabs(sums, pixels, shared.filters[at.filters.stage], accumulate || tap > 0);
      ptx::wgmma_wait<1>(); // those of the tap before are done
      release_before(shared, at, !stays);
      at.filters_before = at.filters.stage;
      at.filters.next();
    }
    at.patch_before = at.patch.stage;
    at.patch.next();
  }

  /// A warpgroup: its half of the rows of all tiles of this block.
  static __device__ void consume(Shared& shared, const GemmParams& params) {
    const int group = threadIdx.x / kGroupThreads;
    Cursors at;
    for (int index = blockIdx.x; index < params.grid.tiles * params.splits; index += gridDim.x) {
      typename Tile::Sums sums;
      const Work work(params, index);
      for (int i = 0; i < work.stages; ++i) {
        multiply_patch(sums, shared, params, at, i > 0);
      }
      ptx::wgmma_wait<0>();
      release_before(shared, at, !stay(params));
      Tile::finish(sums, shared.staging[group], params, work.tile, index, group);
    }
  }
};

template <class Element, WideTile kTile>
__global__ void __launch_bounds__(kThreads, 1) forward_patch_kernel(const __grid_constant__ GemmParams params) {
  run_implicit_gemm<PatchGemm<Element, kTile, Filters::rows>>(params);
}

template <class Element, WideTile kTile>
__global__ void __launch_bounds__(kThreads, 1) grad_input_patch_kernel(const __grid_constant__ GemmParams params) {
  run_implicit_gemm<PatchGemm<Element, kTile, Filters::columns>>(params);
}

/// Host: of a dense [N, H, W, C] tensor, the box with its halo.
inline CUtensorMap make_patch_map(const char* name, const Problem& p, const void* base, int64_t c, const PixelBox& box) {
  return make_image_map(name, p.dtype, base, p.n, p.h, p.w, c, {kPatchWidth, box.h + 2, box.n}, p.h, p.w);
}

template <class Element, WideTile kTile>
void launch_forward_patch(const Problem& p, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  using Gemm = PatchGemm<Element, kTile, Filters::rows>;
  const GemmParams params{make_patch_map("x", p, pointers.x, p.c, plan.box),
                          make_filter_map(p.dtype, pointers.weight, p.k, p.c, Gemm::kN),
                          {pointers.bias, pointers.y, pointers.argmax, static_cast<int>(p.k), p.relu, p.pool},
                          make_tile_grid(plan, p.n, p.pool ? p.h / 2 * 2 : p.h, p.pool ? p.w / 2 * 2 : p.w),
                          plan_detail::pixel_stages(Pass::forward, p) / 9,
                          plan.splits,
                          static_cast<float*>(pointers.workspace)};
  launch_with_splits<Gemm>("sm90 forward_patch", forward_patch_kernel<Element, kTile>, p.dtype, plan, params, stream);
}

template <class Element, WideTile kTile>
void launch_grad_input_patch(const Problem& p, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  using Gemm = PatchGemm<Element, kTile, Filters::columns>;
  // The workspace: the splits' partial sums, then the gradient before ReLU and pool.
  auto* partials = static_cast<float*>(pointers.workspace);
  void* preact = partials + plan_detail::partial_bytes(plan) / int64_t{sizeof(float)};
  const void* grad = materialise_grad_preact(p, pointers.output, preact, stream);
  const GemmParams params{make_patch_map("the gradient", p, grad, p.k, plan.box),
                          make_filter_map(p.dtype, pointers.weight, p.k, p.c, Gemm::Tile::kDepth),
                          {nullptr, pointers.grad_input, nullptr, static_cast<int>(p.c), false, false},
                          make_tile_grid(plan, p.n, p.h, p.w),
                          plan_detail::pixel_stages(Pass::grad_input, p) / 9,
                          plan.splits,
                          partials};
  launch_with_splits<Gemm>("sm90 grad_input_patch", grad_input_patch_kernel<Element, kTile>, p.dtype, plan, params, stream);
}

} // namespace vggfast::cuda::sm90
