// The schedules of grad_weight, the gradient of the filters.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/dtypes.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {
namespace {

// ---- direct ----

// The rows of N * H are cut into a number of parts that depends on the problem alone, each part sums into memory of its own, and
// the parts are added in order. More parts than threads would need cost memory, so wide layers get few; threads then take ranges of
// output channels, whose sums L2 keeps.
int64_t direct_parts(const Kernels& k, const Image& x, const Image& dz) {
  const int64_t bytes = 9 * x.c * round_up(dz.c, k.block) * 4;
  return std::clamp<int64_t>(std::min((8 << 20) / bytes, x.n * x.h / 4), 1, 64);
}

int64_t grad_weight_direct_workspace(const Kernels& k, const Image& x, const Image& dz) {
  const int64_t padded = round_up(dz.c, k.block);
  return direct_parts(k, x, dz) * (9 * x.c + 2) * padded; // a double for every bias
}

template <class T>
void store_grad_filters(const float* parts, int64_t count, int64_t part_size, int64_t block, int64_t tap_c, const Filters& dw) {
  const int64_t tap = tap_c / dw.in, c = tap_c % dw.in;
  T* p = (T*)const_cast<void*>(dw.data) + c * dw.stride_in + tap / 3 * dw.stride_r + tap % 3 * dw.stride_s;
  for (int64_t out = 0; out < dw.out; ++out) {
    double sum = 0;
    const int64_t at = (out / block * 9 * dw.in + tap_c) * block + out % block;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * part_size + at];
    from_float(float(sum), p + out * dw.stride_out);
  }
}

void grad_weight_direct(const Kernels& k, const Image& x, const Image& dz, const Filters& dw, float* bias, float* workspace,
                        const Parallel& parallel) {
  const int64_t padded = round_up(dz.c, k.block), parts = direct_parts(k, x, dz), part_size = 9 * x.c * padded;
  double* bias_parts = (double*)workspace; // first, for its alignment
  float* sums = workspace + parts * 2 * padded;
  const int64_t rows = x.n * x.h;
  const int64_t blocks = padded / k.block, ranges = std::clamp<int64_t>(16 / parts, 1, blocks);
  parallel(parts * ranges, [&](int64_t job) {
    const int64_t part = job / ranges, range = job % ranges;
    const int64_t first = blocks * range / ranges, last = blocks * (range + 1) / ranges;
    float* sum = sums + part * part_size;
    double* bias_sum = range == 0 ? bias_parts + part * padded : nullptr;
    memset(sum + first * 9 * x.c * k.block, 0, (last - first) * 9 * x.c * k.block * sizeof(float));
    if (bias_sum) memset(bias_sum, 0, padded * sizeof(double));
    const int64_t floats = 3 * (x.w + 2) * x.c + x.w * padded + (dz.w + 2) * dz.c + k.width;
    k.direct_grad_rows(x, dz, rows * part / parts, rows * (part + 1) / parts, first, last, sum, bias_sum, scratch(floats));
  });
  parallel(9 * x.c, [&](int64_t tap_c) {
    with_type(dw.dtype, [&](auto* type) {
      store_grad_filters<std::remove_pointer_t<decltype(type)>>(sums, parts, part_size, k.block, tap_c, dw);
    });
  });
  for (int64_t c = 0; c < dz.c; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += bias_parts[part * padded + c];
    bias[c] = float(sum);
  }
}

// ---- Winograd ----

// What grad_weight works on: S, the sum of V^T Z over a part of the tiles, for each part, unless it is made in pieces by the
// threads that use it; the sums of dZ over groups of tiles.
struct GradWeight {
  const Kernels& k;
  const Plan& plan;
  const Image &x, &dz;
  TileGrid grid;
  int64_t padded, blocks, v_row, s_block, s_size;
  float *s, *bias_sums;

  GradWeight(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, float* workspace)
      : k(k), plan(plan), x(x), dz(dz), grid(tile_grid(x.n, x.h, x.w, plan.edges)), padded(round_up(dz.c, k.block)),
        blocks(padded / k.block), v_row(points_row(x.c, machine(k, 1))), s_block(36 * filters_position(x.c, k.block)),
        s_size(plan.schedule == Schedule::outputs_fused ? 0 : blocks * s_block), s(workspace), bias_sums(s + plan.groups * s_size) {
  }
  int64_t workspace() const { return plan.groups * s_size + ceil_div(grid.count(), bias_group) * padded; }

  // Parts of whole groups of tiles.
  int64_t begin_of(int64_t part) const {
    return std::min(ceil_div(grid.count(), bias_group) * part / plan.groups * bias_group, grid.count());
  }
  int64_t z_row(int64_t channels) const { return points_row(channels, machine(k, 1)); }

  // V of a range of tiles.
  void transform_input(const TileRange& tiles, const Points& v) const { k.winograd_input(x, tiles, v, false); }
  // Z of the tiles, in whole groups, and output channels [c_begin, c_end). Their sums go to `elsewhere` where another job has them.
  void transform_gradients(const TileRange& tiles, int64_t c_begin, int64_t c_end, const Points& z,
                           float* elsewhere = nullptr) const {
    for (int64_t from = tiles.begin; from < tiles.end; from += bias_group) {
      float* sums = elsewhere ? elsewhere : bias_sums + from / bias_group * padded + c_begin;
      k.winograd_grad_output(dz, {grid, from, std::min(from + bias_group, tiles.end)}, c_begin, c_end, z.from(from - tiles.begin),
                             sums);
    }
  }
  // sum, of one point and `block` of output channels, = V^T Z of those of the tiles that have it, or += if that is not the first.
  void accumulate(int point, const TileRange& tiles, const Points& v, int64_t in, int64_t block, const Points& z, bool first,
                  float* sum, const Soon& soon) const {
    const TileRange some = tiles.with_point(point);
    const int64_t from = some.begin - tiles.begin;
    if (some.count() > 0)
      k.winograd_accumulate(v.from(from).data + point * v.position, v.row, in, z.from(from).data + point * z.position, z.row,
                            some.count(), dz.c - block * k.block, first, sum, soon);
    else if (first)
      std::fill(sum, sum + in * k.block, 0.f);
  }
  // S of one point and the blocks [begin, end) of output channels, whose Z is from z on. pieces: pieces_floats().
  void accumulate_blocks(int64_t part, int point, int64_t begin, int64_t end, const Points& v, Points z, const TileRange& tiles,
                         float* pieces) const {
    const bool first = tiles.begin == begin_of(part);
    const int64_t bytes = x.c * k.block * int64_t(sizeof(float));
    float* sum = s + part * s_size + begin * s_block + point * filters_position(x.c, k.block);
    const TileRange some = tiles.with_point(point);
    if (plan.pieces && some.count() > 0) {
      const Points a = v.from(some.begin - tiles.begin), b = z.from(some.begin - tiles.begin);
      return k.pieces_accumulate(a.data + point * a.position, a.row, x.c, b.data + point * b.position, b.row, some.count(),
                                 end - begin, first, sum, s_block, pieces);
    }
    for (int64_t block = begin; block < end; ++block, z.data += k.block, sum += s_block) // S is beyond L2
      accumulate(point, tiles, v, x.c, block, z, first, sum, {reinterpret_cast<const char*>(sum), bytes});
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
      const TileRange tiles{g.grid, begin, std::min(begin + plan.tiles, end)};
      const Points v{memory + pieces, g.v_row, odd_lines(tiles.count() * g.v_row)};
      const Points z{v.data + 36 * v.position, z_row, odd_lines(tiles.count() * z_row)};
      g.transform_input(tiles, v);
      g.transform_gradients(tiles, c_begin, c_end, z);
      for (int i = 0; i < 36; ++i) g.accumulate_blocks(part, i, first_block, last_block, v, z, tiles, memory);
    }
  });
}

// More threads than parts and ranges: all make V and Z of a chunk of tiles, then take points and blocks.
void accumulate_points_split(const GradWeight& g, float* memory, const Parallel& parallel) {
  const int64_t z_row = g.z_row(g.padded);
  for (int64_t part = 0; part < g.plan.groups; ++part)
    for (int64_t begin = g.begin_of(part), end = g.begin_of(part + 1); begin < end; begin += g.plan.tiles) {
      const TileRange tiles{g.grid, begin, std::min(begin + g.plan.tiles, end)};
      const Points v{memory, g.v_row, odd_lines(tiles.count() * g.v_row)};
      const Points z{memory + 36 * v.position, z_row, odd_lines(tiles.count() * z_row)};
      parallel(ceil_div(tiles.count(), bias_group), [&](int64_t i) {
        const int64_t from = i * bias_group;
        const TileRange group{g.grid, begin + from, std::min(begin + from + bias_group, tiles.end)};
        g.transform_input(group, v.from(from));
        g.transform_gradients(group, 0, g.padded, z.from(from));
      });
      parallel(36 * g.blocks, [&](int64_t job) {
        const int64_t b = job % g.blocks;
        g.accumulate_blocks(part, int(job / g.blocks), b, b + 1, v, {z.data + b * g.k.block, z.row, z.position}, tiles,
                            scratch(g.pieces_floats(1)));
      });
    }
}

// A line of a gradient that L2 does not keep would be read only to be overwritten.
bool streams_gradient(const Filters& dw) {
  return dw.dtype == DType::f32 && dw.in % 16 == 0 && reinterpret_cast<uintptr_t>(dw.data) % 64 == 0 &&
         dw.out * dw.in * 9 * int64_t(sizeof(float)) >= 4 << 20;
}

// The channels [begin, end) of an image whose channels are adjacent.
Image channels_of(Image x, int64_t begin, int64_t end) {
  x.data = static_cast<const char*>(x.data) + begin * bytes_of(x.dtype);
  x.c = end - begin;
  return x;
}

// A thread takes all tiles, a range of output channels and one of input channels through everything, with V of `depth` input
// channels at a time: S of these and one block of output channels stays in its L2, and dW is made of it at once. A block's Z lies
// together, and is asked for a point ahead.
bool grad_filters_outputs_fused(const GradWeight& g, const Filters& dw, const Parallel& parallel) {
  const Kernels& k = g.k;
  const Plan& plan = g.plan;
  const TileRange tiles{g.grid, 0, g.grid.count()};
  const int64_t v_row = points_row(plan.depth, machine(k, 1)), v_position = odd_lines(tiles.count() * v_row);
  const int64_t z_position = odd_lines(tiles.count() * k.block);
  const int64_t s_position = filters_position(plan.depth, k.block), z_bytes = tiles.count() * k.block * int64_t(sizeof(float));
  std::atomic<bool> finite{true};
  const int64_t parts = ceil_div(dw.in, plan.depth); // of the input channels
  parallel(plan.splits * plan.in_splits, [&](int64_t job) {
    const int64_t split = job / plan.in_splits, in_split = job % plan.in_splits;
    const int64_t begin = g.blocks * split / plan.splits, end = g.blocks * (split + 1) / plan.splits;
    const int64_t c_begin = parts * in_split / plan.in_splits * plan.depth,
                  c_end = parts * (in_split + 1) / plan.in_splits * plan.depth;
    float* s = scratch(36 * (s_position + v_position + (end - begin) * z_position) + k.block);
    const Points v{s + 36 * s_position, v_row, v_position};
    // Ranges of input channels all make Z, and with it the sums of dZ: the first keeps them, the others put them aside.
    float* sums = in_split == 0 ? nullptr : v.data + 36 * (v_position + (end - begin) * z_position);
    const auto z_of = [&](int64_t block) {
      return Points{v.data + 36 * (v_position + (block - begin) * z_position), k.block, z_position};
    };
    for (int64_t b = begin; b < end; ++b) g.transform_gradients(tiles, b * k.block, (b + 1) * k.block, z_of(b), sums);
    for (int64_t c = c_begin; c < c_end; c += plan.depth) {
      const Filters some = input_channels(dw, c, std::min(c + plan.depth, dw.in));
      k.winograd_input(channels_of(g.x, c, c + some.in), tiles, v, false);
      for (int64_t b = begin; b < end; ++b) {
        const Points z = z_of(b);
        for (int i = 0; i < 36; ++i)
          g.accumulate(i, tiles, v, some.in, b, z, true, s + i * filters_position(some.in, k.block),
                       {reinterpret_cast<const char*>(z.data + (i + 1) * z.position), z_bytes});
        if (!k.winograd_grad_filters(s, b, some, streams_gradient(dw))) finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  return finite;
}

// dW of S, the sum of all parts'.
bool grad_filters(const GradWeight& g, const Filters& dw, const Parallel& parallel) {
  std::atomic<bool> finite{true};
  parallel(g.blocks, [&](int64_t b) {
    float* sum = g.s + b * g.s_block;
    for (int64_t part = 1; part < g.plan.groups; ++part)
      for (int64_t i = 0; i < g.s_block; ++i) sum[i] += sum[part * g.s_size + i];
    if (!g.k.winograd_grad_filters(sum, b, dw, streams_gradient(dw))) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

bool grad_weight_winograd(const Kernels& k, const Plan& plan, const Image& x, const Image& dz, const Filters& dw, float* bias,
                          float* workspace, const Parallel& parallel) {
  const GradWeight g(k, plan, x, dz, workspace);
  bool finite = true;
  if (plan.schedule == Schedule::outputs_fused) {
    finite = grad_filters_outputs_fused(g, dw, parallel);
  } else {
    if (plan.schedule == Schedule::points_split)
      accumulate_points_split(g, workspace + g.workspace(), parallel);
    else
      accumulate_outputs_split(g, parallel);
    finite = grad_filters(g, dw, parallel);
  }
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
