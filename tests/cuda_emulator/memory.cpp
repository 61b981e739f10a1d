#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {

namespace {

uintptr_t reserve(size_t bytes) {
  void* range = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) {
    std::perror("cuda emulator: reserving address space");
    std::abort();
  }
  return reinterpret_cast<uintptr_t>(range);
}

bool misaligned(uintptr_t address, size_t bytes) {
  const bool power_of_two = (bytes & (bytes - 1)) == 0;
  return power_of_two && bytes <= 16 && address % bytes != 0;
}

} // namespace

GlobalMemory::GlobalMemory() : base_(reserve(kReserved)), next_(base_ + kGap) {}

GlobalMemory::~GlobalMemory() {
  munmap(reinterpret_cast<void*>(base_), kReserved);
}

void* GlobalMemory::allocate(size_t bytes, bool input) {
  const uintptr_t begin = next_;
  if (begin + bytes + kGap > base_ + kReserved) {
    return nullptr;
  }
  next_ = (begin + bytes + kGap + 255) / 256 * 256;
  allocations_.push_back({begin, bytes, input, {}});
  if (!input) {
    allocations_.back().pages.resize((bytes + kPage - 1) / kPage);
  }
  return reinterpret_cast<void*>(begin);
}

void GlobalMemory::release_all() {
  if (!allocations_.empty()) {
    madvise(reinterpret_cast<void*>(base_), next_ - base_, MADV_DONTNEED);
  }
  allocations_.clear();
  next_ = base_ + kGap;
}

void GlobalMemory::begin_launch() {
  for (Allocation& allocation : allocations_) {
    for (auto& page : allocation.pages) {
      if (page != nullptr) {
        std::transform(page->begin(), page->end(), page->begin(), [](uint32_t s) { return std::min(s, kReadable); });
      }
    }
  }
}

const GlobalMemory::Allocation* GlobalMemory::find(uintptr_t address) const {
  for (const Allocation& allocation : allocations_) {
    if (address >= allocation.begin && address < allocation.begin + allocation.bytes) {
      return &allocation;
    }
  }
  return nullptr;
}

const char* GlobalMemory::check_output(const Allocation& allocation, size_t offset, Access access, uint32_t thread) {
  auto& page = const_cast<std::unique_ptr<Page>&>(allocation.pages[offset / kPage]);
  if (page == nullptr) {
    if (access == Access::read) {
      return "uninitialised";
    }
    page = std::make_unique<Page>();
    const size_t begin = offset / kPage * kPage;
    std::memset(reinterpret_cast<void*>(allocation.begin + begin), 0xff, std::min(kPage, allocation.bytes - begin));
  }
  uint32_t& state = (*page)[offset % kPage];
  const bool foreign = state >= kFirstThread && state != thread + kFirstThread;
  if (access == Access::read) {
    return state == kUninitialised ? "uninitialised" : foreign ? "race: written by another thread in this launch" : nullptr;
  }
  state = thread + kFirstThread;
  return foreign ? "race: another thread wrote it in this launch" : nullptr;
}

const char* GlobalMemory::check(uintptr_t address, size_t bytes, Access access, uint32_t thread) {
  const Allocation* allocation = find(address);
  if (allocation == nullptr || address + bytes > allocation->begin + allocation->bytes) {
    return "out of bounds";
  }
  if (misaligned(address, bytes)) {
    return "misaligned";
  }
  if (allocation->input) {
    return access == Access::read ? nullptr : "read-only";
  }
  for (size_t i = 0; i < bytes; ++i) {
    if (const char* wrong = check_output(*allocation, address + i - allocation->begin, access, thread)) {
      return wrong;
    }
  }
  return nullptr;
}

size_t GlobalMemory::uninitialised_bytes(uintptr_t address, size_t bytes) const {
  const Allocation* allocation = find(address);
  if (allocation == nullptr) {
    return bytes;
  }
  size_t count = 0;
  for (size_t offset = address - allocation->begin, end = offset + bytes; offset < end; ++offset) {
    const auto& page = allocation->pages[offset / kPage];
    count += page == nullptr || (*page)[offset % kPage] == kUninitialised;
  }
  return count;
}

SharedMemory::SharedMemory() : reserved_(reserve(kReserved)), base_(reserved_ + kOffset), state_(kCapacity) {}

SharedMemory::~SharedMemory() {
  munmap(reinterpret_cast<void*>(reserved_), kReserved);
}

void SharedMemory::begin_block(size_t bytes) {
  bytes_ = bytes;
  std::memset(base(), 0xff, bytes);
  std::fill_n(state_.begin(), bytes, Byte{0, 0, 0, 0, State::uninitialised});
}

const char* SharedMemory::check_byte(Byte& byte, Access access, uint16_t thread, uint32_t epoch) {
  if (byte.state == State::in_flight) {
    return "in flight: an asynchronous copy into it was not waited for";
  }
  if (byte.write_epoch == epoch && byte.writer != thread) {
    return "race: another thread wrote it since the last barrier";
  }
  if (access == Access::read) {
    if (byte.state == State::uninitialised) {
      return "uninitialised";
    }
    byte.reader = byte.read_epoch == epoch && byte.reader != thread ? kSeveral : thread;
    byte.read_epoch = epoch;
    return nullptr;
  }
  if (byte.read_epoch == epoch && byte.reader != thread) {
    return "race: another thread reads it since the last barrier";
  }
  byte.state = State::written;
  byte.writer = thread;
  byte.write_epoch = epoch;
  return nullptr;
}

const char* SharedMemory::check(uintptr_t address, size_t bytes, Access access, uint16_t thread, uint32_t epoch) {
  if (address < base_ || address + bytes > base_ + bytes_) {
    return "out of bounds";
  }
  if (misaligned(address, bytes)) {
    return "misaligned";
  }
  Byte* state = state_.data() + (address - base_);
  for (size_t i = 0; i < bytes; ++i) {
    if (const char* wrong = check_byte(state[i], access, thread, epoch)) {
      return wrong;
    }
  }
  return nullptr;
}

const char* SharedMemory::begin_copy(uintptr_t address, size_t bytes, uint16_t thread, uint32_t epoch) {
  if (const char* wrong = check(address, bytes, Access::write, thread, epoch)) {
    return wrong;
  }
  std::memset(reinterpret_cast<void*>(address), 0xff, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    state_[address - base_ + i].state = State::in_flight;
  }
  return nullptr;
}

void SharedMemory::land_copy(uintptr_t address, size_t bytes, uint16_t thread, uint32_t epoch) {
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = state_[address - base_ + i];
    byte.state = State::written;
    byte.writer = thread;
    byte.write_epoch = epoch;
  }
}

} // namespace emulator
