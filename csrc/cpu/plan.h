// How a problem is cut up: a pure function from the problem and the machine to a small value that can be printed and tested.
#pragma once
#include <algorithm>
#include <string>

#include "cpu/kernels.h"

namespace vggfast::cpu {

enum class Algorithm { automatic, winograd, direct };

struct Machine {
  int width, block, rows; // of the ISA's micro-kernel
  int threads;
};

struct Plan {
  Algorithm algorithm;
  // Winograd. Fused: a thread takes `tiles` tiles through all three steps, V and M stay in its L2.
  // Not fused: V of `tiles` tiles is shared, and threads take blocks of output channels.
  bool fused;
  int64_t tiles;
  // Direct: output rows a thread takes at once.
  int64_t band;
  const char* reason;
};

inline std::string to_string(const Plan& p) {
  if (p.algorithm == Algorithm::direct) return "direct, bands of " + std::to_string(p.band) + " rows: " + p.reason;
  return std::string("winograd F(4x4,3x3), ") + (p.fused ? "tile-fused" : "V shared, output channels split") + ", tiles " +
         std::to_string(p.tiles) + ": " + p.reason;
}

inline TileGrid tile_grid(int64_t n, int64_t h, int64_t w) {
  return {n, ceil_div(h, 4), ceil_div(w, 4)};
}

// Floats a row of V or Z takes: the extra vector keeps the 36 positions out of the same cache sets.
inline int64_t points_row(int64_t channels, const Machine& m) {
  return round_up(channels, m.block) + m.width;
}

// Direct: the padded fp32 band should stay in L2 beside the packed filters.
inline Plan plan_direct(int64_t in, int64_t h, int64_t w, const char* reason) {
  const int64_t row_bytes = (w + 2) * in * 4, fitting = 256 * 1024 / row_bytes - 2;
  const int64_t band = std::clamp<int64_t>(fitting / 2 * 2, 2, 16);
  return {Algorithm::direct, false, 0, std::min(band, round_up(h, 2)), reason};
}

// Winograd multiplies 36 values a tile and channel pair where direct multiplies 9 a pixel; the transforms cost about a quarter
// more, and both channel counts must be large enough to share them.
inline const char* why_direct(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w) {
  if (in < 16 || out < 16) return "fewer than 16 channels do not share the transforms";
  if (36 * tile_grid(n, h, w).count() * 4 > 9 * n * h * w * 3) return "4x4 tiles cover too little of so small an image";
  return nullptr;
}

// Forward and grad_input: n images of h x w, `in` channels read, `out` channels written.
inline Plan choose_plan(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, const Machine& m, Algorithm wanted) {
  const char* direct = wanted == Algorithm::direct     ? "asked for"
                       : wanted == Algorithm::winograd ? nullptr
                                                       : why_direct(n, in, out, h, w);
  if (direct) return plan_direct(in, h, w, direct);
  const int64_t tiles = tile_grid(n, h, w).count();
  const int64_t v_bytes = 36 * 4 * points_row(in, m) * m.rows; // of one row block of tiles
  if (v_bytes > 768 * 1024) return {Algorithm::winograd, false, std::min<int64_t>(tiles, 128), 0, "V of one row block exceeds L2"};
  const int64_t groups = ceil_div(tiles, m.rows);
  if (groups < 2 * m.threads && tiles <= 128)
    return {Algorithm::winograd, false, tiles, 0, "too few tiles to share among the threads"};
  // More tiles a group read the filters less often; two row blocks still fit L2 for narrow layers.
  const int64_t tiles_a_group = v_bytes <= 256 * 1024 && groups >= 8 * m.threads ? 2 * m.rows : m.rows;
  return {Algorithm::winograd, true, tiles_a_group, 0, "V and M of a group of tiles stay in L2"};
}

// grad_weight: V and Z of `tiles` tiles are shared; 16 MB of them keep to L3 and below the size malloc would map afresh each time.
inline Plan choose_grad_weight_plan(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, const Machine& m, Algorithm wanted) {
  const char* direct = wanted == Algorithm::direct     ? "asked for"
                       : wanted == Algorithm::winograd ? nullptr
                                                       : why_direct(n, in, out, h, w);
  if (direct) return {Algorithm::direct, false, 0, 1, direct};
  const int64_t tile_bytes = 36 * 4 * (points_row(in, m) + points_row(out, m));
  const int64_t fitting = std::max<int64_t>((16 << 20) / tile_bytes / 16 * 16, 16);
  return {Algorithm::winograd, false, std::min(tile_grid(n, h, w).count(), fitting), 0, "V and Z of a chunk of tiles stay in L3"};
}

} // namespace vggfast::cpu
