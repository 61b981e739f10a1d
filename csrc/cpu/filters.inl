// Filters with any strides, in and out of [9 taps][kBlock output channels]. Of an ordinary weight [out, in, 3, 3] the nine taps lie
// together, in order or (mirrored, for grad_input) in reverse; a vector of output channels is then rows of nine, transposed in
// registers. Of a channels_last weight input channels do, and (mirrored) output channels.

using Taps = float[9][kBlock];

// +1 or -1 where the nine taps of a filter lie together in that direction, else 0.
static inline int taps_direction(const Filters& w) {
  const bool together = w.stride_r == 3 * w.stride_s && (w.stride_s == 1 || w.stride_s == -1);
  return together ? int(w.stride_s) : 0;
}

template <class T>
static inline void gather_taps(const Filters& w, int64_t k0, int64_t lanes, int64_t c, Taps& taps) {
  const T* p = (const T*)w.data + k0 * w.stride_out + c * w.stride_in;
  const int direction = taps_direction(w);
  if (w.stride_out == 1) {
    for (int64_t k = 0; k < lanes; k += Vec::width)
      for (int i = 0; i < 9; ++i)
        load_lanes(p + k + i / 3 * w.stride_r + i % 3 * w.stride_s, lanes_from(k, lanes)).store(taps[i] + k);
    return;
  }
  if (direction == 0 || lanes < kBlock) {
    for (int64_t k = 0; k < lanes; ++k, p += w.stride_out)
      for (int r = 0; r < 3; ++r)
        for (int s = 0; s < 3; ++s) taps[3 * r + s][k] = to_float(p[r * w.stride_r + s * w.stride_s]);
    return;
  }
  const T* lowest = direction > 0 ? p : p - 8;
  for (int k = 0; k < kBlock; ++k) // kBlock rows far apart are more streams than hardware prefetchers follow
    __builtin_prefetch(lowest + k * w.stride_out + 16 * w.stride_in);
  for (int k = 0; k < kBlock; k += Vec::width)
    for (int first = 0; first < 9; first += Vec::width) {
      const int count = 9 - first < Vec::width ? 9 - first : Vec::width;
      Vec rows[Vec::width];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) rows[i] = load_lanes(lowest + (k + i) * w.stride_out + first, count);
      transpose(rows);
      for (int i = 0; i < count; ++i) rows[i].store(taps[direction > 0 ? first + i : 8 - first - i] + k);
    }
}

// Whether the filters of neighbouring input channels follow each other, as those of an ordinary weight read forward do, or their
// taps do, as those of a channels_last weight.
static inline bool channels_together(const Filters& w) {
  return (taps_direction(w) == 1 && w.stride_in == 9) || w.stride_in == 1;
}

// Taps of Vec::width input channels from c on, for a vector of output channels from k on, as [channel][tap][Vec::width]. Each row
// of memory is read once and in whole vectors: visited again for every channel it would have left L1, where rows a power of two
// apart share a few sets.
template <class T>
static inline void gather_channels(const Filters& w, int64_t k, int64_t c, float* taps) {
  const T* p = (const T*)w.data + k * w.stride_out + w.stride_in * c;
  const bool more = c + 2 * Vec::width <= w.in;
  if (w.stride_in == 1) {
    for (int tap = 0; tap < 9; ++tap, taps += Vec::width) {
      const T* row = p + tap / 3 * w.stride_r + tap % 3 * w.stride_s;
      Vec rows[Vec::width];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) rows[i] = Vec::load(row + i * w.stride_out);
      if (more)
        for (int i = 0; i < Vec::width; ++i) __builtin_prefetch(row + i * w.stride_out + Vec::width);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) rows[i].store(taps + i * 9 * Vec::width);
    }
    return;
  }
  for (int part = 0; part < 9; ++part, p += Vec::width, taps += Vec::width * Vec::width) {
    Vec rows[Vec::width];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::width; ++i) rows[i] = Vec::load(p + i * w.stride_out);
    if (more) // so many rows are more streams than hardware prefetchers follow
      for (int i = 0; i < Vec::width; ++i) __builtin_prefetch(p + i * w.stride_out + 9 * Vec::width);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < Vec::width; ++i) rows[i].store(taps + i * Vec::width);
  }
}

// Only ever into a gradient's own memory, [out, in, 3, 3] contiguous.
template <class T>
static inline void scatter_taps(const Filters& w, int64_t k0, int64_t lanes, int64_t c, const Taps& taps) {
  T* p = (T*)const_cast<void*>(w.data) + k0 * w.stride_out + c * w.stride_in;
  for (int k = 0; k < lanes; k += Vec::width)
    for (int first = 0; first < 9; first += Vec::width) {
      const int count = 9 - first < Vec::width ? 9 - first : Vec::width;
      Vec rows[Vec::width];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) rows[i] = i < count ? Vec::load(taps[first + i] + k) : Vec::zero();
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i)
        if (k + i < lanes) store_lanes(rows[i], p + (k + i) * w.stride_out + first, count);
    }
}

// The same for Vec::width input channels from c on and as many output channels from k on, of taps as gather_channels has them: each
// row of memory is written once and in whole vectors. stream: past the caches, where a row's vectors are lines.
template <class T, bool stream>
static inline void scatter_channels(const Filters& w, int64_t k, int64_t c, const float* taps) {
  T* p = (T*)const_cast<void*>(w.data) + k * w.stride_out + c * w.stride_in;
  for (int part = 0; part < 9; ++part, p += Vec::width, taps += Vec::width * Vec::width) {
    Vec rows[Vec::width];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::width; ++i) rows[i] = Vec::load(taps + i * Vec::width);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < Vec::width; ++i)
      if constexpr (stream && std::is_same_v<T, float>)
        rows[i].stream(p + i * w.stride_out);
      else
        rows[i].store(p + i * w.stride_out);
  }
}
