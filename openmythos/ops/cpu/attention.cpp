// Causal attention of training in blocks of queries, each on the keys that it may see.
//
// Keys and values of a head stay in the second cache. Queries, results and gradients are read and
// written where they lie.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "tiles.h"

using tiles::lanes, tiles::load, tiles::store, tiles::Vector, tiles::wide;
using torch::stable::Tensor;

namespace {

constexpr int64_t queries = 48;  // of a block: whole tiles
constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t count) { return (count + wide - 1) / wide * wide; }

// Where the weights of the query block at ``start`` begin, in floats; of all of them at ``length``.
int64_t offset(int64_t start, int64_t length) {
  int64_t sum = 0;
  for (int64_t s = 0; s < start; s += queries)
    sum += std::min(queries, length - s) * padded(std::min(s + queries, length));
  return sum;
}

// The rows of one head of [B, H, T, C], whose channels lie side by side.
template <typename Float>
struct Head {
  Float* data;
  int64_t step;
  template <typename Any>
  Head(Any& x, Float* from, int64_t row, int64_t head)
      : data(from + row * x.stride(0) + head * x.stride(1)), step(x.stride(2)) {}
  std::vector<Float*> rows(int64_t start, int64_t stop) const {
    std::vector<Float*> found;
    for (int64_t t = start; t < stop; ++t) found.push_back(data + t * step);
    return found;
  }
};

std::vector<float*> rows_of(float* data, int64_t count, int64_t step) {
  std::vector<float*> found;
  for (int64_t r = 0; r < count; ++r) found.push_back(data + r * step);
  return found;
}

using Rows = std::vector<const float*>;
using Targets = std::vector<float*>;

// Panels of the transpose of rows [T, C]: [T / wide] panels of [C, wide].
std::vector<float> transposed_panels(const Rows& rows, int64_t width) {
  std::vector<float> panels(padded(rows.size()) * width);
  for (int64_t t = 0; t < int64_t(rows.size()); t += wide) {
    const float* some[wide];
    for (int64_t j = 0; j < wide; ++j) some[j] = rows[std::min<int64_t>(t + j, rows.size() - 1)];
    tiles::transpose(some, wide, 0, width, &panels[t * width], wide);
  }
  return panels;
}

// Panels of rows [T, C] as they are: [C / wide] panels of [T, wide].
std::vector<float> plain_panels(const Rows& rows, int64_t width) {
  std::vector<float> panels(rows.size() * width);
  for (int64_t c = 0; c < width; c += wide)
    tiles::pack(rows.data(), rows.size(), c, &panels[c * rows.size()]);
  return panels;
}

// ``out`` (+)= the first ``inner`` columns of ``in`` times plain panels of ``length`` rows.
void multiply(const Rows& in, int64_t inner, const std::vector<float>& panels, int64_t length,
              int64_t width, const Targets& out, bool add) {
  for (int64_t c = 0; c < width; c += wide)
    for (int64_t k = 0; k < inner; k += tiles::block)
      tiles::multiply(in.size(), in.data(), k, &panels[c * length + k * wide], wide, out.data(), c,
                      std::min(tiles::block, inner - k), add || k > 0);
}

// ``out`` = rows times transposed panels, as many as ``columns`` need.
void multiply_transposed(const Rows& in, const std::vector<float>& panels, int64_t width,
                         int64_t columns, const Targets& out) {
  for (int64_t t = 0; t < columns; t += wide)
    tiles::multiply(in.size(), in.data(), 0, &panels[t * width], wide, out.data(), t, width, false);
}

// Scores -> weights, in place: the first ``visible`` of ``columns``; the others are 0.
void softmax(float* row, const float* mask, float scale, int64_t visible, int64_t columns) {
  for (int64_t c = 0; c < visible; c += lanes) store(row + c, load(row + c) * scale);
  if (mask)
    for (int64_t c = 0; c < visible; ++c) row[c] += mask[c];
  std::fill(row + visible, row + columns, minus_infinity);
  Vector most = Vector{} + minus_infinity, sums = {};
  for (int64_t c = 0; c < visible; c += lanes) most = load(row + c) > most ? load(row + c) : most;
  float top = minus_infinity;
  for (int lane = 0; lane < lanes; ++lane) top = std::max(top, most[lane]);
  for (int64_t c = 0; c < visible; c += lanes) {
    const Vector weight = tiles::exponential(load(row + c) - top);
    store(row + c, weight);
    sums += weight;
  }
  const float share = 1 / tiles::total(sums);
  for (int64_t c = 0; c < visible; c += lanes) store(row + c, load(row + c) * share);
  std::fill(row + visible, row + columns, 0.0f);
}

void check_operands(const Tensor& q, const Tensor& k, const Tensor& v) {
  check::strided("q", q, check::floats, {check::any, check::any, check::any, check::any});
  check::strided("k", k, check::floats, {q.size(0), check::any, q.size(2), q.size(3)});
  check::strided("v", v, check::floats, {q.size(0), k.size(1), q.size(2), check::any});
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q must have a multiple of the ", k.size(1), " heads of k");
  STD_TORCH_CHECK(q.size(3) % wide == 0 && v.size(3) % wide == 0, "q, k and v must have widths of multiples of ", wide);
}

// q [B, H, T, C], k [B, G, T, C], v [B, G, T, W], mask [B, 1, T, T] added to the scores or none
// -> [B, T, H, W], and the weights of all blocks for the gradient if they are to be kept.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<Tensor> mask, double scale, bool keep) {
  check_operands(q, k, v);
  if (mask) check::strided("mask", *mask, check::floats, {q.size(0), 1, q.size(2), q.size(2)});
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), width = q.size(3);
  const int64_t groups = k.size(1), width_v = v.size(3), size = offset(length, length);
  Tensor y = torch::stable::new_empty(q, {batch, length, heads, width_v});
  Tensor kept = torch::stable::new_empty(q, {batch, heads, keep ? size : 0});
  const Tensor by_head = torch::stable::transpose(y, 1, 2);
  const float* masks = mask ? mask->const_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, g = task % groups, per = heads / groups;
      const auto keys = Head(k, k.const_data_ptr<float>(), b, g).rows(0, length);
      const auto values = Head(v, v.const_data_ptr<float>(), b, g).rows(0, length);
      const auto turned = transposed_panels(keys, width), panels = plain_panels(values, width_v);
      std::vector<float> scratch(keep ? 0 : queries * padded(length));
      for (int64_t h = g * per; h < (g + 1) * per; ++h)
        for (int64_t start = 0; start < length; start += queries) {
          const int64_t stop = std::min(start + queries, length), columns = padded(stop);
          float* block = keep ? kept.mutable_data_ptr<float>() + (b * heads + h) * size + offset(start, length)
                              : scratch.data();
          const auto weights = rows_of(block, stop - start, columns);
          multiply_transposed(Head(q, q.const_data_ptr<float>(), b, h).rows(start, stop), turned,
                              width, columns, weights);
          for (int64_t t = start; t < stop; ++t)
            softmax(weights[t - start], masks ? masks + b * mask->stride(0) + t * mask->stride(2) : nullptr,
                    scale, t + 1, columns);
          multiply({weights.begin(), weights.end()}, stop, panels, length, width_v,
                   Head(by_head, y.mutable_data_ptr<float>(), b, h).rows(start, stop), false);
        }
    }
  });
  return {y, kept};
}

// Gradients of the weights -> of the scores times ``scale``, in place: w (g - sum of w g).
void softmax_backward(const float* weights, float* grad, float scale, int64_t columns) {
  Vector products = {};
  for (int64_t c = 0; c < columns; c += lanes) products += load(weights + c) * load(grad + c);
  const float mean = tiles::total(products);
  for (int64_t c = 0; c < columns; c += lanes)
    store(grad + c, load(weights + c) * (load(grad + c) - mean) * scale);
}

// The gradients of q [B, T, H, C], k [B, T, G, C] and v [B, T, G, W] from that of y [B, H, T, W].
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& kept, double scale) {
  check_operands(q, k, v);
  check::strided("grad", grad, check::floats, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check::packed("kept", kept, check::floats, {q.size(0), q.size(1), offset(q.size(2), q.size(2))});
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), width = q.size(3);
  const int64_t groups = k.size(1), width_v = v.size(3), size = offset(length, length);
  Tensor grad_q = torch::stable::new_empty(q, {batch, length, heads, width});
  Tensor grad_k = torch::stable::new_zeros(q, {batch, length, groups, width});
  Tensor grad_v = torch::stable::new_zeros(q, {batch, length, groups, width_v});
  const Tensor to_q = torch::stable::transpose(grad_q, 1, 2), to_k = torch::stable::transpose(grad_k, 1, 2);
  const Tensor to_v = torch::stable::transpose(grad_v, 1, 2);
  torch::stable::parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, g = task % groups, per = heads / groups;
      const auto values = transposed_panels(Head(v, v.const_data_ptr<float>(), b, g).rows(0, length), width_v);
      const auto keys = plain_panels(Head(k, k.const_data_ptr<float>(), b, g).rows(0, length), width);
      std::vector<float> scores(queries * padded(length)), turned(queries * padded(length));
      for (int64_t h = g * per; h < (g + 1) * per; ++h)
        for (int64_t start = 0; start < length; start += queries) {
          const int64_t stop = std::min(start + queries, length), count = stop - start, columns = padded(stop);
          float* block = kept.mutable_data_ptr<float>() + (b * heads + h) * size + offset(start, length);
          const auto weights = rows_of(block, count, columns), gradients = rows_of(scores.data(), count, columns);
          const auto from_q = Head(q, q.const_data_ptr<float>(), b, h).rows(start, stop);
          const auto from_y = Head(grad, grad.const_data_ptr<float>(), b, h).rows(start, stop);
          multiply_transposed(from_y, values, width_v, columns, gradients);
          for (int64_t r = 0; r < count; ++r) softmax_backward(weights[r], gradients[r], scale, columns);
          multiply({gradients.begin(), gradients.end()}, stop, keys, length, width,
                   Head(to_q, grad_q.mutable_data_ptr<float>(), b, h).rows(start, stop), false);
          const auto by_key = rows_of(turned.data(), stop, queries);
          const Rows columns_of(by_key.begin(), by_key.end());
          tiles::transpose(Rows(gradients.begin(), gradients.end()).data(), count, 0, columns, turned.data(), queries);
          multiply(columns_of, count, plain_panels(from_q, width), count, width,
                   Head(to_k, grad_k.mutable_data_ptr<float>(), b, g).rows(0, stop), true);
          tiles::transpose(Rows(weights.begin(), weights.end()).data(), count, 0, columns, turned.data(), queries);
          multiply(columns_of, count, plain_panels(from_y, width_v), count, width_v,
                   Head(to_v, grad_v.mutable_data_ptr<float>(), b, g).rows(0, stop), true);
        }
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_attention, library) {
  library.def("forward(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool keep) -> (Tensor, Tensor)");
  library.def(
      "backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor kept, float scale) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_attention, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
}
