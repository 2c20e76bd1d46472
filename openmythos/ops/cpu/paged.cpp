// Attention of one query per row and head to keys and values in pages, as decoding makes it.
//
// The heads that share a kv head are computed together, so that its keys and values are read once.
// A row's sums have one order, whatever stands in the other rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "tiles.h"

using tiles::lanes, tiles::load, tiles::store, tiles::Vector;
using torch::stable::Tensor;

namespace {

constexpr int together = 8;  // keys that meet a query in registers

// A vector at ``from + i`` or, past the last whole one, at the end of a row of ``width`` floats: it
// begins earlier, and overlaps with the one before.
inline int64_t vector_at(int64_t i, int64_t width) { return std::min(i, width - lanes); }

// The query with zeros where its last vector overlaps with the one before, each vector in turn.
void spread(const float* q, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += lanes) {
    const int64_t at = vector_at(i, width);
    for (int64_t lane = 0; lane < lanes; ++lane) to[i + lane] = at + lane < i ? 0 : q[at + lane];
  }
}

// found[t] = q . key[t] for ``Count`` keys that are ``stride`` apart; ``q`` is spread.
template <int Count>
inline void dots(const float* q, const float* key, int64_t stride, int64_t width, float* found) {
  Vector sums[Count] = {};
  for (int64_t i = 0; i < width; i += lanes) {
    const Vector part = load(q + i);
    const float* from = key + vector_at(i, width);
#pragma GCC unroll 8
    for (int t = 0; t < Count; ++t) sums[t] += part * load(from + t * stride);
  }
  tiles::total_each<Count>(sums, found);
}

// The same for rows that are shorter than a vector.
inline void short_dot(const float* q, const float* key, int64_t width, float* found) {
  *found = 0;
  for (int64_t i = 0; i < width; ++i) *found += q[i] * key[i];
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

// A pool as plain numbers: to ask a tensor for a size costs as much as to read a key.
struct Pool {
  const float* data;
  int64_t size, groups, width;  // tokens per page, kv heads, channels

  explicit Pool(const Tensor& pool)
      : data(pool.const_data_ptr<float>()), size(pool.size(1)), groups(pool.size(2)), width(pool.size(3)) {}
  int64_t stride() const { return groups * width; }  // from one token to the next
  const float* at(int64_t page, int64_t group) const { return data + (page * size * groups + group) * width; }
};

// One kv head of one row.
struct Group {
  const Pool &k, &v;
  const int64_t* pages;
  int64_t group, length;

  const float* key(int64_t page) const { return k.at(pages[page], group); }
  const float* value(int64_t page) const { return v.at(pages[page], group); }

  // Calls ``work(page, first token, number of tokens)`` for every page.
  template <typename Work>
  void each(const Work& work) const {
    for (int64_t page = 0; page * k.size < length; ++page)
      work(page, page * k.size, std::min(k.size, length - page * k.size));
  }

  void score(const float* q, int64_t heads, float* scores, int64_t step) const {
    const int64_t width = k.width, stride = k.stride(), room = (width + lanes - 1) / lanes * lanes;
    const bool narrow = width < lanes;
    std::vector<float> queries(heads * room);
    for (int64_t h = 0; h < heads && !narrow; ++h) spread(q + h * width, width, queries.data() + h * room);
    each([&](int64_t page, int64_t start, int64_t count) {
      const float* first = key(page);
      for (int64_t h = 0; h < heads; ++h) {
        const float* query = narrow ? q + h * width : queries.data() + h * room;
        float* found = scores + h * step + start;
        int64_t t = 0;
        for (; t + together <= count && !narrow; t += together) dots<together>(query, first + t * stride, stride, width, found + t);
        for (; t < count; ++t)
          narrow ? short_dot(query, first + t * stride, width, found + t) : dots<1>(query, first + t * stride, stride, width, found + t);
      }
    });
  }

  // Sums over all tokens of ``Rows`` heads and ``Columns`` vectors from column c on stay in registers.
  template <int Rows, int Columns>
  void mix_tile(const float* weights, int64_t step, float* out, int64_t c, int64_t width) const {
    const int64_t stride = v.stride();
    constexpr int turns = Rows * Columns < 6 ? 2 : 1;  // sums that take turns, where few would wait for each other
    int64_t at[Columns];
    for (int j = 0; j < Columns; ++j) at[j] = vector_at(c + j * lanes, width);
    Vector sums[turns][Rows][Columns] = {};
    const auto add = [&](int turn, int64_t token, const float* value) __attribute__((always_inline)) {
      Vector parts[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) parts[j] = load(value + at[j]);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sums[turn][r][j] += weights[r * step + token] * parts[j];
    };
    each([&](int64_t page, int64_t start, int64_t count) {
      const float* first = value(page);
      int64_t t = 0;
      for (; t + turns <= count; t += turns)
#pragma GCC unroll 2
        for (int turn = 0; turn < turns; ++turn) add(turn, start + t + turn, first + (t + turn) * stride);
      for (; t < count; ++t) add(0, start + t, first + t * stride);
    });
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < Columns; ++j) store(out + r * width + at[j], turns > 1 ? sums[0][r][j] + sums[turns - 1][r][j] : sums[0][r][j]);
  }

  template <int Rows, int Columns>
  void mix_columns(int64_t left, const float* weights, int64_t step, float* out, int64_t c, int64_t width) const {
    if (left >= Columns) return mix_tile<Rows, Columns>(weights, step, out, c, width);
    if constexpr (Columns > 1) mix_columns<Rows, Columns - 1>(left, weights, step, out, c, width);
  }

  template <int Rows>
  void mix_heads(int64_t heads, const float* weights, int64_t step, float* out, int64_t width) const {
    constexpr int most = 4;  // vectors beside each other
    for (; heads >= Rows; heads -= Rows, weights += Rows * step, out += Rows * width)
      for (int64_t c = 0; c < width; c += most * lanes)
        mix_columns<Rows, most>((width - c + lanes - 1) / lanes, weights, step, out, c, width);
    if constexpr (Rows > 1)
      if (heads) mix_heads<Rows - 1>(heads, weights, step, out, width);
  }

  void mix(const float* weights, int64_t heads, int64_t step, float* out, int64_t width) const {
    if (width >= lanes) return mix_heads<4>(heads, weights, step, out, width);
    const int64_t stride = v.stride();
    std::fill(out, out + heads * width, 0.0f);
    each([&](int64_t page, int64_t start, int64_t count) {
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t t = 0; t < count; ++t)
          for (int64_t c = 0; c < width; ++c) out[h * width + c] += weights[h * step + start + t] * value(page)[t * stride + c];
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
  const int64_t num_rows = q.size(0), heads = q.size(1), depth = q.size(2), most = table.size(1);
  const Pool keys(k), values(v);
  const int64_t groups = keys.groups, per = heads / groups;
  Tensor result = torch::stable::new_empty(q, {num_rows, heads, width});
  const float* queries = q.const_data_ptr<float>();
  const int64_t *tables = table.const_data_ptr<int64_t>(), *lengths = length.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, num_rows * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> weights;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups, g = task % groups, first = n * heads + g * per;
      const Group part{keys, values, tables + n * most, g, lengths[n]};
      const int64_t step = (part.length + lanes - 1) / lanes * lanes;
      weights.resize(per * step);
      part.score(queries + first * depth, per, weights.data(), step);
      for (int64_t h = 0; h < per; ++h) softmax(weights.data() + h * step, float(scale), part.length);
      part.mix(weights.data(), per, step, out + first * width, width);
    }
  });
  return result;
}

// What layers stored of a token in one slot is copied to the slots after it, up to ``last``: entry
// (layer + slot * layers) * pages + page of the pool, for each row of ``tokens`` [N, 4]: page, place in
// the page, slot, last.
Tensor fill(const Tensor& pool, const Tensor& tokens, int64_t first, int64_t layers, int64_t pages) {
  check::packed("pool", pool, check::floats, {check::any, check::any, check::any, check::any});
  check::packed("tokens", tokens, check::integers, {check::any, 4});
  const int64_t size = pool.size(1), width = pool.size(2) * pool.size(3);
  float* data = pool.mutable_data_ptr<float>();
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < tokens.size(0); ++n, token += 4) {
    const int64_t page = token[0], place = token[1], slot = token[2], last = token[3];
    const bool fits = 0 <= page && page < pages && 0 <= place && place < size && 0 <= slot && 0 <= first &&
                      0 < layers && (first + (std::max(slot, last) + 1) * layers) * pages <= pool.size(0);
    STD_TORCH_CHECK(fits, "tokens holds a page, place or slot that the pool does not have");
    for (int64_t layer = 0; layer < layers; ++layer) {
      const auto at = [&](int64_t s) { return data + (((first + s * layers + layer) * pages + page) * size + place) * width; };
      for (int64_t s = slot + 1; s <= last; ++s) std::memcpy(at(s), at(slot), width * sizeof(float));
    }
  }
  return pool;
}

}  // namespace

STABLE_TORCH_LIBRARY(openmythos_paged, library) {
  library.def("fill(Tensor(a!) pool, Tensor tokens, int first, int layers, int pages) -> Tensor(a!)");
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor table, Tensor length, float scale, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openmythos_paged, CPU, library) {
  library.impl("attend", TORCH_BOX(&attend));
  library.impl("fill", TORCH_BOX(&fill));
}
