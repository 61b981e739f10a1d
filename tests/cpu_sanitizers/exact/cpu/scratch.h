// In place of csrc/cpu/scratch.h, whose memory is kept between jobs and rounded up to pages of 2 MB: here each job's is of exactly
// the size asked for, between the sanitizer's red zones, and holds NaN.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace vggfast::cpu {

inline float* scratch(int64_t floats) {
  struct Memory {
    void* data = nullptr;
    ~Memory() { free(data); }
  };
  thread_local Memory kept;
  free(kept.data);
  kept.data = nullptr;
  if (posix_memalign(&kept.data, 64, floats * sizeof(float))) abort();
  memset(kept.data, 0xff, floats * sizeof(float));
  return static_cast<float*>(kept.data);
}

} // namespace vggfast::cpu
