// From the tensors of a call of torch.ops.deepseek_compress.pack_weights to a PackJob: the shape contract, its checks and
// the outputs, once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "pack.h"

namespace dsc {
namespace {  // torch's types are hidden, so what holds them is too

struct PackCall {
  PackJob job;
  torch::stable::Tensor packed, scales, zeros, bad;  // int32, BF16, int32, and int64 (1)
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void pack_scale(PackJob& job, const std::optional<torch::stable::Tensor>& scale,
                       const torch::stable::Tensor& weight) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!scale || scale->device() == weight.device(), "scale must be on the device of the weight");
  if (job.encoding == Encoding::fp8_block) {
    STD_TORCH_CHECK(job.block_rows > 0 && job.block_columns > 0 && scale && scale->is_contiguous() &&
                        scale->scalar_type() == ScalarType::Float &&
                        scale->numel() == ceil_div(job.rows, job.block_rows) * ceil_div(job.columns, job.block_columns),
                    "scale must be contiguous float32, one number a block");
    job.block_scale = scale->const_data_ptr<float>();
  } else if (job.encoding == Encoding::mxfp4) {
    STD_TORCH_CHECK(job.columns % kMxfp4Block == 0 && scale && scale->is_contiguous() &&
                        scale->scalar_type() == ScalarType::Byte &&
                        scale->numel() == job.rows * job.columns / kMxfp4Block,
                    "scale must be contiguous uint8 (rows, columns / 32)");
    job.exponent = scale->const_data_ptr<uint8_t>();
  }
}

// weight as stored, contiguous; scale: FP8 float32 (blocks of rows, blocks of columns), MXFP4 uint8 (rows, columns / 32).
inline PackCall pack_call(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& scale,
                          int64_t encoding, int64_t block_rows, int64_t block_columns, int64_t group_size,
                          bool symmetric) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix");
  PackJob job{};
  job.weight = weight.const_data_ptr();
  job.encoding = static_cast<Encoding>(encoding);
  job.rows = weight.size(0), job.columns = weight.size(1) * (job.encoding == Encoding::mxfp4 ? 2 : 1);
  job.group_size = group_size, job.symmetric = symmetric;
  job.block_rows = block_rows, job.block_columns = block_columns;
  STD_TORCH_CHECK(group_size > 0 && job.columns % group_size == 0, job.columns, " columns do not divide into groups of ",
                  group_size);
  pack_scale(job, scale, weight);

  const int64_t groups = job.columns / group_size;
  PackCall call{job, torch::stable::new_empty(weight, {job.rows, ceil_div(job.columns, 8)}, ScalarType::Int),
                torch::stable::new_empty(weight, {job.rows, groups}, ScalarType::BFloat16),
                torch::stable::new_empty(weight, {ceil_div(job.rows, kRowsPerWord), groups}, ScalarType::Int),
                torch::stable::fill_(torch::stable::new_empty(weight, {1}, ScalarType::Long), -1.0)};
  call.job.packed = static_cast<uint8_t*>(call.packed.mutable_data_ptr());
  call.job.scale = static_cast<uint16_t*>(call.scales.mutable_data_ptr());
  call.job.zero_point = static_cast<uint32_t*>(call.zeros.mutable_data_ptr());
  call.job.bad = call.bad.mutable_data_ptr<int64_t>();
  return call;
}

}  // namespace
}  // namespace dsc
