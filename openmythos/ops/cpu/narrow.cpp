// Products of few rows with large matrices, as decoding makes them: bound by reading the weights.
// Weights are floats, or integers of 8 bits with one scale per output channel.
//
// Several rows of weights meet all rows of x in registers. They are fetched ahead of that as memory
// has them, in one straight stream, which is what the processor follows best.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "tiles.h"

using tiles::Eight, tiles::lanes, tiles::load, tiles::power, tiles::total_each, tiles::Vector, tiles::wide;
using torch::stable::Tensor;

namespace {

constexpr int registers = 2 * lanes;  // of the processor, as they are vectors: 32 or 16
constexpr int most = 8;            // rows of x at a time
constexpr int64_t line = 64, distance = 1 << 14;  // bytes fetched at once, and how far ahead of their use
constexpr int64_t grain = 1 << 15;  // weights that are worth a thread

inline Eight eight(const float* from) { return *reinterpret_cast<const Eight*>(from); }

// The first ``count`` numbers, then zeros.
template <typename Number>
inline Vector load_some(const Number* from, int64_t count) {
  Number some[lanes] = {};
  std::memcpy(some, from, count * sizeof(Number));
  return load(some);
}

// Keeps a vector in its register: GCC would load it again for every product.
inline void keep([[maybe_unused]] Vector& value) {
#ifdef __x86_64__
  asm("" : "+v"(value));
#endif
}

// Rows of weights as they are stored; ``scale`` has one number per row of integers.
template <typename Number>
struct Weights {
  const Number* rows;
  const float* scale;

  Weights from(int64_t row, int64_t inner) const { return {rows + row * inner, scale ? scale + row : scale}; }
};

// y[n * stride + o] = w[o] . x[n] for ``Outer`` rows of w and ``Rows`` of x; what lies ``ahead`` is fetched.
template <int Outer, int Rows, typename Number>
inline void block(const float* x, Weights<Number> weight, float* y, int64_t inner, int64_t stride, int64_t ahead) {
  const Number* w = weight.rows;
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
    for (int o = 0; o < Outer; ++o)
      if (o * lanes * sizeof(Number) % line == 0) __builtin_prefetch(w + Outer * i + o * lanes + ahead, 0, 2);
    add(i, [](const auto* from) { return load(from); });
  }
  if (i < inner) add(i, [rest = inner - i](const auto* from) { return load_some(from, rest); });
  float found[power(Outer * Rows)];
  total_each<Outer * Rows>(sums, found);
  for (int o = 0; o < Outer; ++o)
    for (int n = 0; n < Rows; ++n) y[n * stride + o] = found[o * Rows + n] * (weight.scale ? weight.scale[o] : 1);
}

// With one row of x and floats the memory is the limit. One row of weights after the other in vectors
// of eight is what the processor reads ahead best.
inline void one_row(const float* x, const float* w, float* y, int64_t outer, int64_t inner) {
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

// y[n * stride + o] = w[o] . x[n] for ``outer`` rows of w and ``Rows`` of x.
template <int Rows, typename Number>
void products(const float* x, Weights<Number> w, float* y, int64_t outer, int64_t inner, int64_t stride) {
  if constexpr (Rows == 1 && std::is_same_v<Number, float>) return one_row(x, w.rows, y, outer, inner);
  constexpr int some = std::clamp((registers - 4) / (Rows + 1), 1, 4);
  constexpr int64_t far = distance / sizeof(Number);
  int64_t o = 0;
  for (; o + some <= outer; o += some)
    block<some, Rows>(x, w.from(o, inner), y + o, inner, stride, std::min(far, (outer - o - some) * inner));
  for (; o < outer; ++o) block<1, Rows>(x, w.from(o, inner), y + o, inner, stride, 0);
}

template <int Rows = most, typename Number>
void products(const float* x, Weights<Number> w, float* y, int64_t rows, int64_t outer, int64_t inner, int64_t stride) {
  for (; rows >= Rows; rows -= Rows, x += Rows * inner, y += Rows * stride)
    products<Rows>(x, w, y, outer, inner, stride);
  if constexpr (Rows > 1)
    if (rows) products<Rows - 1>(x, w, y, rows, outer, inner, stride);
}

// x [N, I], weight [O, I] -> x weight^T [N, O].
template <typename Number>
Tensor multiply(const Tensor& x, const Tensor& weight, Weights<Number> w) {
  check::packed("x", x, check::floats, {check::any, weight.size(1)});
  const int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  Tensor result = torch::stable::new_empty(x, {rows, outer});
  const float* in = x.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, outer, grain / (inner + 1) + 1, [&](int64_t begin, int64_t end) {
    products(in, w.from(begin, inner), out + begin, rows, end - begin, inner, outer);
  });
  return result;
}

Weights<float> floats(const char* name, const Tensor& weight, const check::Shape& shape) {
  check::packed(name, weight, check::floats, shape);
  return {weight.const_data_ptr<float>(), nullptr};
}

// ``scale`` has the shape of ``values`` without its last dimension.
Weights<int8_t> bytes(const char* name, const Tensor& values, const Tensor& scale, const check::Shape& shape) {
  check::packed(name, values, check::bytes, shape);
  check::Shape channels;
  for (int64_t d = 0; d + 1 < values.dim(); ++d) channels.push_back(values.size(d));
  check::packed("scale", scale, check::floats, channels);
  return {values.const_data_ptr<int8_t>(), scale.const_data_ptr<float>()};
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  return multiply(x, weight, floats("weight", weight, {check::any, check::any}));
}

Tensor linear_int8(const Tensor& x, const Tensor& values, const Tensor& scale) {
  return multiply(x, values, bytes("values", values, scale, {check::any, check::any}));
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

// Sum over k of weight[n, k] * down[e] (SiLU(gate[e] x) * up[e] x) with e = expert[n, k]; down [E, D, F].
template <typename Number>
Tensor mixture(const Tensor& x, const Tensor& expert, const Tensor& weight, Weights<Number> first,
               Weights<Number> second, const check::Shape& shape) {
  const int64_t num_experts = shape[0], dim = shape[1], width = shape[2];
  check::packed("x", x, check::floats, {check::any, dim});
  check::indices("expert", expert, {x.size(0), check::any}, num_experts);
  check::packed("weight", weight, check::floats, {x.size(0), expert.size(1)});
  const int64_t rows = x.size(0), slots = expert.size(1), pairs = rows * slots;
  Tensor result = torch::stable::new_zeros(x, {rows, dim});
  const float* in = x.const_data_ptr<float>();
  const int64_t* chosen = expert.const_data_ptr<int64_t>();
  const float* share = weight.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  std::vector<float> inner(2 * pairs * width);  // gate and up of each pair
  torch::stable::parallel_for(0, 2 * width * pairs, grain / (dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin, stop; row < end; row = stop) {
      const int64_t pair = row / (2 * width);
      stop = std::min(end, (pair + 1) * 2 * width);
      const auto w = first.from(chosen[pair] * 2 * width + row % (2 * width), dim);
      products<1>(in + pair / slots * dim, w, &inner[row], stop - row, dim, 0);
    }
  });
  for (int64_t pair = 0; pair < pairs; ++pair) activate(&inner[2 * pair * width], width, share[pair]);
  torch::stable::parallel_for(0, rows, grain / (slots * width * dim + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> part(dim);
    for (int64_t pair = begin * slots; pair < end * slots; ++pair) {
      products<1>(&inner[2 * pair * width], second.from(chosen[pair] * dim, width), part.data(), dim, width, 0);
      for (int64_t d = 0; d < dim; ++d) out[pair / slots * dim + d] += part[d];
    }
  });
  return result;
}

check::Shape shape_of(const Tensor& down) {
  STD_TORCH_CHECK(down.dim() == 3, "down must have three dimensions");
  return {down.size(0), down.size(1), down.size(2)};
}

Tensor experts(const Tensor& x, const Tensor& expert, const Tensor& weight, const Tensor& gate_up,
               const Tensor& down) {
  const check::Shape shape = shape_of(down);
  return mixture(x, expert, weight, floats("gate_up", gate_up, {shape[0], 2 * shape[2], shape[1]}),
                 floats("down", down, shape), shape);
}

Tensor experts_int8(const Tensor& x, const Tensor& expert, const Tensor& weight, const Tensor& gate_up,
                    const Tensor& gate_up_scale, const Tensor& down, const Tensor& down_scale) {
  const check::Shape shape = shape_of(down);
  return mixture(x, expert, weight, bytes("gate_up", gate_up, gate_up_scale, {shape[0], 2 * shape[2], shape[1]}),
                 bytes("down", down, down_scale, shape), shape);
}

// Each head's rows of x [H, N, I] by its channels first to first + O of values [H, C, I] -> [H, N, O].
Tensor heads_int8(const Tensor& x, const Tensor& values, const Tensor& scale, int64_t first, int64_t outer) {
  const auto w = bytes("values", values, scale, {x.size(0), check::any, check::any});
  const int64_t heads = x.size(0), channels = values.size(1), inner = values.size(2);
  check::packed("x", x, check::floats, {heads, check::any, inner});
  STD_TORCH_CHECK(0 <= first && 0 <= outer && first + outer <= channels, "values has fewer channels");
  const int64_t rows = x.size(1);
  Tensor result = torch::stable::new_empty(x, {heads, rows, outer});
  const float* in = x.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, heads, grain / (outer * inner + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      products(in + h * rows * inner, w.from(h * channels + first, inner), out + h * rows * outer, rows, outer, inner, outer);
  });
  return result;
}

// y[n] = the sum over o of x[n, o] * w[o] for ``rows`` rows of x and ``outer`` of w.
template <int Rows = most>
void absorb(int64_t rows, const float* x, const int8_t* w, float* y, int64_t outer, int64_t inner) {
  for (; rows >= Rows; rows -= Rows, x += Rows * outer, y += Rows * inner) {
    const float* in[Rows];
    float* out[Rows];
    for (int n = 0; n < Rows; ++n) in[n] = x + n * outer, out[n] = y + n * inner;
    for (int64_t i = 0; i < inner; i += wide) tiles::tile<Rows>(in, 0, w + i, inner, out, i, outer, false);
  }
  if constexpr (Rows > 1)
    if (rows) absorb<Rows - 1>(rows, x, w, y, outer, inner);
}

// Each head's rows of x [H, N, O], times the scale of its channels first to first + O of
// values [H, C, I], by those channels -> [H, N, I]. I is a multiple of ``wide``.
Tensor absorb_int8(const Tensor& x, const Tensor& values, const Tensor& scale, int64_t first) {
  const auto w = bytes("values", values, scale, {x.size(0), check::any, check::any});
  const int64_t heads = x.size(0), channels = values.size(1), inner = values.size(2);
  check::packed("x", x, check::floats, {heads, check::any, check::any});
  const int64_t rows = x.size(1), outer = x.size(2);
  STD_TORCH_CHECK(0 <= first && first + outer <= channels, "values has fewer channels");
  STD_TORCH_CHECK(inner % wide == 0, "values must have a width of multiples of ", wide);
  Tensor result = torch::stable::new_empty(x, {heads, rows, inner});
  const float* in = x.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, heads, grain / (outer * inner + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scaled(rows * outer);
    for (int64_t h = begin; h < end; ++h) {
      const auto own = w.from(h * channels + first, inner);
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t o = 0; o < outer; ++o) scaled[n * outer + o] = in[(h * rows + n) * outer + o] * own.scale[o];
      absorb(rows, scaled.data(), own.rows, out + h * rows * inner, outer, inner);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_narrow, library) {
  library.def("linear(Tensor x, Tensor weight) -> Tensor");
  library.def("experts(Tensor x, Tensor expert, Tensor weight, Tensor gate_up, Tensor down) -> Tensor");
  library.def("linear_int8(Tensor x, Tensor values, Tensor scale) -> Tensor");
  library.def(
      "experts_int8(Tensor x, Tensor expert, Tensor weight, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
      "Tensor down_scale) -> Tensor");
  library.def("heads_int8(Tensor x, Tensor values, Tensor scale, int first, int outer) -> Tensor");
  library.def("absorb_int8(Tensor x, Tensor values, Tensor scale, int first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_narrow, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("experts", TORCH_BOX(&experts));
  library.impl("linear_int8", TORCH_BOX(&linear_int8));
  library.impl("experts_int8", TORCH_BOX(&experts_int8));
  library.impl("heads_int8", TORCH_BOX(&heads_int8));
  library.impl("absorb_int8", TORCH_BOX(&absorb_int8));
}
