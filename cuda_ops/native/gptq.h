// The two loops of GPTQ that no matrix product does: the search of each group's range, and the rounding of columns one
// after the other. Everything is columns-first, (columns, rows), so that a vector holds neighbouring rows.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dsc {

struct SearchJob {
  const float* groups;      // (count, size, rows)
  const float* importance;  // (count, size), or null: all 1
  const float* shrink;      // (steps): the ranges tried are those of the group times these, the first 1
  int64_t count, size, rows, steps;
  int64_t num_bits;
  bool symmetric;
  float* scale;       // (count, rows)
  float* zero_point;  // (count, rows)
};

struct FeedJob {
  const float* base;      // (columns, rows): the weights after the feedback of all columns before these
  const float* target;    // (columns, rows): the weights
  const float* feedback;  // (columns, columns): strictly lower, row j feeds column j
  int64_t columns, rows;
};

struct RoundJob : FeedJob {
  const float* scale;       // (groups, rows)
  const float* zero_point;  // (groups, rows)
  const int64_t* group;     // (columns): the group whose grid the column has
  const uint8_t* fixed;     // (columns, rows), or null: not 0 where the weight stays 0
  float top;                // the largest code
  uint8_t* codes;           // (columns, rows)
  float* residual;          // (columns, rows): target - (code - zero_point) * scale
};

struct UnroundedJob : FeedJob {
  float* values;  // (columns, rows): the weights when those before them in this block are not rounded either
};

// The rows [first, last) of every group.
void search_grid(const SearchJob& job, int64_t first, int64_t last);
void round_columns(const RoundJob& job, int64_t first, int64_t last);
void unrounded(const UnroundedJob& job, int64_t first, int64_t last);

}  // namespace dsc
