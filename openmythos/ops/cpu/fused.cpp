// Elementwise operations of training, forward and gradient, each in one pass over its operands.
//
// In torch each of them is 4 to 10 kernels, which read and write a whole tensor every time. Built by
// native.py at first use.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "tiles.h"

using tiles::exponential, tiles::lanes, tiles::load, tiles::store, tiles::total, tiles::Vector;
using torch::stable::Tensor;

namespace {

constexpr int64_t grain = 1 << 15;  // elements that are worth a thread
constexpr int64_t parts = 16;       // of the rows, whose sums are added in order whatever the threads

// The shape of x with another last width, and the number of its rows.
std::vector<int64_t> shape(const Tensor& x, int64_t width) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(width);
  return sizes;
}
int64_t last(const Tensor& x) { return x.size(x.dim() - 1); }
int64_t rows_of(const Tensor& x) { return x.numel() / last(x); }

template <typename Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
  torch::stable::parallel_for(0, rows, grain / width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

// x [..., C], whose rows are R -> weight * x / rms(x), and 1 / rms(x) [R].
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, std::optional<Tensor> weight, double eps) {
  const int64_t rows = rows_of(x), width = last(x);
  Tensor y = torch::stable::empty_like(x), scales = torch::stable::new_empty(x, {rows});
  const float* in = x.const_data_ptr<float>();
  const float* w = weight ? weight->const_data_ptr<float>() : nullptr;
  float* out = y.mutable_data_ptr<float>();
  float* scale = scales.mutable_data_ptr<float>();
  for_rows(rows, width, [&](int64_t r) {
    const float* from = in + r * width;
    Vector squares = {};
    for (int64_t c = 0; c < width; c += lanes) squares += load(from + c) * load(from + c);
    scale[r] = 1 / std::sqrt(total(squares) / width + float(eps));
    for (int64_t c = 0; c < width; c += lanes) {
      const Vector unit = load(from + c) * scale[r];
      store(out + r * width + c, w ? unit * load(w + c) : unit);
    }
  });
  return {y, scales};
}

// With n = x / rms(x) and g = grad * weight: (g - n mean(g n)) / rms(x), and the sum of grad n [C].
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             std::optional<Tensor> weight, const Tensor& scales) {
  const int64_t rows = rows_of(x), width = last(x);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_zeros(x, {width});
  const float* g = grad.const_data_ptr<float>();
  const float* in = x.const_data_ptr<float>();
  const float* w = weight ? weight->const_data_ptr<float>() : nullptr;
  const float* scale = scales.const_data_ptr<float>();
  float* out = grad_x.mutable_data_ptr<float>();
  std::vector<float> sums(w ? parts * width : 0);
  torch::stable::parallel_for(0, parts, grain * parts / (rows * width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r) {
        const int64_t row = r * width;
        Vector products = {};
        for (int64_t c = 0; c < width; c += lanes) {
          Vector product = load(g + row + c) * load(in + row + c) * scale[r];
          if (w) {
            float* sum = &sums[part * width + c];
            store(sum, load(sum) + product);
            product *= load(w + c);
          }
          products += product;
        }
        const float mean = total(products) / width;
        for (int64_t c = 0; c < width; c += lanes) {
          const Vector through = w ? load(g + row + c) * load(w + c) : load(g + row + c);
          store(out + row + c, (through - load(in + row + c) * (scale[r] * mean)) * scale[r]);
        }
      }
  });
  float* sum = grad_weight.mutable_data_ptr<float>();
  for (size_t i = 0; i < sums.size(); ++i) sum[i % width] += sums[i];
  return {grad_x, grad_weight};
}

// inner [..., 2 F] = (gate, up) -> SiLU(gate) * up * share [..., F]; share[order[r]] is row r's.
Tensor swiglu(const Tensor& inner, std::optional<Tensor> share, std::optional<Tensor> order) {
  const int64_t rows = rows_of(inner), width = last(inner) / 2;
  Tensor hidden = torch::stable::new_empty(inner, shape(inner, width));
  const float* in = inner.const_data_ptr<float>();
  const float* shares = share ? share->const_data_ptr<float>() : nullptr;
  const int64_t* at = share ? order->const_data_ptr<int64_t>() : nullptr;
  float* out = hidden.mutable_data_ptr<float>();
  for_rows(rows, width, [&](int64_t r) {
    const float* gate = in + 2 * r * width;
    const float part = shares ? shares[at[r]] : 1.0f;
    for (int64_t f = 0; f < width; f += lanes) {
      const Vector x = load(gate + f), up = load(gate + width + f);
      store(out + r * width + f, x / (1 + exponential(-x)) * up * part);
    }
  });
  return hidden;
}

// The gradients of inner and of the shares, in their shapes (empty without shares).
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& inner,
                                           std::optional<Tensor> share, std::optional<Tensor> order) {
  const int64_t rows = rows_of(inner), width = last(inner) / 2;
  Tensor grad_inner = torch::stable::empty_like(inner);
  Tensor grad_share = share ? torch::stable::empty_like(*share) : torch::stable::new_empty(inner, {0});
  const float* g = grad.const_data_ptr<float>();
  const float* in = inner.const_data_ptr<float>();
  const float* shares = share ? share->const_data_ptr<float>() : nullptr;
  const int64_t* at = share ? order->const_data_ptr<int64_t>() : nullptr;
  float* out = grad_inner.mutable_data_ptr<float>();
  float* out_share = grad_share.mutable_data_ptr<float>();
  for_rows(rows, width, [&](int64_t r) {
    const float* gate = in + 2 * r * width;
    float* to = out + 2 * r * width;
    const float part = shares ? shares[at[r]] : 1.0f;
    Vector products = {};
    for (int64_t f = 0; f < width; f += lanes) {
      const Vector x = load(gate + f), up = load(gate + width + f), y = load(g + r * width + f);
      const Vector sigmoid = 1 / (1 + exponential(-x)), active = x * sigmoid;
      products += y * active * up;
      store(to + f, y * part * up * (sigmoid + active * (1 - sigmoid)));
      store(to + width + f, y * part * active);
    }
    if (shares) out_share[at[r]] = total(products);
  });
  return {grad_inner, grad_share};
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_fused, library) {
  library.def("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor scales) -> (Tensor, Tensor)");
  library.def("swiglu(Tensor inner, Tensor? share, Tensor? order) -> Tensor");
  library.def(
      "swiglu_backward(Tensor grad, Tensor inner, Tensor? share, Tensor? order) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_fused, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
