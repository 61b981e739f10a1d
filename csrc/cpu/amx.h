// How a convolution of bfloat16 images is laid out for AMX's tile registers: geometry that its kernel and its schedule share.
#pragma once
#include "cpu/kernels.h"

namespace vggfast::cpu {

static constexpr int kAmxBlock = 32;                       // output channels, two tiles
static constexpr int64_t kAmxTile = 16 * kAmxBlock;        // elements of a tile of filters: [16 pairs of values][16 outputs][2]
static constexpr int64_t kAmxResults = 2 * 16 * kAmxBlock; // sums of a tile of pixels in two output rows, a block of channels each

// A step multiplies pixels by filters over `depth` of their values: one tap of 32 input channels. Where a row of three taps has no
// more values than that, as in a first layer, a step is that row.
struct AmxShape {
  bool few;
  int64_t channels; // of the padded image
  int64_t pitch;    // between its pixels, in elements
  int64_t depth, steps;
  int64_t columns, pixels; // tiles in a row of the image, and the pixels of each: even, so that no pool window lies in two

  AmxShape(int64_t in, int64_t width)
      : few(in <= 10), channels(round_up(in, few ? 2 : 32)), pitch(channels < 256 ? channels : channels + 32),
        depth(few ? 3 * channels : 32), steps(few ? 3 : 9 * channels / 32), columns(ceil_div(width, 16)),
        pixels(round_up(ceil_div(width, columns), 2)) {}

  int64_t row(int64_t width) const { return (width + 2) * pitch; } // elements of a padded row
  int64_t filters() const { return steps * 2 * kAmxTile; }         // elements of a block's packed filters
  // Elements of a padded band for `height` rows of output; the last tile of its last row may reach past it.
  int64_t band(int64_t height, int64_t width) const {
    return (round_up(height, 2) + 2) * row(width) + (columns * pixels - width) * pitch;
  }
  // Floats of a job's memory: twice the sums of two tiles in two rows, where steps begin, filters if it packs its own, a band of
  // each image.
  int64_t floats(int64_t images, int64_t height, int64_t width, bool own_filters) const {
    const int64_t elements = images * band(height, width) + (own_filters ? filters() : 0);
    return 2 * kAmxResults + 2 * round_up(steps, 8) + ceil_div(elements, 2);
  }
  // From the pixel above and left of an output to the first value of a step. Taps follow each other within 32 channels, so that
  // nine steps read the same lines.
  int64_t offset(int64_t step, int64_t row_size) const {
    const int64_t tap = few ? 3 * step : step % 9;
    return tap / 3 * row_size + tap % 3 * pitch + (few ? 0 : step / 9 * 32);
  }
};

static constexpr int64_t kAmxSums = 9 * 4 * 256; // of a gradient of 32 x 32 filters: [9 taps][2][2] tiles of fp32

// The pixels of all images in one line for the gradient of the filters, which sums over them: a zero after each row, a row of zeros
// after each image. What a tap reads beside a pixel then lies at a distance that is the same for all.
struct AmxPixel {
  int64_t n, h, w; // h = H and w = W are the zeros after a row and an image
};
struct AmxPositions {
  int64_t n, h, w, row; // row: positions of one
  AmxPositions(int64_t n, int64_t h, int64_t w) : n(n), h(h), w(w), row(w + 1) {}
  int64_t rows() const { return n * (h + 1) - 1; }
  AmxPixel at(int64_t position) const { // from -row - 1 on: what lies before the first image are an image's last zeros
    const int64_t size = row * (h + 1), image = (position + size) / size - 1, rest = position - image * size;
    return {image, rest / row, rest % row};
  }
  void next(AmxPixel& p) const {
    if (++p.w < row) return;
    p.w = 0;
    if (++p.h <= h) return;
    p.h = 0;
    ++p.n;
  }
  bool inside(const AmxPixel& p) const { return p.n >= 0 && p.n < n && p.h < h && p.w < w; }
};

// Memory of one chunk of rows, in elements.
struct AmxChunk {
  int64_t pairs;           // of positions, a multiple of 16
  int64_t columns, stride; // of the transposed input: what taps reach is there, too. Rows are an odd number of lines apart
  int64_t transposed, gradients, rows;
  AmxChunk(const AmxPositions& p, int64_t chunk, int64_t in, int64_t out)
      : pairs(round_up(ceil_div(chunk * p.row, 2), 16)), columns(round_up(2 * pairs + 2 * p.row + 2, 32)),
        stride(odd_lines(ceil_div(columns, 2)) * 2), transposed(round_up(in, kAmxBlock) * stride), gradients(2 * pairs * out),
        rows(2 * p.row * out) {}
  int64_t floats() const { return ceil_div(transposed + gradients + rows, 2); }
};

} // namespace vggfast::cpu
