// The pixel operand of forward and grad_input: shifted pixels as rows, channels along the row.
#pragma once

#include "cuda/tile.cuh"

namespace vggfast::cuda::sm80 {

/// The nine taps of one block of channels, then the next block.
struct TapCursor {
  int tap = 0;
  int channel = 0; // first of the block

  __device__ __forceinline__ void next(int depth) {
    if (++tap == 9) {
      tap = 0;
      channel += depth;
    }
  }
  /// Offset of the tap's source pixel, in pixels.
  __device__ __forceinline__ int shift(int width) const { return (tap / 3 - 1) * width + tap % 3 - 1; }
};

/// A: shifted pixels, channels along the row. Each thread brings one chunk of every kRowStep-th tile row.
template <class Gemm>
class PixelLoader {
public:
  using Storage = typename Gemm::Storage;
  static constexpr int kChunks = kStageRowBytes / 16;
  static constexpr int kRowStep = Gemm::kThreads / kChunks;
  static constexpr int kRows = Gemm::shape.block_m / kRowStep;
  static constexpr int kVectorSize = kVector<typename Gemm::Element>;

  /// `source`: the tile's first pixel in a [pixels, channels] tensor.
  __device__ PixelLoader(const Storage* source, const TileRow* rows, int width, int channels)
      : source_(source), width_(width), channels_(channels) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const TileRow entry = rows[row() + i * kRowStep];
      offsets_[i] = entry.source * channels + column();
      taps_[i] = entry.taps;
    }
  }

  __device__ __forceinline__ void fetch(unsigned char* tile, const TapCursor& at) {
    const int offset = at.shift(width_) * channels_ + at.channel;
    const bool inside = at.channel + column() < channels_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool valid = inside && (taps_[i] >> at.tap & 1u);
      const Storage* from = valid ? source_ + (offsets_[i] + offset) : source_;
      ptx::cp_async_ca<16>(tile + swizzle<kStageRowBytes>(row() + i * kRowStep, chunk()), from, valid ? 16 : 0);
    }
  }

private:
  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int chunk() { return threadIdx.x % kChunks; }
  static __device__ int column() { return chunk() * kVectorSize; }

  const Storage* source_;
  int width_, channels_;
  int offsets_[kRows];
  uint32_t taps_[kRows];
};

} // namespace vggfast::cuda::sm80
