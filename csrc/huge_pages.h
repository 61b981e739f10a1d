// Fresh memory is cleared by the system a page at a time, at a cost like that of the arithmetic on it: huge pages make that one
// step instead of 512. A wish: where the system grants none, nothing changes.
#pragma once
#include <sys/mman.h>

#include <cstdint>

namespace vggfast {

inline constexpr int64_t huge_page = 2 << 20;
inline constexpr const char* out_of_memory = "DefaultCPUAllocator: can't allocate memory."; // as torch says it

/// For the huge pages that lie wholly within these bytes.
inline void wish_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge_page * huge_page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

} // namespace vggfast
