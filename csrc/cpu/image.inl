// Reading a size x size patch of an Image as floats, one vector of channels at a time.
// Winograd's transforms see plain fp32 patches, whichever of the three kinds of image (conv3x3.h) there is. Direct convolution
// reads rows (load_row in direct.inl), AMX's rows of bfloat16 (amx.inl).

static inline uint32_t load_argmax(const uint8_t* p, int lanes) { // 2 bits a lane
  uint32_t packed = 0;
  if (lanes == Vec::width)
    memcpy(&packed, p, Vec::width / 4); // of known size, or it is a call and a load that waits for stores
  else
    memcpy(&packed, p, (lanes + 3) / 4);
  return packed;
}

static inline int lanes_from(int64_t channel, int64_t channels) {
  const int64_t rest = channels - channel;
  return rest < Vec::width ? int(rest) : Vec::width;
}

template <class T>
static inline Vec load_lanes(const T* p, int lanes) {
  return lanes == Vec::width ? Vec::load(p) : Vec::load_first(p, lanes);
}
template <class T>
static inline void store_lanes(Vec v, T* p, int lanes) {
  if (lanes == Vec::width) return v.store(p);
  v.store_first(p, lanes);
}

// A gradient before the ReLU that gave y: zero where it was shut.
template <class T>
static inline Vec open_gates(Vec g, const T* y, int lanes) {
  return select(not_below_or_zero(load_lanes(y, lanes)), g, Vec::zero());
}

// The gradient at one element of `data`, zero where the ReLU was shut.
template <class T>
static inline Vec load_masked(const Image& image, int64_t n, int64_t h, int64_t w, int64_t c, int lanes) {
  const Vec g = load_lanes((const T*)image.data + n * image.stride_n + h * image.stride_h + w * image.stride_w + c, lanes);
  if (!image.y) return g;
  return open_gates(g, (const T*)image.y + n * image.y_stride_n + h * image.y_stride_h + w * image.y_stride_w + c, lanes);
}

// A size x size patch of pixels, a vector of channels each: [size][size][Vec::width].
template <int size>
struct Patch {
  alignas(64) float data[size * size * Vec::width];
  float* at(int64_t i, int64_t j) { return data + (i * size + j) * Vec::width; }
};

struct Range {
  int64_t begin, end;
};
// Which of the `size` positions from `first` on lie in [0, limit).
static inline Range inside(int64_t first, int64_t size, int64_t limit) {
  return {first < 0 ? -first : 0, first + size <= limit ? size : limit - first};
}

// A loop, since for so few bytes memset takes longer than the transform that follows.
template <int size>
static inline void clear(Patch<size>& patch) {
#pragma GCC unroll 6
  for (int i = 0; i < size * size; ++i) Vec::zero().store(patch.data + i * Vec::width);
}

// A patch inside the image, from `data` and `y` on, and a whole vector of its channels: nothing is asked for each pixel.
template <class T, int size, bool masked>
static inline void load_inside(const Image& image, const T* data, const T* y, Patch<size>& patch) {
  const int64_t row = image.stride_h, column = image.stride_w, y_row = image.y_stride_h, y_column = image.y_stride_w;
  for (int64_t i = 0; i < size; ++i, data += row, y += masked ? y_row : 0)
#pragma GCC unroll 6
    for (int64_t j = 0; j < size; ++j) {
      __builtin_prefetch(data + j * column + Vec::width);
      const Vec g = Vec::load(data + j * column);
      (masked ? open_gates(g, y + j * y_column, Vec::width) : g).store(patch.at(i, j));
    }
}

// patch(i, j) = image[n, c..c+lanes, h0 + i, w0 + j], zero outside the image.
template <class T, int size>
static inline void load_patch(const Image& image, int64_t n, int64_t h0, int64_t w0, int64_t c, int lanes, Patch<size>& patch) {
  const Range rows = inside(h0, size, image.h), columns = inside(w0, size, image.w);
  const bool all = rows.begin == 0 && columns.begin == 0 && rows.end == size && columns.end == size;
  if (!all) clear(patch);
  const int64_t h = h0 + rows.begin, w = w0 + columns.begin;
  const T* data = (const T*)image.data + n * image.stride_n + h * image.stride_h + w * image.stride_w + c;
  const T* y = (const T*)image.y;
  if (y) y += n * image.y_stride_n + h * image.y_stride_h + w * image.y_stride_w + c;
  if (all && lanes == Vec::width)
    return y ? load_inside<T, size, true>(image, data, y, patch) : load_inside<T, size, false>(image, data, y, patch);
  for (int64_t i = rows.begin; i < rows.end; ++i, data += image.stride_h, y += y ? image.y_stride_h : 0)
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const int64_t column = j - columns.begin;
      const T* pixel = data + column * image.stride_w;
      __builtin_prefetch(pixel + Vec::width); // the next patch, of the channels that follow
      const Vec g = load_lanes(pixel, lanes);
      (y ? open_gates(g, y + column * image.y_stride_w, lanes) : g).store(patch.at(i, j));
    }
}

// The same for a pooled image: every pool window that touches the patch is read once and spread over its four positions.
template <class T, int size>
static inline void load_pooled_patch(const Image& image, int64_t n, int64_t h0, int64_t w0, int64_t c, int lanes,
                                     Patch<size>& patch) {
  const int64_t pooled_h = image.h / 2, pooled_w = image.w / 2, bytes = (image.c + 3) / 4;
  const bool all = h0 >= 0 && w0 >= 0 && h0 + size <= 2 * pooled_h && w0 + size <= 2 * pooled_w;
  if (!all) clear(patch);
  for (int64_t ph = h0 < 0 ? 0 : h0 / 2; ph < pooled_h && 2 * ph < h0 + size; ++ph)
    for (int64_t pw = w0 < 0 ? 0 : w0 / 2; pw < pooled_w && 2 * pw < w0 + size; ++pw) {
      const Vec g = load_masked<T>(image, n, ph, pw, c, lanes);
      const uint32_t argmax = load_argmax(image.argmax + ((n * pooled_h + ph) * pooled_w + pw) * bytes + c / 4, lanes);
      for (int position = 0; position < 4; ++position) {
        const int64_t i = 2 * ph + position / 2 - h0, j = 2 * pw + position % 2 - w0;
        if (i >= 0 && i < size && j >= 0 && j < size) select(argmax_is(argmax, position), g, Vec::zero()).store(patch.at(i, j));
      }
    }
}

template <class T, int size>
static inline void load_any_patch(const Image& image, int64_t n, int64_t h0, int64_t w0, int64_t c, int lanes, Patch<size>& patch) {
  if (image.kind == ImageKind::pooled) return load_pooled_patch<T>(image, n, h0, w0, c, lanes, patch);
  load_patch<T>(image, n, h0, w0, c, lanes, patch);
}
