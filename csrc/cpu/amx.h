// How a convolution of bfloat16 images is laid out for AMX's tile registers: geometry that its kernel and its schedule share.
#pragma once
#include "cpu/kernels.h"

namespace vggfast::cpu {

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
  // Elements of a padded band for `height` rows of output; the last tile of its last row may reach past it.
  int64_t band(int64_t height, int64_t width) const {
    return (round_up(height, 2) + 2) * row(width) + (columns * pixels - width) * pitch;
  }
  // From the pixel above and left of an output to the first value of a step. Taps follow each other within 32 channels, so that
  // nine steps read the same lines.
  int64_t offset(int64_t step, int64_t row_size) const {
    const int64_t tap = few ? 3 * step : step % 9;
    return tap / 3 * row_size + tap % 3 * pitch + (few ? 0 : step / 9 * 32);
  }
};

static constexpr int kAmxBlock = 32;                // output channels, two tiles
static constexpr int64_t kAmxTile = 16 * kAmxBlock; // elements of a tile of filters: [16 pairs of values][16 outputs][2]

} // namespace vggfast::cpu
