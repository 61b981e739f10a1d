// Which of the compiled instruction sets this machine runs, and which one is in use.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace vggfast::cpu {

// The widest the CPU has, or what VGGFAST_CPU_ISA or set_isa() names. Throws std::invalid_argument for a name that is unknown or
// that this CPU cannot run.
const Kernels& kernels();
void set_isa(const std::string& name);    // "auto" returns to the widest, as does "aten"
std::vector<std::string> runnable_isas(); // best first

} // namespace vggfast::cpu
