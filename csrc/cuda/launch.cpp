#include "cuda/launch.cuh"

#include <mutex>
#include <set>
#include <utility>

namespace vggfast::cuda {

void allow_shared_memory(const void* kernel, int bytes, const char* name) {
  constexpr int always_allowed = 48 * 1024;
  if (bytes <= always_allowed) {
    return;
  }
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) == 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
    allowed.insert({kernel, device});
  }
}

} // namespace vggfast::cuda
