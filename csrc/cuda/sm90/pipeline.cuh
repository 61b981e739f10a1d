// Stages between the copy engine and the tensor cores, and how wgmma finds its operands in them.
#pragma once

#include "cuda/ptx/sm90.cuh"

namespace vggfast::cuda::sm90 {

/// Barriers of a ring of stages: `full` completes when a stage's bytes have landed, `empty` when its readers are done.
template <int kStages>
struct StageBarriers {
  ptx::Mbarrier full[kStages];
  ptx::Mbarrier empty[kStages];

  /// One thread; then a block barrier. `readers`: arrivals that release a stage.
  __device__ void init(int readers) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], readers);
    }
    ptx::fence_barrier_init();
  }
};

__device__ __forceinline__ void wait_phase(ptx::Mbarrier& barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(&barrier, parity)) {
  }
}

/// A place in the ring. Both sides walk it in the same order and never start over, also not between tiles.
template <int kStages>
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1u;
    }
  }
};

// ---- Shared-memory descriptors of tiles in the 128-byte swizzle: rows of 128 bytes, a pattern of 8 rows (1024 bytes), at
// whose start tiles must lie. Bits 0-13: address / 16; 16-29 and 32-45: two strides / 16; 62-63: 1, the 128-byte swizzle.

__device__ __forceinline__ uint64_t swizzled_descriptor(const void* tile, int leading_bytes, int stride_bytes) {
  const uint64_t address = (ptx::shared_address(tile) & 0x3ffffu) >> 4;
  return address | static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         uint64_t{1} << 62;
}

inline constexpr int kPatternBytes = 1024;

/// Rows of the product as rows, 128 bytes of the reduction along them; the next 8 rows follow.
__device__ __forceinline__ uint64_t row_descriptor(const void* tile) {
  return swizzled_descriptor(tile, 16, kPatternBytes); // the leading stride is not used
}

/// Elements of the reduction as rows, 64 rows or columns of the product along them, the next 64 `block_bytes` further.
__device__ __forceinline__ uint64_t column_descriptor(const void* tile, int block_bytes) {
  return swizzled_descriptor(tile, block_bytes, kPatternBytes);
}

// One wgmma takes 32 bytes of the reduction. Descriptors to the next, in units of the address field:
inline constexpr uint64_t kRowStep = 32 >> 4;          // along the row
inline constexpr uint64_t kColumnStep = 16 * 128 >> 4; // 16 rows, of 16-bit elements

} // namespace vggfast::cuda::sm90
