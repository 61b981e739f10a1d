// Plans of the sm_90 kernels that bring a box of pixels with its halo once and read all nine taps from it. Plain host C++.
//
// What they need of the hardware, beyond what plan_sm90.h's kernels need, is only in the manual's words so far: that a
// descriptor may start at any row of the swizzle's pattern. They have a switch of their own until a GPU has shown it.
#pragma once

#include "cuda/plan_sm90.h"

namespace vggfast::cuda {

/// Columns of a patch: eight of pixels, which are the eight rows of the swizzle's pattern, and the halo's two.
inline constexpr int kPatchWidth = 10;

constexpr int patch_rows(const PixelBox& box) {
  return kPatchWidth * (box.h + 2) * box.n;
}

/// A block's tile of the product and its two rings: patches, and filters of one tap. 227 KiB with 16 KiB of staging.
struct PatchTileShape {
  int block_m, block_n;
  int patches, stages;

  constexpr int group_m() const { return block_m / 2; }
  /// Rows of the largest patch: of the most images, each of which has a halo. 128 bytes each, whole patterns in all.
  constexpr int most_rows() const { return patch_rows({8, 8, block_m / 64}); }
};

constexpr PatchTileShape patch_tile_shape(WideTile tile) {
  switch (tile) {
  // Nine stages hold the filters of 64 channels: where those are all, they stay. 10 bytes a clock from L2 then, else 25.
  case WideTile::m256n64:
    return {256, 64, 2, 9};
  // 21 bytes a clock from L2, where a tile of one box a tap takes 48.
  case WideTile::m256n128:
    return {256, 128, 2, 6};
  // Half the rows where 256 leave SMs idle: 37 bytes a clock.
  case WideTile::m128n128:
    return {128, 128, 3, 8};
  default:
    return {};
  }
}

/// Whether so many stages hold the filters of all taps of all channels, and are filled once for all tiles of a block.
constexpr bool filters_stay(int stages, int64_t blocks_of_channels, int64_t tiles_n) {
  return stages == 9 && blocks_of_channels == 1 && tiles_n == 1;
}

namespace plan_detail {

// Multiply-adds of 16-bit elements a clock and SM: 989 TFLOP/s of an H100 at 1.83 GHz.
inline constexpr double kProductsPerClock = 2048;

/// Eight columns, and rows and images so that 64 pixels in order are of one image. The fewest boxes; the least halo on equal
/// numbers.
inline PixelBox best_patch_box(int pixels, int64_t n, int64_t h, int64_t w) {
  PixelBox best{};
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int box_h = pixels / 8; box_h >= 8; box_h /= 2) {
    const PixelBox box{8, box_h, pixels / 8 / box_h};
    if (box_count(box, n, h, w) < fewest) {
      fewest = box_count(box, n, h, w);
      best = box;
    }
  }
  return best;
}

/// Modelled clocks of one tile's 64 channels: nine products, or what they fetch.
inline double patch_block_clocks(const PatchTileShape& shape, const PixelBox& box, bool stay) {
  const double bytes = 128.0 * (patch_rows(box) + (stay ? 0 : 9 * shape.block_n));
  return std::max(9.0 * shape.block_m * shape.block_n * swizzle_row(DType::bf16) / kProductsPerClock, bytes / kL2BytesPerClock);
}

inline const char* patch_reason(int splits, bool stay) {
  return splits > 1 ? "few tiles: the reduction is split over the SMs that they leave idle; a patch serves nine taps"
         : stay     ? "a patch serves nine taps, and the filters of all of them stay"
                    : "a patch serves nine taps";
}

/// Forward and grad_input.
inline TimedPlan plan_patch(Pass pass, const Problem& p, const Device& device) {
  const bool pools = pass == Pass::forward && p.pool;
  const int64_t h = pools ? p.h / 2 * 2 : p.h, w = pools ? p.w / 2 * 2 : p.w;
  const int64_t columns = pass == Pass::forward ? p.k : p.c;
  const int blocks = pixel_stages(pass, p) / 9; // of 64 channels
  TimedPlan best;
  for (const auto tile : {WideTile::m256n64, WideTile::m256n128, WideTile::m128n128}) {
    const PatchTileShape shape = patch_tile_shape(tile);
    if ((shape.block_n == 64) != (columns <= 64)) {
      continue;
    }
    const PixelBox box = best_patch_box(shape.block_m, p.n, h, w);
    const int64_t tiles_m = box_count(box, p.n, h, w), tiles_n = ceil_div(columns, shape.block_n);
    for (int wanted = 1; wanted <= blocks; ++wanted) {
      const int per_split = static_cast<int>(ceil_div(blocks, wanted)), splits = static_cast<int>(ceil_div(blocks, per_split));
      Plan candidate{Kernel::wgmma_patch, TileId{}, tiles_m, tiles_n, splits, 0, "", tile, box};
      const int64_t items = tiles_m * tiles_n * splits, partials = partial_bytes(candidate);
      const bool stay = filters_stay(shape.stages, blocks, tiles_n);
      double clocks = double(ceil_div(items, device.sm_count) * per_split) * patch_block_clocks(shape, box, stay);
      clocks += splits > 1 ? double(partials) * kClocksPerPartialByte + kSecondPassClocks : 0;
      if (clocks < best.clocks) {
        candidate.blocks = std::min<int64_t>(items, device.sm_count);
        candidate.workspace_bytes = partials + (pass == Pass::grad_input ? grad_preact_bytes(p) : 0);
        candidate.reason = patch_reason(splits, stay);
        best = {candidate, clocks};
      }
    }
  }
  return best;
}

} // namespace plan_detail

/// The plan of a kernel that reads patches, or Kernel::aten and why not. Pure, as choose_plan.
inline Plan choose_plan_patch(Pass pass, const Problem& p, const Device& device) {
  using namespace plan_detail;
  const char* reason = unsupported(pass, p, device);
  reason = reason != nullptr ? reason : unsupported_sm90(pass, p, device);
  if (reason == nullptr && pass == Pass::grad_weight) {
    reason = "grad_weight shares its stages among the taps of a row already";
  }
  if (reason == nullptr && p.dtype == DType::tf32) {
    reason = "fp32: patches are of 16-bit elements";
  }
  if (reason != nullptr) {
    Plan plan;
    plan.reason = reason;
    return plan;
  }
  return plan_patch(pass, p, device).plan;
}

/// With the kernels that read patches allowed too: theirs where the model expects them to be faster.
inline Plan choose_plan_up_to_patch(Pass pass, const Problem& p, const Device& device) {
  const Plan patch = choose_plan_patch(pass, p, device);
  if (patch.kernel == Kernel::aten ||
      plan_detail::plan_pixels_sm90(pass, p, device).clocks <= plan_detail::plan_patch(pass, p, device).clocks) {
    return choose_plan_up_to_sm90(pass, p, device);
  }
  return patch;
}

} // namespace vggfast::cuda
