// What the CUDA ops would do: what the Python module shows.
#pragma once
#include <cstdint>
#include <string>

namespace vggfast::cuda {

// "sm80": the kernels for every tensor-core GPU; "sm90": those of Hopper too, where they take the problem; "sm90patch": also
// those that read all taps from one patch, where they are expected to be faster. VGGFAST_CUDA_PLAN says which at the start. Throws
// std::invalid_argument for anything else.
void set_kernels(const std::string& kernels);

// The plan of the named step ("forward", "grad_input", "grad_weight", "max_pool") for a device with these numbers, in words;
// "aten: why" if none; `kernels` as set_kernels takes them.
std::string describe_plan(const std::string& step, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, bool pool,
                          const std::string& dtype, int sm_count, int compute_capability, const std::string& kernels);

// CUDA's version that is linked in, as "13.0".
std::string runtime_version();

// Why nothing of this build runs on the GPU of this index; empty if it does.
std::string device_obstacle(int index);

} // namespace vggfast::cuda
