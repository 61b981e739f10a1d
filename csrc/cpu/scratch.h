// Memory that a thread keeps between calls, because fresh pages cost more than the smaller layers' arithmetic, and in huge pages,
// because Winograd walks 36 places of it at once, more than small pages' address translations are kept for.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace vggfast::cpu {

class Memory {
public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  // At least `floats` floats, aligned for every vector and cache line; their values are whatever was left there.
  float* reserve(int64_t floats) {
    if (floats <= size_) return data_;
    constexpr int64_t huge_page = 2 << 20;
    const int64_t bytes = floats * int64_t(sizeof(float)), page = bytes >= huge_page / 2 ? huge_page : 64;
    const int64_t rounded = (bytes + page - 1) / page * page;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<float*>(std::aligned_alloc(page, rounded));
    if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == huge_page) madvise(data_, rounded, MADV_HUGEPAGE); // a wish; failure changes nothing
#endif
    size_ = rounded / int64_t(sizeof(float));
    return data_;
  }

private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// For one job on one thread.
inline float* scratch(int64_t floats) {
  thread_local Memory kept;
  return kept.reserve(floats);
}

// For one call, shared by its jobs; the calling thread keeps it up to a size that VGG's layers need.
class Workspace {
public:
  explicit Workspace(int64_t floats) {
    constexpr int64_t most = 32 << 20;
    thread_local Memory kept;
    data_ = floats <= most ? kept.reserve(floats) : own_.reserve(floats);
  }
  float* data() const { return data_; }

private:
  Memory own_;
  float* data_;
};

} // namespace vggfast::cpu
