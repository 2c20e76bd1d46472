// Attention of one query per row and head to keys and values in pages, as decoding makes it.
//
// The heads that share a kv head are computed together, so that its keys and values are read once.
// A row's sums have one order, whatever stands in the other rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "tiles.h"

using tiles::lanes, tiles::load, tiles::store, tiles::Vector, tiles::wide;
using torch::stable::Tensor;

namespace {

constexpr int together = 8;  // keys that meet a query in registers

// found[t] = q . key[t] for ``Count`` keys that are ``stride`` apart.
template <int Count>
inline void dots(const float* q, const float* key, int64_t stride, int64_t width, float* found) {
  Vector sums[Count] = {};
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    const Vector part = load(q + i);
    for (int t = 0; t < Count; ++t) sums[t] += part * load(key + t * stride + i);
  }
  float totals[Count];
  tiles::total_each<Count>(sums, totals);
  for (int t = 0; t < Count; ++t) {
    for (int64_t j = i; j < width; ++j) totals[t] += q[j] * key[t * stride + j];
    found[t] = totals[t];
  }
}

// Scores -> weights that sum to 1, in place; the row has room up to a multiple of ``lanes``.
void softmax(float* row, float scale, int64_t length) {
  const int64_t padded = (length + lanes - 1) / lanes * lanes;
  std::fill(row + length, row + padded, -std::numeric_limits<float>::infinity());
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < length; ++t) top = std::max(top, row[t] *= scale);
  Vector sums = {};
  for (int64_t t = 0; t < padded; t += lanes) {
    const Vector weight = tiles::exponential(load(row + t) - top);
    store(row + t, weight);
    sums += weight;
  }
  const float share = 1 / tiles::total(sums);
  for (int64_t t = 0; t < padded; t += lanes) store(row + t, load(row + t) * share);
}

// One kv head of one row.
struct Group {
  const Tensor &k, &v;
  const float *keys, *values;
  const int64_t* pages;
  int64_t group, length;

  const float* key(int64_t page) const { return keys + (pages[page] * k.size(1) * k.size(2) + group) * k.size(3); }
  const float* value(int64_t page) const { return values + (pages[page] * v.size(1) * v.size(2) + group) * v.size(3); }

  // Calls ``work(page, first token, number of tokens)`` for every page.
  template <typename Work>
  void each(const Work& work) const {
    const int64_t size = k.size(1);
    for (int64_t page = 0; page * size < length; ++page) work(page, page * size, std::min(size, length - page * size));
  }

  void score(const float* q, int64_t heads, float* scores, int64_t step) const {
    const int64_t width = k.size(3), stride = k.size(2) * width;
    each([&](int64_t page, int64_t start, int64_t count) {
      const float* first = key(page);
      for (int64_t h = 0; h < heads; ++h) {
        const float* query = q + h * width;
        float* found = scores + h * step + start;
        int64_t t = 0;
        for (; t + together <= count; t += together) dots<together>(query, first + t * stride, stride, width, found + t);
        for (; t < count; ++t) dots<1>(query, first + t * stride, stride, width, found + t);
      }
    });
  }

  void mix(const float* weights, int64_t heads, int64_t step, float* out, int64_t width) const {
    const int64_t stride = v.size(2) * v.size(3), whole = width / wide * wide;
    std::vector<const float*> rows;
    std::vector<float*> targets;
    for (int64_t h = 0; h < heads; ++h) rows.push_back(weights + h * step), targets.push_back(out + h * width);
    each([&](int64_t page, int64_t start, int64_t count) {
      const float* first = value(page);
      for (int64_t c = 0; c < whole; c += wide)
        tiles::multiply(heads, rows.data(), start, first + c, stride, targets.data(), c, count, start > 0);
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t c = whole; c < width; ++c) {
          float sum = start > 0 ? targets[h][c] : 0;
          for (int64_t t = 0; t < count; ++t) sum += rows[h][start + t] * first[t * stride + c];
          targets[h][c] = sum;
        }
    });
  }
};

void check_operands(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& length,
                    int64_t width) {
  check::packed("q", q, check::floats, {check::any, check::any, check::any});
  check::packed("k", k, check::floats, {check::any, check::any, check::any, q.size(2)});
  check::packed("v", v, check::floats, {k.size(0), k.size(1), k.size(2), check::any});
  check::packed("table", table, check::integers, {q.size(0), check::any});
  check::packed("length", length, check::integers, {q.size(0)});
  const int64_t pages = k.size(0), size = k.size(1), groups = k.size(2), most = table.size(1);
  STD_TORCH_CHECK(groups > 0 && q.size(1) % groups == 0, "q must have a multiple of the ", groups, " heads of k");
  STD_TORCH_CHECK(0 < width && width <= v.size(3), "width is ", width, "; it must be in 1..", v.size(3));
  const int64_t *lengths = length.const_data_ptr<int64_t>(), *entries = table.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < q.size(0); ++n) {
    STD_TORCH_CHECK(0 < lengths[n] && lengths[n] <= most * size, "length holds ", lengths[n], "; it must be in 1..", most * size);
    for (int64_t m = 0; m * size < lengths[n]; ++m) {
      const int64_t page = entries[n * most + m];
      STD_TORCH_CHECK(0 <= page && page < pages, "table holds ", page, "; it must be in 0..", pages - 1);
    }
  }
}

// [N, H, K], pools [P, page, G, K] and [P, page, G, W], [N, M], [N] -> [N, H, width].
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& length,
              double scale, int64_t width) {
  check_operands(q, k, v, table, length, width);
  const int64_t num_rows = q.size(0), heads = q.size(1), groups = k.size(2), per = heads / groups;
  Tensor result = torch::stable::new_empty(q, {num_rows, heads, width});
  const float* queries = q.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, num_rows * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> weights;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups, g = task % groups, first = n * heads + g * per;
      const Group part{k, v, k.const_data_ptr<float>(), v.const_data_ptr<float>(),
                       table.const_data_ptr<int64_t>() + n * table.size(1), g, length.const_data_ptr<int64_t>()[n]};
      const int64_t step = (part.length + lanes - 1) / lanes * lanes;
      weights.resize(per * step);
      part.score(queries + first * q.size(2), per, weights.data(), step);
      for (int64_t h = 0; h < per; ++h) softmax(weights.data() + h * step, float(scale), part.length);
      part.mix(weights.data(), per, step, out + first * width, width);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_paged, library) {
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor table, Tensor length, float scale, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_paged, CPU, library) { library.impl("attend", TORCH_BOX(&attend)); }
