// Products of few rows with large matrices, as decoding makes them: bound by reading the weights.
//
// Each row of weights is read once, from start to end, and meets all rows of x on the way: one
// stream is what the processor's prefetcher follows best. Built by native.py at first use.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <vector>

using torch::stable::Tensor;

namespace {

constexpr int64_t lanes = 8;           // floats in one vector
constexpr int64_t ahead = 1024;        // floats of prefetch: weights of one or two rows
constexpr int64_t grain = 1 << 15;     // weights that are worth a thread
typedef float Vector __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float))));

// y[row * stride] = w . x[row] for ``Rows`` rows of x.
template <int Rows>
void dot(const float* x, const float* w, float* y, int64_t inner, int64_t stride) {
  constexpr int unroll = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  Vector sums[Rows][unroll] = {};
  int64_t i = 0;
  for (; i + lanes * unroll <= inner; i += lanes * unroll) {
    // With one row the memory is the limit and the processor looks ahead by itself.
    if (Rows > 2 && i % (2 * lanes) == 0) __builtin_prefetch(w + i + ahead);
    for (int u = 0; u < unroll; ++u) {
      const Vector weights = *reinterpret_cast<const Vector*>(w + i + lanes * u);
      for (int r = 0; r < Rows; ++r)
        sums[r][u] += weights * *reinterpret_cast<const Vector*>(x + r * inner + i + lanes * u);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    Vector sum = sums[r][0];
    for (int u = 1; u < unroll; ++u) sum += sums[r][u];
    float total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
    for (int64_t rest = i; rest < inner; ++rest) total += w[rest] * x[r * inner + rest];
    y[r * stride] = total;
  }
}

void dot_rows(const float* x, const float* w, float* y, int64_t rows, int64_t inner, int64_t stride) {
  for (; rows >= 8; rows -= 8, x += 8 * inner, y += 8 * stride) dot<8>(x, w, y, inner, stride);
  if (rows & 4) dot<4>(x, w, y, inner, stride), x += 4 * inner, y += 4 * stride;
  if (rows & 2) dot<2>(x, w, y, inner, stride), x += 2 * inner, y += 2 * stride;
  if (rows & 1) dot<1>(x, w, y, inner, stride);
}

// x [N, I], weight [O, I] -> x weight^T [N, O].
Tensor linear(const Tensor& x, const Tensor& weight) {
  const int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  Tensor result = torch::stable::new_empty(x, {rows, outer});
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, outer, grain / inner + 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) dot_rows(in, w + o * inner, out + o, rows, inner, outer);
  });
  return result;
}

// Sum over k of weight[n, k] * down[e] (SiLU(gate[e] x) * up[e] x) with e = expert[n, k].
Tensor experts(const Tensor& x, const Tensor& expert, const Tensor& weight, const Tensor& gate_up,
               const Tensor& down) {
  const int64_t rows = x.size(0), dim = x.size(1), slots = expert.size(1), width = down.size(2);
  const int64_t pairs = rows * slots;
  Tensor result = torch::stable::new_empty(x, {rows, dim});
  const float* in = x.const_data_ptr<float>();
  const int64_t* chosen = expert.const_data_ptr<int64_t>();
  const float* scale = weight.const_data_ptr<float>();
  const float* first = gate_up.const_data_ptr<float>();
  const float* second = down.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  std::vector<float> gate(pairs * width), up(pairs * width);
  torch::stable::parallel_for(0, 2 * pairs, grain / (width * dim) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t half = begin; half < end; ++half) {
      const int64_t pair = half / 2;
      const float* w = first + (2 * chosen[pair] + half % 2) * width * dim;
      float* to = (half % 2 ? up.data() : gate.data()) + pair * width;
      for (int64_t f = 0; f < width; ++f) dot<1>(in + pair / slots * dim, w + f * dim, to + f, dim, 0);
    }
  });
  for (int64_t i = 0; i < pairs * width; ++i)
    up[i] *= scale[i / width] * gate[i] / (1 + std::exp(-gate[i]));
  torch::stable::parallel_for(0, rows, grain / (slots * width * dim) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> part(dim);
    for (int64_t pair = begin * slots; pair < end * slots; ++pair) {
      const float* w = second + chosen[pair] * dim * width;
      float* to = out + pair / slots * dim;
      for (int64_t d = 0; d < dim; ++d) dot<1>(up.data() + pair * width, w + d * width, &part[d], width, 0);
      for (int64_t d = 0; d < dim; ++d) to[d] = pair % slots ? to[d] + part[d] : part[d];
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_narrow, library) {
  library.def("linear(Tensor x, Tensor weight) -> Tensor");
  library.def("experts(Tensor x, Tensor expert, Tensor weight, Tensor gate_up, Tensor down) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_narrow, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("experts", TORCH_BOX(&experts));
}
