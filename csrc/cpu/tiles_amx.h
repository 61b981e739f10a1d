// AMX's tile registers: tmm0 to tmm3 hold sums (16 pixels x 16 output channels, fp32), tmm4 and tmm5 pixels (16 x 32 bf16), tmm6
// and tmm7 filters (16 pairs of input channels x 16 output channels). As instructions, not intrinsics: those are macros that take
// no template argument. Included inside the ISA's namespace.

struct Tiles {
  // Tiles of `rows` pixels and `depth` input channels (even, at most 32), for this thread until release().
  static void configure(int rows, int depth) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 2 * depth : 64);
      config.rows[i] = uint8_t(i < 6 ? rows : depth / 2);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { asm volatile("tilerelease"); } // the kernel of the system then has no tiles to save
  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const void* p, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(float* p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(tile) : "memory");
  }
  // sums += pixels * filters
  template <int sums, int pixels, int filters>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(pixels), "i"(filters));
  }
};
