// mbarriers, the copy engine, tensor maps and register allocation of sm_90.
#include <algorithm>
#include <cstring>

#include <cuda.h>

#include "machine.h"

namespace emulator {

namespace {

constexpr uint32_t kWindow = 1024; // where a block's own shared memory begins: the system takes the first KiB

bool passes(const Mbarrier& barrier, uint32_t parity) {
  return (barrier.phase & 1u) != parity;
}

const TensorMap& tensor_map(const void* map, const void* code) {
  const auto& decoded = *static_cast<const TensorMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || decoded.magic != TensorMap::kMagic) {
    Machine::get().fail("bulk copy: expected a tensor map at a 64-byte boundary, as cuTensorMapEncodeTiled wrote it", code);
  }
  return decoded;
}

/// Every 16 bytes of a box: source (null outside the tensor) and destination.
template <class Visit>
void for_chunks(const BulkCopy& copy, Visit visit) {
  const TensorMap& map = copy.map;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; ++i) {
    rows *= map.box[i];
  }
  const uint32_t first = shared_address(reinterpret_cast<const void*>(copy.shared));
  for (uint32_t row = 0; row < rows; ++row) {
    const unsigned char* from = map.base;
    bool inside = true;
    for (uint32_t i = 1, rest = row; i < map.rank; ++i) {
      const int64_t at = copy.coordinates[i] + int64_t{rest % map.box[i]};
      rest /= map.box[i];
      inside = inside && 0 <= at && at < static_cast<int64_t>(map.extents[i]);
      from += at * static_cast<int64_t>(map.strides[i]);
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += SharedMemory::kChunk) {
      const int64_t column = copy.coordinates[0] + int64_t{byte} / map.element_bytes;
      const int64_t left = (static_cast<int64_t>(map.extents[0]) - column) * map.element_bytes;
      const bool any = inside && 0 <= column && left > 0;
      const uint32_t to = swizzle_address(first + row * row_bytes + byte, map.swizzle_bytes);
      visit(any ? from + column * map.element_bytes : nullptr, std::min<int64_t>(left, SharedMemory::kChunk),
            copy.shared + (to - first));
    }
  }
}

/// Of fp32 words: to the nearest TF32. Which of two equally near ones the hardware takes is not documented; here it is the one
/// away from zero, as cvt.rna. Infinities and NaN keep their upper bits.
void round_to_tf32(uintptr_t words, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 4) {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const void*>(words + at), 4);
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    word = (finite ? word + 0x1000u : word) & 0xffffe000u;
    std::memcpy(reinterpret_cast<void*>(words + at), &word, 4);
  }
}

int64_t box_bytes(const TensorMap& map) {
  int64_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) {
    bytes *= map.box[i];
  }
  return bytes;
}

} // namespace

uint32_t shared_address(const void* pointer) {
  Machine& machine = Machine::get();
  const auto offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(machine.shared.base());
  return static_cast<uint32_t>(offset) + kWindow;
}

size_t Machine::mbarrier_index(const void* barrier, const char* operation, const void* code) {
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  for (size_t i = 0; i < mbarriers.size(); ++i) {
    if (mbarriers[i].address == address) {
      if (current_->clock[mbarriers[i].init_thread] < mbarriers[i].init_time) {
        fail(std::string(operation) + ": no barrier orders it after the mbarrier's initialisation", code);
      }
      return i;
    }
  }
  fail(std::string(operation) + ": no mbarrier was initialised there", code);
}

void Machine::complete_if_done(Mbarrier& barrier, const void* code) {
  if (barrier.pending > 0) {
    return;
  }
  if (barrier.bytes < 0) {
    fail("mbarrier: more bytes landed than the phase expected", code);
  }
  if (barrier.bytes > 0) {
    return;
  }
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  join(barrier.completed, barrier.arriving);
  const auto index = static_cast<size_t>(&barrier - mbarriers.data());
  barrier.completed[mbarrier_agent(index)] = barrier.phase;
  for (Thread& thread : threads_) {
    if (thread.wait == Wait::mbarrier && static_cast<size_t>(thread.waits_for) == index && passes(barrier, thread.parity)) {
      wake(thread);
    }
  }
}

void mbarrier_init(void* barrier, int arrivals) {
  Machine& machine = Machine::get();
  const void* code = __builtin_return_address(0);
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  if (arrivals < 1 || arrivals >= 1 << 20 || address % 8 != 0 || machine.mbarriers.size() == Machine::kMaxMbarriers) {
    machine.fail("mbarrier.init: expected 1 to 2^20 - 1 arrivals, an 8-byte boundary, at most 32 mbarriers", code);
  }
  if (const char* wrong = machine.shared.claim_barrier(address, machine.actor())) {
    machine.fail(std::string("mbarrier.init: ") + wrong, code);
  }
  Thread& thread = *machine.current();
  Mbarrier entry{};
  entry.address = address;
  entry.arrivals = entry.pending = arrivals;
  entry.init_thread = thread.linear;
  entry.init_time = thread.clock[thread.linear];
  machine.mbarriers.push_back(entry);
}

void fence_barrier_init() {
  Machine& machine = Machine::get();
  Thread& thread = *machine.current();
  for (Mbarrier& barrier : machine.mbarriers) {
    if (barrier.init_thread == thread.linear && barrier.fence_time == 0) {
      barrier.fence_time = thread.clock[thread.linear];
    }
  }
  machine.advance(thread);
}

void fence_proxy_async() {
  Machine& machine = Machine::get();
  Thread& thread = *machine.current();
  machine.fences[thread.linear].push_back(thread.clock[thread.linear]);
  machine.advance(thread);
}

void mbarrier_arrive(void* at, int expected_bytes) {
  Machine& machine = Machine::get();
  const void* code = __builtin_return_address(0);
  Mbarrier& barrier = machine.mbarriers[machine.mbarrier_index(at, "mbarrier.arrive", code)];
  Thread& thread = *machine.current();
  if (--barrier.pending < 0) {
    machine.fail("mbarrier.arrive: more arrivals than the phase takes", code);
  }
  barrier.bytes += expected_bytes;
  join(barrier.arriving, thread.clock);
  machine.advance(thread);
  machine.complete_if_done(barrier, code);
}

bool mbarrier_try_wait_parity(void* at, uint32_t parity) {
  Machine& machine = Machine::get();
  const void* code = __builtin_return_address(0);
  const size_t index = machine.mbarrier_index(at, "mbarrier.try_wait", code);
  if (parity > 1) {
    machine.fail("mbarrier.try_wait: expected parity 0 or 1", code);
  }
  if (machine.random() % 8 == 0) { // the hardware may give up at any time
    machine.yield();
    return false;
  }
  Thread& thread = *machine.current();
  if (!passes(machine.mbarriers[index], parity)) {
    thread.waits_for = static_cast<int>(index);
    thread.parity = parity;
    machine.block(Wait::mbarrier);
  }
  const Mbarrier& barrier = machine.mbarriers[index];
  if (!passes(barrier, parity)) {
    return false;
  }
  if (!barrier.completed.empty()) {
    join(thread.clock, barrier.completed);
  }
  return true;
}

void tma_load(void* shared, const void* map, void* at, const int* coordinates, int rank) {
  Machine& machine = Machine::get();
  const void* code = __builtin_return_address(0);
  BulkCopy copy{
      tensor_map(map, code), {}, reinterpret_cast<uintptr_t>(shared), machine.mbarrier_index(at, "cp.async.bulk.tensor", code)};
  if (copy.map.rank != rank) {
    machine.fail("cp.async.bulk.tensor: the tensor map has another number of dimensions", code);
  }
  if (copy.shared % 128 != 0 || !machine.shared.inside(copy.shared, static_cast<size_t>(box_bytes(copy.map)))) {
    machine.fail("cp.async.bulk.tensor: expected a destination in shared memory at a 128-byte boundary", code);
  }
  const Mbarrier& barrier = machine.mbarriers[copy.barrier];
  if (barrier.fence_time == 0 || machine.current()->clock[barrier.init_thread] <= barrier.fence_time) {
    machine.fail("cp.async.bulk.tensor: no fence.mbarrier_init and barrier made the mbarrier visible to the copy engine", code);
  }
  std::copy_n(coordinates, rank, copy.coordinates);
  ++machine.statistics.tma_boxes;
  for_chunks(copy, [&](const unsigned char*, int64_t, uintptr_t to) {
    if (const char* wrong = machine.shared.begin_bulk_write(to, machine.actor())) {
      machine.fail(std::string("cp.async.bulk.tensor into shared memory: ") + wrong, code);
    }
  });
  machine.bulk_copies.push_back(copy);
}

void Machine::land_bulk_copy(size_t which) {
  const BulkCopy copy = bulk_copies[which];
  bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(which));
  Mbarrier& barrier = mbarriers[copy.barrier];
  for_chunks(copy, [&](const unsigned char* from, int64_t bytes, uintptr_t to) {
    std::memset(reinterpret_cast<void*>(to), 0, SharedMemory::kChunk);
    if (from != nullptr) {
      if (const char* wrong =
              global.check(reinterpret_cast<uintptr_t>(from), static_cast<size_t>(bytes), Access::read, thread_id())) {
        fail(std::string("cp.async.bulk.tensor from global memory: ") + wrong, nullptr);
      }
      std::memcpy(reinterpret_cast<void*>(to), from, static_cast<size_t>(bytes));
      if (copy.map.rounds_to_tf32) {
        round_to_tf32(to, static_cast<size_t>(bytes));
      }
    }
    shared.land_bulk_write(to, mbarrier_agent(copy.barrier), barrier.phase + 1);
  });
  barrier.bytes -= box_bytes(copy.map);
  barrier.last_copy = barrier.phase + 1;
  complete_if_done(barrier, nullptr);
}

void prefetch_tensormap(const void* map) {
  tensor_map(map, __builtin_return_address(0));
}

void set_max_registers(int registers, bool increase) {
  Machine& machine = Machine::get();
  const void* code = __builtin_return_address(0);
  Warp& warp = machine.warp(machine.current()->linear / 32u);
  if (registers % 8 != 0 || registers < 24 || registers > 256) {
    machine.fail("setmaxnreg: expected a multiple of 8 from 24 to 256", code);
  }
  machine.warp_operation(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", nullptr, [](void* const*) {});
  if (warp.registers != registers && (warp.registers < registers) != increase) {
    machine.fail("setmaxnreg: inc to fewer registers, or dec to more", code);
  }
  // The first lane to run moves the warp's registers, when there are any.
  for (int tries = 0; warp.registers != registers; ++tries) {
    const int64_t wanted = 32 * (registers - warp.registers);
    if (wanted <= machine.free_registers) {
      machine.free_registers -= wanted;
      warp.registers = registers;
      machine.statistics.registers_moved += static_cast<uint64_t>(wanted < 0 ? -wanted : wanted);
    } else if (tries == 1000) {
      machine.fail("setmaxnreg.inc: waits for registers that nobody gives back", code);
    } else {
      machine.yield();
    }
  }
}

} // namespace emulator

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

/// Refuses what the driver's documentation says it refuses, and what the twins do not know.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* extents,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill fill) {
  emulator::TensorMap decoded{};
  decoded.base = static_cast<const unsigned char*>(base);
  decoded.rank = static_cast<uint8_t>(rank);
  const bool fp32 = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  decoded.element_bytes = fp32 ? 4 : 2;
  decoded.rounds_to_tf32 = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  decoded.swizzle_bytes = static_cast<uint8_t>(16 << static_cast<int>(swizzle));
  decoded.magic = emulator::TensorMap::kMagic;
  const bool known_type = fp32 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const bool known_mode = interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!known_type || !known_mode || rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(map) % 64 != 0 ||
      reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (cuuint32_t i = 0; i < rank; ++i) {
    decoded.extents[i] = extents[i];
    decoded.strides[i] = i == 0 ? decoded.element_bytes : strides[i - 1];
    decoded.box[i] = static_cast<uint16_t>(box[i]);
    if (extents[i] < 1 || extents[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256 || element_strides[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const uint64_t least = i == 0 ? 0 : decoded.strides[i - 1] * extents[i - 1];
    if (i > 0 && (decoded.strides[i] % 16 != 0 || decoded.strides[i] >= uint64_t{1} << 40 || decoded.strides[i] < least)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  const uint32_t inner = box[0] * decoded.element_bytes;
  if (inner % 16 != 0 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > decoded.swizzle_bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &decoded, sizeof decoded);
  return CUDA_SUCCESS;
}
