// grad_input = transposed convolution of the gradient, with TMA and wgmma: forward's product over the gradient of the
// convolution's own output, on mirrored taps. The filters are read as they lie, output channels along the reduction.
#pragma once

#include "cuda/sm90/grad_preact.h"
#include "cuda/sm90/launch_splits.cuh"

namespace vggfast::cuda::sm90 {

template <class Element, WideTile kTile>
__global__ void __launch_bounds__(kThreads, 1) grad_input_kernel(const __grid_constant__ GemmParams params) {
  run_implicit_gemm<WideGemm<Element, kTile, Filters::columns>>(params);
}

template <class Element, WideTile kTile>
void launch_grad_input(const Problem& p, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  using Gemm = WideGemm<Element, kTile, Filters::columns>;
  // The workspace: the splits' partial sums, then the gradient before ReLU and pool.
  auto* partials = static_cast<float*>(pointers.workspace);
  void* preact = partials + plan_detail::partial_bytes(plan) / int64_t{sizeof(float)};
  const void* grad = materialise_grad_preact(p, pointers.output, preact, stream);
  const GemmParams params{make_image_map("the gradient", p.dtype, grad, p.n, p.h, p.w, p.k, plan.box, p.h, p.w),
                          make_filter_map(p.dtype, pointers.weight, p.k, p.c, kSwizzleRow),
                          {nullptr, pointers.grad_input, nullptr, static_cast<int>(p.c), false, false},
                          make_tile_grid(plan, p.n, p.h, p.w),
                          plan_detail::pixel_stages(Pass::grad_input, p),
                          plan.splits,
                          partials};
  launch_with_splits<Gemm>("sm90 grad_input", grad_input_kernel<Element, kTile>, p.dtype, plan, params, stream);
}

} // namespace vggfast::cuda::sm90
