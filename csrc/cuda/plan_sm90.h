// Plans of the sm_90 kernels (TMA and wgmma): which tile, which box of pixels, how many blocks. Plain host C++.
//
// All numbers here are computed from published limits of the H100 and H200; none was measured.
#pragma once

#include "cuda/plan.h"

namespace vggfast::cuda {

/// A block's tile of the product and the stages that its shared memory holds: 227 KiB a block, with 16 KiB of staging.
struct WideTileShape {
  int block_m, block_n;
  int stages;

  /// Rows of one of the two warpgroups in forward and grad_input.
  constexpr int group_m() const { return block_m / 2; }
};

/// Elements in a row of the 128-byte swizzle, which is what a stage of forward and grad_input reduces: 64 of 16 bits, 32 of fp32.
/// Stages of both therefore have the same bytes, and take the tensor cores the same time: TF32 has half the rate.
constexpr int swizzle_row(DType dtype) {
  return 128 / element_bytes(dtype);
}

/// Of forward and grad_input: pixels x channels.
constexpr WideTileShape pixel_tile_shape(WideTile tile) {
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
  default:
    return {};
  }
}

/// Pixels of one stage of grad_weight: four steps of wgmma.
inline constexpr int kStageDepth = 64;

/// Taps of one filter row, which share the gradient's side of a stage.
inline constexpr int kRowTaps = 3;

/// Of grad_weight: output channels x input channels, for each of three taps.
constexpr WideTileShape weight_tile_shape(WideTile tile) {
  switch (tile) {
  // Three taps of 64x128 a warpgroup: 192 accumulators a thread, 43 bytes a clock from L2.
  case WideTile::m128n128:
    return {128, 128, 3};
  // 64 input channels.
  case WideTile::m128n64:
    return {128, 64, 5};
  // 64 output channels: the warpgroups share the pixels of a stage, and each has its own partial result.
  case WideTile::m64n64:
    return {64, 64, 6};
  default:
    return {};
  }
}

/// Partial results of one block of grad_weight: the warpgroups without rows of their own.
constexpr int weight_tile_parts(WideTile tile) {
  return tile == WideTile::m64n64 ? 2 : 1;
}

namespace plan_detail {

/// Why TMA and wgmma cannot take what the sm_80 kernels can, or null.
inline const char* unsupported_sm90(Pass pass, const Problem& p, const Device& device) {
  constexpr int64_t coordinate_limit = int64_t{1} << 30;
  if (pass == Pass::max_pool) {
    return "a pool on its own has nothing to multiply";
  }
  if (device.compute_capability != 90) {
    return "wgmma exists only on compute capability 9.0";
  }
  if (p.dtype == DType::tf32 && pass == Pass::grad_weight) {
    return "fp32: wgmma takes TF32 operands only with the reduction along their rows, and here it runs over pixels";
  }
  if (p.c % (16 / element_bytes(p.dtype)) != 0) {
    return "input channels are not a multiple of 16 bytes, as TMA's strides must be";
  }
  if (std::max({p.n, p.h, p.w}) >= coordinate_limit) {
    return "a dimension passes TMA's 32-bit coordinates";
  }
  if (pass == Pass::grad_weight && std::min(p.h, p.w) < 2) {
    return "images of one row or column leave nothing of the shifted tensors that grad_weight reads";
  }
  return nullptr;
}

inline int64_t box_count(const PixelBox& box, int64_t n, int64_t h, int64_t w) {
  return ceil_div(w, box.w) * ceil_div(h, box.h) * ceil_div(n, box.n);
}

/// The box of `pixels` pixels that covers [n, h, w] with the fewest boxes; on equal numbers the widest up to 8, then the
/// tallest. `pools`: 8 columns and whole pools, because there a thread holds both rows of a pool.
inline PixelBox best_box(int pixels, int64_t n, int64_t h, int64_t w, bool pools) {
  PixelBox best{};
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const int box_w : {8, 16, 4, 2, 1}) {
    for (int box_h = pixels / box_w; box_h >= (pools ? 2 : 1); box_h /= 2) {
      const PixelBox box{box_w, box_h, pixels / box_w / box_h};
      if (std::max(box.h, box.n) <= 256 && box_count(box, n, h, w) < fewest) {
        fewest = box_count(box, n, h, w);
        best = box;
      }
    }
    if (pools) {
      break;
    }
  }
  return best;
}

inline const char* pixel_tile_reason(WideTile tile) {
  switch (tile) {
  case WideTile::m256n64:
    return "64 columns: 256 rows halve the traffic of the filters";
  case WideTile::m256n128:
    return "256x128: least traffic from L2, and fewest idle SMs or columns";
  case WideTile::m128n256:
    return "128x256: least traffic from L2 and to the tensor cores";
  default:
    return "few tiles: 128x128 spreads them over more SMs";
  }
}

/// Bytes of the gradient before ReLU and pool, which the copy engine needs as a tensor.
inline int64_t grad_preact_bytes(const Problem& p) {
  return p.relu || p.pool ? p.n * p.h * p.w * p.k * element_bytes(p.dtype) : 0;
}

/// Bytes of grad_input's own copy of the filters, which TF32 needs: input channels as rows, output channels along them.
inline int64_t mirrored_filter_bytes(const Problem& p) {
  return p.dtype == DType::tf32 ? 9 * p.c * p.k * element_bytes(p.dtype) : 0;
}

/// Stages of one tile's reduction: nine taps of every 64 channels, of fp32 every 32.
inline int pixel_stages(Pass pass, const Problem& p) {
  return static_cast<int>(9 * ceil_div(pass == Pass::forward ? p.c : p.k, swizzle_row(p.dtype)));
}

/// Of the sums that splits of forward and grad_input leave to their second pass.
inline int64_t partial_bytes(const Plan& plan) {
  const WideTileShape shape = pixel_tile_shape(plan.wide_tile);
  const int64_t tile = int64_t{shape.block_m} * shape.block_n * int64_t{sizeof(float)};
  return plan.splits > 1 ? plan.tiles_m * plan.tiles_n * plan.splits * tile : 0;
}

// Of the modelled times: bytes a clock and SM from L2, which bound every tile here; clocks a byte of partial sums, written and
// read at 4 TB/s; clocks of a second launch, about 2 us.
inline constexpr double kL2BytesPerClock = 32, kClocksPerPartialByte = 2.0 / 2300, kSecondPassClocks = 3500;

/// A plan, and the time that the model expects of it.
struct TimedPlan {
  Plan plan;
  double clocks = std::numeric_limits<double>::infinity();
};

/// Forward and grad_input.
inline TimedPlan plan_pixels_sm90(Pass pass, const Problem& p, const Device& device) {
  constexpr int max_splits = 18; // at least 4 stages each in VGG
  const bool pools = pass == Pass::forward && p.pool;
  const int64_t h = pools ? p.h / 2 * 2 : p.h, w = pools ? p.w / 2 * 2 : p.w;
  const int64_t columns = pass == Pass::forward ? p.k : p.c;
  const int stages = pixel_stages(pass, p);
  TimedPlan best;
  for (const auto tile : {WideTile::m256n64, WideTile::m128n256, WideTile::m256n128, WideTile::m128n128}) {
    const WideTileShape shape = pixel_tile_shape(tile);
    if ((shape.block_n == 64) != (columns <= 64)) {
      continue;
    }
    const PixelBox box = best_box(shape.block_m, p.n, h, w, pools);
    const int64_t tiles_m = box_count(box, p.n, h, w), tiles_n = ceil_div(columns, shape.block_n);
    for (int wanted = 1; wanted <= std::min(max_splits, stages); ++wanted) {
      const int per_split = static_cast<int>(ceil_div(stages, wanted)), splits = static_cast<int>(ceil_div(stages, per_split));
      Plan candidate{Kernel::wgmma, TileId{}, tiles_m, tiles_n, splits, 0, "", tile, box};
      const int64_t items = tiles_m * tiles_n * splits, partials = partial_bytes(candidate);
      const double stage_clocks = 128.0 * (shape.block_m + shape.block_n) / kL2BytesPerClock;
      double clocks = double(ceil_div(items, device.sm_count) * per_split) * stage_clocks;
      clocks += splits > 1 ? double(partials) * kClocksPerPartialByte + kSecondPassClocks : 0;
      if (clocks < best.clocks) {
        candidate.blocks = std::min<int64_t>(items, device.sm_count);
        candidate.workspace_bytes = partials + (pass == Pass::grad_input ? grad_preact_bytes(p) + mirrored_filter_bytes(p) : 0);
        candidate.reason =
            splits > 1 ? "few tiles: the reduction is split over the SMs that they leave idle" : pixel_tile_reason(tile);
        best = {candidate, clocks};
      }
    }
  }
  return best;
}

inline Plan plan_grad_weight_sm90(const Problem& p, const Device& device) {
  constexpr int64_t partials_limit = int64_t{64} << 20;
  const WideTile tile = p.k <= 64 ? WideTile::m64n64 : p.c <= 64 ? WideTile::m128n64 : WideTile::m128n128;
  const WideTileShape shape = weight_tile_shape(tile);
  Plan plan;
  plan.kernel = Kernel::wgmma;
  plan.wide_tile = tile;
  plan.box = best_box(kStageDepth, p.n, p.h, p.w, false);
  plan.tiles_m = ceil_div(p.k, shape.block_m);
  plan.tiles_n = kRowTaps * ceil_div(p.c, shape.block_n); // filter rows x tiles of input channels
  const int64_t stages = box_count(plan.box, p.n, p.h, p.w);
  const int64_t bytes_per_part = (9 * p.c * p.k + p.k) * int64_t{sizeof(float)};
  const double stage_clocks = 128.0 * (shape.block_m + kRowTaps * shape.block_n) / kL2BytesPerClock;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t wanted = 1; wanted <= std::min<int64_t>(stages, device.sm_count); ++wanted) {
    const int64_t per_split = ceil_div(stages, wanted), splits = ceil_div(stages, per_split);
    const int64_t parts = splits * weight_tile_parts(tile), items = plan.tiles_m * plan.tiles_n * splits;
    if (wanted > 1 && parts * bytes_per_part > partials_limit) {
      break;
    }
    const double time = double(ceil_div(items, device.sm_count) * per_split) * stage_clocks +
                        double(parts * bytes_per_part) * kClocksPerPartialByte;
    if (time < least) {
      least = time;
      plan.splits = static_cast<int>(parts);
      plan.blocks = items;
    }
  }
  plan.workspace_bytes = plan.splits * bytes_per_part + grad_preact_bytes(p);
  plan.reason = tile == WideTile::m64n64    ? "64 output channels: the warpgroups share the pixels"
                : tile == WideTile::m128n64 ? "64 input channels, a filter row a block, split over pixels"
                                            : "128x128 for a filter row a block, split over pixels";
  return plan;
}

} // namespace plan_detail

/// The sm_90 plan of one pass, or Kernel::aten and why not. Pure, as choose_plan.
inline Plan choose_plan_sm90(Pass pass, const Problem& p, const Device& device) {
  using namespace plan_detail;
  const char* reason = unsupported(pass, p, device);
  reason = reason != nullptr ? reason : unsupported_sm90(pass, p, device);
  if (reason != nullptr) {
    Plan plan;
    plan.reason = reason;
    return plan;
  }
  return pass == Pass::grad_weight ? plan_grad_weight_sm90(p, device) : plan_pixels_sm90(pass, p, device).plan;
}

/// With the sm_90 kernels allowed: theirs wherever they take the problem, elsewhere what choose_plan says.
inline Plan choose_plan_up_to_sm90(Pass pass, const Problem& p, const Device& device) {
  const Plan wide = choose_plan_sm90(pass, p, device);
  if (wide.kernel != Kernel::aten) {
    return wide;
  }
  Plan plan = choose_plan(pass, p, device);
  if (plan.kernel != Kernel::aten) {
    plan.not_wgmma = wide.reason;
  }
  return plan;
}

} // namespace vggfast::cuda
