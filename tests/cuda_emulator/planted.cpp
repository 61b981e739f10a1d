// Small kernels with one bug each, which the emulator must catch, and their correct version, which it must accept.
// Included as CUDA kernels are: through the shim, with the access hooks.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx/sm80.cuh"

namespace {

using namespace vggfast::cuda;

enum class Bug : int {
  none,
  missing_barrier,
  missing_wait,
  early_refill,
  skipped_barrier,
  diverged_warp,
  global_read_out_of_bounds,
  global_write_out_of_bounds,
  shared_out_of_bounds,
  uninitialised_shared,
  uninitialised_global,
  two_writers,
  write_to_input,
  misaligned_vector,
  unwaited_copy,
  wild_pointer,
  count,
};

constexpr int kThreads = 64;

struct Params {
  const float* in; // [2 * kThreads]
  float* out;      // [kThreads]
  Bug bug;
};

struct Shared {
  alignas(16) float stages[2][kThreads];
};

__device__ void copy_stage(Shared& shared, const Params& params, int stage) {
  const int i = threadIdx.x;
  ptx::cp_async_ca<4>(&shared.stages[stage][i], params.in + stage * kThreads + i, 4);
  ptx::cp_async_commit();
}

/// out[i] = in[0][mirror of i] + in[1][mirror of i], through two asynchronously filled stages.
__global__ void planted_kernel(const Params params) {
  auto& shared = ptx::dynamic_shared<Shared>();
  const int i = threadIdx.x, mirror = kThreads - 1 - i;
  const Bug bug = params.bug;
  copy_stage(shared, params, 0);
  copy_stage(shared, params, 1);
  if (bug == Bug::unwaited_copy) {
    params.out[i] = 0.0f;
    return;
  }
  if (bug == Bug::missing_wait) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
  if (bug == Bug::skipped_barrier && i == 5) {
    return;
  }
  if (bug != Bug::missing_barrier) {
    __syncthreads();
  }
  float sum = shared.stages[0][mirror] + shared.stages[1][mirror];
  if (bug == Bug::early_refill) {
    copy_stage(shared, params, 0);
    ptx::cp_async_wait<0>();
  }
  if (bug == Bug::diverged_warp && i % 32 == 3) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  }
  if (bug == Bug::global_read_out_of_bounds) {
    sum += params.in[2 * kThreads + i];
  }
  if (bug == Bug::shared_out_of_bounds) {
    sum += shared.stages[1][kThreads + i];
  }
  if (bug == Bug::uninitialised_global) {
    sum += params.out[mirror];
  }
  if (bug == Bug::write_to_input) {
    const_cast<float*>(params.in)[i] = sum;
  }
  if (bug == Bug::wild_pointer) {
    sum += *(reinterpret_cast<const float*>(uintptr_t{0x1000}) + i);
  }
  const int to = bug == Bug::global_write_out_of_bounds ? i + 1 : bug == Bug::two_writers ? i / 2 : i;
  params.out[to] = sum;
}

/// Needs no copies: reads shared memory nobody wrote, or a vector at an odd element.
__global__ void planted_read_kernel(const Params params) {
  auto& shared = ptx::dynamic_shared<Shared>();
  const int i = threadIdx.x;
  if (params.bug == Bug::uninitialised_shared) {
    params.out[i] = shared.stages[0][i];
    return;
  }
  const uint4 vector = *reinterpret_cast<const uint4*>(params.in + 1);
  params.out[i] = static_cast<float>(vector.x);
}

std::string message;

} // namespace

extern "C" {

int emu_planted_bugs() {
  return static_cast<int>(Bug::count);
}

const char* emu_planted(int bug, const float* in, float* out) {
  const Params params{in, out, static_cast<Bug>(bug)};
  const bool reads_only = params.bug == Bug::uninitialised_shared || params.bug == Bug::misaligned_vector;
  try {
    launch_kernel("planted", reads_only ? planted_read_kernel : planted_kernel, {1, kThreads, sizeof(Shared)},
                  emulator::callers_stream(0), params);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

/// Launches that CUDA refuses. 0: more shared memory than the kernel was allowed; 1: an empty grid.
const char* emu_refused_launch(int which, const float* in, float* out) {
  const cudaLaunchConfig_t config{which == 1 ? emulator::dim3(0) : emulator::dim3(1), emulator::dim3(kThreads),
                                  which == 0 ? size_t{64} * 1024 : sizeof(Shared), emulator::callers_stream(0)};
  return cudaLaunchKernelEx(&config, planted_kernel, Params{in, out, Bug::none}) == cudaSuccess ? nullptr : emulator::failure();
}
}
