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
  if (host_too && address - base_ >= kReserved) {
    return misaligned(address, bytes) ? "misaligned" : nullptr;
  }
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

SharedMemory::SharedMemory()
    : reserved_(reserve(kReserved)), base_(reserved_ + kOffset), state_(kCapacity), chunks_(kCapacity / kChunk + 1) {}

SharedMemory::~SharedMemory() {
  munmap(reinterpret_cast<void*>(reserved_), kReserved);
}

void SharedMemory::begin_block(size_t bytes, uint32_t threads) {
  bytes_ = bytes;
  threads_ = threads;
  std::memset(base(), 0xff, bytes);
  std::fill_n(state_.begin(), bytes, Byte{0, 0, 0, 0, State::uninitialised});
  if (chunks_used_) {
    std::fill(chunks_.begin(), chunks_.end(), Chunk{Chunk::Last::ordinary, true, 0, 0, {}});
    chunks_used_ = false;
  }
}

bool SharedMemory::read_by_others(const Chunk& chunk, const Clock& clock) const {
  for (uint32_t warp = 0; warp < threads_ / 32; ++warp) {
    if (chunk.warp_reads[warp] > clock[threads_ + warp]) {
      return true;
    }
  }
  return false;
}

const char* SharedMemory::check_chunk(Chunk& chunk, Access access, const Actor& actor) const {
  if (chunk.last == Chunk::Last::in_flight) {
    return "in flight: the copy engine is writing it";
  }
  if (chunk.last == Chunk::Last::landed && chunk.time > actor.clock[chunk.agent]) {
    return "in flight: the mbarrier of the bulk copy into it was not waited for";
  }
  if (access == Access::write) {
    if (read_by_others(chunk, actor.clock)) {
      return "race: asynchronous products read it since the last barrier";
    }
    chunk.last = Chunk::Last::ordinary;
  }
  chunk.ordinary_access = true;
  return nullptr;
}

const char* SharedMemory::check_byte(Byte& byte, Access access, const Actor& actor) {
  if (byte.state == State::in_flight) {
    return "in flight: an asynchronous copy into it was not waited for";
  }
  if (byte.state == State::barrier) {
    return "an mbarrier: only its own instructions may touch it";
  }
  if (byte.writer != actor.thread && byte.write_time > actor.clock[byte.writer]) {
    return "race: another thread wrote it since the last barrier";
  }
  const bool several = byte.read_time != 0 && byte.reader == kSeveral;
  const bool concurrent_reads = several                       ? byte.read_time == actor.epoch
                                : byte.reader == actor.thread ? false
                                                              : byte.read_time > actor.clock[byte.reader];
  if (access == Access::read) {
    if (byte.state == State::uninitialised) {
      return "uninitialised";
    }
    byte.reader = concurrent_reads ? kSeveral : actor.thread;
    byte.read_time = concurrent_reads ? actor.epoch : actor.clock[actor.thread];
    return nullptr;
  }
  if (concurrent_reads) {
    return "race: another thread reads it since the last barrier";
  }
  byte.state = State::written;
  byte.writer = actor.thread;
  byte.write_time = actor.clock[actor.thread];
  return nullptr;
}

const char* SharedMemory::check(uintptr_t address, size_t bytes, Access access, const Actor& actor) {
  if (!inside(address, bytes)) {
    return "out of bounds";
  }
  if (misaligned(address, bytes)) {
    return "misaligned";
  }
  const size_t first = address - base_;
  for (size_t at = first; at < first + bytes; ++at) {
    if (chunks_used_ && (at == first || at % kChunk == 0)) {
      if (const char* wrong = check_chunk(chunks_[at / kChunk], access, actor)) {
        return wrong;
      }
    }
    if (const char* wrong = check_byte(state_[at], access, actor)) {
      return wrong;
    }
  }
  return nullptr;
}

const char* SharedMemory::begin_copy(uintptr_t address, size_t bytes, const Actor& actor) {
  if (const char* wrong = check(address, bytes, Access::write, actor)) {
    return wrong;
  }
  std::memset(reinterpret_cast<void*>(address), 0xff, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    state_[address - base_ + i].state = State::in_flight;
  }
  return nullptr;
}

void SharedMemory::land_copy(uintptr_t address, size_t bytes, const Actor& actor) {
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = state_[address - base_ + i];
    byte.state = State::written;
    byte.writer = actor.thread;
    byte.write_time = actor.clock[actor.thread];
  }
}

const char* SharedMemory::claim_barrier(uintptr_t address, const Actor& actor) {
  if (const char* wrong = check(address, 8, Access::write, actor)) {
    return wrong;
  }
  for (size_t i = 0; i < 8; ++i) {
    state_[address - base_ + i].state = State::barrier;
  }
  return nullptr;
}

const char* SharedMemory::begin_bulk_write(uintptr_t address, const Actor& actor) {
  chunks_used_ = true;
  Chunk& chunk = chunks_[(address - base_) / kChunk];
  if (chunk.last == Chunk::Last::in_flight) {
    return "in flight: another bulk copy is writing it";
  }
  if (read_by_others(chunk, actor.clock)) {
    return "race: asynchronous products read it since the last barrier";
  }
  if (chunk.last == Chunk::Last::landed && chunk.time > actor.clock[chunk.agent]) {
    return "race: nobody who released it has waited for the bulk copy before";
  }
  if (chunk.ordinary_access) {
    for (size_t i = 0; i < kChunk; ++i) {
      Byte& byte = state_[address - base_ + i];
      if (const char* wrong = check_byte(byte, Access::write, actor)) {
        return wrong;
      }
      byte = {0, 0, 0, 0, State::written};
    }
    chunk.ordinary_access = false;
  }
  chunk.last = Chunk::Last::in_flight;
  std::memset(reinterpret_cast<void*>(address), 0xff, kChunk);
  return nullptr;
}

void SharedMemory::land_bulk_write(uintptr_t address, uint16_t agent, uint32_t time) {
  Chunk& chunk = chunks_[(address - base_) / kChunk];
  chunk.last = Chunk::Last::landed;
  chunk.agent = agent;
  chunk.time = time;
}

const char* SharedMemory::async_read(uintptr_t address, uint32_t warp, uint32_t time, const Clock& clock,
                                     const std::vector<Clock>& fences) {
  chunks_used_ = true;
  Chunk& chunk = chunks_[(address - base_) / kChunk];
  if (chunk.last == Chunk::Last::in_flight) {
    return "in flight: the copy engine is writing it";
  }
  if (chunk.last == Chunk::Last::landed && chunk.time > clock[chunk.agent]) {
    return "in flight: its mbarrier was not waited for before the product, or it was filled again too early";
  }
  for (size_t i = 0; chunk.last == Chunk::Last::ordinary && i < kChunk; ++i) {
    const Byte& byte = state_[address - base_ + i];
    if (byte.state != State::written) {
      return byte.state == State::uninitialised ? "uninitialised" : "in flight, or an mbarrier";
    }
    if (byte.write_time > clock[byte.writer]) {
      return "race: another thread wrote it since the last barrier";
    }
    const Clock& own = fences[byte.writer];
    const auto fence = std::lower_bound(own.begin(), own.end(), byte.write_time);
    if (fence == own.end() || *fence >= clock[byte.writer]) {
      return "dirty: written by ordinary stores that no fence.proxy.async and barrier made visible";
    }
  }
  chunk.warp_reads[warp] = time;
  return nullptr;
}

} // namespace emulator
