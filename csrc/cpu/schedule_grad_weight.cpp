// The schedules of grad_weight, the gradient of the filters.
#include <atomic>
#include <cstring>

#include "cpu/dtypes.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {
namespace {

// ---- direct ----

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
    with_type(dw.dtype, [&](auto* type) {
      store_grad_filters<std::remove_pointer_t<decltype(type)>>(sums, parts, part_size, padded, tap_c, dw);
    });
  });
  for (int64_t c = 0; c < dz.c; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += bias_parts[part * padded + c];
    bias[c] = float(sum);
  }
}

// ---- Winograd ----

// What grad_weight works on: S, the sum of V^T Z over a part of the tiles, for each part; the sums of dZ over groups of tiles.
struct GradWeight {
  const Kernels& k;
  const Plan& plan;
  const Image &x, &dz;
  TileGrid grid;
  int64_t padded, blocks, v_row, s_size;
  float *s, *bias_sums;

  GradWeight(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, float* workspace)
      : k(k), plan(plan), x(x), dz(dz), grid(tile_grid(x.n, x.h, x.w)), padded(round_up(dz.c, k.block)), blocks(padded / k.block),
        v_row(points_row(x.c, machine(k, 1))), s_size(36 * x.c * padded), s(workspace), bias_sums(s + plan.groups * s_size) {}
  int64_t workspace() const { return plan.groups * s_size + ceil_div(grid.count(), bias_group) * padded; }

  // Parts of whole groups of tiles.
  int64_t begin_of(int64_t part) const {
    return std::min(ceil_div(grid.count(), bias_group) * part / plan.groups * bias_group, grid.count());
  }
  int64_t z_row(int64_t channels) const { return points_row(channels, machine(k, 1)); }

  // V and Z of the tiles [begin, end), in whole groups, and output channels [c_begin, c_end).
  void transform(int64_t begin, int64_t end, int64_t c_begin, int64_t c_end, const Points& v, const Points& z) const {
    for (int64_t from = begin; from < end; from += bias_group) {
      const TileRange tiles{grid, from, std::min(from + bias_group, end)};
      k.winograd_input(x, tiles, v.from(from - begin), false);
      k.winograd_grad_output(dz, tiles, c_begin, c_end, z.from(from - begin), bias_sums + from / bias_group * padded + c_begin);
    }
  }
  // S of one point and the blocks [begin, end) of output channels, whose Z is from z on. pieces: pieces_floats().
  void accumulate(int64_t part, int64_t point, int64_t begin, int64_t end, const Points& v, const Points& z, int64_t count,
                  bool first, float* pieces) const {
    const float *a = v.data + point * v.position, *b = z.data + point * z.position;
    const int64_t s_block = 36 * x.c * k.block;
    float* sum = s + part * s_size + begin * s_block + point * x.c * k.block;
    if (plan.pieces) return k.pieces_accumulate(a, v.row, x.c, b, z.row, count, end - begin, first, sum, s_block, pieces);
    for (int64_t block = begin; block < end; ++block, b += k.block, sum += s_block)
      k.winograd_accumulate(a, v.row, x.c, b, z.row, count, first, sum);
  }
  int64_t pieces_floats(int64_t blocks) const { return plan.pieces ? pieces_scratch(plan.tiles, blocks) : 0; }
};

// A thread takes a part of the tiles and a range of output channels through everything: V and Z never leave its core.
void accumulate_outputs_split(const GradWeight& g, const Parallel& parallel) {
  const Plan& plan = g.plan;
  parallel(plan.groups * plan.splits, [&](int64_t job) {
    const int64_t part = job / plan.splits, split = job % plan.splits, end = g.begin_of(part + 1);
    const int64_t first_block = g.blocks * split / plan.splits, last_block = g.blocks * (split + 1) / plan.splits;
    const int64_t c_begin = first_block * g.k.block, c_end = last_block * g.k.block, z_row = g.z_row(c_end - c_begin);
    const int64_t pieces = g.pieces_floats(last_block - first_block);
    float* memory = scratch(pieces + 36 * (odd_lines(plan.tiles * g.v_row) + odd_lines(plan.tiles * z_row)));
    for (int64_t begin = g.begin_of(part); begin < end; begin += plan.tiles) {
      const int64_t count = std::min(plan.tiles, end - begin);
      const Points v{memory + pieces, g.v_row, odd_lines(count * g.v_row)};
      const Points z{v.data + 36 * v.position, z_row, odd_lines(count * z_row)};
      g.transform(begin, begin + count, c_begin, c_end, v, z);
      for (int64_t i = 0; i < 36; ++i)
        g.accumulate(part, i, first_block, last_block, v, z, count, begin == g.begin_of(part), memory);
    }
  });
}

// More threads than parts and ranges: all make V and Z of a chunk of tiles, then take points and blocks.
void accumulate_points_split(const GradWeight& g, float* memory, const Parallel& parallel) {
  const int64_t z_row = g.z_row(g.padded);
  for (int64_t part = 0; part < g.plan.groups; ++part)
    for (int64_t begin = g.begin_of(part), end = g.begin_of(part + 1); begin < end; begin += g.plan.tiles) {
      const int64_t count = std::min(g.plan.tiles, end - begin);
      const Points v{memory, g.v_row, odd_lines(count * g.v_row)}, z{memory + 36 * v.position, z_row, odd_lines(count * z_row)};
      parallel(ceil_div(count, bias_group), [&](int64_t i) {
        const int64_t from = i * bias_group;
        g.transform(begin + from, begin + std::min(from + bias_group, count), 0, g.padded, v.from(from), z.from(from));
      });
      parallel(36 * g.blocks, [&](int64_t job) {
        const int64_t i = job / g.blocks, b = job % g.blocks;
        g.accumulate(part, i, b, b + 1, v, {z.data + b * g.k.block, z.row, z.position}, count, begin == g.begin_of(part),
                     scratch(g.pieces_floats(1)));
      });
    }
}

bool grad_weight_winograd(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, const Filters& dw, float* bias,
                          float* workspace, const Parallel& parallel) {
  const GradWeight g(k, plan, x, dz, workspace);
  if (plan.schedule == Schedule::points_split)
    accumulate_points_split(g, workspace + g.workspace(), parallel);
  else
    accumulate_outputs_split(g, parallel);
  std::atomic<bool> finite{true};
  parallel(g.blocks, [&](int64_t b) {
    const int64_t size = 36 * x.c * k.block;
    float* sum = g.s + b * size;
    for (int64_t part = 1; part < plan.groups; ++part)
      for (int64_t i = 0; i < size; ++i) sum[i] += sum[part * g.s_size + i];
    if (!k.winograd_grad_filters(sum, b, dw)) finite.store(false, std::memory_order_relaxed);
  });
  for (int64_t c = 0; c < dz.c; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < ceil_div(g.grid.count(), bias_group); ++i) sum += g.bias_sums[i * g.padded + c];
    bias[c] = float(sum);
  }
  return finite;
}

} // namespace

int64_t grad_weight_workspace(const Kernels& k, const Plan& plan, const Image& x, const Image& dz) {
  const int64_t direct = grad_weight_direct_workspace(k, x, dz);
  if (plan.algorithm == Algorithm::amx) return std::max(direct, grad_weight_amx_workspace(plan, x, dz));
  if (plan.algorithm == Algorithm::direct) return direct;
  const GradWeight g(k, plan, x, dz, nullptr);
  int64_t winograd = g.workspace();
  if (plan.schedule == Schedule::points_split)
    winograd += 36 * (odd_lines(plan.tiles * g.v_row) + odd_lines(plan.tiles * g.z_row(g.padded)));
  return std::max(direct, winograd);
}

void grad_weight(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, const Filters& dw, float* bias,
                 float* workspace, const Parallel& parallel) {
  if (plan.algorithm == Algorithm::amx && grad_weight_amx(k, plan, x, dz, dw, bias, workspace, parallel)) return;
  if (plan.algorithm == Algorithm::winograd && grad_weight_winograd(k, plan, x, dz, dw, bias, workspace, parallel)) return;
  grad_weight_direct(k, x, dz, dw, bias, workspace, parallel);
}

} // namespace vggfast::cpu
