// The emulated memories: global allocations with guard gaps, and one block's shared memory with a record per byte of who
// touched it when. Each check returns null, or what is wrong with the access.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

enum class Access { read, write };

/// Global memory: a reserved range in which allocations lie far apart, so that a stray index falls in a gap.
class GlobalMemory {
public:
  GlobalMemory();
  ~GlobalMemory();
  /// Poisoned (every byte 0xff) and uninitialised until written or uploaded to; inputs read as zero until uploaded to,
  /// and take up memory only where they were.
  void* allocate(size_t bytes, bool input);
  void release_all();

  bool contains(uintptr_t address) const { return address - base_ < kReserved; }
  /// Between launches everything written becomes plainly readable.
  void begin_launch();
  const char* check(uintptr_t address, size_t bytes, Access access, uint32_t thread);
  /// In `bytes` of an output from `address` on.
  size_t uninitialised_bytes(uintptr_t address, size_t bytes) const;

private:
  static constexpr size_t kReserved = size_t{1} << 35, kGap = size_t{1} << 24, kPage = 4096;
  static constexpr uint32_t kUninitialised = 0, kReadable = 1, kFirstThread = 2;
  /// Per byte of an output: uninitialised, readable, or the thread of this launch that wrote it.
  using Page = std::array<uint32_t, kPage>;
  struct Allocation {
    uintptr_t begin;
    size_t bytes;
    bool input;
    std::vector<std::unique_ptr<Page>> pages; // of outputs, made when first written to
  };
  const Allocation* find(uintptr_t address) const;
  const char* check_output(const Allocation& allocation, size_t offset, Access access, uint32_t thread);

  uintptr_t base_, next_;
  std::vector<Allocation> allocations_;
};

/// Shared memory of the running block. Only barriers order threads: two accesses of one byte by different threads
/// between the same two barriers, one of them a write, are a race.
class SharedMemory {
public:
  static constexpr size_t kCapacity = 227 * 1024;

  SharedMemory();
  ~SharedMemory();
  void begin_block(size_t bytes);
  void* base() const { return reinterpret_cast<void*>(base_); }
  bool contains(uintptr_t address) const { return address - reserved_ < kReserved; }
  const char* check(uintptr_t address, size_t bytes, Access access, uint16_t thread, uint32_t epoch);
  /// The bytes belong to an asynchronous copy from now on, and to `thread` at `epoch` once landed.
  const char* begin_copy(uintptr_t address, size_t bytes, uint16_t thread, uint32_t epoch);
  void land_copy(uintptr_t address, size_t bytes, uint16_t thread, uint32_t epoch);

private:
  static constexpr size_t kReserved = size_t{1} << 28, kOffset = size_t{1} << 27;
  static constexpr uint16_t kSeveral = 0xffff;
  enum class State : uint8_t { uninitialised, written, in_flight };
  struct Byte {
    uint32_t write_epoch, read_epoch; // 0: never
    uint16_t writer, reader;
    State state;
  };
  const char* check_byte(Byte& byte, Access access, uint16_t thread, uint32_t epoch);

  uintptr_t reserved_, base_;
  size_t bytes_ = 0;
  std::vector<Byte> state_;
};

} // namespace emulator
