// grad_weight and grad_bias. Rows of the product are output channels, columns input channels of one tap, the reduction
// runs over pixels and is split over blocks: every split writes its own fp32 partial sums, a second pass adds them in
// order, so results do not depend on timing.
#pragma once

#include "cuda/grad_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/mainloop.cuh"

namespace vggfast::cuda::sm80 {

struct GradWeightParams {
  GradSource source;
  const void* x;    // [N, H, W, C]
  float* workspace; // [splits][K * 9 * C sums of grad_weight, then K of grad_bias]
  FastDiv w, h;
  int pixels; // N * H * W
  int c, k;
  int tiles_m, tiles_c;
  int stages_per_split;
  bool pool;

  __device__ int64_t split_elements() const { return int64_t{9} * c * k + k; }
};

/// Row and column of a pixel in its image, and the image.
struct PixelPlace {
  int n, h, w;

  __device__ __forceinline__ PixelPlace(const GradWeightParams& params, int pixel) {
    const int rows = params.w.quotient(pixel);
    n = params.h.quotient(rows);
    w = pixel - rows * params.w.divisor();
    h = rows - n * params.h.divisor();
  }
};

/// A: pixels along the reduction, output channels along the row, through registers. Also sums the columns for grad_bias.
template <class Gemm>
class GradColumnLoader {
public:
  using Element = typename Gemm::Element;
  static constexpr int kVectorSize = kVector<Element>;
  static constexpr int kChunks = Gemm::kRowBytesM / 16;
  static constexpr int kRowStep = Gemm::kThreads / kChunks;
  static constexpr int kRows = Gemm::kDepth / kRowStep;
  static_assert(kRows * kRowStep == Gemm::kDepth);
  /// Partial column sums of every thread row, in the stages' memory after the main loop.
  using BiasSums = float[kRowStep][Gemm::shape.block_m];
  static_assert(sizeof(BiasSums) <= Gemm::kStageBytes);

  /// `sum_bias`: whether this block's column sums are asked for; the same in all threads.
  __device__ GradColumnLoader(const GradWeightParams& params, int first_channel, bool sum_bias)
      : params_(params), channel_(first_channel + chunk() * kVectorSize), sum_bias_(sum_bias) {}

  __device__ __forceinline__ void fetch(int first_pixel) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      load(vectors_[i], first_pixel + row() + i * kRowStep);
    }
  }

  __device__ __forceinline__ void land(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Vector<Element> vector = vectors_[i].masked(params_.source);
      const int at = swizzle_transposed<Element, Gemm::kRowBytesM>(row() + i * kRowStep, chunk());
      *reinterpret_cast<uint4*>(tile + at) = vector.words;
      if (sum_bias_) {
#pragma unroll
        for (int e = 0; e < kVectorSize; ++e) {
          bias_[e] += Element::load(vector.elements[e]);
        }
      }
    }
  }

  /// The main loop's last barrier has passed. Writes the sums of this block's channels.
  __device__ void store_bias(BiasSums& sums, float* to) const {
#pragma unroll
    for (int e = 0; e < kVectorSize; ++e) {
      sums[row()][chunk() * kVectorSize + e] = bias_[e];
    }
    __syncthreads();
    const int first_channel = channel_ - chunk() * kVectorSize;
    for (int i = threadIdx.x; i < Gemm::shape.block_m && first_channel + i < params_.k; i += Gemm::kThreads) {
      float sum = 0.0f;
      for (int part = 0; part < kRowStep; ++part) {
        sum += sums[part][i];
      }
      to[first_channel + i] = sum;
    }
  }

private:
  __device__ __forceinline__ void load(GradVector<Element>& vector, int pixel) {
    bool valid = pixel < params_.pixels && channel_ < params_.k;
    int64_t source = pixel;
    int position = 0;
    if (params_.pool) {
      const PixelPlace at(params_, pixel);
      const int pools_h = params_.h.divisor() / 2, pools_w = params_.w.divisor() / 2;
      valid = valid && at.h < 2 * pools_h && at.w < 2 * pools_w;
      source = (int64_t{at.n} * pools_h + at.h / 2) * pools_w + at.w / 2;
      position = at.h % 2 * 2 + at.w % 2;
    }
    if (valid) {
      vector.load(params_.source, source * params_.k + channel_, position);
    } else {
      vector.clear();
    }
  }
  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int chunk() { return threadIdx.x % kChunks; }

  const GradWeightParams& params_;
  int channel_;
  bool sum_bias_;
  GradVector<Element> vectors_[kRows];
  float bias_[kVectorSize] = {};
};

/// B: the tap's source pixels along the reduction, input channels along the row.
template <class Gemm>
class PixelColumnLoader {
public:
  using Element = typename Gemm::Element;
  using Storage = typename Gemm::Storage;
  static constexpr int kChunks = Gemm::kRowBytesN / 16;
  static constexpr int kRowStep = Gemm::kThreads / kChunks;
  static constexpr int kRows = Gemm::kDepth / kRowStep;
  static_assert(kRows * kRowStep == Gemm::kDepth);

  __device__ PixelColumnLoader(const GradWeightParams& params, int first_channel, int tap)
      : params_(params), dr_(tap / 3 - 1), ds_(tap % 3 - 1), channel_(first_channel + chunk() * kVector<Element>) {}

  __device__ __forceinline__ void fetch(unsigned char* tile, int first_pixel) {
    const int height = params_.h.divisor(), width = params_.w.divisor();
    const Storage* x = static_cast<const Storage*>(params_.x);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x / kChunks + i * kRowStep, pixel = first_pixel + row;
      const PixelPlace at(params_, pixel);
      const int h = at.h + dr_, w = at.w + ds_;
      const bool inside = 0 <= h && h < height && 0 <= w && w < width;
      const bool valid = pixel < params_.pixels && channel_ < params_.c && inside;
      const Storage* from = valid ? x + (int64_t{pixel + dr_ * width + ds_} * params_.c + channel_) : x;
      ptx::cp_async_ca<16>(tile + swizzle_transposed<Element, Gemm::kRowBytesN>(row, chunk()), from, valid ? 16 : 0);
    }
  }

private:
  static __device__ int chunk() { return threadIdx.x % kChunks; }

  const GradWeightParams& params_;
  int dr_, ds_;
  int channel_;
};

template <class Gemm>
struct GradWeightLoader {
  GradColumnLoader<Gemm> grads;
  PixelColumnLoader<Gemm> pixels;
  int first_pixel;

  __device__ __forceinline__ void fetch(typename Gemm::Stage& stage) {
    grads.fetch(first_pixel);
    pixels.fetch(stage.b, first_pixel);
    first_pixel += Gemm::kDepth;
  }
  __device__ __forceinline__ void land(typename Gemm::Stage& stage) { grads.land(stage.a); }
};

/// Partial sums of one tap to `to`, [K, 9, C] of this split.
template <class Gemm>
__device__ __forceinline__ void store_partial(const typename Gemm::Accumulators& sums, float* to, const GradWeightParams& params,
                                              int first_row, int first_column, int tap) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Gemm::kFragmentsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = first_row + Gemm::warp_row() + 16 * i + 8 * half + lane / 4;
#pragma unroll
      for (int j = 0; j < Gemm::kFragmentsN; ++j) {
        const int c = first_column + Gemm::warp_column() + 8 * j + lane % 4 * 2;
        if (k < params.k && c < params.c) {
          const float(&v)[4] = sums.values[i][j];
          *reinterpret_cast<float2*>(to + ((k * 9 + tap) * params.c + c)) = make_float2(v[2 * half], v[2 * half + 1]);
        }
      }
    }
  }
}

template <class Element, TileId kTile>
__global__ void __launch_bounds__(tile_shape(kTile).threads(), 2)
    grad_weight_kernel(const __grid_constant__ GradWeightParams params) {
  using Tile = Gemm<Element, kTile>;
  using Loader = GradWeightLoader<Tile>;
  auto& shared = ptx::dynamic_shared<typename Tile::Shared>();

  // Blocks that run together work on the same pixels.
  const int tile_m = blockIdx.x % params.tiles_m, column_tile = blockIdx.x / params.tiles_m;
  const int tap = column_tile % 9, tile_c = column_tile / 9 % params.tiles_c, split = column_tile / 9 / params.tiles_c;
  const int first_row = tile_m * Tile::shape.block_m, first_column = tile_c * Tile::shape.block_n;
  const int all_stages = (params.pixels + Tile::kDepth - 1) / Tile::kDepth;
  const int first_stage = split * params.stages_per_split;
  const int stages = min(params.stages_per_split, all_stages - first_stage);

  const bool sum_bias = tap == 0 && tile_c == 0;
  Loader loader{{params, first_row, sum_bias}, {params, first_column, tap}, first_stage * Tile::kDepth};
  typename Tile::Accumulators sums;
  Tile::clear(sums);
  mainloop<Tile, Order::transposed, Order::transposed>(sums, shared, loader, stages);

  float* partial = params.workspace + split * params.split_elements();
  store_partial<Tile>(sums, partial, params, first_row, first_column, tap);
  if (sum_bias) {
    auto& bias_sums = reinterpret_cast<typename decltype(loader.grads)::BiasSums&>(shared.finished);
    loader.grads.store_bias(bias_sums, partial + int64_t{9} * params.c * params.k);
  }
}

struct ReduceParams {
  const float* workspace;
  void* grad_weight;
  void* grad_bias; // or null
  int splits;
  int64_t weight_elements, bias_elements; // both multiples of 4
};

/// Second pass: adds the splits' partial sums in order, four elements a thread.
template <class Element>
__global__ void reduce_splits_kernel(const __grid_constant__ ReduceParams params) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;
  const int64_t elements = params.weight_elements + params.bias_elements;
  const bool bias = at >= params.weight_elements;
  if (at >= elements || (bias && params.grad_bias == nullptr)) {
    return;
  }
  float sums[4] = {};
  for (int split = 0; split < params.splits; ++split) {
    const float4 part = *reinterpret_cast<const float4*>(params.workspace + split * elements + at);
    sums[0] += part.x;
    sums[1] += part.y;
    sums[2] += part.z;
    sums[3] += part.w;
  }
  auto* to = static_cast<typename Element::Storage*>(bias ? params.grad_bias : params.grad_weight);
  to += bias ? at - params.weight_elements : at;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    to[e] = Element::round(sums[e]);
  }
}

template <class Element>
void launch_reduce_splits(const Problem& p, int splits, const GradWeightPointers& pointers, cudaStream_t stream) {
  constexpr int threads = 256;
  const ReduceParams params{
      static_cast<const float*>(pointers.workspace), pointers.grad_weight, pointers.grad_bias, splits, int64_t{9} * p.c * p.k, p.k};
  const int64_t vectors = (params.weight_elements + params.bias_elements) / 4;
  launch_kernel("sm80 grad_weight reduction", reduce_splits_kernel<Element>, {(vectors + threads - 1) / threads, threads, 0},
                stream, params);
}

template <class Element, TileId kTile>
void launch_grad_weight(const Problem& p, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  using Tile = Gemm<Element, kTile>;
  const auto pixels = static_cast<int>(p.n * p.h * p.w);
  const int all_stages = (pixels + Tile::kDepth - 1) / Tile::kDepth;
  const GradWeightParams params{make_grad_source(p, pointers.output),
                                pointers.x,
                                static_cast<float*>(pointers.workspace),
                                FastDiv(static_cast<uint32_t>(p.w)),
                                FastDiv(static_cast<uint32_t>(p.h)),
                                pixels,
                                static_cast<int>(p.c),
                                static_cast<int>(p.k),
                                static_cast<int>(plan.tiles_m),
                                static_cast<int>(plan.tiles_n / 9),
                                (all_stages + plan.splits - 1) / plan.splits,
                                p.pool};
  const LaunchShape shape{plan.tiles_m * plan.tiles_n * plan.splits, Tile::kThreads, int{sizeof(typename Tile::Shared)}};
  launch_kernel("sm80 grad_weight", grad_weight_kernel<Element, kTile>, shape, stream, params);
  launch_reduce_splits<Element>(p, plan.splits, pointers, stream);
}

} // namespace vggfast::cuda::sm80
