// Stored weights -> 4-bit asymmetric codes in the pack-quantized layout of compressed-tensors, in one pass.
#pragma once

#include <cstdint>

namespace dsc {

enum class Encoding : int64_t { float32 = 0, float16 = 1, bfloat16 = 2, fp8_block = 3, mxfp4 = 4 };

constexpr int64_t kRowsPerWord = 8;     // zero points of eight rows share a word
constexpr int64_t kGroupsAtOnce = 64;    // their ranges, scales and zero points wait on the stack
constexpr int64_t kMxfp4Block = 32;     // E2M1 values that share one E8M0 exponent
constexpr float kSmallestScale = 1e-30f;  // a scale below this is that of a group of zeros

struct PackJob {
  const void* weight;           // (rows, columns) in `encoding`; mxfp4: (rows, columns / 2) bytes, low nibble first
  const float* block_scale;     // fp8_block: (ceil(rows / block_rows), ceil(columns / block_columns))
  const uint8_t* exponent;      // mxfp4: (rows, columns / 32) E8M0
  Encoding encoding;
  int64_t rows, columns, block_rows, block_columns, group_size;
  bool symmetric;               // scale from the longer side, every zero point 8
  uint8_t* packed;              // (rows, ceil(columns / 8)) int32 words as bytes
  uint16_t* scale;              // (rows, groups) BF16
  uint32_t* zero_point;         // (ceil(rows / 8), groups), the lowest row in the lowest nibble
  int64_t* bad;                 // (1): the first row that holds a NaN or an infinity, or whose range overflows float32; -1
};

// Packs the rows of the words [first, last) of `zero_point`. Returns the first bad row or -1; leaves `job.bad` alone.
int64_t pack_words(const PackJob& job, int64_t first, int64_t last);

}  // namespace dsc
