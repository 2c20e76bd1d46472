// The experts' products of training: each expert has its own rows, often few of them.
//
// A library multiplies one pair of matrices a call: it copies the weights into its own order even
// for three rows, and wants the rows gathered before and added up after. Here rows are read and
// written where they lie, and few rows read the weights where they lie too.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "tiles.h"

using tiles::block, tiles::wide;
using torch::stable::Tensor;

namespace {

constexpr int64_t few = 128;  // rows that do not repay a copy of the weights

// Every expert's rows of x times its weights [O, I] or their transpose. Row m is x's row source[m]
// and goes to y's row target[m]; without an index that is m itself.
struct Product {
  const float* x;
  const int64_t* source;
  const float* weights;
  bool transposed;  // y = x W^T, not x W
  int64_t outer, inner;
  const int64_t* ends;
  int64_t experts;
  float* y;
  const int64_t* target;

  int64_t width_in() const { return transposed ? inner : outer; }
  int64_t width_out() const { return transposed ? outer : inner; }

  // Columns begin to end of all rows, so that threads never write to the same place.
  void columns(int64_t begin, int64_t end) const {
    std::vector<const float*> in, matrix(outer);
    std::vector<float*> out;
    std::vector<float> panel(block * wide);
    for (int64_t expert = 0, m = 0; expert < experts; ++expert) {
      in.clear(), out.clear();
      for (; m < ends[expert]; ++m) {
        in.push_back(x + (source ? source[m] : m) * width_in());
        out.push_back(y + (target ? target[m] : m) * width_out());
      }
      for (int64_t o = 0; o < outer; ++o) matrix[o] = weights + (expert * outer + o) * inner;
      for (int64_t n = begin; n < end && !in.empty(); n += wide)
        for (int64_t k = 0; k < width_in(); k += block) {
          const int64_t length = std::min(block, width_in() - k);
          const bool packed = transposed || int64_t(in.size()) > few;
          if (transposed)
            tiles::transpose(&matrix[n], wide, k, length, panel.data(), wide);
          else if (packed)
            tiles::pack(&matrix[k], length, n, panel.data());
          tiles::multiply(in.size(), in.data(), k, packed ? panel.data() : matrix[k] + n,
                          packed ? wide : inner, out.data(), n, length, target || k > 0);
        }
    }
  }

  void run() const {
    torch::stable::parallel_for(0, width_out() / wide, 1, [&](int64_t begin, int64_t end) {
      columns(begin * wide, end * wide);
    });
  }
};

void check_weights(const char* name, const Tensor& weights) {
  check::packed(name, weights, check::floats, {check::any, check::any, check::any});
  STD_TORCH_CHECK(weights.size(1) % wide == 0 && weights.size(2) % wide == 0, name, " must have widths of multiples of ", wide);
}

// -> [M, O] if transposed, else [M, I], of rows source[m] of x.
Tensor multiply(const Tensor& x, const Tensor& source, const Tensor& weights, const Tensor& ends,
                bool transposed) {
  check_weights("weights", weights);
  const int64_t outer = weights.size(1), inner = weights.size(2);
  check::packed("x", x, check::floats, {check::any, transposed ? inner : outer});
  check::indices("source", source, {check::any}, x.size(0));
  check::ends("ends", ends, weights.size(0), source.size(0));
  Tensor y = torch::stable::new_empty(x, {source.size(0), transposed ? outer : inner});
  Product{x.const_data_ptr<float>(), source.const_data_ptr<int64_t>(),
          weights.const_data_ptr<float>(), transposed, outer, inner,
          ends.const_data_ptr<int64_t>(), ends.size(0), y.mutable_data_ptr<float>(), nullptr}
      .run();
  return y;
}

// Row m of the product of x [M, ...] is added to row target[m] of the result, which has ``rows``.
Tensor multiply_add(const Tensor& x, const Tensor& target, const Tensor& weights,
                    const Tensor& ends, bool transposed, int64_t rows) {
  check_weights("weights", weights);
  const int64_t outer = weights.size(1), inner = weights.size(2);
  check::packed("x", x, check::floats, {check::any, transposed ? inner : outer});
  check::indices("target", target, {x.size(0)}, rows);
  check::ends("ends", ends, weights.size(0), x.size(0));
  Tensor y = torch::stable::new_zeros(x, {rows, transposed ? outer : inner});
  Product{x.const_data_ptr<float>(), nullptr, weights.const_data_ptr<float>(), transposed, outer,
          inner, ends.const_data_ptr<int64_t>(), ends.size(0), y.mutable_data_ptr<float>(),
          target.const_data_ptr<int64_t>()}
      .run();
  return y;
}

// out [O, I] = the sum over rows of left^T right.
void outer_products(const std::vector<const float*>& left, const std::vector<const float*>& right,
                    std::vector<float>& turned, float* out, int64_t outer, int64_t inner) {
  std::vector<const float*> in(outer);
  std::vector<float*> to(outer);
  for (int64_t o = 0; o < outer; ++o) in[o] = &turned[o * block], to[o] = out + o * inner;
  const int64_t rows = left.size();
  for (int64_t k = 0; k < rows; k += block) {
    const int64_t length = std::min(block, rows - k);
    tiles::transpose(&left[k], length, 0, outer, turned.data(), block);
    torch::stable::parallel_for(0, inner / wide, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> panel(block * wide);
      for (int64_t n = begin * wide; n < end * wide; n += wide) {
        tiles::pack(&right[k], length, n, panel.data());
        tiles::multiply(outer, in.data(), 0, panel.data(), wide, to.data(), n, length, k > 0);
      }
    });
  }
}

// Each expert's sum over uses u and its rows m of left[u][left_rows[u][m]]^T right[u][right_rows[u][m]]
// into ``out`` [E, O, I]; experts without rows are left as they are.
void gradient(Tensor out, std::vector<Tensor> left, std::vector<Tensor> left_rows,
              std::vector<Tensor> right, std::vector<Tensor> right_rows, std::vector<Tensor> ends) {
  check_weights("out", out);
  const int64_t outer = out.size(1), inner = out.size(2);
  const size_t uses = ends.size();
  STD_TORCH_CHECK(left.size() == uses && left_rows.size() == uses && right.size() == uses && right_rows.size() == uses,
                  "left, left_rows, right, right_rows and ends must be lists of one length");
  for (size_t u = 0; u < uses; ++u) {
    check::packed("left", left[u], check::floats, {check::any, outer});
    check::packed("right", right[u], check::floats, {check::any, inner});
    check::indices("left_rows", left_rows[u], {check::any}, left[u].size(0));
    check::indices("right_rows", right_rows[u], {left_rows[u].size(0)}, right[u].size(0));
    check::ends("ends", ends[u], out.size(0), left_rows[u].size(0));
  }
  std::vector<const float*> lefts, rights;
  std::vector<float> turned(outer * block);
  for (int64_t expert = 0; expert < out.size(0); ++expert) {
    lefts.clear(), rights.clear();
    for (size_t u = 0; u < uses; ++u) {
      const int64_t* stops = ends[u].const_data_ptr<int64_t>();
      for (int64_t m = expert ? stops[expert - 1] : 0; m < stops[expert]; ++m) {
        lefts.push_back(left[u].const_data_ptr<float>() + left_rows[u].const_data_ptr<int64_t>()[m] * outer);
        rights.push_back(right[u].const_data_ptr<float>() + right_rows[u].const_data_ptr<int64_t>()[m] * inner);
      }
    }
    if (!lefts.empty())
      outer_products(lefts, rights, turned, out.mutable_data_ptr<float>() + expert * outer * inner, outer, inner);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_experts, library) {
  library.def("multiply(Tensor x, Tensor source, Tensor weights, Tensor ends, bool transposed) -> Tensor");
  library.def("multiply_add(Tensor x, Tensor target, Tensor weights, Tensor ends, bool transposed, int rows) -> Tensor");
  library.def(
      "gradient(Tensor(a!) out, Tensor[] left, Tensor[] left_rows, Tensor[] right, Tensor[] right_rows, "
      "Tensor[] ends) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_experts, CPU, library) {
  library.impl("multiply", TORCH_BOX(&multiply));
  library.impl("multiply_add", TORCH_BOX(&multiply_add));
  library.impl("gradient", TORCH_BOX(&gradient));
}
