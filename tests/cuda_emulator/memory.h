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

  /// Kernels use the host's memory too, of which only the alignment is known.
  bool host_too = false;
  bool contains(uintptr_t address) const { return host_too || address - base_ < kReserved; }
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

/// What a thread knows of others: per agent (thread, warp of asynchronous products, mbarrier), how far that agent had come
/// when the thread last learnt of it through a barrier. An access is ordered before another if its time is known there.
using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& from);

/// Who makes an ordinary access, and what it knows.
struct Actor {
  uint16_t thread;
  const Clock& clock;
  uint32_t epoch; // barriers of the whole block so far
};

/// Shared memory of the running block. Two accesses of one byte by different threads, one of them a write, that no barrier
/// of any kind orders are a race. The asynchronous proxy (copy engine, tensor cores) has its own record per 16 bytes.
class SharedMemory {
public:
  static constexpr size_t kCapacity = 227 * 1024, kChunk = 16;

  SharedMemory();
  ~SharedMemory();
  void begin_block(size_t bytes, uint32_t threads);
  void* base() const { return reinterpret_cast<void*>(base_); }
  bool contains(uintptr_t address) const { return address - reserved_ < kReserved; }
  bool inside(uintptr_t address, size_t bytes) const { return base_ <= address && address + bytes <= base_ + bytes_; }

  const char* check(uintptr_t address, size_t bytes, Access access, const Actor& actor);
  /// cp.async: the bytes belong to an asynchronous copy from now on, and to the actor once landed.
  const char* begin_copy(uintptr_t address, size_t bytes, const Actor& actor);
  void land_copy(uintptr_t address, size_t bytes, const Actor& actor);
  /// From now on only mbarrier instructions may touch these 8 bytes.
  const char* claim_barrier(uintptr_t address, const Actor& actor);

  /// The copy engine, told to by the actor, begins to write one chunk; it ends. Whoever knows `time` of `agent` may read.
  const char* begin_bulk_write(uintptr_t address, const Actor& actor);
  void land_bulk_write(uintptr_t address, uint16_t agent, uint32_t time);
  /// The tensor cores read one chunk for a warp whose own time is `time` and which knew `clock` when it asked for it.
  /// `fences`: of every thread, its own times at its proxy fences.
  const char* async_read(uintptr_t address, uint32_t warp, uint32_t time, const Clock& clock, const std::vector<Clock>& fences);

private:
  static constexpr size_t kReserved = size_t{1} << 28, kOffset = size_t{1} << 27;
  static constexpr uint16_t kSeveral = 0xffff;
  static constexpr uint32_t kMaxWarps = 32;
  enum class State : uint8_t { uninitialised, written, in_flight, barrier };
  struct Byte {
    uint32_t write_time, read_time; // of the writer and the reader, for several readers the epoch; 0: never
    uint16_t writer, reader;
    State state;
  };
  struct Chunk {
    enum class Last : uint8_t { ordinary, in_flight, landed } last; // the last write
    bool ordinary_access;                                           // since the last bulk write began
    uint16_t agent;                                                 // whose `time` tells that it has landed
    uint32_t time;
    uint32_t warp_reads[kMaxWarps]; // the warps' times of their asynchronous reads; 0: never
  };
  const char* check_chunk(Chunk& chunk, Access access, const Actor& actor) const;
  const char* check_byte(Byte& byte, Access access, const Actor& actor);
  bool read_by_others(const Chunk& chunk, const Clock& clock) const;

  uintptr_t reserved_, base_;
  size_t bytes_ = 0;
  uint32_t threads_ = 0;
  bool chunks_used_ = true; // by the asynchronous proxy, in this block or the one before
  std::vector<Byte> state_;
  std::vector<Chunk> chunks_;
};

} // namespace emulator
