// What kernels call: indices, barriers, warp collectives, asynchronous copies, tensor-core products.
#include <cmath>
#include <cstring>

#include "machine.h"

namespace emulator {

namespace {

uint16_t half_word(uint32_t word, int half) {
  return static_cast<uint16_t>(word >> (16 * half));
}

float element(MmaType type, uint32_t word, int half) {
  uint32_t bits;
  float value;
  if (type == MmaType::f16) {
    _Float16 narrow;
    const uint16_t raw = half_word(word, half);
    std::memcpy(&narrow, &raw, 2);
    return static_cast<float>(narrow);
  }
  // TF32 operands lose their low 13 bits in hardware.
  bits = type == MmaType::bf16 ? static_cast<uint32_t>(half_word(word, half)) << 16 : word & 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Shuffle {
  uint32_t value;
  int lane_mask;
  uint32_t result;
};

void execute_shuffle(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& own = *static_cast<Shuffle*>(lanes[lane]);
    own.result = static_cast<Shuffle*>(lanes[lane ^ own.lane_mask])->value;
  }
}

struct LdMatrix {
  const unsigned char* row;
  uint32_t* matrices;
};

void count_conflicts(void* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows_on_banks[8] = {};
    for (int row = 0; row < 8; ++row) {
      const auto address = reinterpret_cast<uintptr_t>(static_cast<LdMatrix*>(lanes[8 * matrix + row])->row);
      Machine::get().statistics.ldmatrix_conflicts += rows_on_banks[address / 16 % 8]++ > 0;
    }
  }
}

template <bool kTransposed>
void execute_ldmatrix(void* const* lanes) {
  count_conflicts(lanes);
  ++Machine::get().statistics.ldmatrix;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], static_cast<LdMatrix*>(lanes[8 * matrix + row])->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = kTransposed ? elements[minor][major] : elements[major][minor];
      const uint32_t high = kTransposed ? elements[minor + 1][major] : elements[major][minor + 1];
      static_cast<LdMatrix*>(lanes[lane])->matrices[matrix] = high << 16 | low;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

/// Fragment layouts of the PTX manual: with g = lane / 4 and t = lane % 4, register r of A holds row g + 8 (r % 2) and
/// columns from (t + 4 (r / 2)) * width on, register r of B column g and rows from (t + 4 r) * width on.
template <MmaType kType>
void execute_mma(void* const* lanes) {
  constexpr int width = kType == MmaType::tf32 ? 1 : 2, depth = 8 * width;
  ++Machine::get().statistics.mma;
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < width; ++half) {
      for (int r = 0; r < 4; ++r) {
        a[g + 8 * (r % 2)][(t + 4 * (r / 2)) * width + half] = element(kType, own.a[r], half);
      }
      for (int r = 0; r < 2; ++r) {
        b[(t + 4 * r) * width + half][g] = element(kType, own.b[r], half);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& own = *static_cast<Mma*>(lanes[lane]);
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
      float sum = own.d[e];
      for (int k = 0; k < depth; ++k) {
        sum += a[row][k] * b[k][column];
      }
      own.d[e] = sum;
    }
  }
}

void land(const std::vector<Copy>& group) {
  Machine& machine = Machine::get();
  for (const Copy& copy : group) {
    auto* to = reinterpret_cast<unsigned char*>(copy.shared);
    std::memset(to, 0, static_cast<size_t>(copy.bytes));
    std::memcpy(to, reinterpret_cast<const void*>(copy.global), static_cast<size_t>(copy.source_bytes));
    machine.shared.land_copy(copy.shared, static_cast<size_t>(copy.bytes), machine.actor());
  }
}

} // namespace

bool run(const Launch& launch) {
  return Machine::get().run(launch);
}
const char* failure() {
  return Machine::get().failure.c_str();
}

int& last_error() {
  return Machine::get().last_error;
}

Gpu& gpu() {
  return Machine::get().gpu;
}

int& current_device() {
  return Machine::get().device;
}

bool allow_shared(const void* kernel, int bytes) {
  Machine& machine = Machine::get();
  if (bytes < 0 || static_cast<size_t>(bytes) > SharedMemory::kCapacity) {
    machine.failure = "cudaFuncSetAttribute: more shared memory than any GPU has";
    return false;
  }
  machine.allowed_shared[{machine.device, kernel}] = bytes;
  return true;
}

dim3 thread_index() {
  return Machine::get().current()->index;
}
dim3 block_index() {
  return Machine::get().block_index();
}
dim3 block_dim() {
  return Machine::get().launch().block;
}
dim3 grid_dim() {
  return Machine::get().launch().grid;
}
void* dynamic_shared() {
  return Machine::get().shared.base();
}
void block_barrier() {
  Machine::get().barrier();
}
Statistics statistics() {
  return Machine::get().statistics;
}

void named_barrier(int id, int threads) {
  Machine::get().named_barrier(id, threads, __builtin_return_address(0));
}

void warp_barrier(unsigned mask) {
  Machine& machine = Machine::get();
  if (mask != 0xffffffffu) {
    machine.fail("__syncwarp: only whole warps are emulated", __builtin_return_address(0));
  }
  machine.warp_operation("__syncwarp", nullptr, [](void* const*) {
    Machine& running = Machine::get();
    running.join_warp(running.current()->linear / 32u);
  });
}

uint32_t shuffle_xor(unsigned mask, uint32_t value, int lane_mask) {
  Machine& machine = Machine::get();
  if (mask != 0xffffffffu || lane_mask < 0 || lane_mask > 31) {
    machine.fail("shfl: only whole warps are emulated, lane masks 0 to 31", __builtin_return_address(0));
  }
  Shuffle own{value, lane_mask, 0};
  machine.warp_operation("shfl", &own, &execute_shuffle);
  return own.result;
}

void ldmatrix_x4(uint32_t* matrices, const void* row, bool transposed) {
  Machine& machine = Machine::get();
  machine.check(reinterpret_cast<uintptr_t>(row), 16, Access::read, __builtin_return_address(0));
  if (!machine.shared.contains(reinterpret_cast<uintptr_t>(row))) {
    machine.fail("ldmatrix outside shared memory", __builtin_return_address(0));
  }
  LdMatrix own{static_cast<const unsigned char*>(row), matrices};
  machine.warp_operation(transposed ? "ldmatrix.trans" : "ldmatrix", &own,
                         transposed ? &execute_ldmatrix<true> : &execute_ldmatrix<false>);
}

void mma(MmaType type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Mma own{d, a, {b0, b1}};
  void (*const execute[])(void* const*) = {&execute_mma<MmaType::bf16>, &execute_mma<MmaType::f16>, &execute_mma<MmaType::tf32>};
  const char* const names[] = {"mma bf16", "mma f16", "mma tf32"};
  Machine::get().warp_operation(names[static_cast<int>(type)], &own, execute[static_cast<int>(type)]);
}

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  Machine& machine = Machine::get();
  const void* code = __builtin_return_address(0);
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (source_bytes < 0 || source_bytes > bytes) {
    machine.fail("cp.async: source size outside 0 to the copy's size", code);
  }
  if (from % static_cast<uintptr_t>(bytes) != 0 || !machine.shared.contains(to)) {
    machine.fail("cp.async: misaligned source, or a destination outside shared memory", code);
  }
  if (source_bytes > 0) {
    machine.check(from, static_cast<size_t>(source_bytes), Access::read, code);
  }
  ++machine.statistics.cp_async;
  const auto size = static_cast<size_t>(bytes);
  if (const char* wrong = machine.shared.begin_copy(to, size, machine.actor())) {
    machine.fail(std::string("cp.async into shared memory: ") + wrong, code);
  }
  machine.current()->open_group.push_back({to, from, bytes, source_bytes});
}

void cp_async_commit() {
  Thread& thread = *Machine::get().current();
  thread.groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}

void cp_async_wait(int pending) {
  auto& groups = Machine::get().current()->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    land(groups.front());
    groups.erase(groups.begin());
  }
}

} // namespace emulator
