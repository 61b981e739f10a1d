// Kernels bound by memory alone: 2x2 max pooling on its own, and the gradient through ReLU and pool as a tensor (the
// backward pass of that pooling, and what the plain convolution's backward needs where no kernel here fits).
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/grad_source.cuh"
#include "cuda/launch.cuh"

namespace vggfast::cuda::sm80 {

inline constexpr int kPointwiseThreads = 256;
inline constexpr int kPointwiseVectors = 4 * kPointwiseThreads; // 16-byte vectors a block aims at

/// A run of positions of [positions, channels], all of whose vectors one block handles.
struct PositionRun {
  FastDiv vectors; // per position
  int per_block;   // positions
  int positions;   // of the whole tensor

  __device__ int first() const { return static_cast<int>(blockIdx.x) * per_block; }
  __device__ int items() const { return min(per_block, positions - first()) * vectors.divisor(); }
};

inline PositionRun make_position_run(int64_t positions, int64_t channels, int vector) {
  const int64_t vectors = channels / vector;
  const int64_t per_block = vectors < kPointwiseVectors ? kPointwiseVectors / vectors : 1;
  return {FastDiv(static_cast<uint32_t>(vectors)), static_cast<int>(per_block), static_cast<int>(positions)};
}

inline LaunchShape launch_shape(const PositionRun& run) {
  return {(int64_t{run.positions} + run.per_block - 1) / run.per_block, kPointwiseThreads, 0};
}

struct MaxPoolParams {
  const void* x;   // [N, H, W, C]
  void* y;         // [N, Ho, Wo, C]
  uint8_t* argmax; // [N, Ho, Wo, C / 4] or null
  PixelGrid grid;  // pooled only
  PositionRun pools;
  int c;
};

template <class Element>
__global__ void __launch_bounds__(kPointwiseThreads) max_pool2x2_kernel(const __grid_constant__ MaxPoolParams params) {
  using Storage = typename Element::Storage;
  const auto* x = static_cast<const Storage*>(params.x);
  for (int item = threadIdx.x; item < params.pools.items(); item += kPointwiseThreads) {
    const int local = params.pools.vectors.quotient(item), pool = params.pools.first() + local;
    const int channel = (item - local * params.pools.vectors.divisor()) * kVector<Element>;
    const PixelGrid::Pool at = params.grid.pool(pool);
    Vector<Element> inputs[4];
#pragma unroll
    for (int position = 0; position < 4; ++position) {
      const int64_t pixel = params.grid.pixel(at, position / 2, position % 2);
      inputs[position].words = *reinterpret_cast<const uint4*>(x + (pixel * params.c + channel));
    }
    Vector<Element> best_values;
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < kVector<Element>; ++e) {
      PoolMax best{Element::load(inputs[0].elements[e]), 0};
#pragma unroll
      for (uint32_t position = 1; position < 4; ++position) {
        best.take(Element::load(inputs[position].elements[e]), position);
      }
      best_values.elements[e] = Element::round(best.value);
      codes |= best.position << (2 * e);
    }
    const int64_t out = int64_t{pool} * params.c + channel;
    *reinterpret_cast<uint4*>(static_cast<Storage*>(params.y) + out) = best_values.words;
    if (params.argmax != nullptr) {
#pragma unroll
      for (int byte = 0; byte < kVector<Element> / 4; ++byte) {
        params.argmax[out / 4 + byte] = static_cast<uint8_t>(codes >> (8 * byte));
      }
    }
  }
}

struct GradPreactParams {
  GradSource source;
  void* grad_preact; // [N, H, W, K]
  FastDiv w, h;
  PositionRun pixels;
  int k;
  bool pool;
};

template <class Element>
__global__ void __launch_bounds__(kPointwiseThreads) grad_preact_kernel(const __grid_constant__ GradPreactParams params) {
  using Storage = typename Element::Storage;
  for (int item = threadIdx.x; item < params.pixels.items(); item += kPointwiseThreads) {
    const int local = params.pixels.vectors.quotient(item), pixel = params.pixels.first() + local;
    const int channel = (item - local * params.pixels.vectors.divisor()) * kVector<Element>;
    bool valid = true;
    int64_t source = pixel;
    int position = 0;
    if (params.pool) {
      const int rows = params.w.quotient(pixel), n = params.h.quotient(rows);
      const int h = rows - n * params.h.divisor(), w = pixel - rows * params.w.divisor();
      const int pools_h = params.h.divisor() / 2, pools_w = params.w.divisor() / 2;
      valid = h < 2 * pools_h && w < 2 * pools_w;
      source = (int64_t{n} * pools_h + h / 2) * pools_w + w / 2;
      position = h % 2 * 2 + w % 2;
    }
    GradVector<Element> vector;
    if (valid) {
      vector.load(params.source, source * params.k + channel, position);
    } else {
      vector.clear();
    }
    auto* to = static_cast<Storage*>(params.grad_preact) + (int64_t{pixel} * params.k + channel);
    *reinterpret_cast<uint4*>(to) = vector.masked(params.source).words;
  }
}

template <class Element>
void launch_max_pool2x2(const Problem& p, const PoolPointers& pointers, cudaStream_t stream) {
  const PixelGrid grid = make_pixel_grid(p, true);
  const MaxPoolParams params{
      pointers.x, pointers.y, pointers.argmax, grid, make_position_run(grid.pools, p.c, kVector<Element>), static_cast<int>(p.c)};
  launch_kernel("sm80 max_pool2x2", max_pool2x2_kernel<Element>, launch_shape(params.pools), stream, params);
}

template <class Element>
void launch_grad_preact(const Problem& p, const GradPreactPointers& pointers, cudaStream_t stream) {
  const GradPreactParams params{make_grad_source(p, pointers.output),
                                pointers.grad_preact,
                                FastDiv(static_cast<uint32_t>(p.w)),
                                FastDiv(static_cast<uint32_t>(p.h)),
                                make_position_run(p.n * p.h * p.w, p.k, kVector<Element>),
                                static_cast<int>(p.k),
                                p.pool};
  launch_kernel("sm80 grad_preact", grad_preact_kernel<Element>, launch_shape(params.pixels), stream, params);
}

} // namespace vggfast::cuda::sm80
