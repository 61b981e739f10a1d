// Which kernel, tile and grid a problem gets: a pure function from sizes to a small printable value. Plain host C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <ostream>

#include "cuda/problem.h"

namespace vggfast::cuda {

enum class Pass : int { forward, grad_input, grad_weight, max_pool };
enum class Kernel : int { aten, implicit_gemm, first_layer, pointwise, wgmma, wgmma_patch };

/// Tiles of the implicit GEMMs, rows x columns of the product; each is instantiated by hand in sm80/*.cu.
enum class TileId : int { m128n128, m256n64, m64n64 };
inline constexpr int kTiles = 3;

/// Bytes of the reduction that one pipeline stage holds per tile row: 32 16-bit or 16 fp32 elements.
inline constexpr int kStageRowBytes = 64;
/// Bytes of a tile's table of pixels per row (TileRow).
inline constexpr int kTileRowBytes = 12;

/// Tiles of the sm_90 kernels, rows x columns of the product; each is instantiated by hand in sm90/*.cu. The first four are
/// those of forward and grad_input, the last three of grad_weight.
enum class WideTile : int { m256n64, m256n128, m128n256, m128n128, m128n64, m64n64 };

/// Pixels that the copy engine brings at once: columns (the fastest), rows, images, each a power of two.
struct PixelBox {
  int w, h, n;
};

/// A block's tile of the product, and the grid of warps that share it.
struct TileShape {
  int block_m, block_n;
  int warps_m, warps_n;
  int stages;
  int blocks_per_sm; // that the register file holds

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int warp_m() const { return block_m / warps_m; }
  constexpr int warp_n() const { return block_n / warps_n; }
  constexpr int stage_bytes() const { return stages * (block_m + block_n) * kStageRowBytes; }
};

constexpr TileShape tile_shape(TileId tile) {
  switch (tile) {
  // 64x64 per warp: 4 KiB of ldmatrix for 32 mma, half of what the shared memory of sm_80 can feed.
  case TileId::m128n128:
    return {128, 128, 2, 2, 4, 2};
  // The same warp tile where only 64 output channels exist (VGG's first block). Three stages, because four leave room for one
  // block in the 164 KiB of compute capability 8.0.
  case TileId::m256n64:
    return {256, 64, 4, 1, 3, 2};
  // Small problems: four times the blocks, at 32x32 per warp.
  case TileId::m64n64:
    return {64, 64, 2, 2, 4, 4};
  }
  return {};
}

struct Device {
  int sm_count;
  int compute_capability; // major * 10 + minor

  /// Shared memory of an SM in bytes (CUDA programming guide, technical specifications per compute capability).
  constexpr int shared_memory() const {
    switch (compute_capability) {
    case 80:
    case 87:
      return 164 << 10;
    case 90:
    case 100:
    case 103:
    case 110:
      return 228 << 10;
    default: // 8.6, 8.9, 12.x
      return 100 << 10;
    }
  }
};

struct Plan {
  Kernel kernel = Kernel::aten;
  TileId tile = TileId::m64n64;
  int64_t tiles_m = 0, tiles_n = 0; // blocks over rows and columns of the product
  int splits = 1;                   // parts of the reduction, each with its own partial result (grad_weight)
  int64_t workspace_bytes = 0;
  const char* reason = ""; // which limit or measurement chose this row
  // Kernel::wgmma and wgmma_patch alone; tiles_m and tiles_n then count boxes of pixels and tiles of channels.
  WideTile wide_tile = WideTile::m256n64;
  PixelBox box{};
  int64_t blocks = 0;              // launched; forward's and grad_input's are persistent, at most one an SM
  const char* not_wgmma = nullptr; // why another kernel, where wgmma was allowed
};

inline std::ostream& operator<<(std::ostream& out, const Plan& plan) {
  constexpr const char* kernels[] = {"aten", "implicit_gemm", "first_layer", "pointwise", "wgmma", "wgmma_patch"};
  constexpr const char* tiles[] = {"m128n128", "m256n64", "m64n64"};
  constexpr const char* wide_tiles[] = {"m256n64", "m256n128", "m128n256", "m128n128", "m128n64", "m64n64"};
  out << kernels[static_cast<int>(plan.kernel)];
  if (plan.kernel == Kernel::wgmma || plan.kernel == Kernel::wgmma_patch) {
    out << " tile=" << wide_tiles[static_cast<int>(plan.wide_tile)] << " box=" << plan.box.w << "x" << plan.box.h << "x"
        << plan.box.n << " tiles=" << plan.tiles_m << "x" << plan.tiles_n << " splits=" << plan.splits << " blocks=" << plan.blocks
        << " workspace=" << plan.workspace_bytes;
  } else if (plan.kernel == Kernel::implicit_gemm || plan.kernel == Kernel::first_layer) {
    out << " tile=" << tiles[static_cast<int>(plan.tile)] << " grid=" << plan.tiles_m << "x" << plan.tiles_n << "x" << plan.splits
        << " workspace=" << plan.workspace_bytes;
  }
  out << ": " << plan.reason;
  if (plan.not_wgmma != nullptr) {
    out << "; not wgmma: " << plan.not_wgmma;
  }
  return out;
}

namespace plan_detail {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

/// Why the kernels cannot take this problem, or null.
inline const char* unsupported(Pass pass, const Problem& p, const Device& device) {
  // Loaders count up to one tile past the last pixel.
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 1024;
  const int vector = 16 / element_bytes(p.dtype);
  if (device.compute_capability < 80) {
    return "tensor cores with cp.async need compute capability 8.0";
  }
  if (std::min({p.n, p.h, p.w, p.c, p.k}) < 1 || (p.pool && std::min(p.h, p.w) < 2)) {
    return "no output elements";
  }
  if (p.n * p.h * p.w > limit) {
    return "2^31 pixels or more: pixel indices are 32-bit (element offsets are 64-bit)";
  }
  if (pass == Pass::max_pool) {
    return p.c % vector != 0 ? "channels are not a multiple of 16 bytes" : nullptr;
  }
  if (9 * p.c * p.k > limit || (8 * p.w + 2048) * std::max(p.c, p.k) > limit) {
    return "offsets inside the weight or inside one tile pass 2^31 elements";
  }
  if (p.k % vector != 0) {
    return "output channels are not a multiple of 16 bytes";
  }
  return nullptr;
}

/// Blocks of a tile that share an SM; each also takes 1 KiB of the SM's shared memory for CUDA itself.
constexpr int resident_blocks(TileId tile, const Device& device) {
  const TileShape shape = tile_shape(tile);
  const int bytes = shape.stage_bytes() + shape.block_m * kTileRowBytes + 1024;
  return std::min(shape.blocks_per_sm, std::max(1, device.shared_memory() / bytes));
}

static_assert(resident_blocks(TileId::m128n128, {108, 80}) == 2 && resident_blocks(TileId::m256n64, {108, 80}) == 2);

/// Modelled time of a grid on tile t, in multiply-adds per SM at the rate of a 64x64 warp tile.
inline double grid_cost(TileId tile, int64_t blocks, const Device& device) {
  const TileShape shape = tile_shape(tile);
  // ldmatrix bytes per mma bound 32x32 warp tiles at about 0.6 of the 64x64 rate (computed, not measured).
  const double efficiency = tile == TileId::m64n64 ? 0.6 : 1.0;
  const int resident = resident_blocks(tile, device);
  const int64_t waves = ceil_div(blocks, int64_t{device.sm_count} * resident);
  // A last wave that leaves SMs with fewer residents still takes at least one block's time alone.
  const int64_t last = blocks - (waves - 1) * device.sm_count * resident;
  const double depth = double((waves - 1) * resident + ceil_div(last, device.sm_count));
  return depth * shape.block_m * shape.block_n / efficiency;
}

struct Tiling {
  TileId tile;
  int64_t tiles_m, tiles_n;
};

/// The tile with the least modelled time; the larger tile on equal time.
inline Tiling cheapest_tiling(int64_t rows, int64_t columns, int64_t repeats, const Device& device) {
  Tiling best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kTiles; ++i) {
    const auto tile = static_cast<TileId>(i);
    const TileShape shape = tile_shape(tile);
    const int64_t tiles_m = ceil_div(rows, shape.block_m), tiles_n = ceil_div(columns, shape.block_n);
    const double cost = grid_cost(tile, tiles_m * tiles_n * repeats, device);
    if (cost < best_cost) {
      best_cost = cost;
      best = {tile, tiles_m, tiles_n};
    }
  }
  return best;
}

inline const char* tile_reason(TileId tile) {
  switch (tile) {
  case TileId::m128n128:
    return "enough blocks of 128x128 to fill the SMs: least shared-memory traffic per product";
  case TileId::m256n64:
    return "64 columns: 256 rows keep 64x64 per warp";
  case TileId::m64n64:
    return "few blocks: small tiles spread them over more SMs";
  }
  return "";
}

/// Rows of the product when pixels are taken as 2x2 pools: odd edges are rounded up unless only pools are written.
inline int64_t pool_rows(const Problem& p, bool pooled_only) {
  const int64_t pools_h = pooled_only ? p.h / 2 : ceil_div(p.h, 2), pools_w = pooled_only ? p.w / 2 : ceil_div(p.w, 2);
  return 4 * p.n * pools_h * pools_w;
}

inline Plan plan_grad_weight(const Problem& p, const Device& device) {
  // One block column per tap and tile of input channels; the split fills about two waves of two blocks an SM.
  constexpr int64_t workspace_limit = int64_t{32} << 20, min_blocks_per_split = 8;
  const bool narrow = std::min(p.c, p.k) <= 64 || p.dtype == DType::tf32;
  const TileId tile = narrow ? TileId::m64n64 : TileId::m128n128;
  const TileShape shape = tile_shape(tile);
  Plan plan{Kernel::implicit_gemm, tile, ceil_div(p.k, shape.block_m), 9 * ceil_div(p.c, shape.block_n)};
  const int64_t bytes_per_split = (9 * p.c * p.k + p.k) * int64_t{sizeof(float)};
  const int64_t pixel_blocks = ceil_div(p.n * p.h * p.w, kStageRowBytes / element_bytes(p.dtype));
  const int64_t wanted = ceil_div(int64_t{4} * device.sm_count, plan.tiles_m * plan.tiles_n);
  const int64_t useful = std::max<int64_t>(1, pixel_blocks / min_blocks_per_split);
  const int64_t affordable = std::max<int64_t>(1, workspace_limit / bytes_per_split);
  plan.splits = static_cast<int>(std::min({wanted, useful, affordable}));
  plan.workspace_bytes = plan.splits * bytes_per_split;
  plan.reason = p.dtype == DType::tf32 ? "64x64 tiles: transposed TF32 operands leave no registers for larger ones"
                : narrow               ? "64 channels or fewer on one side: 64x64 tiles, split over pixels"
                                       : "128x128 tiles per tap, split over pixels to fill the SMs";
  return plan;
}

} // namespace plan_detail

/// The plan of one pass. Pure: the same problem and device always give the same value.
inline Plan choose_plan(Pass pass, const Problem& p, const Device& device) {
  using namespace plan_detail;
  Plan plan;
  if (const char* reason = unsupported(pass, p, device)) {
    plan.reason = reason;
    return plan;
  }
  if (pass == Pass::max_pool) {
    plan.kernel = Kernel::pointwise;
    plan.reason = "one pass over the input, 2 bits an element for the backward pass";
    return plan;
  }
  if (p.c % (16 / element_bytes(p.dtype)) != 0) {
    if (pass == Pass::forward && p.c <= 3) {
      constexpr int rows = 64, columns = 64;
      return {Kernel::first_layer,
              TileId::m64n64,
              ceil_div(pool_rows(p, p.pool), rows),
              ceil_div(p.k, columns),
              1,
              0,
              "3 input channels or fewer: the whole reduction is one step, read from any strides"};
    }
    plan.reason = "input channels are not a multiple of 16 bytes";
    return plan;
  }
  if (pass == Pass::grad_weight) {
    return plan_grad_weight(p, device);
  }
  const bool backward = pass == Pass::grad_input;
  const Tiling tiling = cheapest_tiling(pool_rows(p, p.pool && !backward), backward ? p.c : p.k, 1, device);
  return {Kernel::implicit_gemm, tiling.tile, tiling.tiles_m, tiling.tiles_n, 1, 0, tile_reason(tiling.tile)};
}

} // namespace vggfast::cuda
