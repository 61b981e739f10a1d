// AVX-512 with AMX's bfloat16 tiles: those of avx512.cpp, and on tile registers direct convolution of bfloat16 and Winograd's
// products of floats.
#if defined(__x86_64__)
#  include <immintrin.h>

#  include <cstring>
#  include <optional>
#  include <type_traits>
#  include <utility>

#  include "cpu/amx.h"
#  include "cpu/dtypes.h"
#  include "cpu/target.h"

VGGFAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
namespace vggfast::cpu::amx {
static constexpr int kVecs = 2;
#  include "cpu/tiles_amx.h"
#  include "cpu/vec_avx512.h"

#  include "cpu/amx_algorithm.inl"
} // namespace vggfast::cpu::amx

namespace vggfast::cpu::amx_emulated {
static constexpr int kVecs = 2;
#  include "cpu/tiles_emulated.h"
#  include "cpu/vec_avx512.h"

#  include "cpu/amx_algorithm.inl"
} // namespace vggfast::cpu::amx_emulated
VGGFAST_TARGET_END

namespace vggfast::cpu {
namespace {
#  define VGGFAST_WITH_TILES(isa)                                                                                                  \
    with_tiles(#isa, isa::amx_filters, isa::amx_rows, isa::amx_grad_rows, isa::amx_grad_filters, isa::pieces_multiply,             \
               isa::pieces_accumulate)
Kernels with_tiles(const char* name, decltype(Kernels::amx_filters) filters, decltype(Kernels::amx_rows) rows,
                   decltype(Kernels::amx_grad_rows) grad_rows, decltype(Kernels::amx_grad_filters) grad_filters,
                   decltype(Kernels::pieces_multiply) multiply, decltype(Kernels::pieces_accumulate) accumulate) {
  Kernels table = kernels_avx512;
  table.name = name, table.amx_filters = filters, table.amx_rows = rows;
  table.amx_grad_rows = grad_rows, table.amx_grad_filters = grad_filters;
  table.pieces_multiply = multiply, table.pieces_accumulate = accumulate;
  return table;
}
} // namespace

const Kernels kernels_amx = VGGFAST_WITH_TILES(amx);
const Kernels kernels_amx_emulated = VGGFAST_WITH_TILES(amx_emulated);
} // namespace vggfast::cpu
#endif
