#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace vggfast::cpu {
namespace {

std::vector<const Kernels*> runnable() { // best first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&kernels_avx512);
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* k : runnable()) {
    if (name == k->name || name == "auto") return k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument("VGGFAST_CPU_ISA: expected auto or one of " + names + " (what this CPU runs), got '" + name + "'");
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
