#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#  include <cpuid.h>
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace vggfast::cpu {
namespace {

#if defined(__x86_64__)
// Whether the CPU has tile registers for bfloat16 and Linux lets this process use them. Asked for once: the answer holds for
// every thread, and after a fork.
bool has_amx() {
  static const bool has = [] {
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18; // arch_prctl(2)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile) &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has;
}
#endif

std::vector<const Kernels*> runnable() { // best first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C); // which not every compiler's __builtin_cpu_supports knows
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) {
    if (has_amx()) found.push_back(&kernels_amx);
    found.push_back(&kernels_avx512);
  }
  if (avx2) found.push_back(&kernels_avx2);
#elif defined(__aarch64__)
  found.push_back(&kernels_neon);
#endif
  found.push_back(&kernels_baseline);
#if defined(__x86_64__)
  // For tests alone, and slow: hence last.
  if (avx512) found.push_back(&kernels_amx_emulated);
#endif
  return found;
}

// "aten" keeps Python from calling the ops (vggfast/switches.py); what calls them all the same gets the widest.
const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* k : runnable()) {
    if (name == k->name || name == "auto" || name == "aten") return k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument("VGGFAST_CPU_ISA: expected auto, aten or one of " + names + " (what this CPU runs), got '" + name +
                              "'");
}

std::atomic<const Kernels*> chosen{nullptr};

} // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) {
    const char* name = std::getenv("VGGFAST_CPU_ISA");
    k = find(name && *name ? name : "auto");
    chosen.store(k, std::memory_order_relaxed);
  }
  return *k;
}

void set_isa(const std::string& name) {
  chosen.store(find(name), std::memory_order_relaxed);
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.push_back(k->name);
  return names;
}

} // namespace vggfast::cpu
