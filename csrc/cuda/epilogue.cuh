// From fp32 accumulators to the output: bias, ReLU, rounding, 2x2 max pool with its 2-bit argmax, coalesced stores.
#pragma once

#include "cuda/tile.cuh"

namespace vggfast::cuda {

struct Epilogue {
  const void* bias; // [channels] or null
  void* y;          // [pixels or pools, channels]
  uint8_t* argmax;  // [pools, ceil(channels / 4)] or null
  int channels;
  bool relu, pool;
};

/// The larger of a pool's values in torch's order: later wins only if greater or NaN.
struct PoolMax {
  float value;
  uint32_t position; // 2 dh + dw

  __device__ __forceinline__ void take(float candidate, uint32_t at) {
    if (candidate > value || candidate != candidate) {
      value = candidate;
      position = at;
    }
  }
};

__device__ __forceinline__ float relu_keeping_nan(float value) {
  return value <= 0.0f ? 0.0f : value;
}

/// Where the rows of a tile of pools (see tile.cuh) go: indices in the whole batch, negative for rows that stand for nothing.
struct PoolRowPlaces {
  const TileRow* rows;
  int first_pixel, first_pool; // of the tile's first row
  int pools;

  __device__ __forceinline__ int64_t pixel(int row) const {
    const TileRow entry = rows[row];
    return entry.taps & TileRow::kExists ? int64_t{first_pixel} + entry.pixel : -1;
  }
  __device__ __forceinline__ int64_t pool(int row) const { return first_pool + row < pools ? first_pool + row : -1; }
};

/// One warp's part of the epilogue and the stores of its group of threads. Gemm: the tile's sizes, element type and
/// accumulators, and which threads share it; every 16 rows are four pools as in tile.cuh. Places: what a row stands for.
template <class Gemm, class Places>
class TileWriter {
  using Element = typename Gemm::Element;
  using Storage = typename Gemm::Storage;
  static constexpr int kRows = Gemm::shape.block_m, kColumns = Gemm::shape.block_n;
  static constexpr int kRowBytes = kColumns * Gemm::kElementBytes;
  static constexpr int kArgmaxRowBytes = kColumns / 4;

public:
  /// Shared memory for the finished tile.
  static constexpr int kStagingBytes = kRows * kRowBytes;
  static_assert(kRows / 4 * (kRowBytes + kArgmaxRowBytes) <= kStagingBytes);

  /// `tile`: kStagingBytes at a 128-byte boundary.
  __device__ TileWriter(const Epilogue& epilogue, unsigned char* tile, const Places& places, int first_channel)
      : epilogue_(epilogue), tile_(tile), argmax_tile_(tile_ + kRows / 4 * kRowBytes), places_(places),
        first_channel_(first_channel) {}

  /// Nobody uses the staging memory any more.
  __device__ void write(typename Gemm::Accumulators& sums) {
    finish_values(sums);
    if (epilogue_.pool) {
      stage_pools(sums);
    } else {
      stage_pixels(sums);
    }
    Gemm::barrier();
    if (!epilogue_.pool) {
      store_pixels();
      return;
    }
    store_pools();
    if (epilogue_.argmax != nullptr) {
      store_argmax();
    }
  }

private:
  /// Bias, ReLU and rounding, in place: from here on every value is one of the output type.
  __device__ __forceinline__ void finish_values(typename Gemm::Accumulators& sums) {
    const auto* bias = static_cast<const Storage*>(epilogue_.bias);
#pragma unroll
    for (int j = 0; j < Gemm::kFragmentsN; ++j) {
      const int channel = first_channel_ + column(j);
      const bool inside = bias != nullptr && channel < epilogue_.channels;
      const float bias0 = inside ? Element::load(bias[channel]) : 0.0f;
      const float bias1 = inside ? Element::load(bias[channel + 1]) : 0.0f;
#pragma unroll
      for (int i = 0; i < Gemm::kFragmentsM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float value = sums.values[i][j][e] + (e % 2 == 0 ? bias0 : bias1);
          value = epilogue_.relu ? relu_keeping_nan(value) : value;
          sums.values[i][j][e] = Element::load(Element::round(value));
        }
      }
    }
  }

  __device__ __forceinline__ void stage_pixels(const typename Gemm::Accumulators& sums) {
    struct alignas(2 * sizeof(Storage)) Pair {
      Storage low, high;
    };
#pragma unroll
    for (int i = 0; i < Gemm::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Gemm::kFragmentsN; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = Gemm::warp_row() + 16 * i + 8 * half + lane() / 4;
          const float(&v)[4] = sums.values[i][j];
          *reinterpret_cast<Pair*>(at(row, column(j))) = {Element::round(v[2 * half]), Element::round(v[2 * half + 1])};
        }
      }
    }
  }

  /// Of the two channels that a lane and the lane 4 away share, each takes one through the pool.
  __device__ __forceinline__ void stage_pools(const typename Gemm::Accumulators& sums) {
    const int odd = lane() / 4 % 2; // dw of this lane's pixels, and which of the two channels it finishes
#pragma unroll
    for (int i = 0; i < Gemm::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Gemm::kFragmentsN; ++j) {
        const float(&v)[4] = sums.values[i][j];
        const float mine[2] = {odd ? v[1] : v[0], odd ? v[3] : v[2]};
        const float theirs[2] = {__shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 4),
                                 __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 4)};
        PoolMax best{odd ? theirs[0] : mine[0], 0};
        best.take(odd ? mine[0] : theirs[0], 1);
        best.take(odd ? theirs[1] : mine[1], 2);
        best.take(odd ? mine[1] : theirs[1], 3);
        const int row = Gemm::warp_row() / 4 + 4 * i + lane() / 8;
        *reinterpret_cast<Storage*>(at(row, column(j) + odd)) = Element::round(best.value);
        stage_argmax(row, column(j), best.position, odd);
      }
    }
  }

  /// Four lanes, four channels, one byte.
  __device__ __forceinline__ void stage_argmax(int row, int pair_column, uint32_t position, int odd) {
    uint32_t packed = position << (2 * ((pair_column + odd) % 4));
    packed |= __shfl_xor_sync(0xffffffffu, packed, 1);
    packed |= __shfl_xor_sync(0xffffffffu, packed, 4);
    if (lane() % 2 == 0 && odd == 0) {
      argmax_tile_[row * kArgmaxRowBytes + pair_column / 4] = static_cast<uint8_t>(packed);
    }
  }

  __device__ __forceinline__ void store_pixels() {
    for (int item = Gemm::thread(); item < kRows * kChunks; item += Gemm::kThreads) {
      store_chunk(places_.pixel(item / kChunks), item / kChunks, item % kChunks);
    }
  }

  __device__ __forceinline__ void store_pools() {
    for (int item = Gemm::thread(); item < kRows / 4 * kChunks; item += Gemm::kThreads) {
      store_chunk(places_.pool(item / kChunks), item / kChunks, item % kChunks);
    }
  }

  __device__ __forceinline__ void store_chunk(int64_t position, int row, int chunk) {
    const int channel = first_channel_ + chunk * kVector<Element>;
    if (position >= 0 && channel < epilogue_.channels) {
      auto* y = static_cast<Storage*>(epilogue_.y) + position * epilogue_.channels + channel;
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(tile_ + swizzle<kRowBytes>(row, chunk));
    }
  }

  __device__ __forceinline__ void store_argmax() {
    const int bytes = min(kArgmaxRowBytes, (epilogue_.channels - first_channel_) / 4);
    for (int item = Gemm::thread(); item < kRows / 4 * kArgmaxRowBytes; item += Gemm::kThreads) {
      const int byte = item % kArgmaxRowBytes;
      const int64_t pool = places_.pool(item / kArgmaxRowBytes);
      if (pool >= 0 && byte < bytes) {
        epilogue_.argmax[pool * (epilogue_.channels / 4) + first_channel_ / 4 + byte] = argmax_tile_[item];
      }
    }
  }

  static __device__ int lane() { return threadIdx.x % 32; }
  /// Column of this lane's first element in fragment j.
  static __device__ int column(int j) { return Gemm::warp_column() + 8 * j + lane() % 4 * 2; }
  __device__ unsigned char* at(int row, int tile_column) const {
    const int bytes = tile_column * Gemm::kElementBytes;
    return tile_ + swizzle<kRowBytes>(row, bytes / 16) + bytes % 16;
  }

  static constexpr int kChunks = kRowBytes / 16;
  const Epilogue& epilogue_;
  unsigned char* tile_;
  unsigned char* argmax_tile_;
  const Places places_;
  int first_channel_;
};

/// A whole block's tile of pools, staged where its main loop had its stages.
template <class Gemm>
__device__ __forceinline__ void write_pool_rows(const Epilogue& epilogue, typename Gemm::Shared& shared,
                                                const PoolRowPlaces& places, int first_channel, typename Gemm::Accumulators& sums) {
  using Writer = TileWriter<Gemm, PoolRowPlaces>;
  static_assert(Writer::kStagingBytes <= Gemm::kStageBytes);
  Writer writer(epilogue, shared.finished, places, first_channel);
  writer.write(sums);
}

} // namespace vggfast::cuda
