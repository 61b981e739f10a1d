// The running block: fibers, who waits for what, and the memories. Shared by the emulator's own source files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"
#include "memory.h"

namespace emulator {

enum class Wait : uint8_t { nothing, barrier, warp, finished };

/// One asynchronous copy that was issued and has not landed.
struct Copy {
  uintptr_t shared;
  uintptr_t global;
  int bytes, source_bytes;
};

struct Thread {
  void* stack_pointer = nullptr;
  dim3 index;
  uint16_t linear = 0;
  Wait wait = Wait::nothing;
  std::vector<Copy> open_group;          // issued since the last commit
  std::vector<std::vector<Copy>> groups; // committed, oldest first
};

/// Lanes that have arrived at the warp operation in progress.
struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  void* arguments[32] = {};
};

class Machine {
public:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr unsigned kMaxThreads = 1024;

  static Machine& get();

  bool run(const Launch& launch);
  [[noreturn]] void fail(const std::string& what, const void* code);

  /// Stops the running fiber until wake() (or the last arrival at a barrier) makes it runnable.
  void block(Wait wait);
  void barrier();
  /// All 32 lanes meet; the last one runs `execute` on everyone's arguments.
  void warp_operation(const char* operation, void* arguments, void (*execute)(void* const* lanes));

  void check(uintptr_t address, size_t bytes, Access access, const void* code);
  uint32_t thread_id() const { return block_number_ * thread_count_ + current_->linear; }

  GlobalMemory global;
  SharedMemory shared;
  Statistics statistics{};
  std::string failure;
  uint64_t seed = 1;
  uint32_t last_blocks = 0; // of each launch, that run; 0: all
  std::vector<std::pair<const void*, int>> allowed_shared;

  Thread* current() { return current_; }
  const Launch& launch() const { return *launch_; }
  dim3 block_index() const { return block_; }
  uint32_t epoch() const { return epoch_; }

private:
  Machine();
  bool run_block(uint32_t number);
  void start_fibers();
  static void fiber_main();
  void finish_fiber();
  void schedule();
  void report_deadlock();
  uint64_t random();
  bool is_program_data(uintptr_t address) const;

  const Launch* launch_ = nullptr;
  dim3 block_;
  uint32_t block_number_ = 0, thread_count_ = 0, epoch_ = 1, unfinished_ = 0, at_barrier_ = 0;
  Thread* current_ = nullptr;
  void* host_stack_pointer_ = nullptr;
  bool failed_ = false;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<uint16_t> runnable_;
  unsigned char* stacks_ = nullptr;
  std::vector<std::pair<uintptr_t, uintptr_t>> program_; // loaded segments of this library
};

/// "file:line" of an instruction of this library, or its address.
std::string source_line(const void* code);

} // namespace emulator
