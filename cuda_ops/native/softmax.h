// The softmax of rows of logits, in mixed precision: what a call hands to the CPU and CUDA kernels.
//
//   l = logit * row_scale[row] * column_scale[column], -infinity where masked       float32
//   p = exp(l - max l) / sum exp(l - max l)                                         0 where every column is masked
//
// uint8 output: codes = round(255 exp(l - max l)) and out_scale = 1 / (255 sum exp(l - max l)), so p ~ codes * out_scale
// with the full range used in every row. A NaN, or +infinity, among the visible logits makes the row NaN.
#pragma once

#include <cstdint>

#include "both.h"

namespace dsc {

enum class Type : int32_t { int32 = 0, float16 = 1, bfloat16 = 2, float32 = 3, uint8 = 4 };

constexpr int kMaskDims = 4;

struct SoftmaxJob {
  const void* logits;         // (rows, columns) int32, float16, bfloat16 or float32
  const float* row_scale;     // (rows,) or null
  const float* column_scale;  // (columns,) of the matrix a row is in, or null
  const uint8_t* keep;        // bytes, not 0 where a column takes part, or null; rows by `mask_stride`
  const int32_t* range;       // (rows, 2): columns [begin, end) take part, or null
  void* out;                  // (rows, columns) float16, bfloat16, float32 or uint8
  float* out_scale;           // (rows,) for uint8, else null
  int64_t rows, columns;        // each below 2^31
  int64_t column_scale_stride;  // between matrices; 0 where all share one
  int64_t mask_stride[kMaskDims];  // of the leading dimensions of the logits, outermost first; 0 where broadcast
  int32_t mask_size[kMaskDims];    // those dimensions, padded with 1 in front
  int32_t rows_per_matrix;         // consecutive rows that share their column scales
  Type in, out_type;

  DSC_BOTH const float* columns_of(int64_t row) const {
    const uint32_t matrix = static_cast<uint32_t>(row) / static_cast<uint32_t>(rows_per_matrix);
    return column_scale ? column_scale + matrix * column_scale_stride : nullptr;
  }
  DSC_BOTH const uint8_t* keep_of(int64_t row) const {
    if (!keep) return nullptr;
    int64_t offset = 0;
    auto rest = static_cast<uint32_t>(row);
    for (int d = kMaskDims - 1; d >= 0; d--) {
      offset += rest % static_cast<uint32_t>(mask_size[d]) * mask_stride[d];
      rest /= static_cast<uint32_t>(mask_size[d]);
    }
    return keep + offset;
  }
  // The columns that can take part: [begin, end), inside [0, columns).
  DSC_BOTH int64_t begin_of(int64_t row) const { return range ? clamped(range[2 * row]) : 0; }
  DSC_BOTH int64_t end_of(int64_t row) const {
    if (!range) return columns;
    const int64_t begin = clamped(range[2 * row]), end = clamped(range[2 * row + 1]);
    return end > begin ? end : begin;
  }
  DSC_BOTH int64_t clamped(int64_t c) const { return c < 0 ? 0 : c > columns ? columns : c; }
};

// CPU: rows [first, last) with the best instructions there are.
void softmax_rows(const SoftmaxJob& job, int64_t first, int64_t last);

}  // namespace dsc
