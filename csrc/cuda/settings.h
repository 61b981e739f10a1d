// What the CUDA ops would do: what the Python module shows.
#pragma once
#include <cstdint>
#include <string>

namespace vggfast::cuda {

// The plan of the named pass ("forward", "grad_input", "grad_weight") for a device with these numbers, in words; "aten: why" if
// none.
std::string describe_plan(const std::string& pass, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, bool pool,
                          const std::string& dtype, int sm_count, int compute_capability);

} // namespace vggfast::cuda
