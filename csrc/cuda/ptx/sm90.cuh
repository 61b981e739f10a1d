// PTX that sm_90a has beyond sm_80, one instruction one function: with sm80.cuh the only place where `asm` appears.
// Pointers are generic; the shared-window address is taken here.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/sm80.cuh"

namespace vggfast::cuda::ptx {

/// One phase of a shared-memory barrier that counts arrivals and bytes.
using Mbarrier = uint64_t;

/// Every phase takes `arrivals` arrivals. One thread; fence_barrier_init and a block barrier before anyone uses it.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/// Makes this thread's mbarrier_init visible to the asynchronous proxy.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Orders this thread's ordinary accesses to shared memory before later ones of tensor cores and copy engine.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// One arrival.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// One arrival, after which the phase also waits for `bytes` bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

/// Whether the phase of this parity has completed; may give up and say no after a while.
__device__ __forceinline__ bool mbarrier_try_wait_parity(Mbarrier* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n"
               ".reg .pred p;\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n"
               "}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

/// Brings a tensor map, in parameter or global memory, to the copy engine.
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// One box of a 3-dimensional tensor to shared memory; its bytes count for `barrier`. Innermost coordinate first.
__device__ __forceinline__ void tma_load_3d(void* shared, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               :
               : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

/// One box of a 4-dimensional tensor; elements outside the tensor arrive as zeros and count all the same.
__device__ __forceinline__ void tma_load_4d(void* shared, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2,
                                            int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

/// All threads of kThreads that name barrier `id` (1 to 15; __syncthreads is 0) meet; whole warps.
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

/// Gives registers back, for the whole warpgroup: kRegisters a thread remain.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Waits until the warpgroup has kRegisters a thread.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Before the first product and after any other access to accumulators, in all four warps.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// Closes the group of the products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kPending groups are in flight; older groups have then read their operands and written d.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  static_assert(0 <= kPending && kPending <= 7);
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The accumulators of one instruction as operands %0, %1, ...: their constraints, and their names.
#define VGGFAST_D4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define VGGFAST_D32(d, j)                                                                                                          \
  VGGFAST_D4(d, j), VGGFAST_D4(d, j + 1), VGGFAST_D4(d, j + 2), VGGFAST_D4(d, j + 3), VGGFAST_D4(d, j + 4), VGGFAST_D4(d, j + 5),  \
      VGGFAST_D4(d, j + 6), VGGFAST_D4(d, j + 7)
#define VGGFAST_NAMES32                                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VGGFAST_NAMES64                                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                               \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VGGFAST_NAMES128                                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                               \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                               \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                                   \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// asm takes literals only, so the types, the names and the number of the first operand after them are pasted in.
#define VGGFAST_WGMMA(n, type, names, a, b, p, ta, tb, ...)                                                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, %" a ", %" b ", p, 1, 1, %" ta        \
               ", %" tb ";\n}"                                                                                                     \
               : __VA_ARGS__                                                                                                       \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)), "n"(kTransposedA), "n"(kTransposedB))
// TF32 has no transposed operands.
#define VGGFAST_WGMMA_TF32(n, names, a, b, p, ...)                                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k8.f32.tf32.tf32 {" names "}, %" a ", %" b ", p, 1, 1;\n}"                   \
               : __VA_ARGS__                                                                                                       \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)))

/// d = a b + (accumulate ? d : 0) on four warps: a 64x16 and b 16xkN through shared-memory descriptors, d 64xkN in the layout
/// of mma.sync's fragments, warp w holding rows 16 w on. Transposed: the rows of the operand in memory run along the
/// reduction. Runs on after the call: wgmma_commit, wgmma_wait.
template <int kN, int kTransposedA, int kTransposedB>
__device__ __forceinline__ void wgmma_bf16(float (&d)[kN / 8][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 64) {
    VGGFAST_WGMMA("64", "bf16", VGGFAST_NAMES32, "32", "33", "34", "35", "36", VGGFAST_D32(d, 0));
  } else if constexpr (kN == 128) {
    VGGFAST_WGMMA("128", "bf16", VGGFAST_NAMES64, "64", "65", "66", "67", "68", VGGFAST_D32(d, 0), VGGFAST_D32(d, 8));
  } else {
    VGGFAST_WGMMA("256", "bf16", VGGFAST_NAMES128, "128", "129", "130", "131", "132", VGGFAST_D32(d, 0), VGGFAST_D32(d, 8),
                  VGGFAST_D32(d, 16), VGGFAST_D32(d, 24));
  }
}

/// The same for float16.
template <int kN, int kTransposedA, int kTransposedB>
__device__ __forceinline__ void wgmma_f16(float (&d)[kN / 8][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 64) {
    VGGFAST_WGMMA("64", "f16", VGGFAST_NAMES32, "32", "33", "34", "35", "36", VGGFAST_D32(d, 0));
  } else if constexpr (kN == 128) {
    VGGFAST_WGMMA("128", "f16", VGGFAST_NAMES64, "64", "65", "66", "67", "68", VGGFAST_D32(d, 0), VGGFAST_D32(d, 8));
  } else {
    VGGFAST_WGMMA("256", "f16", VGGFAST_NAMES128, "128", "129", "130", "131", "132", VGGFAST_D32(d, 0), VGGFAST_D32(d, 8),
                  VGGFAST_D32(d, 16), VGGFAST_D32(d, 24));
  }
}

/// The same for TF32: a 64x8 and b 8xkN, both with the reduction along their rows. The low 13 bits of both are ignored.
template <int kN>
__device__ __forceinline__ void wgmma_tf32(float (&d)[kN / 8][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 64) {
    VGGFAST_WGMMA_TF32("64", VGGFAST_NAMES32, "32", "33", "34", VGGFAST_D32(d, 0));
  } else if constexpr (kN == 128) {
    VGGFAST_WGMMA_TF32("128", VGGFAST_NAMES64, "64", "65", "66", VGGFAST_D32(d, 0), VGGFAST_D32(d, 8));
  } else {
    VGGFAST_WGMMA_TF32("256", VGGFAST_NAMES128, "128", "129", "130", VGGFAST_D32(d, 0), VGGFAST_D32(d, 8), VGGFAST_D32(d, 16),
                       VGGFAST_D32(d, 24));
  }
}

#undef VGGFAST_WGMMA_TF32
#undef VGGFAST_WGMMA
#undef VGGFAST_NAMES128
#undef VGGFAST_NAMES64
#undef VGGFAST_NAMES32
#undef VGGFAST_D32
#undef VGGFAST_D4

} // namespace vggfast::cuda::ptx
