// Products of few rows with large matrices, as decoding makes them: bound by reading the weights.
//
// Several rows of weights meet all rows of x in registers. They are fetched ahead of that as memory
// has them, in one straight stream, which is what the processor follows best.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "tiles.h"

using tiles::Eight, tiles::lanes, tiles::load, tiles::power, tiles::total_each, tiles::Vector;
using torch::stable::Tensor;

namespace {

constexpr int registers = 2 * lanes;  // of the processor, as they are vectors: 32 or 16
constexpr int most = 8;            // rows of x at a time
constexpr int64_t distance = 4096;  // floats between a weight that is used and one that is fetched
constexpr int64_t grain = 1 << 15;  // weights that are worth a thread

inline Eight eight(const float* from) { return *reinterpret_cast<const Eight*>(from); }

// The first ``count`` floats, then zeros.
inline Vector load_some(const float* from, int64_t count) {
  Vector value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

// Keeps a vector in its register: GCC would load it again for every product.
inline void keep([[maybe_unused]] Vector& value) {
#ifdef __x86_64__
  asm("" : "+v"(value));
#endif
}

// y[n * stride + o] = w[o] . x[n] for ``Outer`` rows of w and ``Rows`` of x; what lies ``ahead`` is fetched.
template <int Outer, int Rows>
inline void block(const float* x, const float* w, float* y, int64_t inner, int64_t stride, int64_t ahead) {
  Vector sums[power(Outer * Rows)] = {};
  const auto add = [&](int64_t i, const auto& read) __attribute__((always_inline)) {
    Vector weights[Outer];
#pragma GCC unroll 8
    for (int o = 0; o < Outer; ++o) weights[o] = read(w + o * inner + i);
#pragma GCC unroll 8
    for (int n = 0; n < Rows; ++n) {
      Vector value = read(x + n * inner + i);
      keep(value);
#pragma GCC unroll 8
      for (int o = 0; o < Outer; ++o) sums[o * Rows + n] += weights[o] * value;
    }
  };
  int64_t i = 0;
  for (; i + lanes <= inner; i += lanes) {
#pragma GCC unroll 8
    for (int o = 0; o < Outer; ++o) __builtin_prefetch(w + Outer * i + o * lanes + ahead, 0, 2);
    add(i, [](const float* from) { return load(from); });
  }
  if (i < inner) add(i, [rest = inner - i](const float* from) { return load_some(from, rest); });
  float found[power(Outer * Rows)];
  total_each<Outer * Rows>(sums, found);
  for (int o = 0; o < Outer; ++o)
    for (int n = 0; n < Rows; ++n) y[n * stride + o] = found[o * Rows + n];
}

// y[n * stride + o] = w[o] . x[n] for ``outer`` rows of w and ``Rows`` of x.
template <int Rows>
void products(const float* x, const float* w, float* y, int64_t outer, int64_t inner, int64_t stride) {
  constexpr int some = std::clamp((registers - 4) / (Rows + 1), 1, 4);
  int64_t o = 0;
  for (; o + some <= outer; o += some)
    block<some, Rows>(x, w + o * inner, y + o, inner, stride, std::min(distance, (outer - o - some) * inner));
  for (; o < outer; ++o) block<1, Rows>(x, w + o * inner, y + o, inner, stride, 0);
}

// With one row of x the memory is the limit. One row of weights after the other in vectors of eight
// is what the processor reads ahead best.
template <>
void products<1>(const float* x, const float* w, float* y, int64_t outer, int64_t inner, int64_t) {
  for (int64_t o = 0; o < outer; ++o, w += inner) {
    Eight sums[4] = {};
    int64_t i = 0;
    for (; i + 32 <= inner; i += 32)
      for (int u = 0; u < 4; ++u) sums[u] += eight(w + i + 8 * u) * eight(x + i + 8 * u);
    for (; i + 8 <= inner; i += 8) sums[0] += eight(w + i) * eight(x + i);
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < 4; ++lane) sums[0][lane] += sums[0][lane + 4];
    y[o] = (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
    for (; i < inner; ++i) y[o] += w[i] * x[i];
  }
}

template <int Rows = most>
void products(const float* x, const float* w, float* y, int64_t rows, int64_t outer, int64_t inner, int64_t stride) {
  for (; rows >= Rows; rows -= Rows, x += Rows * inner, y += Rows * stride)
    products<Rows>(x, w, y, outer, inner, stride);
  if constexpr (Rows > 1)
    if (rows) products<Rows - 1>(x, w, y, rows, outer, inner, stride);
}

// x [N, I], weight [O, I] -> x weight^T [N, O].
Tensor linear(const Tensor& x, const Tensor& weight) {
  check::packed("weight", weight, check::floats, {check::any, check::any});
  check::packed("x", x, check::floats, {check::any, weight.size(1)});
  const int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  Tensor result = torch::stable::new_empty(x, {rows, outer});
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, outer, grain / (inner + 1) + 1, [&](int64_t begin, int64_t end) {
    products(in, w + begin * inner, out + begin, rows, end - begin, inner, outer);
  });
  return result;
}

// The first ``width`` values (gate) become ``share`` SiLU(gate) times the next ones (up).
void activate(float* gate, int64_t width, float share) {
  for (int64_t f = 0; f < width; f += lanes) {
    const int64_t count = std::min<int64_t>(lanes, width - f);
    const Vector x = load_some(gate + f, count), up = load_some(gate + width + f, count);
    const Vector hidden = x / (1 + tiles::exponential(-x)) * up * share;
    std::memcpy(gate + f, &hidden, count * sizeof(float));
  }
}

// Sum over k of weight[n, k] * down[e] (SiLU(gate[e] x) * up[e] x) with e = expert[n, k].
Tensor experts(const Tensor& x, const Tensor& expert, const Tensor& weight, const Tensor& gate_up,
               const Tensor& down) {
  check::packed("down", down, check::floats, {check::any, check::any, check::any});
  const int64_t num_experts = down.size(0), dim = down.size(1), width = down.size(2);
  check::packed("gate_up", gate_up, check::floats, {num_experts, 2 * width, dim});
  check::packed("x", x, check::floats, {check::any, dim});
  check::indices("expert", expert, {x.size(0), check::any}, num_experts);
  check::packed("weight", weight, check::floats, {x.size(0), expert.size(1)});
  const int64_t rows = x.size(0), slots = expert.size(1), pairs = rows * slots;
  Tensor result = torch::stable::new_zeros(x, {rows, dim});
  const float* in = x.const_data_ptr<float>();
  const int64_t* chosen = expert.const_data_ptr<int64_t>();
  const float* scale = weight.const_data_ptr<float>();
  const float* first = gate_up.const_data_ptr<float>();
  const float* second = down.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  std::vector<float> inner(2 * pairs * width);  // gate and up of each pair
  torch::stable::parallel_for(0, 2 * width * pairs, grain / (dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin, stop; row < end; row = stop) {
      const int64_t pair = row / (2 * width);
      stop = std::min(end, (pair + 1) * 2 * width);
      const float* w = first + (chosen[pair] * 2 * width + row % (2 * width)) * dim;
      products<1>(in + pair / slots * dim, w, &inner[row], stop - row, dim, 0);
    }
  });
  for (int64_t pair = 0; pair < pairs; ++pair) activate(&inner[2 * pair * width], width, scale[pair]);
  torch::stable::parallel_for(0, rows, grain / (slots * width * dim + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> part(dim);
    for (int64_t pair = begin * slots; pair < end * slots; ++pair) {
      products<1>(&inner[2 * pair * width], second + chosen[pair] * dim * width, part.data(), dim, width, 0);
      for (int64_t d = 0; d < dim; ++d) out[pair / slots * dim + d] += part[d];
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
