// The two loops of GPTQ that no matrix product does: the search of each group's range, and the rounding of columns one
// after the other. Everything is columns-first, (columns, rows), so that a vector or a warp holds neighbouring rows.
#pragma once

#include <cstdint>

#include "both.h"

namespace dsc {

constexpr float kSmallestRange = 1e-30f;  // a scale not above this is that of a group of zeros: 1

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

// The shapes are those of one matrix; `matrix(m)` is matrix m of a batch, `*_step` elements behind the first.
struct FeedJob {
  const float* base;      // (columns, rows): the weights after the feedback of all columns before these
  const float* target;    // (columns, rows): the weights
  const float* feedback;  // (columns, columns): strictly lower, row j feeds column j
  int64_t matrices, columns, rows;
  int64_t base_step, target_step, feedback_step;

 protected:
  DSC_BOTH void move_to(int64_t m) { base += m * base_step, target += m * target_step, feedback += m * feedback_step; }
};

struct RoundJob : FeedJob {
  const float* scale;       // (groups, rows)
  const float* zero_point;  // (groups, rows)
  const int64_t* group;     // (columns): the group whose grid the column has
  const uint8_t* fixed;     // (columns, rows), or null: not 0 where the weight stays 0
  uint8_t* codes;           // (columns, rows)
  float* residual;          // (columns, rows): target - (code - zero_point) * scale
  int64_t scale_step, zero_point_step, group_step, fixed_step, codes_step, residual_step;
  float top;  // the largest code

  DSC_BOTH RoundJob matrix(int64_t m) const {
    RoundJob own = *this;
    own.move_to(m);
    own.scale += m * scale_step, own.zero_point += m * zero_point_step, own.group += m * group_step;
    own.codes += m * codes_step, own.residual += m * residual_step;
    if (fixed) own.fixed += m * fixed_step;
    return own;
  }
};

struct UnroundedJob : FeedJob {
  float* values;  // (columns, rows): the weights when those before them in this block are not rounded either
  int64_t values_step;

  DSC_BOTH UnroundedJob matrix(int64_t m) const {
    UnroundedJob own = *this;
    own.move_to(m);
    own.values += m * values_step;
    return own;
  }
};

// CPU: the rows [first, last) of every group, or of one matrix.
void search_grid(const SearchJob& job, int64_t first, int64_t last);
void round_columns(const RoundJob& job, int64_t first, int64_t last);
void unrounded(const UnroundedJob& job, int64_t first, int64_t last);

}  // namespace dsc
