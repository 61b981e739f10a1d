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

}  // namespace

GlobalMemory::GlobalMemory() : base_(reserve(kReserved)), next_(base_ + kGap) {}

GlobalMemory::~GlobalMemory() { munmap(reinterpret_cast<void*>(base_), kReserved); }

void* GlobalMemory::allocate(size_t bytes, bool read_only) {
    const uintptr_t begin = next_;
    if (begin + bytes + kGap > base_ + kReserved) {
        return nullptr;
    }
    next_ = (begin + bytes + kGap + 255) / 256 * 256;
    allocations_.push_back({begin, bytes, read_only, std::vector<uint32_t>(bytes, kUninitialised)});
    std::memset(reinterpret_cast<void*>(begin), 0xff, bytes);
    return reinterpret_cast<void*>(begin);
}

void GlobalMemory::upload(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    Allocation* allocation = find(reinterpret_cast<uintptr_t>(to));
    const size_t offset = reinterpret_cast<uintptr_t>(to) - allocation->begin;
    std::fill_n(allocation->state.begin() + static_cast<ptrdiff_t>(offset), bytes, kReadable);
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
        for (uint32_t& state : allocation.state) {
            state = std::min(state, kReadable);
        }
    }
}

GlobalMemory::Allocation* GlobalMemory::find(uintptr_t address) {
    for (Allocation& allocation : allocations_) {
        if (address >= allocation.begin && address < allocation.begin + allocation.bytes) {
            return &allocation;
        }
    }
    return nullptr;
}

const char* GlobalMemory::check(uintptr_t address, size_t bytes, Access access, uint32_t thread) {
    Allocation* allocation = find(address);
    if (allocation == nullptr || address + bytes > allocation->begin + allocation->bytes) {
        return "out of bounds";
    }
    if (misaligned(address, bytes)) {
        return "misaligned";
    }
    uint32_t* state = allocation->state.data() + (address - allocation->begin);
    for (size_t i = 0; i < bytes; ++i) {
        if (access == Access::read) {
            if (state[i] == kUninitialised) {
                return "uninitialised";
            }
            if (state[i] != kReadable && state[i] != thread + kFirstThread) {
                return "race: written by another thread in this launch";
            }
            continue;
        }
        if (allocation->read_only) {
            return "read-only";
        }
        if (state[i] >= kFirstThread && state[i] != thread + kFirstThread) {
            return "race: another thread wrote it in this launch";
        }
        state[i] = thread + kFirstThread;
    }
    return nullptr;
}

size_t GlobalMemory::uninitialised_bytes(const void* of) const {
    for (const Allocation& allocation : allocations_) {
        if (allocation.begin == reinterpret_cast<uintptr_t>(of)) {
            return static_cast<size_t>(std::count(allocation.state.begin(), allocation.state.end(), kUninitialised));
        }
    }
    return 0;
}

SharedMemory::SharedMemory() : reserved_(reserve(kReserved)), base_(reserved_ + kOffset), state_(kCapacity) {}

SharedMemory::~SharedMemory() { munmap(reinterpret_cast<void*>(reserved_), kReserved); }

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

}  // namespace emulator
