// Division by a launch constant as one multiplication and one shift.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vggfast::cuda {

/// Quotient of 0 <= n < 2^31 by 1 <= divisor < 2^31 (Granlund and Montgomery 1994, 31-bit dividends).
class FastDiv {
public:
  __host__ __device__ FastDiv() : FastDiv(1) {}
  __host__ __device__ explicit FastDiv(uint32_t divisor) : divisor_(divisor), multiplier_(0), shift_(0) {
    if (divisor == 1) {
      return;
    }
    int log2_up = 0;
    while ((uint64_t{1} << log2_up) < divisor) {
      ++log2_up;
    }
    const int power = 31 + log2_up;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << power) + divisor - 1) / divisor);
    shift_ = power - 32;
  }

  __device__ int quotient(int n) const {
    return divisor_ == 1 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), multiplier_) >> shift_);
  }
  __device__ int divisor() const { return static_cast<int>(divisor_); }

private:
  uint32_t divisor_;
  uint32_t multiplier_;
  int shift_;
};

} // namespace vggfast::cuda
