// What a layer will need soon, asked for while the products run: DRAM answers after hundreds of cycles, and the hardware's
// prefetchers follow neither tiles nor blocks of filters.
#pragma once
#include <algorithm>

#include "cpu/dtypes.h"
#include "cpu/kernels.h"

namespace vggfast::cpu {

// The filters of one output channel from input channel c on; nothing where they do not lie together in memory.
inline Soon output_filters(const Filters& w, int64_t k, int64_t c, int64_t count) {
  const int64_t size = bytes_of(w.dtype), end = std::min(c + count, w.in);
  if (k >= w.out || end <= c || w.stride_in != 9 || w.stride_s != 1) return {};
  return {static_cast<const char*>(w.data) + (k * w.stride_out + c * w.stride_in) * size, (end - c) * 9 * size};
}

// Asks for the lines that a block of output channels of one tile will be written to. A store that misses the caches waits for its
// line, in order; the products hide that wait. Not for results that pass the caches.
inline void prefetch_output(const Kernels& k, const Output& out, const Tile& tile, int64_t block) {
  const int64_t side = out.pool ? 2 : 4, height = out.pool ? out.h / 2 : out.h, width = out.pool ? out.w / 2 : out.w;
  const int64_t size = bytes_of(out.dtype), h_end = std::min(side * (tile.row + 1), height),
                w_end = std::min(side * (tile.col + 1), width);
  for (int64_t h = side * tile.row; h < h_end; ++h)
    for (int64_t w = side * tile.col; w < w_end; ++w) {
      const char* p = static_cast<const char*>(out.data) + (((tile.n * height + h) * width + w) * out.c + block * k.block) * size;
      __builtin_prefetch(p, 1);
      if (k.block * size > 64) __builtin_prefetch(p + 64, 1);
    }
}

// What the input transform of `count` tiles from `begin` on reads, and their left neighbours do not, in about `steps` pieces: a
// row of pixels of some tiles side by side. Products ask for a piece line by line, since a burst of prefetches is mostly dropped.
// A division takes as long as a step of products, and so is made where a row of tiles begins, not for each piece.
class InputPieces {
public:
  InputPieces(const Image& x, const TileGrid& grid, int64_t begin, int64_t count, int64_t steps)
      : x(x), grid(grid), begin(begin), count(count), pooled(x.kind == ImageKind::pooled), side(pooled ? 2 : 4),
        height(pooled ? x.h / 2 : x.h), width(pooled ? x.w / 2 : x.w), rows((side + 2) * (x.y ? 2 : 1)),
        tiles_a_step(ceil_div(rows * count * unit, steps)) {
    if (count > 0) start_run();
  }

  Soon next() {
    due += tiles_a_step;
    const int64_t some = std::min(due / unit, together);
    if (some == 0 || row == rows) return {};
    const Soon soon = piece(some);
    due -= some * unit, taken += some, tile.col += some, together -= some;
    if (together == 0) {
      if (taken == count) taken = 0, ++row;
      start_run();
    }
    return soon;
  }

private:
  static constexpr int64_t unit = 1 << 16; // that a tile is counted in

  // Tiles side by side from the next one on.
  void start_run() {
    const TileRegion region = grid.region_of(begin + taken);
    tile = region.at(begin + taken);
    together = std::min(region.col + region.cols - tile.col, count - taken);
  }

  Soon piece(int64_t some) const {
    const bool of_y = row >= side + 2;
    const int64_t h = side * tile.row - 1 + row - (of_y ? side + 2 : 0);
    const int64_t w = side * tile.col + 1, pixels = std::min(side * some, width - w) - 1, size = bytes_of(x.dtype);
    if (h < 0 || h >= height || pixels < 0) return {};
    if (of_y)
      return {static_cast<const char*>(x.y) + (tile.n * x.y_stride_n + h * x.y_stride_h + w * x.y_stride_w) * size,
              (pixels * x.y_stride_w + x.c) * size};
    return {static_cast<const char*>(x.data) + (tile.n * x.stride_n + h * x.stride_h + w * x.stride_w) * size,
            (pixels * x.stride_w + x.c) * size};
  }

  const Image& x;
  const TileGrid& grid;
  const int64_t begin, count;
  const bool pooled;
  const int64_t side, height, width, rows; // of pixels: a tile, the image, all that are asked for
  const int64_t tiles_a_step;              // in units
  int64_t due = 0;                         // in units: what steps so far owe
  int64_t row = 0;                         // of pixels, that is asked for
  int64_t taken = 0;                       // tiles whose pixels of that row were asked for
  int64_t together = 0;                    // tiles after these that lie side by side
  Tile tile = {};
};

} // namespace vggfast::cpu
