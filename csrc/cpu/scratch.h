// Memory for one job on one thread. It is kept between calls, because fresh pages cost more than the smaller layers' arithmetic.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

namespace vggfast::cpu {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

inline float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> kept;
  thread_local int64_t size = 0;
  if (floats > size) {
    kept.reset();
    size = 0;
    kept.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!kept) throw std::bad_alloc();
    size = floats;
  }
  return kept.get();
}

} // namespace vggfast::cpu
