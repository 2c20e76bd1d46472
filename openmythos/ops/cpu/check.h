// What a kernel may be given. torch.ops is public, so a wrong call must raise an error that says what
// is wrong, before anything is read.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

namespace check {

using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

constexpr auto floats = torch::headeronly::ScalarType::Float;
constexpr auto integers = torch::headeronly::ScalarType::Long;
constexpr auto bytes = torch::headeronly::ScalarType::Char;
constexpr int64_t any = -1;  // size of a dimension that may have any

inline std::string in_words(const Shape& shape) {
  std::string words;
  for (const int64_t size : shape) words += (words.empty() ? "" : ", ") + (size == any ? "*" : std::to_string(size));
  return "[" + words + "]";
}

inline bool has_shape(const Tensor& x, const Shape& shape) {
  bool fits = x.dim() == int64_t(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = shape[d] == any || x.size(d) == shape[d];
  return fits;
}

// x is on a CPU, of this type and shape; its last dimension lies side by side.
inline void strided(const char* name, const Tensor& x, torch::headeronly::ScalarType type, const Shape& shape) {
  Shape given;
  for (int64_t d = 0; d < x.dim(); ++d) given.push_back(x.size(d));
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type, name, " must be ", type == floats ? "float32" : type == bytes ? "int8" : "int64", " on a CPU");
  STD_TORCH_CHECK(has_shape(x, shape), name, " has the shape ", in_words(given), "; it must be ", in_words(shape));
  STD_TORCH_CHECK(x.numel() == 0 || x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1, name, " must have a last stride of 1");
}

// As ``strided``, and all of it is packed.
inline void packed(const char* name, const Tensor& x, torch::headeronly::ScalarType type, const Shape& shape) {
  strided(name, x, type, shape);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// Every entry is in 0 .. below - 1.
inline void indices(const char* name, const Tensor& x, const Shape& shape, int64_t below) {
  packed(name, x, integers, shape);
  const int64_t* entries = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); ++i)
    STD_TORCH_CHECK(0 <= entries[i] && entries[i] < below, name, " holds ", entries[i], "; it must be in 0..", below - 1);
}

// Ends of consecutive blocks that ``rows`` rows are cut into.
inline void ends(const char* name, const Tensor& x, int64_t count, int64_t rows) {
  packed(name, x, integers, {count});
  const int64_t* stops = x.const_data_ptr<int64_t>();
  for (int64_t i = 0, before = 0; i < count; before = stops[i++])
    STD_TORCH_CHECK(before <= stops[i] && stops[i] <= rows, name, " must grow and end at ", rows);
  STD_TORCH_CHECK((count ? stops[count - 1] : 0) == rows, name, " must grow and end at ", rows);
}

}  // namespace check
