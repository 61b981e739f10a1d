// The schedule of convolutions on AMX's tile registers.
#include <atomic>

#include "cpu/amx.h"
#include "cpu/dtypes.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {

int64_t amx_workspace(const Plan& plan, const Image& x, const Filters& w) {
  return plan.own_filters ? 0 : ceil_div(w.out, kAmxBlock) * AmxShape(x.c, x.w).filters() / 2;
}

void forward_amx(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
                 const Parallel& parallel) {
  const AmxShape shape(x.c, x.w);
  BFloat16* packed = plan.own_filters ? nullptr : reinterpret_cast<BFloat16*>(workspace);
  const int64_t blocks = ceil_div(w.out, kAmxBlock), bands = ceil_div(x.h, plan.band);
  if (packed) parallel(blocks, [&](int64_t b) { k.amx_filters(w, b, packed + b * shape.filters()); });
  parallel(ceil_div(x.n, plan.images) * bands * plan.splits, [&](int64_t index) {
    const int64_t split = index % plan.splits, band = index / plan.splits;
    const int64_t n = band / bands * plan.images, h = band % bands * plan.band;
    const AmxJob job{n,
                     std::min(n + plan.images, x.n),
                     h,
                     std::min(h + plan.band, x.h),
                     blocks * split / plan.splits,
                     blocks * (split + 1) / plan.splits};
    k.amx_rows(x, w, packed, out, job, scratch(shape.floats(plan.images, plan.band, x.w, plan.own_filters)));
  });
}

namespace {
struct AmxGradient {
  int64_t parts, padded, sums; // of a part: output channels, whose bias sums are doubles, and floats
  AmxGradient(const Plan& plan, const Image& x, const Image& dz)
      : parts(plan.groups), padded(round_up(dz.c, kAmxBlock)), sums(padded / kAmxBlock * ceil_div(x.c, kAmxBlock) * kAmxSums) {}
};
} // namespace

int64_t grad_weight_amx_workspace(const Plan& plan, const Image& x, const Image& dz) {
  const AmxGradient g(plan, x, dz);
  return g.parts * (g.sums + 2 * g.padded);
}

bool grad_weight_amx(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, const Filters& dw, float* bias,
                     float* workspace, const Parallel& parallel) {
  const AmxGradient g(plan, x, dz);
  const AmxPositions positions(x.n, x.h, x.w);
  const int64_t blocks = g.padded / kAmxBlock, pairs_of_rows = ceil_div(positions.rows(), 2);
  float* sums = workspace;
  double* bias_sums = reinterpret_cast<double*>(sums + g.parts * g.sums);
  std::fill(bias_sums, bias_sums + g.parts * g.padded, 0.);
  parallel(g.parts * plan.splits, [&](int64_t job) {
    const int64_t part = job / plan.splits, split = job % plan.splits;
    const int64_t begin = blocks * split / plan.splits, end = blocks * (split + 1) / plan.splits;
    const AmxChunk chunk(positions, plan.tiles, x.c, (end - begin) * kAmxBlock);
    k.amx_grad_rows(x, dz, pairs_of_rows * part / g.parts * 2, pairs_of_rows * (part + 1) / g.parts * 2, plan.tiles, begin, end,
                    sums + part * g.sums, bias_sums + part * g.padded, scratch(chunk.floats()));
  });
  std::atomic<bool> finite{true};
  parallel(blocks, [&](int64_t b) {
    const int64_t size = g.sums / blocks;
    for (int64_t part = 1; part < g.parts; ++part)
      for (int64_t i = b * size; i < (b + 1) * size; ++i) sums[i] += sums[part * g.sums + i];
    if (!k.amx_grad_filters(sums, b, dw)) finite.store(false, std::memory_order_relaxed);
  });
  for (int64_t c = 0; c < dz.c; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < g.parts; ++part) sum += bias_sums[part * g.padded + c];
    bias[c] = float(sum);
  }
  return finite;
}

} // namespace vggfast::cpu
