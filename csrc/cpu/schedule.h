// Runs a planned problem: cuts it into jobs for a Parallel, and hands each job to an ISA's kernels. No torch here, so that
// sanitizer builds and other hosts can drive the same code.
#pragma once
#include <functional>

#include "cpu/dtypes.h"
#include "cpu/plan.h"

namespace vggfast::cpu {

// parallel(jobs, body) calls body(job) once for every job in [0, jobs), on any threads, and returns when all are done.
using Parallel = std::function<void(int64_t jobs, const std::function<void(int64_t)>& body)>;

// y = conv3x3(x, w) with out's epilogue. workspace: forward_workspace() floats, aligned to 64 bytes.
int64_t forward_workspace(const Kernels&, const Plan&, const Image& x, const Filters& w);
void forward(const Kernels&, const Plan&, const Image& x, const Filters& w, const Output&, float* workspace, const Parallel&);

// The same for a plan of Algorithm::amx, which the two above pass on.
int64_t amx_workspace(const Plan&, const Image& x, const Filters& w);
void forward_amx(const Kernels&, const Plan&, const Image& x, const Filters& w, const Output&, float* workspace, const Parallel&);

int64_t grad_weight_amx_workspace(const Plan&, const Image& x, const Image& dz);
bool grad_weight_amx(const Kernels&, const Plan&, const Image& x, const Image& dz, const Filters& dw, float* bias, float* workspace,
                     const Parallel&); // false: Inf or NaN, as with Winograd

// dw = gradient of the filters, bias[K] = sum of dz. Sums run in an order that depends on the problem alone: equal bits every run.
int64_t grad_weight_workspace(const Kernels&, const Plan&, const Image& x, const Image& dz);
void grad_weight(const Kernels&, const Plan&, const Image& x, const Image& dz, const Filters& dw, float* bias, float* workspace,
                 const Parallel&);

void max_pool(const Kernels&, const Image& x, const Output&, const Parallel&);
void max_pool_grad(const Kernels&, const Image& dz, const Output&, const Parallel&);

Machine machine(const Kernels&, int threads);

// Filters for the channels [begin, end) of the input.
inline Filters input_channels(const Filters& w, int64_t begin, int64_t end) {
  const int64_t bytes = begin * w.stride_in * bytes_of(w.dtype);
  return {w.dtype, w.out, end - begin, static_cast<const char*>(w.data) + bytes, w.stride_out, w.stride_in, w.stride_r, w.stride_s};
}

} // namespace vggfast::cpu
