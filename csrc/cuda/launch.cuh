// The one way a kernel is launched: on the caller's stream, checked right after, never synchronising.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace vggfast::cuda {

inline void check(cudaError_t error, const char* kernel_name) {
  if (error != cudaSuccess) {
    cudaGetLastError(); // told here: the next launch is not to be taken for what failed
    throw std::runtime_error(std::string("vggfast: kernel ") + kernel_name + ": " + cudaGetErrorString(error));
  }
}

/// Lets `kernel` use so much dynamic shared memory on the current device. A kernel always asks for the same amount, so CUDA is
/// asked once per kernel and device.
void allow_shared_memory(const void* kernel, int bytes, const char* name);

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

/// Launches `kernel(arguments...)`; throws std::runtime_error with the kernel's name when CUDA refuses. Safe in graph
/// capture. The device of `stream` must be current.
template <class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Arguments...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shape.blocks < 1 || shape.blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string("vggfast: kernel ") + name + ": expected 1 to 2^31 - 1 blocks, got " +
                             std::to_string(shape.blocks));
  }
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes, name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  const cudaError_t refused = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t sticky = cudaGetLastError();
  check(refused != cudaSuccess ? refused : sticky, name);
}

} // namespace vggfast::cuda
