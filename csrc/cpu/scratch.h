// Memory that a thread keeps between calls, because fresh pages cost more than the smaller layers' arithmetic, and in huge pages,
// because Winograd walks 36 places of it at once, more than small pages' address translations are kept for.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "huge_pages.h"

namespace vggfast::cpu {

class Memory {
public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { release(); }

  // At least `floats` floats, aligned for every vector and cache line; their values are whatever was left there.
  float* reserve(int64_t floats) {
    if (floats <= size_) return data_;
    release();
    // Fresh from the system, not from malloc: what malloc hands out again already has its small pages.
    const int64_t rounded = (floats * int64_t(sizeof(float)) + huge_page - 1) / huge_page * huge_page;
    mapped_ = rounded + huge_page;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) {
      base_ = nullptr;
      throw std::runtime_error(out_of_memory);
    }
    data_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(base_) + huge_page - 1) / huge_page * huge_page);
    wish_huge_pages(data_, rounded);
    size_ = rounded / int64_t(sizeof(float));
    return data_;
  }

private:
  void release() {
    if (base_) munmap(base_, mapped_);
    base_ = nullptr, data_ = nullptr, size_ = 0;
  }

  void* base_ = nullptr;
  size_t mapped_ = 0;
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
