// A bias as the kernels read it.
#pragma once
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/kernels.h"
#include "torch_glue.h"

namespace vggfast::cpu {

// fp32, padded with zeros so that kernels read whole vectors; empty without a bias.
inline std::vector<float> bias_values(const MaybeTensor& bias) {
  if (!bias) return {};
  std::vector<float> values(round_up(bias->size(0), 64), 0.f);
  with_type(dtype_of(*bias), [&](auto* type) {
    const auto* p = static_cast<const std::remove_pointer_t<decltype(type)>*>(bias->const_data_ptr());
    for (int64_t i = 0; i < bias->size(0); ++i) values[i] = to_float(p[i * bias->stride(0)]);
  });
  return values;
}

} // namespace vggfast::cpu
