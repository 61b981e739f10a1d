// grad_weight and grad_bias with TMA and wgmma. Rows of the product are output channels, columns input channels, the
// reduction runs over pixels: both operands lie with the reduction along their rows. A block has the three taps of a filter
// row, which share the gradient's side of a stage, and one split of the pixels; every split writes fp32 partial sums, a
// second pass adds them in order.
#pragma once

#include "cuda/sm90/consumers.cuh"
#include "cuda/sm90/grad_preact.h"

namespace vggfast::cuda::sm90 {

struct GradWeightParams {
  CUtensorMap grad;    // [N, H, W, K]
  CUtensorMap x[2][2]; // [N, H - 1 or H, W - 1 or W, C]: what a tap reads never lies beyond what its pixel allows
  float* workspace;    // [parts][K * 9 * C sums of grad_weight, then K of grad_bias]
  BoxWalk boxes;
  int stages; // boxes in all
  int stages_per_split;
  int c, k;
  int tiles_k, tiles_c;

  __device__ int64_t part_elements() const { return int64_t{9} * c * k + k; }
};

template <class ElementType, WideTile kTile>
struct WeightGemm {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  static constexpr WideTileShape shape = weight_tile_shape(kTile);
  static constexpr int kStages = shape.stages, kN = shape.block_n;
  static constexpr int kParts = weight_tile_parts(kTile);
  static constexpr int kBlockBytes = kStageDepth * kRowBytes; // 64 pixels of 64 channels
  static constexpr int kSteps = kStageDepth / 16 / kParts;    // of a warpgroup in a stage
  static_assert(shape.block_m / 64 * kParts == kConsumers);

  struct Stage {
    alignas(kPatternBytes) unsigned char grad[shape.block_m / 64][kBlockBytes];
    alignas(kPatternBytes) unsigned char x[kRowTaps][kN / 64][kBlockBytes];
  };
  static constexpr int kBiasParts = 16; // threads that share 8 channels
  struct Shared {
    Stage stages[kStages];
    float bias[kConsumers][kBiasParts][64];
    StageBarriers<kStages> barriers;
  };
  static_assert(sizeof(Shared) <= 227 * 1024);

  struct Sums {
    float values[kRowTaps][kN / 8][4];
    float bias[8]; // of this thread's channels and pixels
  };

  /// What a block works on.
  struct Item {
    int tile_k, filter_row, tile_c, split;
    int first_stage, stages;

    /// Blocks that run together work on the same pixels.
    __device__ explicit Item(const GradWeightParams& params) {
      const int rest = blockIdx.x / params.tiles_k, tiles = rest / 3;
      tile_k = blockIdx.x - rest * params.tiles_k;
      filter_row = rest - tiles * 3;
      split = tiles / params.tiles_c;
      tile_c = tiles - split * params.tiles_c;
      first_stage = split * params.stages_per_split;
      stages = min(params.stages_per_split, params.stages - first_stage);
    }
    __device__ bool sums_bias() const { return filter_row == 0 && tile_c == 0; }
  };

  static __device__ void produce(Shared& shared, const GradWeightParams& params) {
    const Item item(params);
    StageCursor<kStages> at;
    for (int i = 0; i < item.stages; ++i) {
      const BoxWalk::Pixel pixel = params.boxes.first_pixel(item.first_stage + i);
      wait_phase(shared.barriers.empty[at.stage], at.parity ^ 1u);
      ptx::Mbarrier* full = &shared.barriers.full[at.stage];
      ptx::mbarrier_arrive_expect_tx(full, sizeof(Stage));
      Stage& stage = shared.stages[at.stage];
      for (int part = 0; part < shape.block_m / 64; ++part) {
        ptx::tma_load_4d(stage.grad[part], &params.grad, full, item.tile_k * shape.block_m + part * 64, pixel.w, pixel.h, pixel.n);
      }
      const int dr = item.filter_row - 1;
      for (int tap = 0; tap < kRowTaps; ++tap) {
        const CUtensorMap* map = &params.x[dr < 0 ? 0 : 1][tap == 0 ? 0 : 1];
        for (int part = 0; part < kN / 64; ++part) {
          ptx::tma_load_4d(stage.x[tap][part], map, full, item.tile_c * kN + part * 64, pixel.w + tap - 1, pixel.h + dr, pixel.n);
        }
      }
      at.next();
    }
  }

  static __device__ __forceinline__ void multiply(float (&sums)[kN / 8][4], uint64_t grad, uint64_t x, bool accumulate) {
    if constexpr (Element::dtype == DType::bf16) {
      ptx::wgmma_bf16<kN, 1, 1>(sums, grad, x, accumulate);
    } else {
      ptx::wgmma_f16<kN, 1, 1>(sums, grad, x, accumulate);
    }
  }

  /// This warpgroup's rows of the gradient, or its pixels.
  static __device__ __forceinline__ int grad_part(int group) { return kParts == 1 ? group : 0; }
  static __device__ __forceinline__ int first_pixel(int group) { return kParts == 1 ? 0 : group * (kStageDepth / kParts); }

  static __device__ __forceinline__ void multiply_stage(Sums& sums, const Stage& stage, int group, bool accumulate) {
    const int skipped = first_pixel(group) / 16;
    const uint64_t grad = column_descriptor(stage.grad[grad_part(group)], kBlockBytes) + skipped * kColumnStep;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tap = 0; tap < kRowTaps; ++tap) {
        const uint64_t x = column_descriptor(stage.x[tap], kBlockBytes) + skipped * kColumnStep;
        multiply(sums.values[tap], grad + step * kColumnStep, x + step * kColumnStep, accumulate || step > 0);
      }
    }
    ptx::wgmma_commit();
  }

  /// Adds 8 channels of every 16th pixel, read as they lie in the swizzle.
  static __device__ __forceinline__ void add_bias(Sums& sums, const Stage& stage, int group) {
    const int chunk = threadIdx.x % 8, first = first_pixel(group) + threadIdx.x % kGroupThreads / 8;
#pragma unroll
    for (int i = 0; i < kStageDepth / kParts / kBiasParts; ++i) {
      Vector<Element> vector;
      const unsigned char* tile = stage.grad[grad_part(group)];
      vector.words = *reinterpret_cast<const uint4*>(tile + swizzle<kRowBytes>(first + i * kBiasParts, chunk));
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        sums.bias[e] += Element::load(vector.elements[e]);
      }
    }
  }

  static __device__ void consume(Shared& shared, const GradWeightParams& params) {
    const Item item(params);
    const int group = threadIdx.x / kGroupThreads;
    Sums sums;
#pragma unroll
    for (float& value : sums.bias) {
      value = 0.0f;
    }
    StageCursor<kStages> at;
    consume_stages(shared.barriers, at, item.stages, [&](int stage, bool accumulate) {
      multiply_stage(sums, shared.stages[stage], group, accumulate);
      if (item.sums_bias()) {
        add_bias(sums, shared.stages[stage], group); // while the products run
        __syncwarp();                                // one lane releases the stage for all
      }
    });
    float* part = params.workspace + (item.split * kParts + (kParts == 1 ? 0 : group)) * params.part_elements();
    const int first_k = item.tile_k * shape.block_m + (kParts == 1 ? group * 64 : 0);
    if (item.sums_bias()) {
      store_bias(sums, shared.bias[group], part + int64_t{9} * params.c * params.k + first_k, params.k - first_k);
    }
    store_sums(sums, part, params, first_k, item.tile_c * kN, item.filter_row);
  }

  static __device__ __forceinline__ void store_sums(const Sums& sums, float* part, const GradWeightParams& params, int first_k,
                                                    int first_c, int filter_row) {
    const int lane = threadIdx.x % 32, row = first_k + threadIdx.x / 32 % 4 * 16 + lane / 4, column = first_c + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = row + 8 * half;
      if (k < params.k) {
#pragma unroll
        for (int tap = 0; tap < kRowTaps; ++tap) {
          float* to = part + ((k * 9 + filter_row * 3 + tap) * params.c + column);
#pragma unroll
          for (int j = 0; j < kN / 8; ++j) {
            if (column + 8 * j < params.c) {
              const float(&v)[4] = sums.values[tap][j];
              *reinterpret_cast<float2*>(to + 8 * j) = make_float2(v[2 * half], v[2 * half + 1]);
            }
          }
        }
      }
    }
  }

  static __device__ void store_bias(const Sums& sums, float (&parts)[kBiasParts][64], float* to, int channels) {
    const int thread = threadIdx.x % kGroupThreads;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      parts[thread / 8][thread % 8 * 8 + e] = sums.bias[e];
    }
    group_barrier();
    if (thread < min(64, channels)) {
      float sum = 0.0f;
      for (int part = 0; part < kBiasParts; ++part) {
        sum += parts[part][thread];
      }
      to[thread] = sum;
    }
  }
};

template <class Element, WideTile kTile>
__global__ void __launch_bounds__(kThreads, 1) grad_weight_kernel(const __grid_constant__ GradWeightParams params) {
  using Gemm = WeightGemm<Element, kTile>;
  auto& shared = ptx::dynamic_shared<typename Gemm::Shared>();
  run_warp_specialised<Gemm>(shared, params);
}

template <class Element, WideTile kTile>
void launch_grad_weight(const Problem& p, const Plan& plan, const GradWeightPointers& pointers, cudaStream_t stream) {
  using Gemm = WeightGemm<Element, kTile>;
  const int64_t part_elements = 9 * p.c * p.k + p.k;
  void* preact = static_cast<float*>(pointers.workspace) + plan.splits * part_elements;
  const void* grad = materialise_grad_preact(p, pointers.output, preact, stream);
  const BoxWalk boxes = make_box_walk(plan.box, p.h, p.w);
  const auto map = [&](const char* name, const void* base, int64_t c, int64_t h, int64_t w) {
    return make_image_map(name, p.dtype, base, p.n, h, w, c, plan.box, p.h, p.w);
  };
  const auto x = [&](int64_t h, int64_t w) { return map("x", pointers.x, p.c, h, w); };
  const int64_t splits = plan.splits / Gemm::kParts, items = plan.tiles_m * plan.tiles_n * splits;
  const int64_t stages = plan_detail::box_count(plan.box, p.n, p.h, p.w);
  const GradWeightParams params{map("the gradient", grad, p.k, p.h, p.w),
                                {{x(p.h - 1, p.w - 1), x(p.h - 1, p.w)}, {x(p.h, p.w - 1), x(p.h, p.w)}},
                                static_cast<float*>(pointers.workspace),
                                boxes,
                                static_cast<int>(stages),
                                static_cast<int>((stages + splits - 1) / splits),
                                static_cast<int>(p.c),
                                static_cast<int>(p.k),
                                static_cast<int>(plan.tiles_m),
                                static_cast<int>(plan.tiles_n / kRowTaps)};
  const LaunchShape shape{items, kThreads, int{sizeof(typename Gemm::Shared)}};
  launch_kernel("sm90 grad_weight", grad_weight_kernel<Element, kTile>, shape, stream, params);
  sm80::reduce_splits(p, plan.splits, pointers, stream);
}

} // namespace vggfast::cuda::sm90
