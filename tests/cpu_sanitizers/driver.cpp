// Runs every entry of the CPU kernels through schedule.h on buffers of exactly the documented size, for a sanitizer to watch.
//
// Compilers do not instrument masked vector loads and stores, so every problem runs three times: in heap memory between the
// sanitizer's red zones, and in pages whose neighbour after the last byte, or before the first, may not be touched by anything.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/schedule.h"

using namespace vggfast;
using namespace vggfast::cpu;

namespace {

enum class Place { heap, page_end, page_begin };
Place place;
int threads;

class Buffer {
public:
  explicit Buffer(size_t bytes, size_t alignment = 1) : bytes_(bytes) {
    if (place == Place::heap) {
      if (posix_memalign(&data_, std::max(alignment, sizeof(void*)), bytes)) abort();
    } else {
      const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
      mapped_ = inner + 2 * page;
      base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (base_ == MAP_FAILED || mprotect(base_ + page, inner, PROT_READ | PROT_WRITE)) abort();
      data_ = base_ + page + (place == Place::page_end ? (inner - bytes) / alignment * alignment : 0);
    }
    memset(data_, 0xff, bytes); // NaN, so that memory which is read before it was written shows in the results
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (base_)
      munmap(base_, mapped_);
    else
      free(data_);
  }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

private:
  void* data_ = nullptr;
  char* base_ = nullptr;
  size_t mapped_ = 0, bytes_;
};

size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

float get(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const BFloat16*>(p)[i]);
  return to_float(static_cast<const Float16*>(p)[i]);
}

void put(void* p, DType dtype, int64_t i, float value) {
  if (dtype == DType::f32) from_float(value, static_cast<float*>(p) + i);
  if (dtype == DType::bf16) from_float(value, static_cast<BFloat16*>(p) + i);
  if (dtype == DType::f16) from_float(value, static_cast<Float16*>(p) + i);
}

void randomise(const Buffer& b, DType dtype, float scale) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, scale);
  for (size_t i = 0; i < b.bytes() / size_of(dtype); ++i) put(b.as(), dtype, int64_t(i), normal(random));
}

void run_jobs(int64_t jobs, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) body(job);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < std::min<int64_t>(threads, jobs); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

// Results of one problem under every plan must agree; the first is kept.
struct Expected {
  std::vector<float> values;
  void check(const char* what, const Plan& plan, const void* p, DType dtype, int64_t count) {
    std::vector<float> got(count);
    double wrong = 0, norm = 0;
    for (int64_t i = 0; i < count; ++i) got[i] = get(p, dtype, i);
    if (values.empty()) values = got;
    for (int64_t i = 0; i < count; ++i) {
      if (std::isfinite(values[i]) != std::isfinite(got[i])) wrong = INFINITY;
      if (!std::isfinite(values[i]) || !std::isfinite(got[i])) continue;
      wrong += (double(got[i]) - values[i]) * (double(got[i]) - values[i]), norm += double(values[i]) * values[i];
    }
    const double bound = dtype == DType::f32 ? 1e-4 : 1e-2;
    if (wrong <= bound * bound * norm) return;
    printf("%s, %s: differs from the direct kernel by %g of %g\n", what, to_string(plan).c_str(), std::sqrt(wrong),
           std::sqrt(norm));
    exit(2);
  }
};

struct Problem {
  int64_t n, in, out, h, w;
  int64_t gap = 0;             // elements between pixels of x beside its channels
  bool channels_first = false; // x in NCHW, which the direct kernels read for few channels
  bool infinite = false;       // an Inf in x: Winograd is repeated by the direct kernel
};

Plan with_splits(Plan plan, int64_t splits) {
  plan.splits = splits;
  return plan;
}

// Every schedule, whether or not plan.h would choose it for so small a problem; direct first.
std::vector<Plan> plans(DType dtype, const Problem& p, int64_t in, int64_t out, const Machine& m) {
  std::vector<Plan> all = {choose_plan(dtype, p.n, in, out, p.h, p.w, m, Algorithm::direct)};
  const bool pieces = m.amx && dtype == DType::f32;
  if (m.amx && !pieces) {
    Plan plan = with_splits(make_direct_plan(2, "driver"), std::min<int64_t>(ceil_div(out, kAmxBlock), 2));
    plan.algorithm = Algorithm::amx;
    all.push_back(plan);
    plan.band = round_up(p.h, 2), plan.images = 2; // of several images whole ones share a job
    if (p.n > 1) all.push_back(plan);
  }
  if (p.channels_first) return all;
  const int64_t tiles = tile_grid(p.n, p.h, p.w).count();
  const Edges edges = edges_of(p.h, p.w);
  const auto winograd = [&](Schedule schedule, int64_t of_pass, int64_t depth) {
    return make_winograd_plan(schedule, of_pass, depth, edges, "driver");
  };
  if (pieces) {
    if (in % 32 != 0) return all;
    Plan plan = with_splits(winograd(Schedule::points_split, ceil_div(tiles, 2), in), std::min<int64_t>(ceil_div(out, m.block), 2));
    plan.pieces = true;
    all.push_back(plan);
    return all;
  }
  all.push_back(choose_plan(dtype, p.n, in, out, p.h, p.w, m, Algorithm::automatic));
  all.push_back(winograd(Schedule::tile_fused, m.rows, in));
  all.push_back(winograd(Schedule::channels_split, tiles, std::min<int64_t>(in, 24)));
  all.push_back(with_splits(winograd(Schedule::chunks_split, ceil_div(tiles, 2), in), 2));
  return all;
}

Image plain(DType dtype, const Problem& p, int64_t c, const void* data, int64_t stride_w) {
  Image image;
  image.dtype = dtype, image.n = p.n, image.c = c, image.h = p.h, image.w = p.w, image.data = data;
  image.stride_w = stride_w, image.stride_h = p.w * stride_w, image.stride_n = p.h * image.stride_h;
  return image;
}

class Layer {
public:
  Layer(const Kernels& k, DType dtype, const Problem& p)
      : k_(k), dtype_(dtype), p_(p), size_(size_of(dtype)), x_((p.n * p.h * p.w * (p.in + p.gap) - p.gap) * size_),
        w_(p.out * p.in * 9 * size_), bias_(round_up(p.out, 64) * 4), machine_(machine(k, threads)) {
    randomise(x_, dtype, 1);
    randomise(w_, dtype, 1 / std::sqrt(9.f * p.in));
    randomise(bias_, DType::f32, 1);
    if (p.infinite) put(x_.as(), dtype, int64_t(x_.bytes() / size_) / 2, INFINITY);
    x = plain(dtype, p, p.in, x_.as(), p.in + p.gap);
    if (p.channels_first) x.stride_w = 1, x.stride_h = p.w, x.stride_c = p.h * p.w, x.stride_n = p.in * p.h * p.w;
    w = {dtype, p.out, p.in, w_.as(), p.in * 9, 9, 3, 1};
  }

  void run(bool relu, bool pool) {
    if (pool && (p_.h < 2 || p_.w < 2)) return;
    const int64_t pixels = pool ? p_.n * (p_.h / 2) * (p_.w / 2) : p_.n * p_.h * p_.w;
    Buffer y(pixels * p_.out * size_, pool ? 1 : alignment(p_.out)), argmax(pixels * ceil_div(p_.out, 4)), grad(y.bytes());
    Output out = output(y.as(), p_.out);
    out.bias = relu ? bias_.as<float>() : nullptr;
    out.stream = out.stream && !pool;
    out.relu = relu, out.pool = pool, out.argmax = pool ? argmax.as<uint8_t>() : nullptr;
    convolve("forward", x, w, out, pixels * p_.out);

    randomise(grad, dtype_, 1);
    Image dz = plain(dtype_, p_, p_.out, grad.as(), p_.out);
    if (pool) dz.stride_h = p_.w / 2 * p_.out, dz.stride_n = p_.h / 2 * dz.stride_h;
    dz.kind = pool ? ImageKind::pooled : relu ? ImageKind::masked : ImageKind::plain;
    if (relu) dz.y = y.as(), dz.y_stride_n = dz.stride_n, dz.y_stride_h = dz.stride_h, dz.y_stride_w = dz.stride_w;
    if (pool) dz.argmax = argmax.as<uint8_t>();
    Buffer gx(p_.n * p_.h * p_.w * p_.in * size_, alignment(p_.in));
    const Filters mirrored{dtype_, p_.in, p_.out, w_.as<char>() + 8 * size_, 9, p_.in * 9, -3, -1};
    convolve("grad_input", dz, mirrored, output(gx.as(), p_.in), p_.n * p_.h * p_.w * p_.in);
    grad_filters(dz);
    if (pool && !relu) pool_alone(dz);
    if (pool || relu) return;
    const int64_t row = 3 * p_.in; // of channels_last filters, whose taps lie apart and whose input channels side by side
    convolve("forward, other filters", x, {dtype_, p_.out, p_.in, w_.as<void>(), 3 * row, 1, row, p_.in}, out, pixels * p_.out);
    const Filters other{dtype_, p_.in, p_.out, w_.as<char>() + 8 * p_.in * size_, 1, 3 * row, -row, -p_.in};
    convolve("grad_input, other filters", dz, other, output(gx.as(), p_.in), p_.n * p_.h * p_.w * p_.in);
  }

  static int64_t calls;

private:
  // Where results may be stored past the caches, they are.
  bool streams(int64_t c) const { return dtype_ == DType::f32 && c % 16 == 0; } // amx: in tests/test_amx.py
  size_t alignment(int64_t c) const { return streams(c) ? 64 : 1; }
  Output output(void* data, int64_t c) const {
    Output out;
    out.dtype = dtype_, out.n = p_.n, out.c = c, out.h = p_.h, out.w = p_.w, out.data = data;
    out.stream = streams(c);
    return out;
  }

  void convolve(const char* what, const Image& image, const Filters& filters, const Output& out, int64_t count) {
    Expected expected;
    for (const Plan& plan : plans(dtype_, p_, image.c, filters.out, machine_)) {
      Buffer workspace(forward_workspace(k_, plan, image, filters) * sizeof(float), 64);
      forward(k_, plan, image, filters, out, workspace.as<float>(), run_jobs);
      expected.check(what, plan, out.data, dtype_, count);
      ++calls;
    }
  }

  void grad_filters(const Image& dz) {
    Expected expected, expected_bias;
    const int64_t tiles = tile_grid(p_.n, p_.h, p_.w).count(), groups = ceil_div(tiles, 16), blocks = ceil_div(p_.out, k_.block);
    const bool pieces = machine_.amx && dtype_ == DType::f32;
    const Edges edges = edges_of(p_.h, p_.w);
    const auto winograd = [&](Schedule schedule, int64_t splits) {
      Plan plan = with_splits(make_winograd_plan(schedule, 16, p_.in, edges, "driver"), std::min(splits, blocks));
      plan.groups = std::min<int64_t>(groups, 2), plan.pieces = pieces;
      return plan;
    };
    Plan fused = with_splits(make_winograd_plan(Schedule::outputs_fused, tiles, std::min<int64_t>(p_.in, 24), edges, "driver"),
                             std::min<int64_t>(3, blocks));
    fused.in_splits = std::min<int64_t>(2, ceil_div(p_.in, fused.depth));
    for (const Plan& plan : {choose_grad_weight_plan(dtype_, p_.n, p_.in, p_.out, p_.h, p_.w, machine_, Algorithm::direct),
                             winograd(Schedule::points_split, 1), winograd(Schedule::outputs_split, 3), fused}) {
      if (plan.algorithm == Algorithm::winograd && (p_.channels_first || (plan.pieces && p_.in % 32 != 0))) continue;
      Buffer dw(w_.bytes()), bias(p_.out * sizeof(float));
      Buffer workspace(grad_weight_workspace(k_, plan, x, dz) * sizeof(float), 64);
      grad_weight(k_, plan, x, dz, {dtype_, p_.out, p_.in, dw.as(), p_.in * 9, 9, 3, 1}, bias.as<float>(), workspace.as<float>(),
                  run_jobs);
      expected.check("grad_weight", plan, dw.as(), dtype_, p_.out * p_.in * 9);
      expected_bias.check("grad_bias", plan, bias.as(), DType::f32, p_.out);
      ++calls;
    }
  }

  // With the argmax and gradient of a layer, and an image of its output's size.
  void pool_alone(const Image& dz) {
    Buffer image(p_.n * p_.h * p_.w * p_.out * size_), y(p_.n * (p_.h / 2) * (p_.w / 2) * p_.out * size_);
    Buffer argmax(p_.n * (p_.h / 2) * (p_.w / 2) * ceil_div(p_.out, 4)), gx(image.bytes());
    randomise(image, dtype_, 1);
    Output out = output(y.as(), p_.out);
    for (uint8_t* saved : {argmax.as<uint8_t>(), static_cast<uint8_t*>(nullptr)}) {
      out.argmax = saved;
      max_pool(k_, plain(dtype_, p_, p_.out, image.as(), p_.out), out, run_jobs);
    }
    max_pool_grad(k_, dz, output(gx.as(), p_.out), run_jobs);
    calls += 3;
  }

  const Kernels& k_;
  DType dtype_;
  Problem p_;
  size_t size_;
  Buffer x_, w_, bias_;
  Machine machine_;
  Image x;
  Filters w;
};
int64_t Layer::calls = 0;

// The three kernels of a fully connected layer, whole and cut in two.
void run_linear(const Kernels& k, DType dtype, int64_t rows, int64_t in, int64_t out) {
  const int64_t columns = round_up(in, k.width), size = size_of(dtype);
  Buffer x(rows * columns * 4, 64), weight(out * in * size, size), bias(out * 4, 4), y(rows * out * 4, 4);
  Buffer grad((out + kLinearPadding) * rows * 4, 4), dx(2 * rows * kLinearColumns * 4, 4), dw(out * in * size, 64);
  for (const Buffer* b : {&x, &bias, &grad})
    for (size_t i = 0; i < b->bytes() / 4; ++i) b->as<float>()[i] = 1.f;
  for (int64_t i = 0; i < out * in; ++i) put(weight.as<void>(), dtype, i, 1.f);
  const Linear l{rows, in, out, dtype, weight.as<void>(), in, rows > 1 ? bias.as<float>() : nullptr, true};
  for (int64_t begin = 0; begin < out; begin += out / 2 + 1) {
    const int64_t end = std::min(begin + out / 2 + 1, out);
    if (rows <= kLinearRows) k.linear(l, x.as<float>(), begin, end, rows % 2 ? kLinearOuts : kLinearOuts / 4, y.as<float>());
    k.linear_grad_weight(l, x.as<float>(), grad.as<float>(), begin, end, dw.as<void>());
  }
  for (int64_t begin = 0; begin < in; begin += kLinearColumns) {
    const int64_t end = std::min(begin + kLinearColumns, in);
    k.linear_grad_input(l, grad.as<float>(), begin, end, dx.as<float>());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < end - begin; ++i)
        if (dx.as<float>()[r * kLinearColumns + i] != float(out)) abort();
  }
  for (int64_t i = 0; i < out * in; ++i)
    if (get(dw.as<void>(), dtype, i) != float(rows)) abort();
  for (int64_t i = 0; rows <= kLinearRows && i < rows * out; ++i)
    if (y.as<float>()[i] != float(in + (rows > 1))) abort();
  Layer::calls += 5;
}

const Problem problems[] = {
    {1, 1, 1, 1, 1},
    {1, 3, 17, 2, 3},
    {2, 3, 64, 7, 5, 0, true},
    {1, 4, 5, 6, 17, 0, true},
    {2, 17, 1, 5, 4, 3},
    {1, 17, 33, 17, 9},
    {1, 33, 3, 3, 17, 1},
    {1, 64, 17, 13, 16},
    {2, 33, 64, 9, 10},
    {1, 64, 33, 1, 17},
    {1, 31, 31, 5, 6}, // one less than blocks of 16 and of 32
    {1, 65, 32, 17, 1, 0, false, true},
    {1, 130, 65, 6, 7},
    {3, 16, 129, 4, 8, 2},
    {1, 256, 257, 3, 5}, // AMX: each thread packs its own filters
};

} // namespace

// driver ISA [few]: exit status 0 if all is well.
int main(int count, char** arguments) {
  set_isa(count > 1 ? arguments[1] : "auto");
  const Kernels& k = kernels();
  const bool few = count > 2;
  for (const Place where : {Place::heap, Place::page_end, Place::page_begin})
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (const Problem& problem : problems) {
        const bool pieces = dtype == DType::f32 && (problem.in % 32 == 0 || problem.out % 32 == 0);
        if (k.amx_rows && dtype != DType::bf16 && !pieces) continue; // the rest is avx512's
        if (problem.in == 256 && !(k.amx_rows && dtype == DType::bf16)) continue;
        if (few && (where != Place::heap || dtype != DType::f32 || problem.n * problem.h < 13)) continue;
        place = where, threads = where == Place::page_begin ? 1 : 3;
        run_linear(k, dtype, 1 + problem.in % max_linear_rows, 9 * problem.in, problem.out);
        Layer layer(k, dtype, problem);
        for (const bool relu : {false, true})
          for (const bool pool : {false, true}) layer.run(relu, pool);
      }
  printf("%s: %lld calls\n", k.name, static_cast<long long>(Layer::calls));
}
