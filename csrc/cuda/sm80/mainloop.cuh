// The multi-stage loop of the sm_80 implicit GEMMs: fetch ahead, wait, barrier, multiply.
#pragma once

#include "cuda/tile.cuh"

namespace vggfast::cuda::sm80 {

/// sums += sum over `blocks` stages of A B.
///
/// Loader: fetch(stage) starts bringing the next block of the reduction, in order, into the stage; land(stage) finishes
/// the parts that travel through registers. Parts that travel by cp.async land at the wait.
template <class Gemm, Order kOrderA, Order kOrderB, class Loader>
__device__ __forceinline__ void mainloop(typename Gemm::Accumulators& sums, typename Gemm::Shared& shared, Loader& loader,
                                         int blocks) {
  constexpr int stages = Gemm::shape.stages;
  for (int block = 0; block < stages - 1; ++block) {
    if (block < blocks) {
      loader.fetch(shared.stages[block]);
      loader.land(shared.stages[block]);
    }
    ptx::cp_async_commit();
  }
  int read = 0, write = stages - 1;
  for (int block = 0; block < blocks; ++block) {
    ptx::cp_async_wait<stages - 2>();
    // One barrier does both: the block to multiply is visible, and the stage to refill was read by everyone.
    __syncthreads();
    const bool more = block + stages - 1 < blocks;
    if (more) {
      loader.fetch(shared.stages[write]);
    }
    ptx::cp_async_commit();
    Gemm::template multiply<kOrderA, kOrderB>(sums, shared.stages[read]);
    if (more) {
      loader.land(shared.stages[write]);
    }
    read = read + 1 == stages ? 0 : read + 1;
    write = write + 1 == stages ? 0 : write + 1;
  }
  // The stages may be reused from here on.
  ptx::cp_async_wait<0>();
  __syncthreads();
}

} // namespace vggfast::cuda::sm80
