// The CPU ops of fully connected layers: validate, allocate, pack, run on torch's threads.
#include "checks.h"
#include "cpu/bias.h"
#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"
#include "torch_glue.h"

namespace vggfast::cpu {
namespace {

constexpr int64_t job_outs = 48; // weights of one job: some megabytes, so that the queue costs nothing

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row, column; // strides
  explicit Matrix(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), rows(t.size(0)), columns(t.size(1)), row(t.stride(0)),
        column(t.stride(1)) {}
  float at(int64_t r, int64_t c) const { return to_float(data[r * row + c * column]); }
};

// body of the tensor as a Matrix of its dtype.
template <class Body>
void with_matrix(const Tensor& t, const Body& body) {
  with_type(dtype_of(t), [&](auto* type) { body(Matrix<std::remove_pointer_t<decltype(type)>>(t)); });
}

Tensor with_adjacent_columns(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Rows [begin, end) of x by vectors of columns, zero past the last.
void pack_rows(const Tensor& t, int64_t begin, int64_t end, int width, float* packed) {
  with_matrix(t, [&](const auto& x) {
    float* p = packed;
    for (int64_t first = 0; first < x.columns; first += width)
      for (int64_t r = begin; r < end; ++r)
        for (int i = 0; i < width; ++i) *p++ = first + i < x.columns ? x.at(r, first + i) : 0.f;
  });
}

// The gradient before the ReLU, [out + kLinearPadding][rows].
std::vector<float> columns_of(const Tensor& grad, const MaybeTensor& y) {
  std::vector<float> columns((grad.size(1) + kLinearPadding) * grad.size(0), 0.f);
  with_matrix(grad, [&](const auto& g) {
    const std::decay_t<decltype(g)> saved(y ? *y : grad);
    for (int64_t o = 0; o < g.columns; ++o)
      for (int64_t r = 0; r < g.rows; ++r)
        columns[o * g.rows + r] = !y || !(saved.at(r, o) <= 0.f) ? g.at(r, o) : 0.f; // NaN lets the gradient through
  });
  return columns;
}

// Floats to elements of t, from one on.
void store_floats(const float* from, int64_t count, const Tensor& t, int64_t first) {
  with_type(dtype_of(t), [&](auto* type) {
    auto* to = static_cast<decltype(type)>(t.mutable_data_ptr()) + first;
    for (int64_t i = 0; i < count; ++i) from_float(from[i], to + i);
  });
}

Linear linear_of(const Tensor& weight, int64_t rows) {
  return {rows, weight.size(1), weight.size(0), dtype_of(weight), weight.const_data_ptr(), weight.stride(0), nullptr, false};
}

Tensor linear(const Tensor& x, const Tensor& weight_any, const MaybeTensor& bias, bool relu) {
  check_linear(x, weight_any, bias);
  const Tensor weight = with_adjacent_columns(weight_any);
  const Kernels& k = kernels();
  const int64_t rows = x.size(0), out = weight.size(0), packed_row = round_up(x.size(1), k.width);
  const std::vector<float> biases = bias_values(bias);
  std::vector<float> sums(rows * out);
  // More rows than the kernel takes go in parts of about one size.
  const int64_t parts = ceil_div(rows, kLinearRows), jobs = ceil_div(out, job_outs);
  const Workspace packed(rows * packed_row);
  std::vector<Linear> problems;
  const auto first = [&](int64_t part) { return rows * part / parts; };
  for (int64_t part = 0; part < parts; ++part) {
    problems.push_back(linear_of(weight, first(part + 1) - first(part)));
    problems.back().bias = bias ? biases.data() : nullptr, problems.back().relu = relu;
    pack_rows(x, first(part), first(part + 1), k.width, packed.data() + first(part) * packed_row);
  }
  const int together = linear_together(machine(k, 1));
  const int64_t step = parts == 1 ? job_outs : std::max(together, 12); // of two parts the second then finds the weights in a cache
  parallel_jobs(jobs, [&](int64_t job) {
    for (int64_t begin = job * job_outs, end = std::min(begin + job_outs, out); begin < end; begin += step)
      for (int64_t part = 0; part < parts; ++part)
        k.linear(problems[part], packed.data() + first(part) * packed_row, begin, std::min(begin + step, end), together,
                 sums.data() + first(part) * out);
  });
  Tensor y = empty_of(x, {rows, out}, x.scalar_type());
  store_floats(sums.data(), rows * out, y, 0);
  return y;
}

Tensor linear_grad_input(const Tensor& grad, const Tensor& weight_any, const MaybeTensor& y) {
  check_linear_grad_input(grad, weight_any, y);
  const Tensor weight = with_adjacent_columns(weight_any);
  const Kernels& k = kernels();
  const Linear l = linear_of(weight, grad.size(0));
  Tensor dx = empty_of(grad, {l.rows, l.in}, grad.scalar_type());
  const std::vector<float> columns = columns_of(grad, y);
  parallel_jobs(ceil_div(l.in, kLinearColumns), [&](int64_t job) {
    const int64_t begin = job * kLinearColumns, end = std::min(begin + kLinearColumns, l.in);
    float* part = scratch(2 * l.rows * kLinearColumns);
    k.linear_grad_input(l, columns.data(), begin, end, part);
    for (int64_t r = 0; r < l.rows; ++r) store_floats(part + r * kLinearColumns, end - begin, dx, r * l.in + begin);
  });
  return dx;
}

std::tuple<Tensor, Tensor> linear_grad_weight(const Tensor& x, const Tensor& grad, const MaybeTensor& y, bool in_float32) {
  check_linear_grad_weight(x, grad, y);
  const Kernels& k = kernels();
  const auto type = in_float32 ? torch::headeronly::ScalarType::Float : x.scalar_type();
  const int64_t rows = x.size(0), in = x.size(1), out = grad.size(1);
  Tensor dw = empty_of(x, {out, in}, type), db = empty_of(x, {out}, type);
  const std::vector<float> columns = columns_of(grad, y);
  const Workspace packed(rows * round_up(in, k.width));
  pack_rows(x, 0, rows, k.width, packed.data());
  const Linear l{rows, in, out, dtype_of(dw), nullptr, 0, nullptr, false};
  parallel_jobs(ceil_div(out, job_outs), [&](int64_t job) {
    const int64_t begin = job * job_outs;
    k.linear_grad_weight(l, packed.data(), columns.data(), begin, std::min(begin + job_outs, out), dw.mutable_data_ptr());
  });
  std::vector<float> sums(out);
  for (int64_t o = 0; o < out; ++o) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += columns[o * rows + r];
    sums[o] = float(sum);
  }
  store_floats(sums.data(), out, db, 0);
  return {dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(vggfast, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  library.impl("linear_grad_weight", TORCH_BOX(&linear_grad_weight));
}

} // namespace
} // namespace vggfast::cpu
