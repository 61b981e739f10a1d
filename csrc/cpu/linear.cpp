// The CPU ops of fully connected layers: validate, allocate, pack, run on torch's threads.
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "torch_glue.h"

namespace vggfast::cpu {
namespace {

constexpr int64_t job_outs = 48; // weights of one job: some megabytes, so that the queue costs nothing

struct Matrix {
  const float* data;
  int64_t rows, columns, row, column; // strides
  explicit Matrix(const Tensor& t)
      : data(static_cast<const float*>(t.const_data_ptr())), rows(t.size(0)), columns(t.size(1)), row(t.stride(0)),
        column(t.stride(1)) {}
  float at(int64_t r, int64_t c) const { return data[r * row + c * column]; }
};

Tensor with_adjacent_columns(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Rows [begin, end) of x by vectors of columns, zero past the last.
void pack_rows(const Matrix& x, int64_t begin, int64_t end, int width, float* packed) {
  const int64_t rows = end - begin;
  for (int64_t first = 0; first < x.columns; first += width)
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < width; ++i) *packed++ = first + i < x.columns ? x.at(begin + r, first + i) : 0.f;
}

// The gradient before the ReLU, [out + kLinearPadding][rows].
std::vector<float> columns_of(const Tensor& grad, const MaybeTensor& y) {
  const Matrix g(grad), saved(y ? *y : grad);
  std::vector<float> columns((g.columns + kLinearPadding) * g.rows, 0.f);
  for (int64_t o = 0; o < g.columns; ++o)
    for (int64_t r = 0; r < g.rows; ++r)
      columns[o * g.rows + r] = !y || !(saved.at(r, o) <= 0.f) ? g.at(r, o) : 0.f; // NaN lets the gradient through
  return columns;
}

Linear linear_of(const Tensor& weight, int64_t rows) {
  return {rows,    weight.size(1), weight.size(0), static_cast<const float*>(weight.const_data_ptr()), weight.stride(0),
          nullptr, false};
}

Tensor linear(const Tensor& x_any, const Tensor& weight_any, const MaybeTensor& bias, bool relu) {
  check_linear(x_any, weight_any, bias);
  const Tensor weight = with_adjacent_columns(weight_any);
  const Kernels& k = kernels();
  const Matrix x(x_any);
  Tensor y = empty_of(x_any, {x.rows, weight.size(0)}, x_any.scalar_type());
  std::vector<float> biases(bias ? weight.size(0) : 0);
  for (size_t o = 0; o < biases.size(); ++o) biases[o] = static_cast<const float*>(bias->const_data_ptr())[o * bias->stride(0)];
  // More rows than the kernel takes go in parts of about one size.
  const int64_t parts = ceil_div(x.rows, kLinearRows), jobs = ceil_div(weight.size(0), job_outs);
  const Workspace packed(x.rows * round_up(x.columns, k.width));
  std::vector<Linear> problems;
  const auto first = [&](int64_t part) { return x.rows * part / parts; };
  for (int64_t part = 0; part < parts; ++part) {
    problems.push_back(linear_of(weight, first(part + 1) - first(part)));
    problems.back().bias = bias ? biases.data() : nullptr, problems.back().relu = relu;
    pack_rows(x, first(part), first(part + 1), k.width, packed.data() + first(part) * round_up(x.columns, k.width));
  }
  const int64_t step = parts == 1 ? job_outs : 12; // of two parts the second then finds the weights in a cache
  parallel_jobs(jobs, [&](int64_t job) {
    for (int64_t begin = job * job_outs, end = std::min(begin + job_outs, weight.size(0)); begin < end; begin += step)
      for (int64_t part = 0; part < parts; ++part)
        k.linear(problems[part], packed.data() + first(part) * round_up(x.columns, k.width), begin, std::min(begin + step, end),
                 static_cast<float*>(y.mutable_data_ptr()) + first(part) * weight.size(0));
  });
  return y;
}

Tensor linear_grad_input(const Tensor& grad, const Tensor& weight_any, const MaybeTensor& y) {
  check_linear_grad_input(grad, weight_any, y);
  const Tensor weight = with_adjacent_columns(weight_any);
  const Linear l = linear_of(weight, grad.size(0));
  Tensor dx = empty_of(grad, {l.rows, l.in}, grad.scalar_type());
  const std::vector<float> columns = columns_of(grad, y);
  parallel_jobs(ceil_div(l.in, kLinearColumns), [&](int64_t job) {
    const int64_t begin = job * kLinearColumns;
    kernels().linear_grad_input(l, columns.data(), begin, std::min(begin + kLinearColumns, l.in),
                                static_cast<float*>(dx.mutable_data_ptr()));
  });
  return dx;
}

std::tuple<Tensor, Tensor> linear_grad_weight(const Tensor& x_any, const Tensor& grad, const MaybeTensor& y) {
  check_linear_grad_weight(x_any, grad, y);
  const Kernels& k = kernels();
  const Matrix x(x_any);
  const int64_t out = grad.size(1);
  Tensor dw = empty_of(x_any, {out, x.columns}, x_any.scalar_type()), db = empty_of(x_any, {out}, x_any.scalar_type());
  const std::vector<float> columns = columns_of(grad, y);
  const Workspace packed(x.rows * round_up(x.columns, k.width));
  pack_rows(x, 0, x.rows, k.width, packed.data());
  const Linear l{x.rows, x.columns, out, nullptr, 0, nullptr, false};
  parallel_jobs(ceil_div(out, job_outs), [&](int64_t job) {
    const int64_t begin = job * job_outs;
    k.linear_grad_weight(l, packed.data(), columns.data(), begin, std::min(begin + job_outs, out),
                         static_cast<float*>(dw.mutable_data_ptr()));
  });
  for (int64_t o = 0; o < out; ++o) {
    double sum = 0;
    for (int64_t r = 0; r < x.rows; ++r) sum += columns[o * x.rows + r];
    static_cast<float*>(db.mutable_data_ptr())[o] = float(sum);
  }
  return {dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(vggfast, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  library.impl("linear_grad_weight", TORCH_BOX(&linear_grad_weight));
}

} // namespace
} // namespace vggfast::cpu
