// Multiply-adds and nothing else, for a roofline: in registers, in as many chains as their latency asks for.

// Of one thread; returns how many operations they were. The sums go to `out`, so that they are made.
static int64_t fma_loop(int64_t steps, float* out) {
  constexpr int chains = Vec::registers / 4 * 3;
  Vec sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = Vec::set(float(i));
  const Vec factor = Vec::set(out[0]);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < chains; ++i) {
      Vec sum = sums[i];
      accumulate(sum, factor, sum); // no product is another's
      sums[i] = sum;
    }
  Vec sum = sums[0];
  for (int i = 1; i < chains; ++i) sum = sum + sums[i];
  sum.store(out);
  return 2 * steps * chains * Vec::width;
}
