// Filters with any strides, in and out of [9 taps][kBlock output channels].

template <class T>
static inline void gather_taps(const Filters& w, int64_t k0, int64_t lanes, int64_t c, float (&taps)[9][kBlock]) {
  const T* p = (const T*)w.data + k0 * w.stride_out + c * w.stride_in;
  for (int64_t k = 0; k < lanes; ++k, p += w.stride_out)
    for (int r = 0; r < 3; ++r)
      for (int s = 0; s < 3; ++s) taps[3 * r + s][k] = to_float(p[r * w.stride_r + s * w.stride_s]);
}

template <class T>
static inline void scatter_taps(const Filters& w, int64_t k0, int64_t lanes, int64_t c, const float (&taps)[9][kBlock]) {
  T* p = (T*)const_cast<void*>(w.data) + k0 * w.stride_out + c * w.stride_in;
  for (int64_t k = 0; k < lanes; ++k, p += w.stride_out)
    for (int r = 0; r < 3; ++r)
      for (int s = 0; s < 3; ++s) from_float(taps[3 * r + s][k], p + r * w.stride_r + s * w.stride_s);
}
