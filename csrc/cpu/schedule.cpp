#include "cpu/schedule.h"

#include <unistd.h>

#include <atomic>

#include "cpu/ahead.h"
#include "cpu/scratch.h"

namespace vggfast::cpu {
namespace {

// ---- direct ----

int64_t direct_workspace(const Kernels& k, const Image& x, const Filters& w) {
  return ceil_div(w.out, k.block) * 9 * x.c * k.block;
}

void forward_few(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* packed,
                 const Parallel& parallel) {
  const int64_t bands = ceil_div(x.h, plan.band), columns = round_up(9 * w.out, k.block);
  k.few_filters(w, packed);
  parallel(x.n * bands, [&](int64_t job) {
    const int64_t begin = job % bands * plan.band;
    k.few_rows(x, packed, out, job / bands, begin, std::min(begin + plan.band, x.h),
               scratch((x.w + 2) * (x.c + 3 * columns) + 2 * x.w * k.block + 16 + k.width));
  });
}

void forward_direct(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* packed,
                    const Parallel& parallel) {
  if (taps_fill_a_block(w.in, w.out)) return forward_few(k, plan, x, w, out, packed, parallel);
  const int64_t bands = ceil_div(x.h, plan.band);
  parallel(ceil_div(w.out, k.block), [&](int64_t b) { k.direct_filters(w, b, packed + b * 9 * x.c * k.block); });
  parallel(x.n * bands, [&](int64_t job) {
    const int64_t begin = job % bands * plan.band, end = std::min(begin + plan.band, x.h);
    k.direct_rows(x, packed, out, job / bands, begin, end,
                  scratch((plan.band + 2) * (x.w + 2) * x.c + 3 * x.w * k.block + k.width));
  });
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

// M = V U of one point, or += with `add`, for those of the tiles that have it.
void multiply(const Kernels& k, const TileRange& tiles, int point, const Points& v, int64_t in, const float* u, int64_t channels,
              const Points& m, bool add = false, const Soon& soon = {}) {
  const TileRange some = tiles.with_point(point);
  const int64_t from = some.begin - tiles.begin;
  if (some.count() > 0) k.winograd_multiply(v.from(from), some.count(), in, u, channels, m.from(from), point, add, soon);
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
        multiply(k, tiles, i, v, x.c, u + b * size.u, w.out - b * k.block, m, false, pieces.next());
      }
      if (!k.winograd_output(m, tiles, b, out)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

// body(begin, end) for ranges of `size` that make up [0, count).
template <class Body>
void parallel_ranges(const Parallel& parallel, int64_t count, int64_t size, const Body& body) {
  parallel(ceil_div(count, size), [&](int64_t i) { body(i * size, std::min((i + 1) * size, count)); });
}
constexpr int64_t tiles_at_once = 4; // that a thread transforms where V or M is shared

// Pass by pass over the tiles: all threads make V of as many as the plan says, and then use it.
template <class Use>
void shared_input(const Kernels& k, const Plan& plan, const Image& x, const Points& v, bool stream, const Parallel& parallel,
                  const Use& use) {
  const TileGrid grid = tile_grid(x.n, x.h, x.w, plan.edges);
  for (int64_t first = 0; first < grid.count(); first += plan.tiles) {
    const TileRange tiles{grid, first, std::min(first + plan.tiles, grid.count())};
    parallel_ranges(parallel, tiles.count(), tiles_at_once, [&](int64_t begin, int64_t end) {
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
          multiply(k, tiles, i, {v.data + c, v.row, v.position}, end - c, u, w.out - b * k.block, m, c > 0,
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
      for (int i = 0; i < 36; ++i) multiply(k, some, i, v.from(from), x.c, u + b * size.u, w.out - b * k.block, m);
      if (!k.winograd_output(m, some, b, out)) finite.store(false, std::memory_order_relaxed);
    });
  });
  return finite;
}

// M of all tiles of a pass and all blocks of output channels.
Points shared_m(const Kernels& k, const Plan& plan, const Filters& w, float* data) {
  const int64_t row = points_row(w.out, machine(k, 1));
  return {data, row, odd_lines(plan.tiles * row)};
}

// V, U and M are shared, and each thread takes points, through products of pieces: those of one point are a single large product,
// whose operands are packed as pieces once.
bool forward_points_split(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
                          const Parallel& parallel) {
  const Sizes size(k, plan, x.c);
  const int64_t blocks = ceil_div(w.out, k.block);
  const Points v{workspace, size.v_row, size.v_position};
  float* u = v.data + size.v;
  const Points m = shared_m(k, plan, w, u + blocks * size.u);
  std::atomic<bool> finite{true};
  all_filters(k, w, size.u, u, parallel);
  shared_input(k, plan, x, v, false, parallel, [&](const TileRange& tiles) {
    parallel(36 * plan.splits, [&](int64_t job) {
      const int64_t point = job / plan.splits, split = job % plan.splits;
      const int64_t first = blocks * split / plan.splits, last = blocks * (split + 1) / plan.splits;
      const TileRange some = tiles.with_point(point);
      if (some.count() == 0) return;
      const Points from = v.from(some.begin - tiles.begin), to = m.from(some.begin - tiles.begin);
      k.pieces_multiply(from.data + point * v.position, v.row, some.count(), x.c,
                        u + first * size.u + point * filters_position(x.c, k.block), size.u, last - first,
                        to.data + point * m.position + first * k.block, m.row, scratch(pieces_scratch(x.c, last - first)));
    });
    parallel_ranges(parallel, tiles.count(), tiles_at_once, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; ++b) {
        const Points block{m.data + begin * m.row + b * k.block, m.row, m.position};
        if (!k.winograd_output(block, {tiles.grid, tiles.begin + begin, tiles.begin + end}, b, out))
          finite.store(false, std::memory_order_relaxed);
      }
    });
  });
  return finite;
}

} // namespace

Machine machine(const Kernels& k, int threads) {
  Machine m{k.width, k.block, k.rows, threads, k.amx_rows != nullptr};
#ifdef _SC_LEVEL2_CACHE_SIZE // which macOS does not have
  // 0 where the system does not tell. More than 2 MB has not been measured, and a virtual machine may tell more than there is.
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (l2 > 0) m.l2 = std::min<int64_t>(l2, 2 << 20);
#endif
  return m;
}

int64_t forward_workspace(const Kernels& k, const Plan& plan, const Image& x, const Filters& w) {
  if (plan.algorithm == Algorithm::amx) return amx_workspace(plan, x, w);
  const int64_t direct = direct_workspace(k, x, w); // Winograd may have to be repeated directly
  if (plan.algorithm == Algorithm::direct) return direct;
  const Sizes size(k, plan, x.c);
  if (plan.schedule == Schedule::tile_fused) return std::max(ceil_div(w.out, k.block) * size.u, direct);
  if (plan.schedule == Schedule::channels_split) return std::max(size.v, direct);
  const int64_t m = plan.schedule == Schedule::points_split ? 36 * shared_m(k, plan, w, nullptr).position : 0;
  return std::max(size.v + m + ceil_div(w.out, k.block) * size.u, direct);
}

void forward(const Kernels& k, const Plan& plan, const Image& x, const Filters& w, const Output& out, float* workspace,
             const Parallel& parallel) {
  if (plan.algorithm == Algorithm::amx) return forward_amx(k, plan, x, w, out, workspace, parallel);
  if (plan.algorithm == Algorithm::winograd) {
    const auto run = plan.schedule == Schedule::tile_fused       ? forward_tile_fused
                     : plan.schedule == Schedule::channels_split ? forward_channels_split
                     : plan.schedule == Schedule::points_split   ? forward_points_split
                                                                 : forward_chunks_split;
    if (run(k, plan, x, w, out, workspace, parallel)) return;
  }
  forward_direct(k, plan.algorithm == Algorithm::direct ? plan : plan_direct(x.n, w.in, w.out, x.h, x.w, 1, "Inf or NaN"), x, w,
                 out, workspace, parallel);
}

void max_pool(const Kernels& k, const Image& x, const Output& out, const Parallel& parallel) {
  parallel_ranges(parallel, x.n * (x.h / 2), 4, [&](int64_t begin, int64_t end) { k.max_pool_rows(x, out, begin, end); });
}

void max_pool_grad(const Kernels& k, const Image& dz, const Output& out, const Parallel& parallel) {
  parallel_ranges(parallel, dz.n * dz.h, 8, [&](int64_t begin, int64_t end) { k.max_pool_grad_rows(dz, out, begin, end); });
}

} // namespace vggfast::cpu
