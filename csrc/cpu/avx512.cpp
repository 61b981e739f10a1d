// AVX-512 (F, BW, DQ, VL): 32 registers hold 14 x 2 accumulators, 2 columns and a broadcast.
#if defined(__x86_64__)
#  include <immintrin.h>

#  include <cstring>
#  include <type_traits>

#  include "cpu/dtypes.h"
#  include "cpu/kernels.h"
#  include "cpu/target.h"

VGGFAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace vggfast::cpu::avx512 {
static constexpr int kRows = 14, kVecs = 2, kSteps = 1;
#  define VGGFAST_ISA_NAME "avx512"
#  include "cpu/vec_avx512.h"

#  include "cpu/algorithm.inl"
} // namespace vggfast::cpu::avx512
VGGFAST_TARGET_END

namespace vggfast::cpu {
const Kernels kernels_avx512 = avx512::table;
}
#endif
