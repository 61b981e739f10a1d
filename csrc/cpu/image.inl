// Reading a size x size patch of an Image into registers' worth of floats, one vector of channels at a time.
// The three kinds of image (conv3x3.h) meet here and nowhere else: transforms see plain fp32 patches.

static inline uint32_t load_argmax(const uint8_t* p, int lanes) { // 2 bits a lane
  uint32_t packed = 0;
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

// The gradient at one element of `data`, zero where the ReLU was shut.
template <class T>
static inline Vec load_masked(const Image& image, int64_t n, int64_t h, int64_t w, int64_t c, int lanes) {
  const Vec g = load_lanes((const T*)image.data + n * image.stride_n + h * image.stride_h + w * image.stride_w + c, lanes);
  if (!image.y) return g;
  const Vec y = load_lanes((const T*)image.y + n * image.y_stride_n + h * image.y_stride_h + w * image.y_stride_w + c, lanes);
  return select(not_below_or_zero(y), g, Vec::zero());
}

// patch[i][j] = image[n, c..c+lanes, h0 + i, w0 + j], zero outside the image.
template <class T, int size>
static inline void load_patch(const Image& image, int64_t n, int64_t h0, int64_t w0, int64_t c, int lanes,
                              Vec (&patch)[size][size]) {
  const T* corner = (const T*)image.data + n * image.stride_n + h0 * image.stride_h + w0 * image.stride_w + c;
  const bool inside = h0 >= 0 && w0 >= 0 && h0 + size <= image.h && w0 + size <= image.w;
  if (image.kind == ImageKind::plain && inside && lanes == Vec::width) {
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j) patch[i][j] = Vec::load(corner + i * image.stride_h + j * image.stride_w);
    return;
  }
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j) {
      const int64_t h = h0 + i, w = w0 + j;
      const bool in = h >= 0 && h < image.h && w >= 0 && w < image.w;
      patch[i][j] = in ? load_masked<T>(image, n, h, w, c, lanes) : Vec::zero();
    }
}

// The same for a pooled image: every pool window that touches the patch is read once and spread over its four positions.
template <class T, int size>
static inline void load_pooled_patch(const Image& image, int64_t n, int64_t h0, int64_t w0, int64_t c, int lanes,
                                     Vec (&patch)[size][size]) {
  const int64_t pooled_h = image.h / 2, pooled_w = image.w / 2, bytes = (image.c + 3) / 4;
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j) patch[i][j] = Vec::zero();
  for (int64_t ph = h0 < 0 ? 0 : h0 / 2; ph < pooled_h && 2 * ph < h0 + size; ++ph)
    for (int64_t pw = w0 < 0 ? 0 : w0 / 2; pw < pooled_w && 2 * pw < w0 + size; ++pw) {
      const Vec g = load_masked<T>(image, n, ph, pw, c, lanes);
      const uint32_t argmax = load_argmax(image.argmax + ((n * pooled_h + ph) * pooled_w + pw) * bytes + c / 4, lanes);
      for (int position = 0; position < 4; ++position) {
        const int64_t i = 2 * ph + position / 2 - h0, j = 2 * pw + position % 2 - w0;
        if (i >= 0 && i < size && j >= 0 && j < size) patch[i][j] = select(argmax_is(argmax, position), g, Vec::zero());
      }
    }
}

template <class T, int size>
static inline void load_any_patch(const Image& image, int64_t n, int64_t h0, int64_t w0, int64_t c, int lanes,
                                  Vec (&patch)[size][size]) {
  if (image.kind == ImageKind::pooled) return load_pooled_patch<T>(image, n, h0, w0, c, lanes, patch);
  load_patch<T>(image, n, h0, w0, c, lanes, patch);
}
