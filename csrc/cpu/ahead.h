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
// line, in order; the products hide that wait.
inline void prefetch_output(const Kernels& k, const Output& out, const Tile& tile, int64_t block) {
  if (out.stream) return;
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

// What the input transform of `count` tiles from `begin` on reads, and their left neighbours do not: the step-th of `steps` pieces,
// a row of pixels of some of the tiles. Products ask for a piece line by line, since a burst of prefetches is mostly dropped.
inline Soon input_piece(const Image& x, const TileGrid& grid, int64_t begin, int64_t count, int64_t step, int64_t steps) {
  const bool pooled = x.kind == ImageKind::pooled;
  const int64_t side = pooled ? 2 : 4, rows = side + 2, height = pooled ? x.h / 2 : x.h, width = pooled ? x.w / 2 : x.w;
  const int64_t arrays = x.y ? 2 : 1, row = step * arrays * rows / steps, first_step = ceil_div(row * steps, arrays * rows);
  const int64_t row_steps = ceil_div((row + 1) * steps, arrays * rows) - first_step, i = step - first_step;
  const int64_t from = begin + i * count / row_steps, to = begin + (i + 1) * count / row_steps;
  if (from == to) return {};
  const Tile tile = grid.at(from);
  int64_t together = 1;
  for (; from + together < to; ++together) {
    const Tile next = grid.at(from + together);
    if (next.n != tile.n || next.row != tile.row || next.col != tile.col + together) break;
  }
  const int64_t h = side * tile.row - 1 + row % rows, w = side * tile.col + 1, w_end = std::min(w + side * together, width);
  if (h < 0 || h >= height || w >= w_end) return {};
  const int64_t size = bytes_of(x.dtype), pixels = w_end - w - 1;
  if (row >= rows)
    return {static_cast<const char*>(x.y) + (tile.n * x.y_stride_n + h * x.y_stride_h + w * x.y_stride_w) * size,
            (pixels * x.y_stride_w + x.c) * size};
  return {static_cast<const char*>(x.data) + (tile.n * x.stride_n + h * x.stride_h + w * x.stride_w) * size,
          (pixels * x.stride_w + x.c) * size};
}

} // namespace vggfast::cpu
