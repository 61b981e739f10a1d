// What an ISA offers: functions that compute a range, on one thread, into memory the caller owns. Plain data in, plain data out.
#pragma once
#include "conv3x3.h"
#include "cpu/tiles.h"
#include "linear.h"

namespace vggfast::cpu {

static inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Memory that will be read soon; products ask for it as they go, so that it has come from DRAM by then.
struct Soon {
  const char* data;
  int64_t bytes;
};

// 36 matrices [tile][channel]; strides in floats. A row has room for whole vectors past its last channel.
struct Points {
  float* data;
  int64_t row, position;
  Points from(int64_t tile) const { return {data + tile * row, row, position}; }
};

// An odd number of cache lines that holds `floats`: 36 positions this far apart fall into different cache sets.
static inline int64_t odd_lines(int64_t floats) {
  return (ceil_div(floats, 16) | 1) * 16;
}
static inline int64_t filters_position(int64_t in, int64_t block) { // between the 36 positions of U or S[36][in][block]
  return odd_lines(in * block);
}

static constexpr int kLinearRows = 8;       // that the forward kernel takes at most; the others take max_linear_rows
static constexpr int kLinearOuts = 24;      // that share a piece of x at most
static constexpr int kLinearColumns = 1024; // of a gradient that a call makes at most: they stay in L2 while the weights pass by
static constexpr int kLinearPadding = 8;    // outputs that `grad` has past the last one, zero

// Floats that pieces_multiply and pieces_accumulate need for sums of so many terms.
static inline int64_t pieces_scratch(int64_t terms, int64_t blocks) {
  return 32 * 32 + (1 + blocks) * round_up(terms, 32) * 48;
}

struct BFloat16;

// What a thread computes at once.
struct AmxJob {
  int64_t n_begin, n_end; // images
  int64_t h_begin, h_end; // output rows of each; h_begin is even
  int64_t begin, end;     // blocks of output channels
};

struct Kernels {
  const char* name;
  int width; // floats a vector
  int block; // output channels a micro-kernel computes; packed filters come in such blocks
  int rows;  // rows a micro-kernel computes at most

  // stream: past the caches; then v and u, and rows of dw, are aligned to 64 bytes
  void (*winograd_input)(const Image&, const TileRange&, const Points& v, bool stream);
  void (*winograd_grad_output)(const Image&, const TileRange&, int64_t c_begin, int64_t c_end, const Points& z, float* bias_sum);
  void (*winograd_filters)(const Filters&, int64_t block, float* u, bool stream);
  void (*winograd_multiply)(const Points& v, int64_t tiles, int64_t in, const float* u, int64_t channels, const Points& m,
                            int point, bool add, const Soon&);
  bool (*winograd_output)(const Points& m, const TileRange&, int64_t block, const Output&);
  void (*winograd_accumulate)(const float* v, int64_t v_row, int64_t in, const float* z, int64_t z_row, int64_t tiles,
                              int64_t channels, bool first, float* s, const Soon&);
  bool (*winograd_grad_filters)(const float* s, int64_t block, const Filters& dw, bool stream);

  void (*direct_filters)(const Filters&, int64_t block, float* packed);
  void (*direct_rows)(const Image&, const float* packed, const Output&, int64_t n, int64_t h_begin, int64_t h_end, float* scratch);
  void (*few_filters)(const Filters&, float* packed);
  void (*few_rows)(const Image&, const float* packed, const Output&, int64_t n, int64_t h_begin, int64_t h_end, float* scratch);
  void (*direct_grad_rows)(const Image&, const Image& dz, int64_t begin, int64_t end, int64_t block_begin, int64_t block_end,
                           float* sum, double* bias, float* scratch);

  // together: outputs that share a piece of x, kLinearOuts or less
  void (*linear)(const Linear&, const float* x, int64_t begin, int64_t end, int together, float* y);
  void (*linear_grad_input)(const Linear&, const float* grad, int64_t begin, int64_t end, float* dx);
  void (*linear_grad_weight)(const Linear&, const float* x, const float* grad, int64_t begin, int64_t end, void* dw);

  void (*max_pool_rows)(const Image&, const Output&, int64_t begin, int64_t end);         // rows of N * H/2
  void (*max_pool_grad_rows)(const Image& dz, const Output&, int64_t begin, int64_t end); // rows of N * H

  int64_t (*fma_loop)(int64_t steps, float* out); // how many operations it did; `out` holds 16 floats, one of them read

  // Only with AMX's tile registers, for bfloat16; else null. Blocks [begin, end) of the output channels. packed may be null: then
  // filters are packed where they are used.
  void (*amx_filters)(const Filters&, int64_t block, BFloat16* packed) = nullptr;
  void (*amx_rows)(const Image&, const Filters&, const BFloat16* packed, const Output&, const AmxJob&, float* scratch) = nullptr;
  void (*amx_grad_rows)(const Image& x, const Image& dz, int64_t row_begin, int64_t row_end, int64_t chunk, int64_t begin,
                        int64_t end, float* sums, double* bias, float* scratch) = nullptr;
  bool (*amx_grad_filters)(const float* sums, int64_t block, const Filters& dw) = nullptr;

  // The same products as winograd_multiply and winograd_accumulate, of whole blocks of 32 input channels and several blocks of
  // output channels at one point, by tile registers (pieces.inl).
  void (*pieces_multiply)(const float* v, int64_t v_row, int64_t tiles, int64_t in, const float* u, int64_t u_block, int64_t blocks,
                          float* m, int64_t m_row, float* scratch) = nullptr;
  void (*pieces_accumulate)(const float* v, int64_t v_row, int64_t in, const float* z, int64_t z_row, int64_t tiles, int64_t blocks,
                            bool first, float* s, int64_t s_block, float* scratch) = nullptr;
};

// Of those but the first a build has its own architecture's: x86-64's, or 64-bit Arm's.
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_amx, kernels_amx_emulated, kernels_neon;

} // namespace vggfast::cpu
