// Plans of the sm_90 kernels (TMA and wgmma): which tile, which box of pixels, how many persistent blocks. Plain host C++.
//
// All numbers here are computed from published limits of the H100 and H200; none was measured.
#pragma once

#include "cuda/plan.h"

namespace vggfast::cuda {

/// A block's tile of the product on two warpgroups, each with half of the rows, and the stages that its shared memory
/// holds beside 16 KiB of staging: 227 KiB a block.
struct WideTileShape {
  int block_m, block_n;
  int stages;

  constexpr int group_m() const { return block_m / 2; }
  /// One step of the reduction: 64 16-bit elements, 128 bytes, a row of the 128-byte swizzle.
  constexpr int stage_bytes() const { return (block_m + block_n) * 128; }
};

constexpr WideTileShape wide_tile_shape(WideTile tile) {
  switch (tile) {
  // 64 columns are all there are in VGG's first block; 256 rows halve the traffic of the filters.
  case WideTile::m256n64:
    return {256, 64, 5};
  // Of 128 accumulators a thread, the most that leaves registers to spare, the two shapes with the least shared-memory
  // traffic: 48 bytes a clock from L2 and 96 (128 columns) or 80 (256 columns) to the tensor cores.
  case WideTile::m256n128:
    return {256, 128, 4};
  case WideTile::m128n256:
    return {128, 256, 4};
  // Half the rows, so twice the blocks, where 256 rows leave SMs idle: 64 bytes a clock from L2.
  case WideTile::m128n128:
    return {128, 128, 6};
  }
  return {};
}

namespace plan_detail {

/// Why TMA and wgmma cannot take what the sm_80 kernels can, or null.
inline const char* unsupported_sm90(Pass pass, const Problem& p, const Device& device) {
  constexpr int64_t coordinate_limit = int64_t{1} << 31;
  if (device.compute_capability != 90) {
    return "wgmma exists only on compute capability 9.0";
  }
  if (p.dtype == DType::tf32) {
    return "fp32: wgmma takes TF32 operands only along the reduction, and would truncate them";
  }
  if (p.c % 8 != 0) {
    return "input channels are not a multiple of 16 bytes, as TMA's strides must be";
  }
  if (pass == Pass::grad_weight) {
    return "grad_weight has no wgmma kernel";
  }
  if (std::max({p.n, p.h, p.w}) * 2 >= coordinate_limit) {
    return "a dimension passes TMA's 32-bit coordinates";
  }
  return nullptr;
}

/// The box of `pixels` pixels, 8 columns wide so that a thread holds a pool's rows, that covers the image plane with the
/// fewest boxes; the tallest on equal numbers. `h`, `w`: pixels that are written.
inline PixelBox best_box(int pixels, int64_t n, int64_t h, int64_t w) {
  PixelBox best{8, 2, pixels / 16};
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int box_h = 2; box_h <= pixels / 8; box_h *= 2) {
    const PixelBox box{8, box_h, pixels / 8 / box_h};
    const int64_t boxes = ceil_div(w, box.w) * ceil_div(h, box.h) * ceil_div(n, box.n);
    if (boxes <= fewest) {
      fewest = boxes;
      best = box;
    }
  }
  return best;
}

inline int64_t box_count(const PixelBox& box, int64_t n, int64_t h, int64_t w) {
  return ceil_div(w, box.w) * ceil_div(h, box.h) * ceil_div(n, box.n);
}

inline const char* wide_tile_reason(WideTile tile) {
  switch (tile) {
  case WideTile::m256n64:
    return "64 columns: 256 rows halve the traffic of the filters";
  case WideTile::m256n128:
    return "256x128: least traffic from L2, and fewest idle SMs or columns";
  case WideTile::m128n256:
    return "128x256: least traffic from L2 and to the tensor cores";
  case WideTile::m128n128:
    return "few tiles: 128x128 spreads them over more SMs";
  }
  return "";
}

} // namespace plan_detail

/// The sm_90 plan of one pass, or Kernel::aten and why not. Pure, as choose_plan.
inline Plan choose_plan_sm90(Pass pass, const Problem& p, const Device& device) {
  using namespace plan_detail;
  Plan plan;
  const char* reason = unsupported(pass, p, device);
  reason = reason != nullptr ? reason : unsupported_sm90(pass, p, device);
  if (reason != nullptr) {
    plan.reason = reason;
    return plan;
  }
  const bool pooled_only = pass == Pass::forward && p.pool;
  const int64_t h = pooled_only ? p.h / 2 * 2 : p.h, w = pooled_only ? p.w / 2 * 2 : p.w;
  const int64_t columns = pass == Pass::forward ? p.k : p.c;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kWideTiles; ++i) {
    const auto tile = static_cast<WideTile>(i);
    const WideTileShape shape = wide_tile_shape(tile);
    if ((shape.block_n == 64) != (columns <= 64)) {
      continue;
    }
    const PixelBox box = best_box(shape.block_m, p.n, h, w);
    const int64_t boxes = box_count(box, p.n, h, w), tiles_n = ceil_div(columns, shape.block_n);
    // Bytes from L2 bound every tile's rate, so a tile's time is its traffic.
    const double time = double(ceil_div(boxes * tiles_n, device.sm_count)) * shape.stage_bytes();
    // Of equal times the later, which has fewer bytes to the tensor cores, except for the small tile.
    if (time < least || (time == least && tile != WideTile::m128n128)) {
      least = time;
      plan = {Kernel::wgmma, TileId{}, boxes, tiles_n, 1, 0, wide_tile_reason(tile), tile, box};
    }
  }
  plan.blocks = std::min<int64_t>(plan.tiles_m * plan.tiles_n, device.sm_count);
  if (pass == Pass::grad_input && (p.relu || p.pool)) {
    plan.workspace_bytes = p.n * p.h * p.w * p.k * element_bytes(p.dtype); // the gradient before ReLU and pool
  }
  return plan;
}

} // namespace vggfast::cuda
