// y = maxpool2x2?(relu?(conv3x3(x, weight) + bias)) with TMA and wgmma.
#pragma once

#include "cuda/sm90/launch_splits.cuh"

namespace vggfast::cuda::sm90 {

template <class Element, WideTile kTile>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ GemmParams params) {
  run_implicit_gemm<WideGemm<Element, kTile, Filters::rows>>(params);
}

template <class Element, WideTile kTile>
void launch_forward(const Problem& p, const Plan& plan, const ForwardPointers& pointers, cudaStream_t stream) {
  using Gemm = WideGemm<Element, kTile, Filters::rows>;
  const GemmParams params{make_image_map("x", p.dtype, pointers.x, p.n, p.h, p.w, p.c, plan.box, p.h, p.w),
                          make_filter_map(p.dtype, pointers.weight, p.k, p.c, Gemm::kN),
                          {pointers.bias, pointers.y, pointers.argmax, static_cast<int>(p.k), p.relu, p.pool},
                          make_tile_grid(plan, p.n, p.pool ? p.h / 2 * 2 : p.h, p.pool ? p.w / 2 * 2 : p.w),
                          plan_detail::pixel_stages(Pass::forward, p),
                          plan.splits,
                          static_cast<float*>(pointers.workspace)};
  launch_with_splits<Gemm>("sm90 forward", forward_kernel<Element, kTile>, p.dtype, plan, params, stream);
}

} // namespace vggfast::cuda::sm90
