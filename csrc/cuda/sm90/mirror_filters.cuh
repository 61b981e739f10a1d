// The filters of grad_input for TF32, whose operands wgmma takes only with the reduction along their rows: a copy with input
// channels as rows, output channels along them, taps mirrored. On it, grad_input is forward's product.
#pragma once

#include "cuda/element.cuh"
#include "cuda/fast_div.h"
#include "cuda/launch.cuh"

namespace vggfast::cuda::sm90 {

struct MirrorParams {
  const void* weight; // [K, 9, C]
  void* mirrored;     // [C, 9, K]
  int c, k;
  FastDiv tiles_c, tiles_k; // of a tap

  static constexpr int kThreads = 256, kTile = 32, kRowStep = kThreads / kTile;
};

/// One block a square of one tap, which turns in shared memory: both sides go along their rows.
template <class Element>
__global__ void __launch_bounds__(MirrorParams::kThreads) mirror_filters_kernel(const __grid_constant__ MirrorParams params) {
  using Storage = typename Element::Storage;
  constexpr int size = MirrorParams::kTile;
  struct Shared {
    Storage values[size][size + 1]; // a column falls on as many banks as it has rows
  };
  auto& shared = ptx::dynamic_shared<Shared>();
  const int squares = params.tiles_c.quotient(blockIdx.x), tap = params.tiles_k.quotient(squares);
  const int first_c = (blockIdx.x - squares * params.tiles_c.divisor()) * size;
  const int first_k = (squares - tap * params.tiles_k.divisor()) * size;
  const int column = threadIdx.x % size;
  for (int row = threadIdx.x / size; row < size; row += MirrorParams::kRowStep) {
    const int k = first_k + row, c = first_c + column;
    if (k < params.k && c < params.c) {
      shared.values[row][column] = static_cast<const Storage*>(params.weight)[(k * 9 + tap) * params.c + c];
    }
  }
  __syncthreads();
  for (int row = threadIdx.x / size; row < size; row += MirrorParams::kRowStep) {
    const int c = first_c + row, k = first_k + column;
    if (k < params.k && c < params.c) {
      static_cast<Storage*>(params.mirrored)[(c * 9 + 8 - tap) * params.k + k] = shared.values[column][row];
    }
  }
}

template <class Element>
void launch_mirror_filters(const Problem& p, const void* weight, void* mirrored, cudaStream_t stream) {
  const auto tiles = [](int64_t channels) { return (channels + MirrorParams::kTile - 1) / MirrorParams::kTile; };
  const MirrorParams params{weight,
                            mirrored,
                            static_cast<int>(p.c),
                            static_cast<int>(p.k),
                            FastDiv(static_cast<uint32_t>(tiles(p.c))),
                            FastDiv(static_cast<uint32_t>(tiles(p.k)))};
  constexpr int bytes = MirrorParams::kTile * (MirrorParams::kTile + 1) * int{sizeof(typename Element::Storage)};
  launch_kernel("sm90 mirror_filters", mirror_filters_kernel<Element>, {9 * tiles(p.c) * tiles(p.k), MirrorParams::kThreads, bytes},
                stream, params);
}

} // namespace vggfast::cuda::sm90
