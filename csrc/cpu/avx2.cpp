// AVX2 + FMA + F16C: 16 registers hold 6 x 2 accumulators, 2 columns and a broadcast.
#if defined(__x86_64__)
#  include <immintrin.h>

#  include <cstring>
#  include <type_traits>

#  include "cpu/dtypes.h"
#  include "cpu/kernels.h"
#  include "cpu/target.h"

VGGFAST_TARGET("avx2,fma,f16c")
namespace vggfast::cpu::avx2 {
static constexpr int kRows = 6, kVecs = 2;
static constexpr int kSteps = 4; // of depth at once in Winograd: 12 products leave little room for a loop's own instructions
#  define VGGFAST_ISA_NAME "avx2"
#  include "cpu/vec_avx2.h"

#  include "cpu/algorithm.inl"
} // namespace vggfast::cpu::avx2
VGGFAST_TARGET_END

namespace vggfast::cpu {
const Kernels kernels_avx2 = avx2::table;
}
#endif
