// A CPU stand-in for one GPU: runs a grid one block at a time, one fiber per CUDA thread, and checks every access.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- For the shim of the CUDA runtime.

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  const void* kernel;
  void (*call)(const void* closure);
  const void* closure;
  size_t closure_bytes;
  const void* stream;
};

/// What cudaGetLastError tells.
int& last_error();

/// What every device says of itself.
struct Gpu {
  int sm_count = 2, capability = 90; // 10 * major + minor
};
Gpu& gpu();

/// The device that is current. Every launch must name its caller's stream.
int& current_device();
inline void* callers_stream(int device) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(0x5700 + device));
}

/// Runs the grid. False when a thread did something that a GPU would not survive, or could survive by luck only.
bool run(const Launch& launch);
/// What run() saw, or why a launch was refused.
const char* failure();
/// cudaFuncSetAttribute(MaxDynamicSharedMemorySize), on the current device.
bool allow_shared(const void* kernel, int bytes);

dim3 thread_index();
dim3 block_index();
dim3 block_dim();
dim3 grid_dim();
void block_barrier();
void named_barrier(int id, int threads);
void warp_barrier(unsigned mask);
uint32_t shuffle_xor(unsigned mask, uint32_t value, int lane_mask);
void* dynamic_shared();

// ---- For the twins of the PTX functions.

void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix_x4(uint32_t* matrices, const void* row, bool transposed);
enum class MmaType { bf16, f16, tf32 };
void mma(MmaType type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

// ---- For the twins of sm_90's.

/// What cuTensorMapEncodeTiled writes. Innermost dimension first; strides in bytes.
struct TensorMap {
  static constexpr uint32_t kMagic = 0x74656e73;
  const unsigned char* base;
  uint64_t extents[5], strides[5];
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle_bytes; // 16: no swizzle
  bool rounds_to_tf32;                        // fp32 elements, on their way to shared memory
  uint32_t magic;
};
static_assert(sizeof(TensorMap) <= 128);

/// Offset in the block's shared memory as the shared window has it.
uint32_t shared_address(const void* pointer);
void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive(void* barrier, int expected_bytes);
bool mbarrier_try_wait_parity(void* barrier, uint32_t parity);
void fence_barrier_init();
void fence_proxy_async();
void tma_load(void* shared, const void* map, void* barrier, const int* coordinates, int rank);
void prefetch_tensormap(const void* map);
void set_max_registers(int registers, bool increase);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
/// d += a b on a warpgroup: a 64x16, b 16xcolumns, of TF32 64x8 and 8xcolumns, through descriptors.
void wgmma(MmaType type, int columns, bool transposed_a, bool transposed_b, float* d, uint64_t a, uint64_t b, bool accumulate);

// ---- For the tests.

struct Statistics {
  uint64_t mma, ldmatrix, ldmatrix_conflicts, cp_async, barriers, accesses, wgmma, tma_boxes, registers_moved;
};
Statistics statistics();

} // namespace emulator
