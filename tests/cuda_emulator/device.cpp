// The emulated device behind a C interface for Python: its memory, its schedule, its counters.
#include <cstring>

#include "machine.h"

extern "C" {

void emu_reset(uint64_t seed) {
  auto& machine = emulator::Machine::get();
  machine.global.release_all();
  machine.seed = seed;
  machine.statistics = {};
  machine.last_blocks = 0;
}

/// Null when the emulated device is full.
void* emu_allocate(size_t bytes, int input) {
  return emulator::Machine::get().global.allocate(bytes, input != 0);
}
void emu_copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
size_t emu_uninitialised(const void* from, size_t bytes) {
  return emulator::Machine::get().global.uninitialised_bytes(reinterpret_cast<uintptr_t>(from), bytes);
}
void emu_statistics(emulator::Statistics* to) {
  *to = emulator::statistics();
}
void emu_set_device(int device) {
  emulator::current_device() = device;
}
void emu_set_gpu(int sm_count, int capability) {
  emulator::gpu() = {sm_count, capability};
}
/// Launches run only their last `blocks` blocks: the far end of a problem too large to emulate. 0: all of them.
void emu_run_last_blocks(uint32_t blocks) {
  emulator::Machine::get().last_blocks = blocks;
}
}
