// What happens between an accumulator and memory: bias, ReLU, rounding, 2x2 max-pool with its argmax.

static inline bool all_zero(Vec v) { // false for NaN lanes
  float lanes[Vec::width];
  v.store(lanes);
  for (int i = 0; i < Vec::width; ++i)
    if (lanes[i] != 0) return false;
  return true;
}

// Bias and ReLU of one vector of channels from k on.
struct Epilogue {
  Vec bias, floor; // none: -0, which changes no sum, and -Inf
  Epilogue() = default;
  Epilogue(const Output& out, int64_t k)
      : bias(out.bias ? Vec::load(out.bias + k) : Vec::set(-0.f)), floor(Vec::set(out.relu ? 0.f : -__builtin_inff())) {}
  Vec operator()(Vec v) const { return at_least(floor, v + bias); }
};

static inline uint32_t spread_bits(uint32_t b) { // bit i moves to bit 2i
  b = (b | b << 8) & 0x00ff00ff;
  b = (b | b << 4) & 0x0f0f0f0f;
  b = (b | b << 2) & 0x33333333;
  return (b | b << 1) & 0x55555555;
}

// The maximum of a window in torch's order and with torch's rules: the first of equals wins, NaN wins over everything.
// The comparison sees values as they are stored, so that ties in bf16 and fp16 fall where torch's do.
template <class T>
static inline Vec max_of_window(Vec v00, Vec v01, Vec v10, Vec v11, uint32_t* argmax) {
  Vec best = v00.rounded((const T*)nullptr);
  uint32_t low = 0, high = 0; // bits 0 and 1 of every lane's position
  const Vec others[3] = {v01, v10, v11};
  for (int position = 1; position < 4; ++position) {
    const Vec value = others[position - 1].rounded((const T*)nullptr);
    const Mask better = greater_or_nan(value, best);
    best = select(better, value, best);
    const uint32_t bits = mask_bits(better);
    low = position & 1 ? low | bits : low & ~bits;
    high = position & 2 ? high | bits : high & ~bits;
  }
  *argmax = spread_bits(low) | spread_bits(high) << 1;
  return best;
}

// The same where nobody asks which it was. Rounding keeps the order, so that the maximum alone is rounded, when it is stored.
static inline Vec max_of_window(Vec v00, Vec v01, Vec v10, Vec v11) {
  const Vec others[3] = {v01, v10, v11};
  Vec best = v00;
  for (const Vec& value : others) best = select(greater_or_nan(value, best), value, best);
  return best;
}

template <class T>
static inline void store_result(const Output& out, Vec v, T* p, int lanes) {
  if constexpr (std::is_same_v<T, float>) {
    if (out.stream) return v.stream(p);
  }
  store_lanes(v, p, lanes);
}

// pixel is the linear index of the pooled pixel, over [N, H/2, W/2].
template <class T>
static inline void store_pooled(const Output& out, int64_t pixel, int64_t k, int lanes, Vec v00, Vec v01, Vec v10, Vec v11) {
  T* p = (T*)out.data + pixel * out.c + k;
  if (!out.argmax) return store_result(out, max_of_window(v00, v01, v10, v11), p, lanes);
  uint32_t argmax;
  store_result(out, max_of_window<T>(v00, v01, v10, v11, &argmax), p, lanes);
  if (lanes < 16) argmax &= (1u << 2 * lanes) - 1; // unused bits of the last byte are zero
  memcpy(out.argmax + pixel * ((out.c + 3) / 4) + k / 4, &argmax, (lanes + 3) / 4);
}
