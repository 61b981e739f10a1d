#include "machine.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>

#if !defined(__x86_64__) || !defined(__linux__)
#  error "the CUDA emulator switches fibers with x86-64 Linux code; write switch_stack for this machine"
#endif

// Saves the callee-saved registers on the running stack, stores its pointer in *rdi, and continues on stack rsi.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulator {

namespace {

int collect_segments(dl_phdr_info* info, size_t, void* into) {
  auto& segments = *static_cast<std::vector<std::pair<uintptr_t, uintptr_t>>*>(into);
  Dl_info self{};
  dladdr(reinterpret_cast<void*>(&collect_segments), &self);
  if (info->dlpi_addr != reinterpret_cast<uintptr_t>(self.dli_fbase)) {
    return 0;
  }
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_LOAD) {
      const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      segments.emplace_back(begin, begin + info->dlpi_phdr[i].p_memsz);
    }
  }
  return 1;
}

std::string name(dim3 at) {
  std::ostringstream text;
  text << '(' << at.x << ", " << at.y << ", " << at.z << ')';
  return text.str();
}

} // namespace

std::string source_line(const void* code) {
  Dl_info where{};
  std::ostringstream text;
  if (code == nullptr || dladdr(code, &where) == 0) {
    return "an unknown line";
  }
  // A return address belongs to the line after the call.
  const auto offset = reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(where.dli_fbase) - 1;
  text << "addr2line -i -e '" << where.dli_fname << "' 0x" << std::hex << offset << " 2>/dev/null";
  std::string innermost;
  if (FILE* pipe = popen(text.str().c_str(), "r")) {
    // One line per inlined caller, innermost first: the kernel's own line is the first that is not of a PTX twin.
    char line[512];
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      line[std::strcspn(line, " \n")] = 0;
      const char* csrc = std::strstr(line, "csrc/");
      if (innermost.empty() || csrc != nullptr) innermost = csrc != nullptr ? csrc : line;
      if (csrc != nullptr) break;
    }
    pclose(pipe);
  }
  if (!innermost.empty() && innermost[0] != '?') return innermost;
  std::ostringstream address;
  address << "offset 0x" << std::hex << offset;
  return address.str();
}

Machine& Machine::get() {
  static Machine machine;
  return machine;
}

Machine::Machine() {
  void* range =
      mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) {
    std::perror("cuda emulator: reserving fiber stacks");
    std::abort();
  }
  stacks_ = static_cast<unsigned char*>(range);
  dl_iterate_phdr(&collect_segments, &program_);
}

uint64_t Machine::random() { // splitmix64
  uint64_t z = seed += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

bool Machine::run(const Launch& launch) {
  failure.clear();
  failed_ = false;
  launch_ = &launch;
  thread_count_ = launch.block.x * launch.block.y * launch.block.z;
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || thread_count_ == 0 || thread_count_ % 32 != 0 ||
      thread_count_ > kMaxThreads) {
    failure = "launch refused: grid " + name(launch.grid) + " of blocks " + name(launch.block) +
              " (whole warps, at most 1024 threads, no empty grid)";
    return false;
  }
  const auto allowed = allowed_shared.find({device, launch.kernel});
  if (launch.shared_bytes > static_cast<size_t>(allowed == allowed_shared.end() ? 48 * 1024 : allowed->second)) {
    failure = "launch refused: more dynamic shared memory than cudaFuncSetAttribute allowed on this device";
    return false;
  }
  if (launch.stream != callers_stream(device)) {
    failure = "launch refused: not on the caller's stream, or another device than the stream's is current";
    return false;
  }
  global.begin_launch();
  const uint32_t blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  std::vector<uint32_t> order(last_blocks == 0 ? blocks : std::min(blocks, last_blocks));
  std::iota(order.begin(), order.end(), blocks - static_cast<uint32_t>(order.size()));
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[random() % i]);
  }
  return std::all_of(order.begin(), order.end(), [&](uint32_t number) { return run_block(number); });
}

bool Machine::run_block(uint32_t number) {
  block_number_ = number;
  block_ = dim3(number % launch_->grid.x, number / launch_->grid.x % launch_->grid.y, number / launch_->grid.x / launch_->grid.y);
  epoch_ = 1;
  unfinished_ = thread_count_;
  at_barrier_ = 0;
  shared.begin_block(launch_->shared_bytes, thread_count_);
  start_fibers();
  const size_t next = random() % runnable_.size();
  current_ = &threads_[runnable_[next]];
  runnable_[next] = runnable_.back();
  runnable_.pop_back();
  emulator_switch_stack(&host_stack_pointer_, current_->stack_pointer);
  current_ = nullptr;
  return !failed_;
}

void Machine::start_fibers() {
  threads_.assign(thread_count_, Thread{});
  warps_.assign(thread_count_ / 32, Warp{});
  std::fill(std::begin(named_barriers_), std::end(named_barriers_), NamedBarrier{});
  mbarriers.clear();
  bulk_copies.clear();
  fences.assign(thread_count_, {});
  products_of.assign((thread_count_ + 127) / 128, {});
  const int registers = std::min(255, static_cast<int>(65536 / thread_count_)) / 8 * 8; // what __launch_bounds__ leaves
  free_registers = 65536 - int64_t{registers} * thread_count_;
  for (Warp& entry : warps_) {
    entry.registers = registers;
  }
  runnable_.resize(thread_count_);
  std::iota(runnable_.begin(), runnable_.end(), uint16_t{0});
  for (uint32_t i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    thread.linear = static_cast<uint16_t>(i);
    thread.clock.assign(thread_count_ + thread_count_ / 32 + kMaxMbarriers, 0);
    thread.clock[i] = 1;
    thread.index = dim3(i % launch_->block.x, i / launch_->block.x % launch_->block.y, i / launch_->block.x / launch_->block.y);
    // Six callee-saved registers, then the address to return to; the stack is 16-byte aligned at the entry's call.
    auto** top = reinterpret_cast<void**>(stacks_ + (i + 1) * kStackBytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Machine::fiber_main);
    for (int saved = 0; saved < 6; ++saved) {
      *--top = nullptr;
    }
    thread.stack_pointer = top;
  }
}

void Machine::fiber_main() {
  Machine& machine = get();
  machine.launch_->call(machine.launch_->closure);
  machine.finish_fiber();
}

void Machine::finish_fiber() {
  if (!current_->open_group.empty() || !current_->groups.empty()) {
    fail("the thread ends with asynchronous copies it never waited for", nullptr);
  }
  if (!current_->open_products.empty() || !current_->product_groups.empty()) {
    fail("the thread ends with asynchronous products it never waited for", nullptr);
  }
  --unfinished_;
  current_->wait = Wait::finished;
  schedule();
}

void Machine::fail(const std::string& what, const void* code) {
  std::ostringstream text;
  text << what;
  if (code != nullptr) {
    text << " at " << source_line(code);
  }
  text << ", block " << name(block_) << ", thread " << name(current_->index);
  failure = text.str();
  failed_ = true;
  void* abandoned;
  emulator_switch_stack(&abandoned, host_stack_pointer_);
  std::abort();
}

/// Leaves the running fiber, which is waiting or finished, for a random runnable one, or for the host.
void Machine::schedule() {
  Thread* from = current_;
  if (unfinished_ == 0) {
    check_end_of_block();
  }
  // Bulk copies land at any time, at the latest when nothing else can happen.
  while (!bulk_copies.empty() && (runnable_.empty() || random() % 4 == 0)) {
    land_bulk_copy(random() % bulk_copies.size());
  }
  if (runnable_.empty()) {
    if (unfinished_ > 0) {
      report_deadlock();
    }
    emulator_switch_stack(&from->stack_pointer, host_stack_pointer_);
    return;
  }
  const size_t next = random() % runnable_.size();
  current_ = &threads_[runnable_[next]];
  runnable_[next] = runnable_.back();
  runnable_.pop_back();
  if (current_ != from) {
    emulator_switch_stack(&from->stack_pointer, current_->stack_pointer);
  }
}

void Machine::check_end_of_block() {
  if (!bulk_copies.empty()) {
    fail("the block ends with bulk copies in flight", nullptr);
  }
  for (size_t i = 0; i < mbarriers.size(); ++i) {
    const auto knows = [&](const Thread& thread) { return thread.clock[mbarrier_agent(i)] >= mbarriers[i].last_copy; };
    if (std::none_of(threads_.begin(), threads_.end(), knows)) {
      fail("the block ends with bulk copies that nobody waited for", nullptr);
    }
  }
  for (uint32_t warp = 0; warp < warps_.size(); ++warp) {
    if (warps_[warp].products != products_of[warp / 4].size()) {
      fail("wgmma: a warp of the warpgroup did not take part in all products", nullptr);
    }
    if (warps_[warp].registers != warps_[warp / 4 * 4].registers) {
      fail("setmaxnreg: the warps of a warpgroup ask for different numbers", nullptr);
    }
  }
}

void Machine::report_deadlock() {
  std::ostringstream text;
  int barrier = 0, warp = 0, mbarrier = 0;
  for (const Thread& thread : threads_) {
    barrier += thread.wait == Wait::barrier || thread.wait == Wait::named_barrier;
    warp += thread.wait == Wait::warp;
    mbarrier += thread.wait == Wait::mbarrier;
  }
  text << "deadlock: " << barrier << " threads wait at a barrier, " << warp << " in a warp operation, ";
  if (mbarrier > 0) {
    text << mbarrier << " for a phase of an mbarrier, ";
  }
  text << threads_.size() - unfinished_ << " have ended";
  for (const Mbarrier& entry : mbarriers) {
    if (entry.pending < entry.arrivals || entry.bytes != 0) {
      text << "; mbarrier " << &entry - mbarriers.data() << " in phase " << entry.phase << " lacks " << entry.pending << " of "
           << entry.arrivals << " arrivals and " << entry.bytes << " bytes";
    }
  }
  for (const Warp& entry : warps_) {
    if (entry.arrived > 0) {
      text << "; " << entry.arrived << " of 32 lanes arrived at " << entry.operation;
    }
  }
  fail(text.str(), nullptr);
}

void Machine::block(Wait wait) {
  current_->wait = wait;
  schedule();
}

void Machine::yield() {
  runnable_.push_back(current_->linear);
  schedule();
}

void Machine::wake(Thread& thread) {
  thread.wait = Wait::nothing;
  runnable_.push_back(thread.linear);
}

void Machine::warp_operation(const char* operation, void* arguments, void (*execute)(void* const* lanes)) {
  Warp& warp = warps_[current_->linear / 32];
  if (warp.arrived > 0 && std::strcmp(warp.operation, operation) != 0) {
    fail(std::string("diverged warp: one lane at ") + operation + " while others wait at " + warp.operation, nullptr);
  }
  warp.operation = operation;
  warp.arguments[current_->linear % 32] = arguments;
  if (++warp.arrived < 32) {
    block(Wait::warp);
    return;
  }
  execute(warp.arguments);
  warp.arrived = 0;
  const uint16_t first = current_->linear / 32 * 32;
  for (uint16_t lane = first; lane < first + 32; ++lane) {
    if (threads_[lane].wait == Wait::warp) {
      wake(threads_[lane]);
    }
  }
}

bool Machine::is_program_data(uintptr_t address) const {
  const auto closure = reinterpret_cast<uintptr_t>(launch_->closure);
  if (address >= closure && address < closure + launch_->closure_bytes) {
    return true;
  }
  return std::any_of(program_.begin(), program_.end(),
                     [&](const auto& segment) { return address >= segment.first && address < segment.second; });
}

void Machine::check(uintptr_t address, size_t bytes, Access access, const void* code) {
  if (current_ == nullptr || address - reinterpret_cast<uintptr_t>(stacks_) < kStackBytes * kMaxThreads) {
    return;
  }
  ++statistics.accesses;
  const char* wrong = nullptr;
  const char* memory = "shared";
  if (shared.contains(address)) {
    wrong = shared.check(address, bytes, access, actor());
  } else if (global.contains(address)) {
    memory = "global";
    wrong = global.check(address, bytes, access, thread_id());
  } else if (!is_program_data(address)) {
    memory = "unallocated";
    wrong = "out of bounds";
  }
  if (wrong != nullptr) {
    std::ostringstream text;
    text << (access == Access::read ? "read" : "write") << " of " << bytes << " bytes of " << memory << " memory: " << wrong;
    fail(text.str(), code);
  }
}

} // namespace emulator
