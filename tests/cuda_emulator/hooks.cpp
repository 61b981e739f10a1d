// The kernels are compiled with -fsanitize=thread and linked without its runtime: the compiler then calls one of these
// functions before every access to memory, and the emulator sees them all, with the line they come from.
// -fsanitize=alignment likewise: a vector access may be split before it gets here, its type's alignment is checked first.
#include <cstddef>

#include "machine.h"

using emulator::Access;
using emulator::Machine;

#define ACCESS(bytes)                                                                                                              \
  void __tsan_read##bytes(void* at) {                                                                                              \
    Machine::get().check(reinterpret_cast<uintptr_t>(at), bytes, Access::read, __builtin_return_address(0));                       \
  }                                                                                                                                \
  void __tsan_write##bytes(void* at) {                                                                                             \
    Machine::get().check(reinterpret_cast<uintptr_t>(at), bytes, Access::write, __builtin_return_address(0));                      \
  }                                                                                                                                \
  void __tsan_unaligned_read##bytes(void* at) {                                                                                    \
    Machine::get().check(reinterpret_cast<uintptr_t>(at), bytes, Access::read, __builtin_return_address(0));                       \
  }                                                                                                                                \
  void __tsan_unaligned_write##bytes(void* at) {                                                                                   \
    Machine::get().check(reinterpret_cast<uintptr_t>(at), bytes, Access::write, __builtin_return_address(0));                      \
  }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) {
  Machine::get().check(reinterpret_cast<uintptr_t>(at), bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  Machine::get().check(reinterpret_cast<uintptr_t>(at), bytes, Access::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
/// Of the guard of a function's static variable, in host code.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __ubsan_handle_type_mismatch_v1(void*, void*) {
  Machine& machine = Machine::get();
  if (machine.current() != nullptr) {
    machine.fail("misaligned access", __builtin_return_address(0));
  }
}
}
