// What the sm_90 kernels share: three warpgroups with their roles, and the walk over boxes of pixels.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/plan_sm90.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/tensor_map.h"

namespace vggfast::cuda::sm90 {

inline constexpr int kGroupThreads = 128; // a warpgroup
inline constexpr int kConsumers = 2;      // warpgroups that multiply; the third has the thread that feeds them
inline constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
inline constexpr int kConsumerWarps = kConsumers * kGroupThreads / 32;
// Of 64 K registers; at launch every thread has 168.
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kGroupThreads * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

/// The threads of one consuming warpgroup meet.
__device__ __forceinline__ void group_barrier() {
  ptx::named_barrier_sync<kGroupThreads>(1 + threadIdx.x / kGroupThreads);
}

/// This warp has no more use for a stage.
__device__ __forceinline__ void release(ptx::Mbarrier& empty) {
  if (threadIdx.x % 32 == 0) {
    ptx::mbarrier_arrive(&empty);
  }
}

/// A warpgroup's main loop: multiply(stage, accumulate) starts the products of each of the next `count` stages and closes
/// their group. When it returns, all of them are done.
template <int kStages, class Multiply>
__device__ __forceinline__ void consume_stages(StageBarriers<kStages>& barriers, StageCursor<kStages>& at, int count,
                                               const Multiply& multiply) {
  int before = 0;
  for (int i = 0; i < count; ++i) {
    wait_phase(barriers.full[at.stage], at.parity);
    multiply(at.stage, i > 0);
    // While these products run, those of the stage before are done, and it can be filled again.
    ptx::wgmma_wait<1>();
    if (i > 0) {
      release(barriers.empty[before]);
    }
    before = at.stage;
    at.next();
  }
  ptx::wgmma_wait<0>();
  release(barriers.empty[before]);
}

/// The whole kernel: Gemm::produce on one thread, Gemm::consume on two warpgroups.
template <class Gemm, class Params>
__device__ __forceinline__ void run_warp_specialised(typename Gemm::Shared& shared, const Params& params) {
  if (threadIdx.x == 0) {
    shared.barriers.init(kConsumerWarps);
  }
  __syncthreads();
  if (threadIdx.x / kGroupThreads == kConsumers) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x % kGroupThreads == 0) {
      Gemm::produce(shared, params);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Gemm::consume(shared, params);
  }
}

/// The boxes that cover the image plane, columns the fastest, images the slowest.
struct BoxWalk {
  FastDiv boxes_w, boxes_h;
  PixelBox box;

  struct Pixel {
    int n, h, w;
  };
  __device__ Pixel first_pixel(int index) const {
    const int rows = boxes_w.quotient(index), images = boxes_h.quotient(rows);
    return {images * box.n, (rows - images * boxes_h.divisor()) * box.h, (index - rows * boxes_w.divisor()) * box.w};
  }
};

/// Host.
inline BoxWalk make_box_walk(const PixelBox& box, int64_t h, int64_t w) {
  const auto boxes = [](int64_t extent, int size) { return FastDiv(static_cast<uint32_t>((extent + size - 1) / size)); };
  return {boxes(w, box.w), boxes(h, box.h), box};
}

} // namespace vggfast::cuda::sm90
