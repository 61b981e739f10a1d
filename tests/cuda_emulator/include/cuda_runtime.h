// Stands in for CUDA's header when the kernels are compiled for the emulator: keywords, vector types, warp and block
// intrinsics, and the few runtime calls that launches make.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
  float x, y;
} __attribute__((aligned(8)));
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));

using emulator::dim3;
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

/// threadIdx.x and its like: objects without memory that ask the emulator.
template <dim3 (*kGet)(), unsigned dim3::*kMember>
struct BuiltinCoordinate {
  operator unsigned() const { return kGet().*kMember; }
};
template <dim3 (*kGet)()>
struct BuiltinIndex {
  BuiltinCoordinate<kGet, &dim3::x> x;
  BuiltinCoordinate<kGet, &dim3::y> y;
  BuiltinCoordinate<kGet, &dim3::z> z;
};
inline constexpr BuiltinIndex<emulator::thread_index> threadIdx{};
inline constexpr BuiltinIndex<emulator::block_index> blockIdx{};
inline constexpr BuiltinIndex<emulator::block_dim> blockDim{};
inline constexpr BuiltinIndex<emulator::grid_dim> gridDim{};

inline void __syncthreads() {
  emulator::block_barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::warp_barrier(mask);
}
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::shuffle_xor(mask, bits, lane_mask);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int lane_mask) {
  return emulator::shuffle_xor(mask, value, lane_mask);
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

#define CUDART_VERSION 13000
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emulator::current_device() = device;
  return cudaSuccess;
}
/// Calls that fail leave their error behind, until somebody asks.
inline cudaError_t remembered(cudaError_t error) {
  emulator::last_error() = error != cudaSuccess ? error : emulator::last_error();
  return error;
}
inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(std::exchange(emulator::last_error(), int{cudaSuccess}));
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return remembered(emulator::allow_shared(kernel, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}
/// A failed emulation is reported by the launch itself, with what the emulator saw.
inline const char* cudaGetErrorString(cudaError_t) {
  return emulator::failure();
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const emulator::Gpu& gpu = emulator::gpu();
  *value = which == cudaDevAttrMultiProcessorCount      ? gpu.sm_count
           : which == cudaDevAttrComputeCapabilityMajor ? gpu.capability / 10
                                                        : gpu.capability % 10;
  return remembered(gpu.sm_count > 0 ? cudaSuccess : cudaErrorInvalidValue); // none: a device that was lost
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };
/// Knows what <cuda.h> declares here.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
    static void run(const void* self) {
      std::apply(static_cast<const Call*>(self)->kernel, static_cast<const Call*>(self)->parameters);
    }
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  const emulator::Launch launch{
      config->gridDim, config->blockDim, config->dynamicSmemBytes, reinterpret_cast<const void*>(kernel), &Call::run, &call,
      sizeof call,     config->stream};
  return remembered(emulator::run(launch) ? cudaSuccess : cudaErrorLaunchFailure);
}
