// The schedule of convolutions on AMX's tile registers.
#include "cpu/amx.h"
#include "cpu/dtypes.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {
namespace {

int64_t filters_size(const Image& x) { // of one block, in elements
  return AmxShape(x.c, x.w).steps * 2 * kAmxTile;
}

// Floats of a job: the sums of two tiles, where steps begin, the band.
int64_t job_scratch(const Image& x, int64_t band) {
  const AmxShape shape(x.c, x.w);
  return 2 * 16 * kAmxBlock + 2 * round_up(shape.steps, 8) + ceil_div(shape.band(band, x.w), 2);
}

} // namespace

int64_t amx_workspace(const Image& x, const Filters& w) {
  return ceil_div(w.out, kAmxBlock) * filters_size(x) / 2;
}

void forward_amx(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
                 const Parallel& parallel) {
  BFloat16* packed = reinterpret_cast<BFloat16*>(workspace);
  const int64_t blocks = ceil_div(w.out, kAmxBlock), bands = ceil_div(x.h, plan.band);
  parallel(blocks, [&](int64_t b) { k.amx_filters(w, b, packed + b * filters_size(x)); });
  parallel(x.n * bands * plan.splits, [&](int64_t job) {
    const int64_t split = job % plan.splits, band = job / plan.splits, begin = band % bands * plan.band;
    k.amx_rows(x, packed, out, band / bands, begin, std::min(begin + plan.band, x.h), blocks * split / plan.splits,
               blocks * (split + 1) / plan.splits, scratch(job_scratch(x, plan.band)));
  });
}

} // namespace vggfast::cpu
