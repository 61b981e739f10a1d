// A small kernel of sm_90's kind, with one bug each: what the emulator must catch, and its correct version.
// Included as CUDA kernels are: through the shim, with the access hooks.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/tensor_map.h"

namespace {

using namespace vggfast::cuda;
using sm90::kRowStep, sm90::row_descriptor, sm90::wait_phase;

enum class Bug : int {
  none,
  missing_full_wait,
  wrong_parity,
  missing_empty_wait,
  released_before_the_product,
  too_few_bytes,
  too_many_bytes,
  too_many_arrivals,
  missing_proxy_fence,
  proxy_fence_after_barrier,
  other_swizzle_in_map,
  no_swizzle_in_descriptor,
  misaligned_descriptor,
  base_offset_of_the_matrix,
  past_the_tile,
  missing_products_wait,
  accumulators_read_early,
  accumulators_written_early,
  missing_wgmma_fence,
  warp_left_out,
  lane_differs,
  missing_init_fence,
  missing_init_barrier,
  mbarrier_read,
  stage_read_without_wait,
  registers_never_freed,
  coordinate_as_element_offset,
  copy_left_in_flight,
  count,
};

constexpr int kRowElements = swizzle_row(DType::bf16);
constexpr int kRows = 64, kBlocks = 5, kStages = 2, kThreads = 384; // the third warpgroup does nothing but hold registers
constexpr int kTileRows = kRows + 8, kTileBytes = kTileRows * 128;

struct Params {
  CUtensorMap a; // [72][320], boxes of 72x64
  float* out;    // [64][64]: the sum of the boxes' rows from `shift` on
  int shift;
  Bug bug;
};

struct Shared {
  alignas(1024) unsigned char a[kStages][kTileBytes];
  alignas(1024) unsigned char identity[kRows * 128];
  sm90::StageBarriers<kStages> barriers;
};

__device__ void produce(Shared& shared, const Params& params) {
  sm90::StageCursor<kStages> at;
  const Bug bug = params.bug;
  const int blocks = bug == Bug::copy_left_in_flight ? kBlocks + 1 : kBlocks;
  for (int block = 0; block < blocks; ++block) {
    if (bug != Bug::missing_empty_wait) {
      wait_phase(shared.barriers.empty[at.stage], at.parity ^ 1u);
    }
    const int bytes = bug == Bug::too_few_bytes ? kTileBytes - 128 : bug == Bug::too_many_bytes ? kTileBytes + 128 : kTileBytes;
    ptx::mbarrier_arrive_expect_tx(&shared.barriers.full[at.stage], bytes);
    if (bug == Bug::too_many_arrivals && block == 1) {
      ptx::mbarrier_arrive(&shared.barriers.full[at.stage]);
    }
    const int column = bug == Bug::coordinate_as_element_offset ? block * 2 * kRowElements : block * kRowElements;
    ptx::tma_load_3d(shared.a[at.stage], &params.a, &shared.barriers.full[at.stage], column, 0, 0);
    at.next();
  }
}

/// B: the identity matrix by ordinary stores, in the swizzle that wgmma reads.
__device__ void write_identity(Shared& shared, Bug bug) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2 * 4;
  for (int chunk = half; chunk < half + 4; ++chunk) {
    for (int e = 0; e < 8; ++e) {
      const uint16_t one = 0x3f80;
      const int at = row * 128 + (chunk ^ (row % 8)) * 16 + 2 * e;
      *reinterpret_cast<uint16_t*>(shared.identity + at) = chunk * 8 + e == row ? one : uint16_t{0};
    }
  }
  if (bug != Bug::missing_proxy_fence && bug != Bug::proxy_fence_after_barrier) {
    ptx::fence_proxy_async();
  }
  ptx::named_barrier_sync<128>(1);
  if (bug == Bug::proxy_fence_after_barrier) {
    ptx::fence_proxy_async();
  }
}

__device__ void multiply(Shared& shared, const Params& params, float (&sums)[8][4], int stage, int block) {
  const Bug bug = params.bug;
  uint64_t a = row_descriptor(shared.a[stage] + params.shift * 128);
  if (bug == Bug::no_swizzle_in_descriptor) {
    a &= ~(uint64_t{3} << 62);
  }
  if (bug == Bug::misaligned_descriptor) {
    a += 128 >> 4;
  }
  if (bug == Bug::base_offset_of_the_matrix) {
    a |= static_cast<uint64_t>((params.shift + 1) % 8) << 49;
  }
  if (bug == Bug::past_the_tile) {
    a += kTileBytes >> 4;
  }
  if (bug != Bug::missing_wgmma_fence) {
    ptx::wgmma_fence();
  }
  const bool first = bug == Bug::lane_differs && threadIdx.x == 7 ? true : block == 0;
  for (int step = 0; step < 4; ++step) {
    if (bug == Bug::warp_left_out && block == kBlocks - 1 && step == 3 && threadIdx.x / 32 == 2) {
      break;
    }
    ptx::wgmma_bf16<64, 0, 0>(sums, a + step * kRowStep, row_descriptor(shared.identity) + step * kRowStep, !first || step > 0);
  }
  ptx::wgmma_commit();
}

__device__ void consume(Shared& shared, const Params& params) {
  const Bug bug = params.bug;
  write_identity(shared, bug);
  float sums[8][4];
  float early = 0.0f;
  sm90::StageCursor<kStages> at;
  for (int block = 0; block < kBlocks; ++block) {
    if (bug != Bug::missing_full_wait && !(bug == Bug::stage_read_without_wait && block == 0)) {
      wait_phase(shared.barriers.full[at.stage], bug == Bug::wrong_parity ? at.parity ^ 1u : at.parity);
    }
    if (bug == Bug::stage_read_without_wait) {
      early = static_cast<float>(shared.a[0][threadIdx.x]);
    }
    multiply(shared, params, sums, at.stage, block);
    if (bug == Bug::released_before_the_product && threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(&shared.barriers.empty[at.stage]);
    }
    if (bug == Bug::accumulators_read_early) {
      early += sums[1][2];
    }
    if (bug == Bug::accumulators_written_early) {
      sums[1][2] = 0.0f;
    }
    if (bug != Bug::missing_products_wait) {
      ptx::wgmma_wait<0>();
    }
    if (bug != Bug::released_before_the_product && threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(&shared.barriers.empty[at.stage]);
    }
    at.next();
  }
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  for (int j = 0; j < 8; ++j) {
    for (int e = 0; e < 4; ++e) {
      params.out[(row + e / 2 * 8) * 64 + 8 * j + threadIdx.x % 4 * 2 + e % 2] = sums[j][e] + early;
    }
  }
}

__global__ void planted_sm90_kernel(const Params params) {
  auto& shared = ptx::dynamic_shared<Shared>();
  const Bug bug = params.bug;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.barriers.full[stage], 1);
      ptx::mbarrier_init(&shared.barriers.empty[stage], 4);
    }
    if (bug != Bug::missing_init_fence) {
      ptx::fence_barrier_init();
    }
  }
  if (bug != Bug::missing_init_barrier) {
    __syncthreads();
  }
  if (bug == Bug::mbarrier_read && threadIdx.x == 3) {
    params.out[0] = static_cast<float>(shared.barriers.full[1]);
  }
  if (threadIdx.x / 128 == 1) {
    if (bug != Bug::registers_never_freed) {
      ptx::setmaxnreg_dec<40>();
    }
    if (threadIdx.x == 128) {
      produce(shared, params);
    }
  } else if (threadIdx.x / 128 == 0) {
    ptx::setmaxnreg_inc<232>();
    consume(shared, params);
  }
}

std::string message;

} // namespace

extern "C" {

int emu_planted_sm90_bugs() {
  return static_cast<int>(Bug::count);
}

const char* emu_planted_sm90(int bug, int shift, const void* a, float* out) {
  try {
    const sm90::MapDimension dimensions[] = {
        {kBlocks * kRowElements, 1, kRowElements}, {1, kBlocks * kRowElements, 1}, {kTileRows, kBlocks * kRowElements, kTileRows}};
    Params params{sm90::make_tensor_map("a", DType::bf16, a, dimensions), out, shift, static_cast<Bug>(bug)};
    if (params.bug == Bug::other_swizzle_in_map) {
      reinterpret_cast<emulator::TensorMap&>(params.a).swizzle_bytes = 64;
    }
    launch_kernel("planted sm90", planted_sm90_kernel, {1, kThreads, sizeof(Shared)}, emulator::callers_stream(0), params);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

/// A 3-dimensional map of 16-bit elements, strides in bytes: 0 where the driver would take it.
int emu_encode(uint64_t base, const uint64_t* extents, const uint64_t* strides, const uint32_t* box, int swizzle) {
  CUtensorMap map;
  const cuuint32_t steps[] = {1, 1, 1};
  return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, reinterpret_cast<void*>(base), extents, strides, box,
                                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
}
