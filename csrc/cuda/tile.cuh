// What the implicit GEMMs share: which pixels a tile row stands for, swizzled shared memory, fragments, accumulators.
#pragma once

#include "cuda/element.cuh"
#include "cuda/fast_div.h"
#include "cuda/plan.h"

namespace vggfast::cuda {

/// Byte offset of a 16-byte chunk in a shared tile of kRowBytes rows. Eight consecutive rows at one chunk, and the
/// consecutive chunks of one row, fall on different banks, so ldmatrix and cp.async run without conflicts.
template <int kRowBytes>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  static_assert(kRowBytes % 64 == 0);
  if constexpr (kRowBytes == 64) {
    return row * kRowBytes + ((chunk ^ (row >> 1)) & 3) * 16;
  } else {
    return row * kRowBytes + (chunk ^ (row & 7)) * 16;
  }
}

/// The same for a tile of 32-bit elements read column-wise by words: four rows x eight columns fall on 32 banks.
template <int kRowBytes>
__device__ __forceinline__ int swizzle_words(int row, int chunk) {
  return row * kRowBytes + (chunk ^ ((2 * row) & 7)) * 16;
}

/// Offset of a chunk in a tile whose rows run along the reduction.
template <class Element, int kRowBytes>
__device__ __forceinline__ int swizzle_transposed(int row, int chunk) {
  if constexpr (Element::dtype == DType::tf32) {
    return swizzle_words<kRowBytes>(row, chunk);
  } else {
    return swizzle<kRowBytes>(row, chunk);
  }
}

// ---- Pixels. Row m of the product is a pixel: four consecutive 2x2 pools make an m16 fragment, with the pool's rows
// in one thread (fragment rows r and r + 8) and its columns in lanes 4 apart (rows r and r ^ 1). Pools are counted
// through the whole batch, so tiles waste nothing at image edges beyond odd sizes.

__device__ __forceinline__ int row_pool(int row) {
  return row / 16 * 4 + row % 8 / 2;
}
__device__ __forceinline__ int row_dh(int row) {
  return row % 16 / 8;
}
__device__ __forceinline__ int row_dw(int row) {
  return row % 2;
}

/// The image plane of a problem cut in 2x2 pools.
struct PixelGrid {
  int h, w;               // pixels of an image
  int pools;              // of the whole batch
  FastDiv pools_w;        // per pool row
  FastDiv pools_h;        // pool rows per image
  int source_h, source_w; // rows and columns that can be read: beyond them is padding
  bool pooled_source;     // what is read is a pooled gradient, one element for four pixels

  struct Pool {
    int n, row, column;
  };
  __device__ Pool pool(int index) const {
    const int rows = pools_w.quotient(index);
    const int n = pools_h.quotient(rows);
    return {n, rows - n * pools_h.divisor(), index - rows * pools_w.divisor()};
  }
  /// Index in the batch of pixel (dh, dw) of a pool.
  __device__ int pixel(const Pool& p, int dh = 0, int dw = 0) const { return (p.n * h + 2 * p.row + dh) * w + 2 * p.column + dw; }
  /// Index in the batch of what pixel (dh, dw) of a pool reads: the pixel, or the pool.
  __device__ int source(const Pool& p, int dh = 0, int dw = 0) const {
    return pooled_source ? (p.n * (source_h / 2) + p.row) * (source_w / 2) + p.column : pixel(p, dh, dw);
  }
};

/// Host: all pixels of a problem's image plane, or with `pooled_only` those that a pool of the floor mode covers.
inline PixelGrid make_pixel_grid(const Problem& p, bool pooled_only) {
  const int round = pooled_only ? 0 : 1;
  const int pools_h = static_cast<int>(p.h + round) / 2, pools_w = static_cast<int>(p.w + round) / 2;
  const auto h = static_cast<int>(p.h), w = static_cast<int>(p.w);
  return {h, w, static_cast<int>(p.n) * pools_h * pools_w, FastDiv(pools_w), FastDiv(pools_h), h, w, false};
}

/// One row of a tile. Both indices count from those of the tile's first pool, which keeps them small.
struct TileRow {
  int pixel;     // what the epilogue writes
  int source;    // what the loader reads at the centre tap
  uint32_t taps; // bit 3 (dr + 1) + ds + 1: the tap falls inside the image; kExists: the row stands for a pixel
  static constexpr uint32_t kExists = 1u << 9;
};

/// Which taps of pixel (h, w) can be read.
__device__ __forceinline__ uint32_t readable_taps(const PixelGrid& grid, int h, int w) {
  uint32_t taps = 0;
  for (int tap = 0; tap < 9; ++tap) {
    const int source_h = h + tap / 3 - 1, source_w = w + tap % 3 - 1;
    const bool inside = 0 <= source_h && source_h < grid.source_h && 0 <= source_w && source_w < grid.source_w;
    taps |= static_cast<uint32_t>(inside) << tap;
  }
  return taps;
}

/// Fills the table of kRows tile rows from pool `first` on; the caller puts a barrier between this and reading it.
template <int kRows>
__device__ void fill_tile_rows(TileRow (&rows)[kRows], const PixelGrid& grid, int first) {
  const PixelGrid::Pool origin = grid.pool(first);
  for (int row = threadIdx.x; row < kRows; row += blockDim.x) {
    const int index = first + row_pool(row), dh = row_dh(row), dw = row_dw(row);
    const PixelGrid::Pool p = grid.pool(min(index, grid.pools - 1));
    const int h = 2 * p.row + dh, w = 2 * p.column + dw;
    TileRow entry{0, 0, 0};
    if (index < grid.pools && h < grid.h && w < grid.w) {
      entry.pixel = grid.pixel(p, dh, dw) - grid.pixel(origin);
      entry.source = grid.source(p, dh, dw) - grid.source(origin);
      entry.taps = readable_taps(grid, h, w) | TileRow::kExists;
    }
    rows[row] = entry;
  }
}

// ---- Fragments of one 32-byte step of the reduction (16 16-bit or 8 fp32 elements), for mma's A (m16) and B (2 x n8).
// `rows`: a shared row holds one row or column of the product and 64 bytes along the reduction.
// `transposed`: a shared row holds one index of the reduction and kRowBytes along the product's row or column.

__device__ __forceinline__ void load_a_rows(uint32_t (&a)[4], const unsigned char* tile, int m, int step) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile + swizzle<kStageRowBytes>(m + lane % 16, 2 * step + lane / 16));
}

__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], const unsigned char* tile, int n, int step) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(b, tile + swizzle<kStageRowBytes>(n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}

/// The word of a transposed fp32 tile at reduction index `row`.
template <int kRowBytes>
__device__ __forceinline__ uint32_t load_word(const unsigned char* tile, int row, int column) {
  return *reinterpret_cast<const uint32_t*>(tile + swizzle_words<kRowBytes>(row, column / 4) + column % 4 * 4);
}

template <class Element, int kRowBytes>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const unsigned char* tile, int m, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (Element::dtype == DType::tf32) {
    const int row = step * 8 + lane % 4, column = m + lane / 4;
    a[0] = load_word<kRowBytes>(tile, row, column);
    a[1] = load_word<kRowBytes>(tile, row, column + 8);
    a[2] = load_word<kRowBytes>(tile, row + 4, column);
    a[3] = load_word<kRowBytes>(tile, row + 4, column + 8);
  } else {
    const int row = step * 16 + lane % 8 + lane / 16 * 8;
    ptx::ldmatrix_x4_trans(a, tile + swizzle<kRowBytes>(row, m / 8 + lane / 8 % 2));
  }
}

template <class Element, int kRowBytes>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const unsigned char* tile, int n, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (Element::dtype == DType::tf32) {
    const int row = step * 8 + lane % 4, column = n + lane / 4;
    b[0] = load_word<kRowBytes>(tile, row, column);
    b[1] = load_word<kRowBytes>(tile, row + 4, column);
    b[2] = load_word<kRowBytes>(tile, row, column + 8);
    b[3] = load_word<kRowBytes>(tile, row + 4, column + 8);
  } else {
    const int row = step * 16 + lane % 8 + lane / 8 % 2 * 8;
    ptx::ldmatrix_x4_trans(b, tile + swizzle<kRowBytes>(row, n / 8 + lane / 16));
  }
}

/// How an operand lies in a stage.
enum class Order { rows, transposed };

/// Sizes, shared memory and arithmetic of one block tile.
template <class ElementType, TileId kTileId>
struct Gemm {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  static constexpr TileShape shape = tile_shape(kTileId);
  static constexpr int kThreads = shape.threads(), kWarpM = shape.warp_m(), kWarpN = shape.warp_n();
  static constexpr int kElementBytes = sizeof(Storage);
  static constexpr int kDepth = kStageRowBytes / kElementBytes; // reduction elements of a stage
  static constexpr int kSteps = kStageRowBytes / 32;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static constexpr int kRowBytesM = shape.block_m * kElementBytes, kRowBytesN = shape.block_n * kElementBytes;

  struct Stage {
    alignas(128) unsigned char a[shape.block_m * kStageRowBytes];
    alignas(128) unsigned char b[shape.block_n * kStageRowBytes];
  };
  static constexpr int kTileBytes = shape.block_m * kRowBytesN;
  static constexpr int kStageBytes = shape.stage_bytes() > kTileBytes ? shape.stage_bytes() : kTileBytes;
  struct Shared {
    union {
      Stage stages[shape.stages];
      unsigned char finished[kStageBytes]; // the tile on its way out, once the stages are read
    };
    TileRow rows[shape.block_m];
  };
  static_assert(sizeof(Stage) * shape.stages == shape.stage_bytes() && sizeof(TileRow) == kTileRowBytes);
  struct Accumulators {
    float values[kFragmentsM][kFragmentsN][4];
  };

  // The threads that share the tile: the whole block.
  static __device__ int thread() { return threadIdx.x; }
  static __device__ void barrier() { __syncthreads(); }
  static __device__ int warp_row() { return threadIdx.x / 32 / shape.warps_n * kWarpM; }
  static __device__ int warp_column() { return threadIdx.x / 32 % shape.warps_n * kWarpN; }

  static __device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums.values[i][j][e] = 0.0f;
        }
      }
    }
  }

  template <Order kOrder>
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const Stage& stage, int m, int step) {
    if constexpr (kOrder == Order::rows) {
      load_a_rows(a, stage.a, m, step);
    } else {
      load_a_transposed<Element, kRowBytesM>(a, stage.a, m, step);
    }
#pragma unroll
    for (uint32_t& word : a) {
      word = Element::operand(word);
    }
  }

  template <Order kOrder>
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], const Stage& stage, int n, int step) {
    if constexpr (kOrder == Order::rows) {
      load_b_rows(b, stage.b, n, step);
    } else {
      load_b_transposed<Element, kRowBytesN>(b, stage.b, n, step);
    }
#pragma unroll
    for (uint32_t& word : b) {
      word = Element::operand(word);
    }
  }

  /// sums += A B over one stage.
  template <Order kOrderA, Order kOrderB>
  static __device__ __forceinline__ void multiply(Accumulators& sums, const Stage& stage) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        load_a<kOrderA>(a[i], stage, warp_row() + 16 * i, step);
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; ++j) {
        load_b<kOrderB>(b[j], stage, warp_column() + 16 * j, step);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
          Element::mma(sums.values[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

} // namespace vggfast::cuda
