// The running block: fibers, who waits for what, and the memories. Shared by the emulator's own source files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"
#include "memory.h"

namespace emulator {

enum class Wait : uint8_t { nothing, barrier, named_barrier, warp, mbarrier, finished };

/// One asynchronous copy that was issued and has not landed.
struct Copy {
  uintptr_t shared;
  uintptr_t global;
  int bytes, source_bytes;
};

/// One asynchronous product, as one lane asked for it.
struct Product {
  MmaType type;
  int columns;
  bool transposed_a, transposed_b, accumulate;
  uint64_t a, b;
  float* d;
  const void* code;
};

/// A lane's accumulators while products on them are in flight: the registers hold poison meanwhile.
struct Accumulator {
  float* registers;
  std::vector<float> values;
};

struct Thread {
  void* stack_pointer = nullptr;
  dim3 index;
  uint16_t linear = 0;
  Wait wait = Wait::nothing;
  int waits_for = 0;        // named barrier or mbarrier
  uint32_t parity = 0;      // of the mbarrier's phase
  Clock clock;              // what it knows; its own entry is its time
  bool knows_fence = false; // wgmma.fence since it last owned its accumulators
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups; // committed, oldest first
  std::vector<Accumulator> accumulators;
  std::vector<Clock> product_clocks;     // lane 0: what the warp knew at each product in flight, oldest first
  std::vector<Copy> open_group;          // issued since the last commit
  std::vector<std::vector<Copy>> groups; // committed, oldest first
};

/// Lanes that have arrived at the warp operation in progress.
struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  void* arguments[32] = {};
  uint32_t time = 1;   // of its asynchronous products
  int registers = 0;   // a thread
  size_t products = 0; // of its warpgroup's, that it has taken part in
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
};

/// {phase, pending arrivals, bytes to come}, and what those who arrived knew.
struct Mbarrier {
  uintptr_t address;
  int arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0, last_copy = 0; // the phase that tells of the last bulk copy, counted from 1
  uint16_t init_thread;
  uint32_t init_time, fence_time = 0; // of that thread: the initialisation, and its fence for the asynchronous proxy
  Clock arriving, completed;
};

/// A bulk copy that was asked for and has not landed.
struct BulkCopy {
  TensorMap map;
  int coordinates[5];
  uintptr_t shared;
  size_t barrier;
};

class Machine {
public:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr unsigned kMaxThreads = 1024, kMaxMbarriers = 32;

  static Machine& get();

  bool run(const Launch& launch);
  [[noreturn]] void fail(const std::string& what, const void* code);

  /// Stops the running fiber until wake() (or the last arrival at a barrier) makes it runnable.
  void block(Wait wait);
  void barrier();
  /// All 32 lanes meet; the last one runs `execute` on everyone's arguments.
  void warp_operation(const char* operation, void* arguments, void (*execute)(void* const* lanes));

  void named_barrier(int id, int threads, const void* code);
  void join_warp(uint32_t warp);
  void check(uintptr_t address, size_t bytes, Access access, const void* code);

  // Asynchronous copies and barriers (async.cpp), products (wgmma.cpp).
  size_t mbarrier_index(const void* barrier, const char* operation, const void* code);
  void complete_if_done(Mbarrier& barrier, const void* code);
  void start_bulk_copy(const BulkCopy& copy, const void* code);
  void land_bulk_copy(size_t which);
  void finish_products(uint32_t warp, size_t pending_groups);
  uint32_t thread_id() const { return block_number_ * thread_count_ + current_->linear; }

  GlobalMemory global;
  SharedMemory shared;
  Statistics statistics{};
  std::string failure;
  uint64_t seed = 1;
  uint32_t last_blocks = 0; // of each launch, that run; 0: all
  Gpu gpu;
  int last_error = 0;
  int device = 0;                                            // that is current
  std::map<std::pair<int, const void*>, int> allowed_shared; // of a kernel on a device

  std::vector<Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  std::vector<Clock> fences;                     // of every thread, its times at proxy fences
  std::vector<std::vector<Product>> products_of; // of every warpgroup: all warps must ask for the same
  int64_t free_registers = 0;

  Thread* current() { return current_; }
  Thread& thread(uint32_t linear) { return threads_[linear]; }
  Warp& warp(uint32_t number) { return warps_[number]; }
  uint32_t thread_count() const { return thread_count_; }
  uint16_t mbarrier_agent(size_t index) const { return static_cast<uint16_t>(thread_count_ + thread_count_ / 32 + index); }
  Actor actor() const { return {current_->linear, current_->clock, epoch_}; }
  void advance(Thread& thread) { ++thread.clock[thread.linear]; }
  void yield();
  void wake(Thread& thread);
  uint64_t random();
  const Launch& launch() const { return *launch_; }
  dim3 block_index() const { return block_; }

private:
  Machine();
  bool run_block(uint32_t number);
  void start_fibers();
  static void fiber_main();
  void finish_fiber();
  void schedule();
  void check_end_of_block();
  void report_deadlock();
  bool is_program_data(uintptr_t address) const;

  const Launch* launch_ = nullptr;
  dim3 block_;
  uint32_t block_number_ = 0, thread_count_ = 0, epoch_ = 1, unfinished_ = 0, at_barrier_ = 0;
  Thread* current_ = nullptr;
  void* host_stack_pointer_ = nullptr;
  bool failed_ = false;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  NamedBarrier named_barriers_[16];
  std::vector<uint16_t> runnable_;
  unsigned char* stacks_ = nullptr;
  std::vector<std::pair<uintptr_t, uintptr_t>> program_; // loaded segments of this library
};

/// The 128-, 64- or 32-byte swizzle of a shared-window address: what the copy engine writes with and the tensor cores read.
constexpr uint32_t swizzle_address(uint32_t address, int swizzle_bytes) {
  return address ^ (address >> 3 & static_cast<uint32_t>(swizzle_bytes - 16));
}

/// "file:line" of an instruction of this library, or its address.
std::string source_line(const void* code);

} // namespace emulator
