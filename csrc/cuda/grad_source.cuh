// The gradient of the convolution's own output, made on the fly from what arrives at the fused op's output: ReLU lets it
// through where !(y <= 0), the pool only at the position that its argmax names.
#pragma once

#include "cuda/element.cuh"

namespace vggfast::cuda {

struct GradSource {
  const void* grad;      // [pixels or pools, K]
  const void* y;         // the same shape; null without ReLU
  const uint8_t* argmax; // [pools, K / 4]; null without pool
};

inline GradSource make_grad_source(const Problem& p, const GradOutput& output) {
  return {output.grad, p.relu ? output.y : nullptr, p.pool ? output.argmax : nullptr};
}

/// One 16-byte vector of it on its way: loaded early, masked when it is needed.
template <class Element>
class GradVector {
  using Storage = typename Element::Storage;
  static constexpr int kSize = kVector<Element>;

public:
  /// `offset` in elements; `position` 2 dh + dw of the pixel in its pool (unused without pool).
  __device__ __forceinline__ void load(const GradSource& source, int64_t offset, int position) {
    difference_ = 0;
    grad_.words = *reinterpret_cast<const uint4*>(static_cast<const Storage*>(source.grad) + offset);
    if (source.y != nullptr) {
      y_.words = *reinterpret_cast<const uint4*>(static_cast<const Storage*>(source.y) + offset);
    }
    if (source.argmax != nullptr) {
      // Two bits of difference per channel, zero where the pool took this pixel.
      constexpr uint32_t every_channel = kSize == 8 ? 0x5555u : 0x55u;
      difference_ = load_argmax(source.argmax + offset / 4) ^ (every_channel * static_cast<uint32_t>(position));
    }
  }
  __device__ __forceinline__ void clear() {
    grad_.words = make_uint4(0, 0, 0, 0);
    difference_ = 0;
  }
  /// What passes ReLU and pool.
  __device__ __forceinline__ Vector<Element> masked(const GradSource& source) const {
    Vector<Element> out = grad_;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const bool dead = source.y != nullptr && Element::load(y_.elements[e]) <= 0.0f;
      const bool elsewhere = source.argmax != nullptr && (difference_ >> (2 * e) & 3u) != 0;
      out.elements[e] = dead || elsewhere ? Storage{} : out.elements[e];
    }
    return out;
  }

private:
  static __device__ __forceinline__ uint32_t load_argmax(const uint8_t* at) {
    if constexpr (kSize == 8) {
      return *reinterpret_cast<const uint16_t*>(at);
    } else {
      return *at;
    }
  }

  Vector<Element> grad_, y_;
  uint32_t difference_;
};

} // namespace vggfast::cuda
