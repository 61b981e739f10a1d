// An ISA's kernels by storage type, as one table. Only here does a dtype become a template argument.

#define VGGFAST_TYPED(dtype, call)                                                                                                 \
  with_type(dtype, [&](auto* type) {                                                                                               \
    using T = std::remove_pointer_t<decltype(type)>;                                                                               \
    return call;                                                                                                                   \
  })

static constexpr Kernels table = {
    VGGFAST_ISA_NAME,
    Vec::width,
    kBlock,
    kRows,
    [](const Image& x, const TileRange& tiles, const Points& v, bool stream) {
      VGGFAST_TYPED(x.dtype, winograd_input<T>(x, tiles, v, stream));
    },
    [](const Image& dz, const TileRange& tiles, int64_t begin, int64_t end, const Points& z, float* bias) {
      VGGFAST_TYPED(dz.dtype, winograd_grad_output<T>(dz, tiles, begin, end, z, bias));
    },
    [](const Filters& w, int64_t block, float* u, bool stream) {
      VGGFAST_TYPED(w.dtype, winograd_filters<T>(w, block, u, stream));
    },
    winograd_multiply,
    [](const Points& m, const TileRange& tiles, int64_t block, const Output& out) {
      return VGGFAST_TYPED(out.dtype, winograd_output<T>(m, tiles, block, out));
    },
    winograd_accumulate,
    [](const float* s, int64_t block, const Filters& dw, bool stream) {
      return VGGFAST_TYPED(dw.dtype, winograd_grad_filters<T>(s, block, dw, stream));
    },
    [](const Filters& w, int64_t block, float* packed) { VGGFAST_TYPED(w.dtype, direct_filters<T>(w, block, packed)); },
    [](const Image& x, const float* packed, const Output& out, int64_t n, int64_t begin, int64_t end, float* scratch) {
      VGGFAST_TYPED(x.dtype, direct_rows<T>(x, packed, out, n, begin, end, scratch));
    },
    [](const Filters& w, float* packed) { VGGFAST_TYPED(w.dtype, few_filters<T>(w, packed)); },
    [](const Image& x, const float* packed, const Output& out, int64_t n, int64_t begin, int64_t end, float* scratch) {
      VGGFAST_TYPED(x.dtype, few_rows<T>(x, packed, out, n, begin, end, scratch));
    },
    [](const Image& x, const Image& dz, int64_t begin, int64_t end, int64_t block_begin, int64_t block_end, float* sum,
       double* bias, float* scratch) {
      VGGFAST_TYPED(x.dtype, direct_grad_rows<T>(x, dz, begin, end, block_begin, block_end, sum, bias, scratch));
    },
    [](const Linear& l, const float* x, int64_t begin, int64_t end, int together, float* y) {
      VGGFAST_TYPED(l.dtype, linear<T>(l, x, begin, end, together, y));
    },
    [](const Linear& l, const float* grad, int64_t begin, int64_t end, float* dx) {
      VGGFAST_TYPED(l.dtype, linear_grad_input<T>(l, grad, begin, end, dx));
    },
    [](const Linear& l, const float* x, const float* grad, int64_t begin, int64_t end, void* dw) {
      VGGFAST_TYPED(l.dtype, linear_grad_weight<T>(l, x, grad, begin, end, (T*)dw));
    },
    [](const Image& x, const Output& out, int64_t begin, int64_t end) {
      VGGFAST_TYPED(x.dtype, max_pool_rows<T>(x, out, begin, end));
    },
    [](const Image& dz, const Output& out, int64_t begin, int64_t end) {
      VGGFAST_TYPED(dz.dtype, max_pool_grad_rows<T>(dz, out, begin, end));
    },
    fma_loop,
};
#undef VGGFAST_TYPED
