// From the tensors of a call of torch.ops.deepseek_compress.softmax to a SoftmaxJob: the shape contract, its checks and
// the outputs, once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "softmax.h"

namespace dsc {
namespace {  // torch's types are hidden, so what holds them is too

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SoftmaxCall {
  SoftmaxJob job;
  Tensor out, out_scale;
};

inline Type softmax_type(ScalarType type, bool output) {
  if (type == ScalarType::Half) return Type::float16;
  if (type == ScalarType::BFloat16) return Type::bfloat16;
  if (type == ScalarType::Float) return Type::float32;
  if (type == ScalarType::Int && !output) return Type::int32;
  if (type == ScalarType::Byte && output) return Type::uint8;
  STD_TORCH_CHECK(false, output ? "out_dtype must be float16, bfloat16, float32 or uint8"
                                : "logits must be int32, float16, bfloat16 or float32");
  return Type::float32;
}

inline const float* softmax_scale(const std::optional<Tensor>& scale, const char* name, const Tensor& logits) {
  if (!scale) return nullptr;
  STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
                      scale->device() == logits.device(),
                  name, " must be contiguous float32 on the device of the logits");
  return scale->const_data_ptr<float>();
}

// mask: bool, broadcast to the logits from the right, last dimension `columns` with stride 1; or int32 (rows, 2).
inline void softmax_mask(SoftmaxJob& job, const Tensor& mask, const Tensor& logits) {
  STD_TORCH_CHECK(mask.device() == logits.device(), "mask must be on the device of the logits");
  if (mask.scalar_type() == ScalarType::Int) {
    STD_TORCH_CHECK(mask.numel() == 2 * job.rows && mask.is_contiguous(), "an int32 mask must be contiguous (",
                    job.rows, ", 2): the first column that takes part and the one after the last");
    job.range = mask.const_data_ptr<int32_t>();
    return;
  }
  const int64_t dims = logits.dim() - 1, extra = logits.dim() - mask.dim();
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() >= 1 && extra >= 0 && dims <= kMaskDims,
                  "mask must be bool with at most as many dimensions as the logits, and these at most ", kMaskDims + 1);
  STD_TORCH_CHECK(mask.size(mask.dim() - 1) == job.columns && (job.columns == 1 || mask.stride(mask.dim() - 1) == 1),
                  "the last dimension of the mask must be contiguous, of size ", job.columns);
  for (int64_t d = 0; d < kMaskDims; d++) {
    const int64_t of_logits = d - (kMaskDims - dims), of_mask = of_logits - extra;
    job.mask_size[d] = of_logits < 0 ? 1 : static_cast<int32_t>(logits.size(of_logits));
    const bool broadcast = of_mask < 0 || mask.size(of_mask) == 1;
    STD_TORCH_CHECK(broadcast || mask.size(of_mask) == job.mask_size[d], "mask: dimension ", of_mask, " is ",
                    mask.size(of_mask), ", not 1 or ", job.mask_size[d]);
    job.mask_stride[d] = broadcast ? 0 : mask.stride(of_mask);
  }
  job.keep = static_cast<const uint8_t*>(mask.const_data_ptr());
}

inline SoftmaxCall softmax_call(const Tensor& logits, const std::optional<Tensor>& row_scale,
                                const std::optional<Tensor>& column_scale, const std::optional<Tensor>& mask,
                                ScalarType out_dtype) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.is_contiguous() && logits.size(logits.dim() - 1) > 0,
                  "logits must be contiguous with at least one column");
  SoftmaxJob job{};
  const int64_t dims = logits.dim() - 1;
  job.in = softmax_type(logits.scalar_type(), false);
  job.out_type = softmax_type(out_dtype, true);
  job.columns = logits.size(dims);
  job.rows = logits.numel() / job.columns;
  STD_TORCH_CHECK(job.rows < INT32_MAX && job.columns < INT32_MAX, "at most 2^31 - 2 rows and columns");
  job.rows_per_matrix = dims > 0 && job.rows > 0 ? static_cast<int32_t>(logits.size(dims - 1)) : 1;
  job.logits = logits.const_data_ptr();
  job.row_scale = softmax_scale(row_scale, "row_scale", logits);
  STD_TORCH_CHECK(!row_scale || row_scale->numel() == job.rows, "row_scale must have ", job.rows,
                  " numbers, one a row");
  job.column_scale = softmax_scale(column_scale, "column_scale", logits);
  if (column_scale && column_scale->numel() != job.columns) {
    STD_TORCH_CHECK(column_scale->numel() == job.rows / job.rows_per_matrix * job.columns,
                    "column_scale must have ", job.columns, " numbers, or as many for each matrix of the logits");
    job.column_scale_stride = job.columns;
  }
  if (mask) softmax_mask(job, *mask, logits);

  std::vector<int64_t> shape, scale_shape{0};
  for (int64_t d = 0; d < dims; d++) shape.push_back(logits.size(d));
  if (job.out_type == Type::uint8) {
    scale_shape = shape;
    scale_shape.push_back(1);
  }
  shape.push_back(job.columns);
  SoftmaxCall call{job, torch::stable::new_empty(logits, shape, out_dtype),
                   torch::stable::new_empty(logits, scale_shape, ScalarType::Float)};
  call.job.out = call.out.mutable_data_ptr();
  call.job.out_scale = job.out_type == Type::uint8 ? call.out_scale.mutable_data_ptr<float>() : nullptr;
  return call;
}

}  // namespace
}  // namespace dsc
