// NEON, which every 64-bit Arm has: 32 registers hold 6 x 4 accumulators, 4 columns and the rows' factors.
#if defined(__aarch64__)
#  include <arm_neon.h>

#  include <cstring>
#  include <type_traits>

#  include "cpu/dtypes.h"
#  include "cpu/kernels.h"

#  pragma GCC push_options
#  pragma GCC optimize("no-schedule-insns") // it would load so far ahead that sums went to the stack
namespace vggfast::cpu::neon {
static constexpr int kRows = 6, kVecs = 4, kSteps = 4;
#  define VGGFAST_ISA_NAME "neon"
#  include "cpu/vec_neon.h"

#  include "cpu/algorithm.inl"
} // namespace vggfast::cpu::neon
#  pragma GCC pop_options

namespace vggfast::cpu {
const Kernels kernels_neon = neon::table;
}
#endif
