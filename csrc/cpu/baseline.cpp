// Any machine the compiler targets by default: 16 vector registers of 4 floats hold 6 x 2 accumulators.
#include <cstring>
#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/kernels.h"

namespace vggfast::cpu::baseline {
static constexpr int kRows = 6, kVecs = 2, kSteps = 1;
#define VGGFAST_ISA_NAME "baseline"
#include "cpu/vec_baseline.h"

#include "cpu/algorithm.inl"
} // namespace vggfast::cpu::baseline

namespace vggfast::cpu {
const Kernels kernels_baseline = baseline::table;
}
