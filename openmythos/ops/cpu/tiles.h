// Products of small matrices in tiles: what our kernels for CPUs are made of.
//
// A tile is some rows by ``wide`` columns whose sums stay in registers. Rows are given by pointers,
// so that they are read and written where they lie. The matrix on the right is cut into panels,
// ``wide`` columns each, whose rows are ``stride`` floats apart (``wide`` in a packed panel).

#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace tiles {

#ifdef __AVX512F__
constexpr int lanes = 16, tall = 12;  // floats in one vector, rows of one tile
#else
constexpr int lanes = 8, tall = 6;
#endif
constexpr int64_t wide = 2 * lanes;
constexpr int64_t block = 256;  // rows of a panel at a time, which then stay in the first cache
typedef float Vector __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(lanes * sizeof(int32_t))));
typedef float Eight __attribute__((vector_size(8 * sizeof(float)), aligned(sizeof(float))));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline Vector load(const int8_t* from) {
#if defined(__AVX512F__)  // in words of the processor: GCC would convert one number after the other
  return Vector(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
  return Vector(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  Vector value;
  for (int lane = 0; lane < lanes; ++lane) value[lane] = from[lane];
  return value;
#endif
}
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

inline float total(Vector value) {
  float sum = 0;
  for (int lane = 0; lane < lanes; ++lane) sum += value[lane];
  return sum;
}

template <int... I>
inline Vector add_pairs(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

constexpr int power(int count) { return count <= 1 ? 1 : 2 * power((count + 1) / 2); }

// found[i] = the sum of the lanes of values[i]; both have room for a power of two.
template <int Count>
inline void total_each(Vector* values, float* found) {
  if constexpr (Count > lanes) {
    total_each<lanes>(values, found);
    total_each<Count - lanes>(values + lanes, found + lanes);
  } else {
    int left = power(Count);
#pragma GCC unroll 4
    for (int width = lanes; width > 1; width /= 2) {
      const int pairs = std::max(left / 2, 1);
#pragma GCC unroll 8
      for (int i = 0; i < pairs; ++i)
        values[i] = add_pairs(values[2 * i], values[left > 1 ? 2 * i + 1 : 0], std::make_integer_sequence<int, lanes>());
      left = pairs;
    }
    std::memcpy(found, &values[0], power(Count) * sizeof(float));
  }
}

// 2^n e^r with |r| <= ln(2) / 2 and the series of e^r: to about one unit in the last place; 0 below
// e^-87, infinite above e^88.
inline Vector exponential(Vector x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = x * 1.44269504f + shift - shift;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  Vector sum = r * (1.0f / 5040) + 1.0f / 720;
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + term;
  sum *= reinterpret_cast<Vector>((__builtin_convertvector(n, Integers) + 127) << 23);
  sum = x < -87.0f ? Vector{} : sum;
  return x > 88.0f ? Vector{} + __builtin_inff() : sum;
}

template <int Rows, typename Weight>
void tile(const float* const* in, int64_t k, const Weight* panel, int64_t stride, float* const* out,
          int64_t n, int64_t inner, bool add) {
  const float* x[Rows];
  for (int r = 0; r < Rows; ++r) x[r] = in[r] + k;
  Vector sums[Rows][2] = {};
  for (int64_t i = 0; i < inner; ++i, panel += stride) {
    const Vector left = load(panel), right = load(panel + lanes);
    for (int r = 0; r < Rows; ++r) {
      sums[r][0] += x[r][i] * left;
      sums[r][1] += x[r][i] * right;
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int half = 0; half < 2; ++half) {
      float* y = out[r] + n + half * lanes;
      store(y, add ? load(y) + sums[r][half] : sums[r][half]);
    }
}

template <int Rows>
void last_tile(int64_t rows, const float* const* in, int64_t k, const float* panel, int64_t stride,
               float* const* out, int64_t n, int64_t inner, bool add) {
  if (rows == Rows) return tile<Rows>(in, k, panel, stride, out, n, inner, add);
  if constexpr (Rows > 1) last_tile<Rows - 1>(rows, in, k, panel, stride, out, n, inner, add);
}

// Columns n to n + wide of ``out`` (+)= columns k to k + inner of ``in`` times a panel.
inline void multiply(int64_t rows, const float* const* in, int64_t k, const float* panel,
                     int64_t stride, float* const* out, int64_t n, int64_t inner, bool add) {
  for (; rows >= tall; rows -= tall, in += tall, out += tall)
    tile<tall>(in, k, panel, stride, out, n, inner, add);
  if (rows) last_tile<tall - 1>(rows, in, k, panel, stride, out, n, inner, add);
}

// Eight values from k on of eight rows -> eight rows of eight, ``stride`` apart in ``to``.
inline void transpose(const float* const* rows, int64_t k, float* to, int64_t stride) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Eight*>(rows[i] + k);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const Eight low = b[i + j], high = b[i + j + 2];
      a[i + 2 * j] = __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    Eight* first = reinterpret_cast<Eight*>(to + i * stride);
    Eight* second = reinterpret_cast<Eight*>(to + (i + 4) * stride);
    *first = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *second = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// ``count`` rows, transposed: value i of row r goes to to[i * stride + r], i below ``length``. Eight
// rows and values at a time; past the last row that row is repeated.
inline void transpose(const float* const* rows, int64_t count, int64_t k, int64_t length, float* to,
                      int64_t stride) {
  for (int64_t r = 0; r < count; r += 8) {
    const float* eight[8];
    for (int64_t j = 0; j < 8; ++j) eight[j] = rows[r + j < count ? r + j : count - 1];
    for (int64_t i = 0; i < length; i += 8) transpose(eight, k + i, to + i * stride + r, stride);
  }
}

// A panel of columns n to n + wide of ``count`` rows.
inline void pack(const float* const* rows, int64_t count, int64_t n, float* panel) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(panel + i * wide, rows[i] + n, wide * sizeof(float));
}

}  // namespace tiles
