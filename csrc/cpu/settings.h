// The switches of the CPU ops, and what they would do: what the Python module shows.
#pragma once
#include <string>
#include <tuple>

#include "cpu/plan.h"

namespace vggfast::cpu {

// VGGFAST_CONV_ALGO, or what set_conv_algo() last said: auto, winograd or direct.
std::string conv_algo();
void set_conv_algo(const std::string& name);

// What the named step ("forward", "grad_input", "grad_weight") would run on tensors of that dtype ("float32", "bfloat16",
// "float16"), in words.
std::string describe_plan(const std::string& step, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w,
                          const std::string& dtype);

// Fp32 GFLOP/s of multiply-adds in registers on all of torch's threads at once: the best of the rounds that fit into `seconds`.
double fma_peak(double seconds);

} // namespace vggfast::cpu
