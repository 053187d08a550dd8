// From the tensors of a call of torch.ops.deepseek_compress.search_grid, round_columns or unrounded to its job: the shape
// contract, its checks and the outputs, once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "gptq.h"

namespace dsc {
namespace {  // torch's types are hidden, so what holds them is too

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SearchCall {
  SearchJob job;
  Tensor scale, zero_point;
};
struct UnroundedCall {
  UnroundedJob job;
  Tensor values;
};

// The tensors of one call: all on one device, each a matrix (or vector), or a batch with one for each of `matrices`.
struct Batch {
  Tensor like;  // gives the device
  bool batched;
  int64_t matrices;

  // Checks that each matrix of `tensor` is contiguous with this shape; returns the way from one to the next.
  int64_t step(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> shape) const {
    const auto dims = static_cast<int64_t>(shape.size()) + batched;
    bool fits = tensor.dim() == dims && tensor.scalar_type() == type && tensor.device() == like.device();
    fits = fits && (!batched || tensor.size(0) == matrices);
    std::string expected = batched ? std::to_string(matrices) : "";
    int64_t d = batched, stride = 1;
    for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    for (const int64_t size : shape) fits = fits && tensor.size(d++) == size;
    for (d = dims - 1; fits && d >= batched; stride *= tensor.size(d--))
      fits = tensor.size(d) == 1 || tensor.stride(d) == stride || tensor.numel() == 0;
    const char* kind = type == ScalarType::Float ? "float32" : type == ScalarType::Long   ? "int64"
                                                           : type == ScalarType::Bool ? "bool"
                                                                                      : "uint8";
    STD_TORCH_CHECK(fits, name, " must be contiguous ", kind, " (", expected, ") on the device of the others");
    return batched ? tensor.stride(0) : 0;
  }
};

// groups float32 (count, size, rows), importance (count, size), shrink (steps); scale and zero point float32 (count,
// rows).
inline SearchCall search_call(const Tensor& groups, const std::optional<Tensor>& importance, const Tensor& shrink,
                              int64_t num_bits, bool symmetric) {
  STD_TORCH_CHECK(groups.dim() == 3 && groups.size(1) > 0, "groups must be (count, size, rows)");
  STD_TORCH_CHECK(num_bits >= 2 && num_bits <= 8, num_bits, " bits: 2 to 8 are possible");
  SearchJob job{};
  job.count = groups.size(0), job.size = groups.size(1), job.rows = groups.size(2), job.steps = shrink.numel();
  job.num_bits = num_bits, job.symmetric = symmetric;
  const Batch whole{groups, false, 1};
  whole.step(groups, "groups", ScalarType::Float, {job.count, job.size, job.rows});
  whole.step(shrink, "shrink", ScalarType::Float, {job.steps});
  if (importance) whole.step(*importance, "importance", ScalarType::Float, {job.count, job.size});
  job.groups = groups.const_data_ptr<float>(), job.shrink = shrink.const_data_ptr<float>();
  job.importance = importance ? importance->const_data_ptr<float>() : nullptr;
  SearchCall call{job, torch::stable::new_empty(groups, {job.count, job.rows}),
                  torch::stable::new_empty(groups, {job.count, job.rows})};
  call.job.scale = call.scale.mutable_data_ptr<float>();
  call.job.zero_point = call.zero_point.mutable_data_ptr<float>();
  return call;
}

inline Batch feed_arguments(FeedJob& job, const Tensor& base, const Tensor& target, const Tensor& feedback) {
  const int64_t dims = base.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, "base must be (columns, rows) or (matrices, columns, rows)");
  job.matrices = dims == 3 ? base.size(0) : 1, job.columns = base.size(dims - 2), job.rows = base.size(dims - 1);
  const Batch batch{base, dims == 3, job.matrices};
  job.base_step = batch.step(base, "base", ScalarType::Float, {job.columns, job.rows});
  job.target_step = batch.step(target, "target", ScalarType::Float, {job.columns, job.rows});
  job.feedback_step = batch.step(feedback, "feedback", ScalarType::Float, {job.columns, job.columns});
  job.base = base.const_data_ptr<float>(), job.target = target.const_data_ptr<float>();
  job.feedback = feedback.const_data_ptr<float>();
  return batch;
}

// base, target float32 (columns, rows), feedback (columns, columns); values float32 (columns, rows).
inline UnroundedCall unrounded_call(const Tensor& base, const Tensor& target, const Tensor& feedback) {
  UnroundedJob job{};
  feed_arguments(job, base, target, feedback);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < base.dim(); d++) shape.push_back(base.size(d));
  UnroundedCall call{job, torch::stable::new_empty(base, shape)};
  call.job.values = call.values.mutable_data_ptr<float>();
  call.job.values_step = job.columns * job.rows;
  return call;
}

// Those, and scale and zero point (groups, rows), group int64 (columns), fixed bool (columns, rows); the results go to
// codes uint8 and residual float32 (columns, rows). That `group` is below the number of groups is the caller's to check.
inline RoundJob round_job(const Tensor& base, const Tensor& target, const Tensor& feedback, const Tensor& scale,
                          const Tensor& zero_point, const Tensor& group, const std::optional<Tensor>& fixed,
                          int64_t top, Tensor& codes, Tensor& residual) {
  RoundJob job{};
  const Batch batch = feed_arguments(job, base, target, feedback);
  const int64_t columns = job.columns, rows = job.rows, groups = scale.dim() < 2 ? 0 : scale.size(scale.dim() - 2);
  job.scale_step = batch.step(scale, "scale", ScalarType::Float, {groups, rows});
  job.zero_point_step = batch.step(zero_point, "zero_point", ScalarType::Float, {groups, rows});
  job.group_step = batch.step(group, "group", ScalarType::Long, {columns});
  if (fixed) job.fixed_step = batch.step(*fixed, "fixed", ScalarType::Bool, {columns, rows});
  job.codes_step = batch.step(codes, "codes", ScalarType::Byte, {columns, rows});
  job.residual_step = batch.step(residual, "residual", ScalarType::Float, {columns, rows});
  job.scale = scale.const_data_ptr<float>(), job.zero_point = zero_point.const_data_ptr<float>();
  job.group = group.const_data_ptr<int64_t>();
  job.fixed = fixed ? static_cast<const uint8_t*>(fixed->const_data_ptr()) : nullptr;
  job.codes = codes.mutable_data_ptr<uint8_t>(), job.residual = residual.mutable_data_ptr<float>();
  job.top = static_cast<float>(top);
  return job;
}

}  // namespace
}  // namespace dsc
