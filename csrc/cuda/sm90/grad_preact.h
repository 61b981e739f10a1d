// The gradient of the convolution's own output as a tensor, which is what the copy engine can read. Host only.
#pragma once

#include "cuda/sm80/launch.h"

namespace vggfast::cuda::sm90 {

/// [N, H, W, K]: in `workspace`, or what arrives where there is neither ReLU nor pool.
inline const void* materialise_grad_preact(const Problem& p, const GradOutput& output, void* workspace, cudaStream_t stream) {
  if (!p.relu && !p.pool) {
    return output.grad;
  }
  sm80::grad_preact(p, {output, workspace}, stream);
  return workspace;
}

} // namespace vggfast::cuda::sm90
