#include "cpu/schedule.h"

#include <unistd.h>

#include <atomic>
#include <cstring>

#include "cpu/ahead.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {
namespace {

// ---- direct ----

// A block of output channels of which few are there is mostly zeros; all taps of four channels fill it.
bool few_outputs(const Filters& w) {
  return w.out <= 4 && w.in >= 16;
}

int64_t direct_workspace(const Kernels& k, const Image& x, const Filters& w) {
  return ceil_div(w.out, k.block) * 9 * x.c * k.block;
}

void forward_few(const Kernels& k, const Image& x, const Filters& w, const Output& out, float* packed, const Parallel& parallel) {
  const int64_t band = 16, bands = ceil_div(x.h, band), columns = round_up(9 * w.out, k.block);
  k.few_filters(w, packed);
  parallel(x.n * bands, [&](int64_t job) {
    const int64_t begin = job % bands * band;
    k.few_rows(x, packed, out, job / bands, begin, std::min(begin + band, x.h),
               scratch((x.w + 2) * (x.c + 3 * columns) + 2 * x.w * k.block + 16 + k.width));
  });
}

void forward_direct(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* packed,
                    const Parallel& parallel) {
  if (few_outputs(w)) return forward_few(k, x, w, out, packed, parallel);
  const int64_t bands = ceil_div(x.h, plan.band);
  parallel(ceil_div(w.out, k.block), [&](int64_t b) { k.direct_filters(w, b, packed + b * 9 * x.c * k.block); });
  parallel(x.n * bands, [&](int64_t job) {
    const int64_t begin = job % bands * plan.band, end = std::min(begin + plan.band, x.h);
    k.direct_rows(x, packed, out, job / bands, begin, end,
                  scratch((plan.band + 2) * (x.w + 2) * x.c + 3 * x.w * k.block + k.width));
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

struct Sizes {
  int64_t v_row, v_position, m_position; // floats
  int64_t v, u, m;                       // V of plan.tiles tiles; U and M of one block of output channels
  Sizes(const Kernels& k, const Plan& plan, int64_t in)
      : v_row(points_row(in, machine(k, 1))), v_position(odd_lines(plan.tiles * v_row)),
        m_position(odd_lines(plan.tiles * k.block)), v(36 * v_position), u(36 * filters_position(plan.depth, k.block)),
        m(36 * m_position) {}
};

// Channels [begin, end) of the input.
Filters input_channels(const Filters& w, int64_t begin, int64_t end) {
  const int64_t bytes = begin * w.stride_in * bytes_of(w.dtype);
  return {w.dtype, w.out, end - begin, static_cast<const char*>(w.data) + bytes, w.stride_out, w.stride_in, w.stride_r, w.stride_s};
}

// M = V U of one point, or += with `add`, for those of the tiles that have it.
void multiply(const Kernels& k, const TileRange& tiles, int point, const Points& v, int64_t in, const float* u, const Points& m,
              bool add = false, const Soon& soon = {}) {
  const TileRange some = tiles.with_point(point);
  const int64_t from = some.begin - tiles.begin;
  if (some.count() > 0) k.winograd_multiply(v.from(from), some.count(), in, u, m.from(from), point, add, soon);
}

// U of all blocks. One that L2 does not keep would be read, line by line, only to be overwritten, and then come to each thread from
// the caches of all others, which is slow on some hosts; DRAM is not.
void all_filters(const Kernels& k, const Filters& w, int64_t size, float* u, const Parallel& parallel) {
  const int64_t blocks = ceil_div(w.out, k.block);
  const bool stream = blocks * size * int64_t(sizeof(float)) >= 1 << 20;
  parallel(blocks, [&](int64_t b) { k.winograd_filters(w, b, u + b * size, stream); });
}

// A thread takes tiles through input transform, products and output transform, and asks for the input of its next tiles meanwhile.
bool forward_tile_fused(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* u,
                        const Parallel& parallel) {
  const Sizes size(k, plan, x.c);
  const TileGrid grid = tile_grid(x.n, x.h, x.w, plan.edges);
  const int64_t blocks = ceil_div(w.out, k.block), steps = 36 * blocks;
  std::atomic<bool> finite{true};
  all_filters(k, w, size.u, u, parallel);
  parallel(ceil_div(grid.count(), plan.tiles), [&](int64_t job) {
    const Points v{scratch(size.v + size.m), size.v_row, size.v_position}, m{v.data + size.v, k.block, size.m_position};
    const TileRange tiles{grid, job * plan.tiles, std::min((job + 1) * plan.tiles, grid.count())};
    const int64_t count = tiles.count(), ahead = std::min(plan.tiles, grid.count() - tiles.end);
    InputPieces pieces(x, grid, tiles.end, ahead, steps);
    k.winograd_input(x, tiles, v, false);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int i = 0; i < 36; ++i) {
        for (int64_t t = i * count / 36; !out.stream && t < (i + 1) * count / 36; ++t)
          prefetch_output(k, out, grid.at(tiles.begin + t), b);
        multiply(k, tiles, i, v, x.c, u + b * size.u, m, false, pieces.next());
      }
      if (!k.winograd_output(m, tiles, b, out)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

// Pass by pass over the tiles: all threads make V of as many as the plan says, and then use it.
template <class Use>
void shared_input(const Kernels& k, const Plan& plan, const Image& x, const Points& v, bool stream, const Parallel& parallel,
                  const Use& use) {
  const TileGrid grid = tile_grid(x.n, x.h, x.w, plan.edges);
  const int64_t share = 4;
  for (int64_t first = 0; first < grid.count(); first += plan.tiles) {
    const TileRange tiles{grid, first, std::min(first + plan.tiles, grid.count())};
    parallel(ceil_div(tiles.count(), share), [&](int64_t i) {
      const int64_t begin = i * share, end = std::min(begin + share, tiles.count());
      k.winograd_input(x, {grid, first + begin, first + end}, v.from(begin), stream);
    });
    use(tiles);
  }
}

// V is shared, and each thread takes blocks of output channels. U of a block would not fit L2 beside V and M, or is used by few
// tiles: it is made `depth` input channels at a time and used at once.
bool forward_channels_split(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out,
                            float* workspace, const Parallel& parallel) {
  const Sizes size(k, plan, x.c);
  const Points v{workspace, size.v_row, size.v_position};
  std::atomic<bool> finite{true};
  shared_input(k, plan, x, v, true, parallel, [&](const TileRange& tiles) {
    parallel(ceil_div(w.out, k.block), [&](int64_t b) {
      const Points m{scratch(size.m + size.u), k.block, size.m_position};
      float* u = m.data + size.m;
      for (int64_t c = 0; c < x.c; c += plan.depth) {
        const int64_t end = std::min(c + plan.depth, x.c);
        k.winograd_filters(input_channels(w, c, end), b, u, false);
        // The filters that this thread is likely to need next: of the next channels, or of the next block.
        const bool last = end == x.c;
        for (int i = 0; i < 36; ++i)
          multiply(k, tiles, i, {v.data + c, v.row, v.position}, end - c, u, m, c > 0,
                   output_filters(w, (last ? b + 1 : b) * k.block + i, last ? 0 : end, i < k.block ? plan.depth : 0));
      }
      if (!k.winograd_output(m, tiles, b, out)) finite.store(false, std::memory_order_relaxed);
    });
  });
  return finite;
}

// U is made once, V is shared, and each thread takes blocks of output channels of a part of the tiles, whose M stays in its L2
// while U and V stream past.
bool forward_chunks_split(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
                          const Parallel& parallel) {
  const Sizes size(k, plan, x.c);
  const int64_t blocks = ceil_div(w.out, k.block);
  const Points v{workspace, size.v_row, size.v_position};
  float* u = workspace + size.v;
  std::atomic<bool> finite{true};
  all_filters(k, w, size.u, u, parallel);
  shared_input(k, plan, x, v, false, parallel, [&](const TileRange& tiles) {
    parallel(blocks * plan.splits, [&](int64_t job) {
      const int64_t b = job / plan.splits, part = job % plan.splits, count = tiles.count();
      const int64_t from = count * part / plan.splits;
      const TileRange some{tiles.grid, tiles.begin + from, tiles.begin + count * (part + 1) / plan.splits};
      const Points m{scratch(size.m), k.block, size.m_position};
      for (int i = 0; i < 36; ++i) multiply(k, some, i, v.from(from), x.c, u + b * size.u, m);
      if (!k.winograd_output(m, some, b, out)) finite.store(false, std::memory_order_relaxed);
    });
  });
  return finite;
}

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
  // S of one point and block of output channels, whose Z is at z.
  void accumulate(int64_t part, int64_t point, int64_t block, const Points& v, const Points& z, int64_t count, bool first) const {
    k.winograd_accumulate(v.data + point * v.position, v.row, x.c, z.data + point * z.position, z.row, count, first,
                          s + part * s_size + (block * 36 + point) * x.c * k.block);
  }
};

// A thread takes a part of the tiles and a range of output channels through everything: V and Z never leave its core.
void accumulate_outputs_split(const GradWeight& g, const Parallel& parallel) {
  const Plan& plan = g.plan;
  parallel(plan.groups * plan.splits, [&](int64_t job) {
    const int64_t part = job / plan.splits, split = job % plan.splits, end = g.begin_of(part + 1);
    const int64_t first_block = g.blocks * split / plan.splits, last_block = g.blocks * (split + 1) / plan.splits;
    const int64_t c_begin = first_block * g.k.block, c_end = last_block * g.k.block, z_row = g.z_row(c_end - c_begin);
    float* memory = scratch(36 * (odd_lines(plan.tiles * g.v_row) + odd_lines(plan.tiles * z_row)));
    for (int64_t begin = g.begin_of(part); begin < end; begin += plan.tiles) {
      const int64_t count = std::min(plan.tiles, end - begin);
      const Points v{memory, g.v_row, odd_lines(count * g.v_row)}, z{memory + 36 * v.position, z_row, odd_lines(count * z_row)};
      g.transform(begin, begin + count, c_begin, c_end, v, z);
      for (int64_t i = 0; i < 36; ++i)
        for (int64_t b = first_block; b < last_block; ++b)
          g.accumulate(part, i, b, v, {z.data + (b - first_block) * g.k.block, z.row, z.position}, count,
                       begin == g.begin_of(part));
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
        g.accumulate(part, i, b, v, {z.data + b * g.k.block, z.row, z.position}, count, begin == g.begin_of(part));
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

Machine machine(const Kernels& k, int threads) {
  // 0 where the system does not tell. More than 2 MB has not been measured, and a virtual machine may tell more than there is.
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  Machine m{k.width, k.block, k.rows, threads, k.amx_rows != nullptr};
  if (l2 > 0) m.l2 = std::min<int64_t>(l2, 2 << 20);
  return m;
}

int64_t forward_workspace(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output&) {
  if (plan.algorithm == Algorithm::amx) return amx_workspace(x, w);
  const int64_t direct = direct_workspace(k, x, w); // Winograd may have to be repeated directly
  if (plan.algorithm == Algorithm::direct) return direct;
  const Sizes size(k, plan, x.c);
  if (plan.schedule == Schedule::tile_fused) return std::max(ceil_div(w.out, k.block) * size.u, direct);
  if (plan.schedule == Schedule::channels_split) return std::max(size.v, direct);
  return std::max(size.v + ceil_div(w.out, k.block) * size.u, direct);
}

void forward(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
             const Parallel& parallel) {
  if (plan.algorithm == Algorithm::amx) return forward_amx(k, plan, x, w, out, workspace, parallel);
  if (plan.algorithm == Algorithm::winograd) {
    const auto run = plan.schedule == Schedule::tile_fused       ? forward_tile_fused
                     : plan.schedule == Schedule::channels_split ? forward_channels_split
                                                                 : forward_chunks_split;
    if (run(k, plan, x, w, out, workspace, parallel)) return;
  }
  forward_direct(k, plan.algorithm == Algorithm::direct ? plan : plan_direct(x.n, x.c, x.h, x.w, 1, "Inf or NaN"), x, w, out,
                 workspace, parallel);
}

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

void max_pool(const Kernels& k, const Image& x, const Output& out, const Parallel& parallel) {
  const int64_t rows = x.n * (x.h / 2), share = 4;
  parallel(ceil_div(rows, share), [&](int64_t i) { k.max_pool_rows(x, out, i * share, std::min((i + 1) * share, rows)); });
}

void max_pool_grad(const Kernels& k, const Image& dz, const Output& out, const Parallel& parallel) {
  const int64_t rows = dz.n * dz.h, share = 8;
  parallel(ceil_div(rows, share), [&](int64_t i) { k.max_pool_grad_rows(dz, out, i * share, std::min((i + 1) * share, rows)); });
}

} // namespace vggfast::cpu
