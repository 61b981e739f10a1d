// grad_input = transposed convolution of the gradient, with TMA and wgmma: forward's product over the gradient of the
// convolution's own output, on mirrored taps. 16-bit filters are read as they lie, output channels along the reduction; TF32 has
// no such operands and reads a copy.
#pragma once

#include "cuda/sm90/grad_preact.h"
#include "cuda/sm90/launch_splits.cuh"
#include "cuda/sm90/mirror_filters.cuh"

namespace vggfast::cuda::sm90 {

/// How grad_input finds its filters.
template <class Element>
inline constexpr Filters kGradFilters = Element::dtype == DType::tf32 ? Filters::rows : Filters::columns;

template <class Element, WideTile kTile>
__global__ void __launch_bounds__(kThreads, 1) grad_input_kernel(const __grid_constant__ GemmParams params) {
  run_implicit_gemm<WideGemm<Element, kTile, kGradFilters<Element>>>(params);
}

/// Host: of the filters as they lie, or of the copy that it first writes to `copy`.
template <class Element, WideTile kTile>
CUtensorMap make_grad_filter_map(const Problem& p, const void* weight, void* copy, cudaStream_t stream) {
  if constexpr (kGradFilters<Element> == Filters::columns) {
    return make_filter_map(p.dtype, weight, p.k, p.c, swizzle_row(p.dtype));
  } else {
    launch_mirror_filters<Element>(p, weight, copy, stream);
    return make_filter_map(p.dtype, copy, p.c, p.k, pixel_tile_shape(kTile).block_n);
  }
}

template <class Element, WideTile kTile>
void launch_grad_input(const Problem& p, const Plan& plan, const GradInputPointers& pointers, cudaStream_t stream) {
  using Gemm = WideGemm<Element, kTile, kGradFilters<Element>>;
  // The workspace: the splits' partial sums, the gradient before ReLU and pool, the copy of the filters.
  auto* partials = static_cast<float*>(pointers.workspace);
  void* preact = partials + plan_detail::partial_bytes(plan) / int64_t{sizeof(float)};
  void* copy = static_cast<unsigned char*>(preact) + plan_detail::grad_preact_bytes(p);
  const void* grad = materialise_grad_preact(p, pointers.output, preact, stream);
  const GemmParams params{make_image_map("the gradient", p.dtype, grad, p.n, p.h, p.w, p.k, plan.box, p.h, p.w),
                          make_grad_filter_map<Element, kTile>(p, pointers.weight, copy, stream),
                          {nullptr, pointers.grad_input, nullptr, static_cast<int>(p.c), false, false},
                          make_tile_grid(plan, p.n, p.h, p.w),
                          plan_detail::pixel_stages(Pass::grad_input, p),
                          plan.splits,
                          partials};
  launch_with_splits<Gemm>("sm90 grad_input", grad_input_kernel<Element, kTile>, p.dtype, plan, params, stream);
}

} // namespace vggfast::cuda::sm90
