// The 2x2 max-pool and its gradient by themselves: for pools that no convolution precedes, and where a fused convolution's gradient
// is composed of torch's operations.

// Rows [begin, end) of N * H/2.
template <class T>
static void max_pool_rows(const Image& x, const Output& out, int64_t begin, int64_t end) {
  const int64_t pooled_h = x.h / 2, pooled_w = x.w / 2;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t pw = 0; pw < pooled_w; ++pw) {
      const T* p = (const T*)x.data + i / pooled_h * x.stride_n + i % pooled_h * 2 * x.stride_h + 2 * pw * x.stride_w;
      for (int64_t c = 0; c < x.c; c += Vec::width) {
        const int lanes = lanes_from(c, x.c);
        store_pooled<T>(out, i * pooled_w + pw, c, lanes, load_lanes(p + c, lanes), load_lanes(p + x.stride_w + c, lanes),
                        load_lanes(p + x.stride_h + c, lanes), load_lanes(p + x.stride_h + x.stride_w + c, lanes));
      }
    }
}

// Rows [begin, end) of N * H of the gradient before the pool.
template <class T>
static void max_pool_grad_rows(const Image& dz, const Output& out, int64_t begin, int64_t end) {
  const int64_t pooled_w = dz.w / 2, pooled_h = dz.h / 2, bytes = (dz.c + 3) / 4;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / dz.h, h = i % dz.h;
    T* row = (T*)out.data + i * dz.w * dz.c;
    if (h / 2 >= pooled_h || dz.w % 2) memset((void*)row, 0, dz.w * dz.c * sizeof(T)); // zeros no window writes
    if (h / 2 >= pooled_h) continue;
    for (int64_t pw = 0; pw < pooled_w; ++pw)
      for (int64_t c = 0; c < dz.c; c += Vec::width) {
        const int lanes = lanes_from(c, dz.c);
        const Vec g = load_masked<T>(dz, n, h / 2, pw, c, lanes);
        const uint32_t argmax = load_argmax(dz.argmax + ((n * pooled_h + h / 2) * pooled_w + pw) * bytes + c / 4, lanes);
        for (int j = 0; j < 2; ++j)
          store_lanes(select(argmax_is(argmax, int(h % 2) * 2 + j), g, Vec::zero()), row + (2 * pw + j) * dz.c + c, lanes);
      }
  }
}
