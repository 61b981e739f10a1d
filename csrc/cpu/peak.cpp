// The multiply-adds of all of torch's threads at once, timed.
#include <chrono>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/settings.h"
#include "torch_glue.h"

namespace vggfast::cpu {

double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  const Kernels& k = kernels();
  const int64_t threads = torch::stable::get_num_threads(), steps = 1 << 20; // a few milliseconds: shorter than a host's pauses
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  do {
    std::atomic<int64_t> operations{0};
    const auto begin = Clock::now();
    parallel_jobs(threads, [&](int64_t) {
      alignas(64) float out[16] = {1e-7f}; // sums stay finite
      operations += k.fma_loop(steps, out);
    });
    best = std::max(best, double(operations) / std::chrono::duration<double>(Clock::now() - begin).count());
  } while (Clock::now() < end);
  return best * 1e-9;
}

} // namespace vggfast::cpu
