// Barriers of threads: who waits, and what each knows of the others afterwards.
#include <algorithm>

#include "machine.h"

namespace emulator {

void join(Clock& into, const Clock& from) {
  into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) {
    into[i] = std::max(into[i], from[i]);
  }
}

namespace {

/// Everything that the chosen threads know, each of them knows from now on.
template <class Chosen>
void meet(std::vector<Thread>& threads, Clock all, Chosen chosen) {
  for (Thread& thread : threads) {
    if (chosen(thread)) {
      join(all, thread.clock);
    }
  }
  for (Thread& thread : threads) {
    if (chosen(thread)) {
      thread.clock = all;
      ++thread.clock[thread.linear];
    }
  }
}

} // namespace

void Machine::barrier() {
  if (++at_barrier_ < thread_count_) {
    block(Wait::barrier);
    return;
  }
  at_barrier_ = 0;
  ++epoch_;
  ++statistics.barriers;
  meet(threads_, current_->clock, [](const Thread&) { return true; });
  for (Thread& thread : threads_) {
    if (thread.wait == Wait::barrier) {
      wake(thread);
    }
  }
}

void Machine::named_barrier(int id, int threads, const void* code) {
  if (id < 1 || id > 15 || threads % 32 != 0 || threads < 32) {
    fail("bar.sync: expected barrier 1 to 15 and whole warps", code);
  }
  NamedBarrier& entry = named_barriers_[id];
  if (entry.arrived > 0 && entry.threads != threads) {
    fail("bar.sync: threads name different numbers of threads at one barrier", code);
  }
  entry.threads = threads;
  if (++entry.arrived < threads) {
    current_->waits_for = id;
    block(Wait::named_barrier);
    return;
  }
  entry.arrived = 0;
  const auto here = [&](const Thread& thread) {
    return &thread == current_ || (thread.wait == Wait::named_barrier && thread.waits_for == id);
  };
  meet(threads_, current_->clock, here);
  for (Thread& thread : threads_) {
    if (thread.wait == Wait::named_barrier && thread.waits_for == id) {
      wake(thread);
    }
  }
}

void Machine::join_warp(uint32_t warp) {
  meet(threads_, threads_[warp * 32].clock, [&](const Thread& thread) { return thread.linear / 32u == warp; });
}

} // namespace emulator
