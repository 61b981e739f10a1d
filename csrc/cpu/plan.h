// How a problem is cut up: a pure function from the problem and the machine to a small value that can be printed and tested.
#pragma once
#include <algorithm>
#include <string>

#include "cpu/amx.h"

namespace vggfast::cpu {

enum class Algorithm { automatic, winograd, direct, amx }; // amx: direct, on tile registers; only ever planned

struct Machine {
  int width, block, rows; // of the ISA's micro-kernel
  int threads;
  bool amx = false;     // it has the tile registers
  int64_t l2 = 1 << 20; // bytes of a core's second-level cache
  // Row blocks of so few tiles read U and Z for little work each, as those of AVX2 do.
  bool short_row_blocks() const { return rows < 8; }
};

// How Winograd's steps (V of the input, M = V U, Y of M; in grad_weight Z of the gradients, S = V^T Z) are shared out.
enum class Schedule {
  tile_fused,     // a thread takes `tiles` tiles through all three steps; M stays in its L2, and V where it fits
  channels_split, // V of `tiles` tiles is shared; a thread takes a block of output channels, and makes U of `depth` channels at a
                  // time
  chunks_split,   // V of `tiles` tiles is shared; a thread takes a block of output channels of one of `splits` parts of them
  points_split,   // V of `tiles` tiles is shared, and in grad_weight Z; threads take points and blocks of output channels (forward:
                  // one of `splits` ranges of them)
  outputs_split,  // grad_weight: a thread takes one of `groups` parts of the tiles and one of `splits` ranges of output channels
  outputs_fused // grad_weight: a thread takes all tiles, one of `splits` ranges of output channels and one of `in_splits` of input
                // channels through all steps; S of `depth` input channels stays in its L2
};

constexpr int64_t bias_group = 16; // tiles whose gradients are summed in fp32 before the sums are added in double

struct Plan {
  Algorithm algorithm = Algorithm::direct;
  Schedule schedule = Schedule::tile_fused;
  int64_t tiles = 0, depth = 0;
  int64_t groups = 1; // grad_weight: parts of the tiles whose sums are kept apart; depends on the problem alone, and so do bits
  // Direct and AMX: output rows a thread takes at once; 0 in grad_weight.
  int64_t band = 0;
  const char* reason = "";
  int64_t splits = 1; // outputs-split, forward's points-split, AMX: ranges of output channels; chunks-split: parts of the tiles
  Edges edges = {};
  bool pieces = false; // products of floats in three pieces, on AMX's tile registers
  // Forward on AMX: images whose bands a thread takes at once, and whether it packs the filters of its output channels itself.
  int64_t images = 1;
  bool own_filters = false;
  int64_t in_splits = 1; // outputs-fused
};

inline Plan make_winograd_plan(Schedule schedule, int64_t tiles, int64_t depth, const Edges& edges, const char* reason) {
  Plan plan;
  plan.algorithm = Algorithm::winograd, plan.schedule = schedule;
  plan.tiles = tiles, plan.depth = depth, plan.edges = edges, plan.reason = reason;
  return plan;
}

inline Plan make_direct_plan(int64_t band, const char* reason) {
  Plan plan;
  plan.band = band, plan.reason = reason;
  return plan;
}

inline std::string to_string(const Edges& e) {
  if (!e.row && !e.column) return "";
  return std::string(", F(2) in the last ") + (!e.column ? "row" : e.row ? "row and column" : "column");
}

inline std::string to_string(const Plan& p) {
  if (p.algorithm == Algorithm::direct)
    return "direct" + (p.band > 0 ? ", bands of " + std::to_string(p.band) + " rows: " : ": ") + p.reason;
  if (p.algorithm == Algorithm::amx && p.schedule == Schedule::outputs_split)
    return "direct on AMX tiles, chunks of " + std::to_string(p.tiles) + " rows: " + p.reason;
  if (p.algorithm == Algorithm::amx)
    return "direct on AMX tiles, bands of " + std::to_string(p.band) + " rows" +
           (p.images > 1 ? " of " + std::to_string(p.images) + " images" : "") +
           (p.splits > 1 ? ", output channels in " + std::to_string(p.splits) + " ranges: " : ": ") + p.reason;
  const char* schedules[] = {"tile-fused",
                             "V shared, output channels split",
                             "V shared, output channels and tiles split",
                             "V shared, points split",
                             "outputs split",
                             "outputs fused"};
  return "winograd F(4x4,3x3)" + to_string(p.edges) + (p.pieces ? ", products on AMX tiles, " : ", ") + schedules[int(p.schedule)] +
         ", tiles " + std::to_string(p.tiles) +
         (p.schedule == Schedule::chunks_split ? " in " + std::to_string(p.splits) + " parts"
          : p.schedule == Schedule::outputs_fused
              ? ", channels in " + std::to_string(p.in_splits) + " x " + std::to_string(p.splits) + " ranges"
              : "") +
         ": " + p.reason;
}

inline TileGrid tile_grid(int64_t n, int64_t h, int64_t w, const Edges& edges = {}) {
  return {n, ceil_div(h, 4), ceil_div(w, 4), edges};
}

// One or two pixels of a tile take four products in a dimension with F(2), six with F(4).
inline Edges edges_of(int64_t h, int64_t w) {
  return {h % 4 == 1 || h % 4 == 2, w % 4 == 1 || w % 4 == 2};
}

// Floats a row of V or Z takes: the extra vector keeps the 36 positions out of the same cache sets.
inline int64_t points_row(int64_t channels, const Machine& m) {
  return round_up(channels, m.block) + m.width;
}

// A band cut until all images have `jobs` of them together, or it has no more than `least` rows.
inline int64_t cut_band(int64_t band, int64_t least, int64_t n, int64_t h, int64_t jobs) {
  while (band > least && n * ceil_div(h, band) < jobs) band = round_up(band / 2, 2);
  return band;
}

// What equal chunks take of `count`, in whole `multiple`s, where none may take more than `largest` of them.
inline int64_t equal_chunk(int64_t count, int64_t largest, int64_t multiple) {
  return round_up(ceil_div(count, ceil_div(count, largest)), multiple);
}

// A block of output channels of which few are there is mostly zeros; all taps of four channels fill it.
inline bool taps_fill_a_block(int64_t in, int64_t out) {
  return out <= 4 && in > 4;
}

// Direct: the padded fp32 band should stay in L2 beside the packed filters; where all taps fill one block, rows come one by one.
// Bands too few for many threads are cut.
inline Plan plan_direct(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, int threads, const char* reason) {
  const int64_t row_bytes = (w + 2) * in * 4;
  const int64_t fitting = taps_fill_a_block(in, out) ? 16 : 256 * 1024 / row_bytes - 2;
  const int64_t band = std::min(std::clamp<int64_t>(fitting / 2 * 2, 2, 16), round_up(h, 2));
  return make_direct_plan(cut_band(band, 2, n, h, threads), reason);
}

// AMX: a thread keeps a padded band in L2, beside the filters of a block of output channels, and passes over it block by block. Few
// and small bands do not give all threads work: they then take ranges of the output channels as well. Where filters are many, what
// reads them costs: small images then share a job, and where L2 keeps all images no filters are written to be read once.
inline Plan plan_amx(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, const Machine& m) {
  const AmxShape shape(in, w);
  const int64_t row_bytes = shape.row(w) * 2, image_bytes = shape.band(h, w) * 2, fitting = (1 << 19) / row_bytes - 2;
  const int64_t rows = round_up(h, 2), blocks = ceil_div(out, kAmxBlock);
  const bool many = blocks * shape.filters() * 2 > 1 << 20;
  Plan plan;
  plan.algorithm = Algorithm::amx, plan.band = rows, plan.splits = m.threads,
  plan.reason = "filters are packed where they are used";
  plan.own_filters = many && image_bytes <= (1 << 20) / n && blocks >= 2 * m.threads;
  plan.images = plan.own_filters ? n : many ? std::clamp<int64_t>((9 << 16) / image_bytes, 1, n) : 1;
  if (plan.own_filters) return plan;
  while (plan.images > 1 && ceil_div(n, plan.images) < m.threads) --plan.images;
  plan.images = equal_chunk(n, plan.images, 1);
  if (plan.images == 1) plan.band = cut_band(std::min(std::max<int64_t>(fitting / 2 * 2, 2), rows), 8, n, h, 8 * m.threads);
  plan.splits = std::min(blocks, ceil_div(4 * m.threads, ceil_div(n, plan.images) * ceil_div(h, plan.band)));
  plan.reason = "tile registers multiply bfloat16 sixteen times as fast";
  return plan;
}

// However small the image: one pixel takes 16 products with F(2), where direct takes 9, and still less time. The direct kernel's
// vectors are as empty where outputs are few, and those of its gradient of the filters; the transforms' where inputs are.
inline const char* why_direct(bool few_channels, Algorithm wanted) {
  if (wanted == Algorithm::direct) return "asked for";
  return few_channels && wanted != Algorithm::winograd ? "with so few channels transforms cost more than they save" : nullptr;
}

// Passes over the filters, each of which makes them where they are used, or 0. M of a block of output channels stays in L2, and V,
// read once a block, should be little beside the U that need not be written and read back. A thread takes whole blocks: few of
// them are not shared out evenly. What a pass makes, few tiles would not pay for.
inline int64_t split_channels_passes(int64_t tiles, int64_t blocks, int64_t u_bytes, const Machine& m) {
  if (tiles <= 128) return blocks >= m.threads ? 1 : 0;
  if (blocks < 4 * m.threads) return 0;
  const bool large = u_bytes >= 16 << 20;
  const int64_t largest = (large ? m.l2 * 7 / 8 : m.l2 / 2) / (36 * 4 * m.block);
  return tiles <= largest ? 1 : large && largest >= 256 ? ceil_div(tiles, largest) : 0;
}

// Input channels that U is made of at a time. Each time M is read and written once more: for few tiles that is little, and U, V
// and M of so many channels stay in L2; else U alone does.
inline int64_t split_depth(int64_t tiles, const Machine& m) {
  return tiles <= 64 ? 4096 / m.block : round_up(m.l2 / (36 * 4 * m.block), 128);
}

// A pass takes `tiles` in parts of half a row block or more, so long as all threads have work; four jobs a thread even out.
inline Plan plan_chunks(int64_t tiles, int64_t in, int64_t blocks, const Machine& m, const char* reason, const Edges& edges) {
  const int64_t even = std::min(ceil_div(4 * m.threads, blocks), ceil_div(2 * tiles, m.rows));
  const int64_t parts = std::min(std::max(even, ceil_div(m.threads, blocks)), tiles);
  Plan plan = make_winograd_plan(Schedule::chunks_split, tiles, in, edges, reason);
  plan.splits = parts;
  return plan;
}

// Whether AMX multiplies floats in pieces. Packing them costs what 20 to 40 of each value's products do, so that channels on both
// sides must be many, and in forward tiles. It depends on the problem alone: pieces and vectors differ in their last bits.
inline bool in_pieces(int64_t in, int64_t out, const Machine& m) {
  return m.amx && in % 32 == 0 && in >= 96 && out >= 96;
}

// V and M of a pass pass through L3: 64 MB of them leave the workspace room for U in what a thread keeps. A thread packs U of a
// point and a range of output channels where its L2 keeps it.
inline Plan plan_pieces(int64_t tiles, int64_t in, int64_t out, const Machine& m, const Edges& edges) {
  const int64_t blocks = ceil_div(out, m.block), fitting = (64 << 20) / (36 * 4 * (in + out));
  const int64_t ranges = std::max(ceil_div(6 * in * blocks * m.block, 800 << 10), ceil_div(4 * m.threads, 36));
  const int64_t of_pass = equal_chunk(tiles, std::clamp<int64_t>(fitting, 128, 800), 1);
  Plan plan = make_winograd_plan(Schedule::points_split, of_pass, in, edges, "a float is three bfloat16");
  plan.splits = std::min(blocks, ranges), plan.pieces = true;
  return plan;
}

// Forward and grad_input: n images of h x w, `in` channels read, `out` channels written.
inline Plan choose_plan(DType dtype, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, const Machine& m, Algorithm wanted) {
  if (m.amx && dtype == DType::bf16 && wanted != Algorithm::winograd) return plan_amx(n, in, out, h, w, m);
  const char* direct = why_direct(in < 8 || out < 5 || in * out <= 64, wanted);
  if (direct) return plan_direct(n, in, out, h, w, m.threads, direct);
  const int64_t tiles = tile_grid(n, h, w).count(), blocks = ceil_div(out, m.block);
  const Edges edges = edges_of(h, w);
  if (in_pieces(in, out, m) && tiles >= 128) return plan_pieces(tiles, in, out, m, edges);
  const int64_t v_bytes = 36 * 4 * points_row(in, m) * m.rows, u_bytes = 36 * 4 * in * round_up(out, m.block);
  const int64_t split_passes = in < 64 ? 0 : split_channels_passes(tiles, blocks, u_bytes, m);
  if (split_passes > 0)
    return make_winograd_plan(Schedule::channels_split, ceil_div(tiles, split_passes), std::min(in, split_depth(tiles, m)), edges,
                              split_passes > 1 ? "filters are made where they are used, once a pass"
                              : tiles > 128    ? "M of a block stays in L2: filters are made where they are used"
                                               : "few tiles: filters are made where they are used");
  // V of a row block of tiles beyond L2, or U beyond what L3 keeps: U is then read once for as many tiles as M of a block of output
  // channels stays in L2 for. Row blocks of few tiles ask more of L3.
  if (v_bytes > 768 * 1024 || u_bytes >= (m.short_row_blocks() ? 8 : 16) << 20) {
    const int64_t passes = ceil_div(tiles, 131), of_thread = ceil_div(tiles, round_up(passes, m.threads));
    if (of_thread >= 2 * m.rows)
      return make_winograd_plan(Schedule::tile_fused, of_thread, in, edges, "few passes over so many filters");
    return plan_chunks(ceil_div(tiles, passes), in, blocks, m, "few passes over so many filters, by many threads", edges);
  }
  // A row block of few tiles reads U from beyond L2 for few products; larger groups share it, while all threads have some. Where a
  // row block is 14 tiles two of them pay while V is small. Where such groups are too few, threads share V instead of waiting.
  const int64_t largest = m.short_row_blocks() ? 48 : in <= 128 ? 2 * m.rows : m.rows;
  const int64_t of_group = std::clamp<int64_t>(tiles / (4 * m.threads) / m.rows * m.rows, m.rows, largest);
  if (4 * ceil_div(tiles, of_group) < 3 * m.threads && blocks > 1)
    return plan_chunks(tiles, in, blocks, m, "groups of tiles are fewer than threads", edges);
  return make_winograd_plan(Schedule::tile_fused, of_group, in, edges, "V and M of a group of tiles stay in L2");
}

// A thread takes one of `groups` parts of the rows and one of `splits` ranges of output channels. What a chunk of `tiles` rows
// needs stays in L2; neither parts nor chunks depend on the threads, and so bits do not.
inline Plan plan_amx_grad_weight(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, const Machine& m) {
  const int64_t blocks = ceil_div(out, kAmxBlock), channels = round_up(in, 32) + std::min<int64_t>(round_up(out, 32), 256);
  const int64_t sums_bytes = blocks * ceil_div(in, kAmxBlock) * kAmxSums * 4, rows = AmxPositions(n, h, w).rows();
  // Each chunk reads and writes the sums once: many of them are worth larger chunks.
  const int64_t bytes = std::max<int64_t>(5 << 18, sums_bytes / 3);
  int64_t chunk = std::clamp<int64_t>(bytes / (2 * channels * (w + 1)) / 2 * 2, 2, round_up(rows, 2));
  const int64_t parts = std::clamp<int64_t>(std::min((16 << 20) / sums_bytes, rows / chunk), 1, 8);
  const int64_t of_part = ceil_div(rows, parts);
  chunk = equal_chunk(of_part, chunk, 2);
  const int64_t splits = std::min(blocks, ceil_div(m.threads, parts));
  Plan plan;
  plan.algorithm = Algorithm::amx, plan.schedule = Schedule::outputs_split,
  plan.reason = "a product over pixels, of which a tap is a shift";
  plan.tiles = chunk, plan.depth = in, plan.groups = parts, plan.splits = splits;
  return plan;
}

// Outputs fused: how many ranges of output and of input channels the threads finish soonest, if some wait for others so be it. A
// job transforms its own ranges, and a channel's transform takes about as long as its products with ten others. Z of a range, which
// the thread keeps memory for, is 32 MB at most.
struct Ranges {
  int64_t out, in;
};
inline Ranges fused_ranges(int64_t tiles, int64_t in, int64_t out, int64_t depth, const Machine& m) {
  const int64_t blocks = ceil_div(out, m.block), parts = ceil_div(in, depth);
  Ranges best = {1, 1};
  int64_t least = INT64_MAX;
  for (int64_t b = 1; b <= parts; ++b)
    for (int64_t a = 1; a <= blocks; ++a) {
      const int64_t outs = ceil_div(blocks, a) * m.block, ins = ceil_div(parts, b) * depth;
      if (36 * 4 * tiles * outs > 32 << 20 && a < blocks) continue;
      const int64_t time = ceil_div(a * b, m.threads) * (ins * outs + 10 * (ins + outs));
      if (time < least) best = {a, b}, least = time;
    }
  return best;
}

// grad_weight. Threads share nothing while there are parts and ranges for all of them: a host may place them on cores between which
// data moves slowly. A range of output channels costs each of its threads V of the same tiles again, one of input channels Z, which
// is little beside the products.
inline Plan choose_grad_weight_plan(DType dtype, int64_t n, int64_t in, int64_t out, int64_t h, int64_t w, const Machine& m,
                                    Algorithm wanted) {
  if (m.amx && dtype == DType::bf16 && wanted != Algorithm::winograd && in >= 16) return plan_amx_grad_weight(n, in, out, h, w, m);
  const char* direct = why_direct(in < 12, wanted);
  if (direct) return make_direct_plan(0, direct);
  const int64_t tiles = tile_grid(n, h, w).count(), blocks = ceil_div(out, m.block);
  const int64_t tile_bytes = 36 * 4 * (points_row(in, m) + points_row(out, m)), s_bytes = 36 * 4 * in * round_up(out, m.block);
  // Each chunk passes V and Z through L3 once, and S once: neither should cost much more than the other. A last chunk of few tiles
  // would pass S like the others, so all are equal.
  const int64_t chunk_bytes = std::clamp<int64_t>(s_bytes * 2 / 3, 4 << 20, 20 << 20);
  const bool pieces = in_pieces(in, out, m) && tiles >= 32;
  const int64_t multiple = pieces ? 32 : bias_group, fitting = std::max(chunk_bytes / tile_bytes / multiple * multiple, multiple);
  const int64_t parts = std::clamp<int64_t>(std::min((16 << 20) / s_bytes, tiles / 128), 1, 4);
  const int64_t of_part = round_up(ceil_div(tiles, parts), bias_group);
  const char* few = "few output channels and tiles for so many threads";
  // Where tiles are few, S is much beside V and Z: it is made in parts, each of all tiles, that need not go to memory. The fewer
  // tiles a row block has, the more often Z is read again. Threads that share V and Z take all tiles at once, too, for the same
  // bits.
  const int64_t fused_tiles = s_bytes >= 16 << 20 ? 512 : m.short_row_blocks() ? 128 : 256;
  if (parts == 1 && tiles <= fused_tiles && !pieces) {
    Plan plan = make_winograd_plan(Schedule::points_split, tiles, in, edges_of(h, w), few);
    const int64_t depth = std::min<int64_t>(in, 64);
    if (4 * blocks * ceil_div(in, depth) < 3 * m.threads) return plan;
    const Ranges ranges = fused_ranges(tiles, in, out, depth, m);
    plan.schedule = Schedule::outputs_fused, plan.depth = depth, plan.reason = "a thread makes V, Z and S for itself";
    plan.splits = ranges.out, plan.in_splits = ranges.in;
    return plan;
  }
  int64_t splits = 1;
  while (splits < blocks && parts * splits % m.threads != 0 && parts * splits < 4 * m.threads) ++splits;
  const bool enough = parts * splits >= m.threads;
  Plan plan = make_winograd_plan(enough ? Schedule::outputs_split : Schedule::points_split, equal_chunk(of_part, fitting, multiple),
                                 in, edges_of(h, w), enough ? "V and Z stay with the thread that made them" : few);
  plan.groups = parts, plan.splits = splits, plan.pieces = pieces;
  return plan;
}

// Outputs of a fully connected layer that share a piece of x: their rows of weights are read in turn, a kilobyte or two of each.
// Where L2 keeps little, few rows at a time are faster although x then comes from L3 more often.
inline int linear_together(const Machine& m) {
  return m.width == 16 ? 1 : m.l2 < 1 << 20 ? kLinearOuts / 4 : kLinearOuts;
}

} // namespace vggfast::cpu
