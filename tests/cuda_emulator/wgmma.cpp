// Asynchronous products of warpgroups. A warp's part (16 of the 64 rows) is done as late as the rules allow: when the warp
// waits for its group. Until then its accumulators hold poison, and whoever overwrites the operands spoils the product.
#include <cstring>

#include "machine.h"

namespace emulator {

namespace {

constexpr uint32_t kPoison = 0xffc0dea1u;
constexpr int kStepBytes = 32; // of the reduction, in one product

constexpr int element_bytes(MmaType type) {
  return type == MmaType::tf32 ? 4 : 2;
}

bool same(const Product& a, const Product& b) {
  return a.type == b.type && a.columns == b.columns && a.transposed_a == b.transposed_a && a.transposed_b == b.transposed_b &&
         a.accumulate == b.accumulate && a.a == b.a && a.b == b.b;
}

/// A shared-memory descriptor of the 128-byte swizzle.
struct Descriptor {
  uint32_t start, leading, stride; // bytes
};

/// The base offset is taken to be 0, as the manual has it where the pattern starts at a 1024-byte boundary; the copy engine's
/// always does. A matrix of rows along the reduction may then start at any row of the pattern (`anywhere`): the swizzle is made
/// of bits of each row's own address.
Descriptor decode(uint64_t bits, bool anywhere, const void* code) {
  const auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
  const Descriptor out{field(0), field(16), field(32)};
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, fields = 0x00003fff3fff3fffull;
  if ((bits & ~fields) != swizzle_128 || (!anywhere && out.start / 128 % 8 != 0)) {
    Machine::get().fail("wgmma: expected a descriptor of the 128-byte swizzle whose pattern starts at a 1024-byte boundary", code);
  }
  return out;
}

/// The element at `from` as the tensor cores take it: of TF32 without the low 13 bits.
float load_element(MmaType type, const unsigned char* from) {
  if (type == MmaType::f16) {
    _Float16 narrow;
    std::memcpy(&narrow, from, 2);
    return static_cast<float>(narrow);
  }
  uint32_t word = 0;
  if (type == MmaType::tf32) {
    std::memcpy(&word, from, 4);
    word &= 0xffffe000u;
  } else {
    std::memcpy(reinterpret_cast<unsigned char*>(&word) + 2, from, 2);
  }
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

/// Reads for one warp, and checks, `rows` rows from `first` on of an operand, as [reduction][row].
struct OperandReader {
  uint32_t warp;
  const Clock& clock;
  const Product& product;

  void read(uint64_t bits, bool transposed, int first, int rows, float* to) const {
    const Descriptor at = decode(bits, !transposed, product.code);
    const int size = element_bytes(product.type), depth = kStepBytes / size, chunk_elements = 16 / size;
    if (transposed) {
      for (int k = 0; k < depth; ++k) {
        for (int row = 0; row < rows; row += 8) {
          const int m = first + row;
          const uint32_t address = at.start + static_cast<uint32_t>(m % 64 * 2 + k % 8 * 128) +
                                   static_cast<uint32_t>(m / 64) * at.leading + static_cast<uint32_t>(k / 8) * at.stride;
          chunk(address, to + k * rows + row, 1);
        }
      }
      return;
    }
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < depth; k += chunk_elements) {
        const int m = first + row;
        const uint32_t address =
            at.start + static_cast<uint32_t>(m % 8 * 128 + k * size) + static_cast<uint32_t>(m / 8) * at.stride;
        chunk(address, to + k * rows + row, rows);
      }
    }
  }

  void chunk(uint32_t address, float* to, int step) const {
    Machine& machine = Machine::get();
    const auto window = reinterpret_cast<uintptr_t>(machine.shared.base()) - shared_address(machine.shared.base());
    const uintptr_t from = window + swizzle_address(address, 128);
    const char* wrong = machine.shared.inside(from, SharedMemory::kChunk) ? nullptr : "outside shared memory";
    if (wrong == nullptr) {
      wrong = machine.shared.async_read(from, warp, machine.warp(warp).time, clock, machine.fences);
    }
    if (wrong != nullptr) {
      machine.fail(std::string("wgmma reads shared memory: ") + wrong, product.code);
    }
    const int size = element_bytes(product.type);
    for (int e = 0; e < 16 / size; ++e) {
      to[e * step] = load_element(product.type, reinterpret_cast<const unsigned char*>(from) + e * size);
    }
  }
};

float* values_of(Thread& thread, const float* registers) {
  for (Accumulator& entry : thread.accumulators) {
    if (entry.registers == registers) {
      return entry.values.data();
    }
  }
  return nullptr;
}

__attribute__((optimize("O3"))) void add_row(float* sums, const float* b, float a, int columns) {
  for (int n = 0; n < columns; ++n) {
    sums[n] += a * b[n];
  }
}

/// One warp's rows of a product. With g = lane / 4 and t = lane % 4, value 4 j + e of a lane is row g + 8 (e / 2), column
/// 8 j + 2 t + e % 2.
void execute(uint32_t warp, size_t group, size_t which, const Clock& clock) {
  Machine& machine = Machine::get();
  const uint32_t first_lane = warp * 32;
  const Product& product = machine.thread(first_lane).product_groups[group][which];
  const int columns = product.columns, depth = kStepBytes / element_bytes(product.type);
  static thread_local float a[kStepBytes / 2 * 16], b[kStepBytes / 2 * 256], sums[16 * 256];
  const OperandReader reader{warp, clock, product};
  reader.read(product.a, product.transposed_a, static_cast<int>(warp % 4 * 16), 16, a);
  reader.read(product.b, product.transposed_b, 0, columns, b);
  const auto place = [&](int lane, int i) { return (lane / 4 + i % 4 / 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  float* lanes[32];
  for (int lane = 0; lane < 32; ++lane) {
    Thread& thread = machine.thread(first_lane + static_cast<uint32_t>(lane));
    lanes[lane] = values_of(thread, thread.product_groups[group][which].d);
    for (int i = 0; i < columns / 2; ++i) {
      sums[place(lane, i)] = product.accumulate ? lanes[lane][i] : 0.0f;
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      add_row(sums + row * columns, b + k * columns, a[k * 16 + row], columns);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      lanes[lane][i] = sums[place(lane, i)];
    }
  }
}

bool in_flight(const Thread& thread, const float* registers) {
  const auto uses = [&](const Product& product) { return product.d == registers; };
  for (const auto& group : thread.product_groups) {
    for (const Product& product : group) {
      if (uses(product)) return true;
    }
  }
  for (const Product& product : thread.open_products) {
    if (uses(product)) return true;
  }
  return false;
}

/// Accumulators that no product in flight uses go back to their registers.
void hand_back(Thread& thread) {
  for (size_t i = 0; i < thread.accumulators.size();) {
    Accumulator& entry = thread.accumulators[i];
    if (in_flight(thread, entry.registers)) {
      ++i;
      continue;
    }
    for (size_t e = 0; e < entry.values.size(); ++e) {
      if (std::memcmp(&entry.registers[e], &kPoison, 4) != 0) {
        Machine::get().fail("wgmma: accumulators were written while a product on them was in flight", nullptr);
      }
    }
    std::memcpy(entry.registers, entry.values.data(), 4 * entry.values.size());
    thread.accumulators.erase(thread.accumulators.begin() + static_cast<std::ptrdiff_t>(i));
    thread.knows_fence = false;
  }
}

} // namespace

void Machine::finish_products(uint32_t warp, size_t pending_groups) {
  const uint32_t first = warp * 32;
  Thread& leader = threads_[first];
  for (uint32_t lane = 1; lane < 32; ++lane) {
    const auto& groups = threads_[first + lane].product_groups;
    bool equal = groups.size() == leader.product_groups.size();
    for (size_t g = 0; equal && g < groups.size(); ++g) {
      equal = groups[g].size() == leader.product_groups[g].size();
      for (size_t i = 0; equal && i < groups[g].size(); ++i) {
        equal = same(groups[g][i], leader.product_groups[g][i]);
      }
    }
    if (!equal) {
      fail("wgmma: lanes of a warp ask for different products", nullptr);
    }
  }
  const size_t groups = leader.product_groups.size();
  const size_t done = groups > pending_groups ? groups - pending_groups : 0;
  for (size_t g = 0; g < done; ++g) {
    for (size_t i = 0; i < leader.product_groups[g].size(); ++i) {
      execute(warp, g, i, leader.product_clocks.front());
      leader.product_clocks.erase(leader.product_clocks.begin());
    }
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    Thread& thread = threads_[first + lane];
    thread.product_groups.erase(thread.product_groups.begin(), thread.product_groups.begin() + static_cast<std::ptrdiff_t>(done));
    hand_back(thread);
    thread.clock[thread_count_ + warp] = warps_[warp].time;
  }
  ++warps_[warp].time;
}

void wgmma_fence() {
  Machine::get().current()->knows_fence = true;
}

void wgmma_commit() {
  Thread& thread = *Machine::get().current();
  thread.product_groups.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}

void wgmma_wait(int pending) {
  Machine::get().warp_operation("wgmma.wait_group", &pending, [](void* const* lanes) {
    Machine& machine = Machine::get();
    machine.finish_products(machine.current()->linear / 32u, static_cast<size_t>(*static_cast<const int*>(lanes[0])));
  });
}

void wgmma(MmaType type, int columns, bool transposed_a, bool transposed_b, float* d, uint64_t a, uint64_t b, bool accumulate) {
  Machine& machine = Machine::get();
  Thread& thread = *machine.current();
  const Product product{type, columns, transposed_a, transposed_b, accumulate, a, b, d, __builtin_return_address(0)};
  if (type == MmaType::tf32 && (transposed_a || transposed_b)) {
    machine.fail("wgmma: TF32 takes operands with the reduction along their rows only", product.code);
  }
  if (!thread.knows_fence) {
    machine.fail("wgmma: no wgmma.fence since the accumulators were ordinary registers", product.code);
  }
  if (values_of(thread, d) == nullptr) {
    thread.accumulators.push_back({d, std::vector<float>(d, d + columns / 2)});
    for (int i = 0; i < columns / 2; ++i) {
      std::memcpy(&d[i], &kPoison, 4);
    }
  }
  thread.open_products.push_back(product);
  if (thread.linear % 32 != 0) {
    return;
  }
  const uint32_t warp_number = thread.linear / 32u;
  ++machine.statistics.wgmma;
  thread.product_clocks.push_back(thread.clock);
  auto& all = machine.products_of[warp_number / 4];
  Warp& warp = machine.warp(warp_number);
  if (warp.products == all.size()) {
    all.push_back(product);
  } else if (!same(all[warp.products], product)) {
    machine.fail("wgmma: warps of a warpgroup ask for different products", product.code);
  }
  ++warp.products;
}

} // namespace emulator
