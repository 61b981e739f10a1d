#include "cpu/schedule.h"

#include <atomic>
#include <cstring>

#include "cpu/dtypes.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {
namespace {

// ---- direct ----

int64_t direct_workspace(const Kernels& k, const Image& x, const Filters& w) {
  return ceil_div(w.out, k.block) * 9 * x.c * k.block;
}

void forward_direct(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* packed,
                    const Parallel& parallel) {
  const int64_t bands = ceil_div(x.h, plan.band);
  parallel(ceil_div(w.out, k.block), [&](int64_t b) { k.direct_filters(w, b, packed + b * 9 * x.c * k.block); });
  parallel(x.n * bands, [&](int64_t job) {
    const int64_t begin = job % bands * plan.band, end = std::min(begin + plan.band, x.h);
    k.direct_rows(x, packed, out, job / bands, begin, end,
                  scratch((plan.band + 2) * (x.w + 2) * x.c + 2 * x.w * k.block + k.width));
  });
}

// The rows of N * H are cut into a number of parts that depends on the problem alone, each part sums into memory of its own, and
// the parts are added in order. More parts than threads would need cost memory, so wide layers get few.
int64_t direct_parts(const Kernels& k, const Image& x, const Image& dz) {
  const int64_t bytes = 9 * x.c * round_up(dz.c, k.block) * 4;
  return std::clamp<int64_t>(std::min((8 << 20) / bytes, x.n * x.h / 4), 1, 64);
}

int64_t grad_weight_direct_workspace(const Kernels& k, const Image& x, const Image& dz) {
  const int64_t padded = round_up(dz.c, k.block);
  return direct_parts(k, x, dz) * (9 * x.c + 2) * padded; // a double for every bias
}

template <class T>
void store_grad_filters(const float* parts, int64_t count, int64_t part_size, int64_t padded, int64_t tap_c, const Filters& dw) {
  const int64_t tap = tap_c / dw.in, c = tap_c % dw.in;
  T* p = (T*)const_cast<void*>(dw.data) + c * dw.stride_in + tap / 3 * dw.stride_r + tap % 3 * dw.stride_s;
  for (int64_t out = 0; out < dw.out; ++out) {
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * part_size + tap_c * padded + out];
    from_float(float(sum), p + out * dw.stride_out);
  }
}

void grad_weight_direct(const Kernels& k, const Image& x, const Image& dz, const Filters& dw, float* bias, float* workspace,
                        const Parallel& parallel) {
  const int64_t padded = round_up(dz.c, k.block), parts = direct_parts(k, x, dz), part_size = 9 * x.c * padded;
  double* bias_parts = (double*)workspace; // first, for its alignment
  float* sums = workspace + parts * 2 * padded;
  const int64_t rows = x.n * x.h;
  parallel(parts, [&](int64_t part) {
    float* sum = sums + part * part_size;
    double* bias_sum = bias_parts + part * padded;
    memset(sum, 0, part_size * sizeof(float));
    memset(bias_sum, 0, padded * sizeof(double));
    const int64_t floats = 3 * (x.w + 2) * x.c + x.w * padded + (dz.w + 2) * dz.c + k.width;
    k.direct_grad_rows(x, dz, rows * part / parts, rows * (part + 1) / parts, sum, bias_sum, scratch(floats));
  });
  parallel(9 * x.c, [&](int64_t tap_c) {
    if (dw.dtype == DType::f32) store_grad_filters<float>(sums, parts, part_size, padded, tap_c, dw);
    if (dw.dtype == DType::bf16) store_grad_filters<BFloat16>(sums, parts, part_size, padded, tap_c, dw);
    if (dw.dtype == DType::f16) store_grad_filters<Float16>(sums, parts, part_size, padded, tap_c, dw);
  });
  for (int64_t c = 0; c < dz.c; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += bias_parts[part * padded + c];
    bias[c] = float(sum);
  }
}

// ---- Winograd ----

struct Sizes {
  int64_t v_row, v, u, m; // floats: a row of V, V of plan.tiles tiles, U of one block of output channels, M of plan.tiles tiles
  Sizes(const Kernels& k, const Plan& plan, int64_t in)
      : v_row(points_row(in, machine(k, 1))), v(36 * plan.tiles * v_row), u(36 * in * k.block), m(36 * plan.tiles * k.block) {}
};

Points points(float* data, int64_t row, int64_t tiles) {
  return {data, row, row * tiles};
}

// A thread takes a group of tiles through input transform, products and output transform.
bool forward_tile_fused(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* u,
                        const Parallel& parallel) {
  const Sizes size(k, plan, x.c);
  const TileGrid grid = tile_grid(x.n, x.h, x.w);
  const int64_t blocks = ceil_div(w.out, k.block);
  std::atomic<bool> finite{true};
  parallel(blocks, [&](int64_t b) { k.winograd_filters(w, b, u + b * size.u); });
  parallel(ceil_div(grid.count(), plan.tiles), [&](int64_t group) {
    const TileRange tiles{grid, group * plan.tiles, std::min((group + 1) * plan.tiles, grid.count())};
    const int64_t count = tiles.end - tiles.begin;
    const Points v = points(scratch(size.v + size.m), size.v_row, count);
    float* m = v.data + size.v;
    k.winograd_input(x, tiles, v);
    for (int64_t b = 0; b < blocks; ++b) {
      k.winograd_multiply(v, count, x.c, u + b * size.u, m);
      if (!k.winograd_output(m, tiles, b, out)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

// All threads make V of a chunk of tiles; then each takes blocks of output channels, so that it reads only its share of the
// filters.
bool forward_channels_split(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out,
                            float* workspace, const Parallel& parallel) {
  const Sizes size(k, plan, x.c);
  const TileGrid grid = tile_grid(x.n, x.h, x.w);
  const int64_t blocks = ceil_div(w.out, k.block), chunks = ceil_div(grid.count(), plan.tiles);
  float* all_u = workspace + size.v; // only with several chunks; one chunk makes U where it uses it
  std::atomic<bool> finite{true};
  if (chunks > 1) parallel(blocks, [&](int64_t b) { k.winograd_filters(w, b, all_u + b * size.u); });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const TileRange tiles{grid, chunk * plan.tiles, std::min((chunk + 1) * plan.tiles, grid.count())};
    const int64_t count = tiles.end - tiles.begin, share = 4;
    const Points v = points(workspace, size.v_row, count);
    parallel(ceil_div(count, share), [&](int64_t i) {
      const int64_t begin = i * share, end = std::min(begin + share, count);
      k.winograd_input(x, {grid, tiles.begin + begin, tiles.begin + end}, {v.data + begin * v.row, v.row, v.position});
    });
    parallel(blocks, [&](int64_t b) {
      float* m = scratch(size.m + (chunks > 1 ? 0 : size.u));
      float* u = chunks > 1 ? all_u + b * size.u : m + size.m;
      if (chunks == 1) k.winograd_filters(w, b, u);
      k.winograd_multiply(v, count, x.c, u, m);
      if (!k.winograd_output(m, tiles, b, out)) finite.store(false, std::memory_order_relaxed);
    });
  }
  return finite;
}

constexpr int64_t bias_group = 16; // tiles whose gradients are summed in fp32 before the sums are added in double

bool grad_weight_winograd(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, const Filters& dw, float* bias,
                          float* workspace, const Parallel& parallel) {
  const Machine m = machine(k, 1);
  const TileGrid grid = tile_grid(x.n, x.h, x.w);
  const int64_t v_row = points_row(x.c, m), z_row = points_row(dz.c, m), padded = round_up(dz.c, k.block);
  const int64_t blocks = padded / k.block, groups = ceil_div(grid.count(), bias_group);
  float *v_data = workspace, *z_data = v_data + 36 * plan.tiles * v_row, *s = z_data + 36 * plan.tiles * z_row;
  float* bias_sums = s + 36 * x.c * padded;
  for (int64_t begin = 0; begin < grid.count(); begin += plan.tiles) {
    const int64_t count = std::min(plan.tiles, grid.count() - begin);
    const Points v = points(v_data, v_row, count), z = points(z_data, z_row, count);
    parallel(ceil_div(count, bias_group), [&](int64_t i) {
      const int64_t from = i * bias_group, to = std::min(from + bias_group, count);
      const TileRange tiles{grid, begin + from, begin + to};
      k.winograd_input(x, tiles, {v.data + from * v.row, v.row, v.position});
      k.winograd_grad_output(dz, tiles, {z.data + from * z.row, z.row, z.position}, bias_sums + (begin / bias_group + i) * padded);
    });
    parallel(36 * blocks, [&](int64_t job) {
      const int64_t i = job / blocks, b = job % blocks;
      k.winograd_accumulate(v.data + i * v.position, v.row, x.c, z.data + i * z.position + b * k.block, z.row, count, begin == 0,
                            s + (b * 36 + i) * x.c * k.block);
    });
  }
  std::atomic<bool> finite{true};
  parallel(blocks, [&](int64_t b) {
    if (!k.winograd_grad_filters(s + b * 36 * x.c * k.block, b, dw)) finite.store(false, std::memory_order_relaxed);
  });
  for (int64_t c = 0; c < dz.c; ++c) {
    double sum = 0;
    for (int64_t g = 0; g < groups; ++g) sum += bias_sums[g * padded + c];
    bias[c] = float(sum);
  }
  return finite;
}

} // namespace

Machine machine(const Kernels& k, int threads) {
  return {k.width, k.block, k.rows, threads};
}

int64_t forward_workspace(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output&) {
  const int64_t direct = direct_workspace(k, x, w); // Winograd may have to be repeated directly
  if (plan.algorithm == Algorithm::direct) return direct;
  const Sizes size(k, plan, x.c);
  const int64_t u = ceil_div(w.out, k.block) * size.u;
  if (plan.fused) return std::max(u, direct);
  return std::max(size.v + (tile_grid(x.n, x.h, x.w).count() > plan.tiles ? u : 0), direct);
}

void forward(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
             const Parallel& parallel) {
  if (plan.algorithm == Algorithm::winograd) {
    const auto run = plan.fused ? forward_tile_fused : forward_channels_split;
    if (run(k, plan, x, w, out, workspace, parallel)) return;
  }
  forward_direct(k, plan.algorithm == Algorithm::direct ? plan : plan_direct(x.c, x.h, x.w, "Inf or NaN"), x, w, out, workspace,
                 parallel);
}

int64_t grad_weight_workspace(const Kernels& k, const Plan& plan, const Image& x, const Image& dz) {
  const int64_t direct = grad_weight_direct_workspace(k, x, dz);
  if (plan.algorithm == Algorithm::direct) return direct;
  const Machine m = machine(k, 1);
  const int64_t padded = round_up(dz.c, k.block), groups = ceil_div(tile_grid(x.n, x.h, x.w).count(), bias_group);
  const int64_t winograd = 36 * plan.tiles * (points_row(x.c, m) + points_row(dz.c, m)) + 36 * x.c * padded + groups * padded;
  return std::max(direct, winograd);
}

void grad_weight(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, const Filters& dw, float* bias,
                 float* workspace, const Parallel& parallel) {
  if (plan.algorithm == Algorithm::winograd && grad_weight_winograd(k, plan, x, dz, dw, bias, workspace, parallel)) return;
  grad_weight_direct(k, x, dz, dw, bias, workspace, parallel);
}

void max_pool(const Kernels& k, const Image& x, const Output& out, const Parallel& parallel) {
  const int64_t rows = x.n * (x.h / 2), share = 4;
  parallel(ceil_div(rows, share), [&](int64_t i) { k.max_pool_rows(x, out, i * share, std::min((i + 1) * share, rows)); });
}

void max_pool_grad(const Kernels& k, const Image& dz, const Output& out, const Parallel& parallel) {
  const int64_t rows = dz.n * dz.h, share = 8;
  parallel(ceil_div(rows, share), [&](int64_t i) { k.max_pool_grad_rows(dz, out, i * share, std::min((i + 1) * share, rows)); });
}

} // namespace vggfast::cpu
