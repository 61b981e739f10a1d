// The only header that includes torch, through its stable ABI: one built library then serves every torch from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv3x3.h"
#include "huge_pages.h"

namespace vggfast {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::BFloat16) return DType::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, "vggfast: expected float32, bfloat16 or float16, got ", type);
  return DType::f16;
}

// A call for nothing but new memory, on the device of `like`. Through the stable ABI torch says only that it failed; programs that
// go on with a smaller batch look for the words that it uses elsewhere.
template <class Call>
inline Tensor new_memory(const Tensor& like, const Call& call) {
  try {
    return call();
  } catch (const std::exception& error) {
    throw std::runtime_error((like.is_cpu() ? out_of_memory : "CUDA out of memory.") + (" " + std::string(error.what())));
  }
}

// A result. malloc gives a large one back to the system when it is freed, and the next one is then cleared anew.
inline Tensor empty_of(const Tensor& like, std::vector<int64_t> size, torch::headeronly::ScalarType type,
                       std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  constexpr int64_t large = 4 << 20;
  Tensor t = new_memory(like, [&] { return torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt, format); });
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (t.is_cpu() && bytes >= large) wish_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

// [N, C, H, W] in channels_last memory.
inline Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return empty_of(like, {n, c, h, w}, like.scalar_type(), torch::headeronly::MemoryFormat::ChannelsLast);
}

// Where each maximum of a 2x2 pool of [N, C, H, W] comes from, 2 bits a channel: [N, H/2, W/2, ceil(C/4)]; empty if not wanted.
inline Tensor empty_argmax(const Tensor& like, bool wanted, int64_t n, int64_t c, int64_t h, int64_t w) {
  const std::vector<int64_t> size = wanted ? std::vector<int64_t>{n, h / 2, w / 2, (c + 3) / 4} : std::vector<int64_t>{0};
  return empty_of(like, size, torch::headeronly::ScalarType::Byte);
}

// Kernels read pixels as runs of channels. A tensor whose channels are not adjacent is copied; strides of size-1 dimensions mean
// nothing and are never looked at.
inline Tensor with_adjacent_channels(const Tensor& t) {
  if (t.size(1) == 1 || t.stride(1) == 1) return t;
  return new_memory(t, [&] { return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast); });
}

// Every call of body(job), job in [0, jobs), on torch's own threads. A thread takes the jobs of its part in order, one by one, so
// that what it asked for in advance and what it wrote in the layer before is its own; then the rest of the others' parts, since the
// slowest would decide.
inline void parallel_jobs(int64_t jobs, const std::function<void(int64_t)>& body) {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(jobs, torch::stable::get_num_threads());
  std::vector<Part> parts(std::max<int64_t>(threads, 1));
  for (int64_t t = 0; t < threads; ++t) parts[t].next = jobs * t / threads, parts[t].end = jobs * (t + 1) / threads;
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + threads - 1; ++i) {
      Part& part = parts[i % threads];
      for (int64_t job; (job = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) body(job);
    }
  };
  if (threads <= 1) return work(0, threads);
  // The stable ABI does not pass on what is thrown on another thread either.
  std::exception_ptr first;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

} // namespace vggfast
