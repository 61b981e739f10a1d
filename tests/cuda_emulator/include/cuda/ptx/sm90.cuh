// C++ twins of csrc/cuda/ptx/sm90.cuh: the same names and signatures, carried out by the emulator.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/ptx/sm80.cuh"

namespace vggfast::cuda::ptx {

using Mbarrier = uint64_t;

inline uint32_t shared_address(const void* pointer) {
  return emulator::shared_address(pointer);
}
inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void fence_barrier_init() {
  emulator::fence_barrier_init();
}
inline void fence_proxy_async() {
  emulator::fence_proxy_async();
}
inline void mbarrier_arrive(Mbarrier* barrier) {
  emulator::mbarrier_arrive(barrier, 0);
}
inline void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
inline bool mbarrier_try_wait_parity(Mbarrier* barrier, uint32_t parity) {
  return emulator::mbarrier_try_wait_parity(barrier, parity);
}
inline void prefetch_tensormap(const CUtensorMap* map) {
  emulator::prefetch_tensormap(map);
}
inline void tma_load_3d(void* shared, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2) {
  const int coordinates[] = {c0, c1, c2};
  emulator::tma_load(shared, map, barrier, coordinates, 3);
}
inline void tma_load_4d(void* shared, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, int c3) {
  const int coordinates[] = {c0, c1, c2, c3};
  emulator::tma_load(shared, map, barrier, coordinates, 4);
}

template <int kThreads>
void named_barrier_sync(int id) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  emulator::named_barrier(id, kThreads);
}

template <int kRegisters>
void setmaxnreg_dec() {
  emulator::set_max_registers(kRegisters, false);
}
template <int kRegisters>
void setmaxnreg_inc() {
  emulator::set_max_registers(kRegisters, true);
}

inline void wgmma_fence() {
  emulator::wgmma_fence();
}
inline void wgmma_commit() {
  emulator::wgmma_commit();
}
template <int kPending>
void wgmma_wait() {
  static_assert(0 <= kPending && kPending <= 7);
  emulator::wgmma_wait(kPending);
}

template <int kN, int kTransposedA, int kTransposedB>
void wgmma_bf16(float (&d)[kN / 8][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  emulator::wgmma(emulator::MmaType::bf16, kN, kTransposedA, kTransposedB, &d[0][0], a_descriptor, b_descriptor, accumulate);
}
template <int kN, int kTransposedA, int kTransposedB>
void wgmma_f16(float (&d)[kN / 8][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  emulator::wgmma(emulator::MmaType::f16, kN, kTransposedA, kTransposedB, &d[0][0], a_descriptor, b_descriptor, accumulate);
}
template <int kN>
void wgmma_tf32(float (&d)[kN / 8][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  emulator::wgmma(emulator::MmaType::tf32, kN, false, false, &d[0][0], a_descriptor, b_descriptor, accumulate);
}

} // namespace vggfast::cuda::ptx
