// CPU implementations of the operators whose schemas cuda_ops/ops.py declares, on torch's stable ABI: shape contract,
// checks, outputs, dispatch. What the kernels compute is said in pack_rows.h and softmax_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "pack.h"
#include "softmax_arguments.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// weight as stored, contiguous; scale: FP8 float32 (blocks of rows, blocks of columns), MXFP4 uint8 (rows, columns / 32).
// Returns packed int32 (rows, ceil(columns / 8)), scale BF16 (rows, groups), zero points int32 (ceil(rows / 8), groups)
// and the first row that is not finite, or -1.
std::tuple<Tensor, Tensor, Tensor, int64_t> pack_weights(Tensor weight, std::optional<Tensor> scale, int64_t encoding,
                                                         int64_t block_rows, int64_t block_columns,
                                                         int64_t group_size, bool symmetric) {
  const auto kind = static_cast<dsc::Encoding>(encoding);
  const bool nibbles = kind == dsc::Encoding::mxfp4;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix");
  const int64_t rows = weight.size(0), columns = weight.size(1) * (nibbles ? 2 : 1);
  STD_TORCH_CHECK(group_size > 0 && columns % group_size == 0, columns, " columns do not divide into groups of ",
                  group_size);
  const int64_t groups = columns / group_size;

  dsc::PackJob job{};
  job.weight = weight.const_data_ptr();
  job.encoding = kind;
  job.rows = rows, job.columns = columns, job.group_size = group_size;
  job.block_rows = block_rows, job.block_columns = block_columns, job.symmetric = symmetric;
  if (kind == dsc::Encoding::fp8_block) {
    STD_TORCH_CHECK(scale && scale->is_contiguous() && scale->scalar_type() == ScalarType::Float &&
                        scale->numel() == ceil_div(rows, block_rows) * ceil_div(columns, block_columns),
                    "scale must be contiguous float32, one number a block");
    job.block_scale = scale->const_data_ptr<float>();
  } else if (nibbles) {
    STD_TORCH_CHECK(columns % dsc::kMxfp4Block == 0 && scale && scale->is_contiguous() &&
                        scale->scalar_type() == ScalarType::Byte && scale->numel() == rows * columns / dsc::kMxfp4Block,
                    "scale must be contiguous uint8 (rows, columns / 32)");
    job.exponent = scale->const_data_ptr<uint8_t>();
  }

  Tensor packed = torch::stable::new_empty(weight, {rows, ceil_div(columns, 8)}, ScalarType::Int);
  Tensor scales = torch::stable::new_empty(weight, {rows, groups}, ScalarType::BFloat16);
  Tensor zeros = torch::stable::new_empty(weight, {ceil_div(rows, dsc::kRowsPerWord), groups}, ScalarType::Int);
  job.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  job.scale = static_cast<uint16_t*>(scales.mutable_data_ptr());
  job.zero_point = static_cast<uint32_t*>(zeros.mutable_data_ptr());

  std::atomic<int64_t> bad{-1};
  const int64_t words_at_once = std::max<int64_t>(1, (1 << 16) / (dsc::kRowsPerWord * columns + 1));
  torch::stable::parallel_for(0, zeros.size(0), words_at_once, [&](int64_t first, int64_t last) {
    const int64_t row = dsc::pack_words(job, first, last);
    int64_t seen = bad.load();
    while (row >= 0 && (seen < 0 || row < seen) && !bad.compare_exchange_weak(seen, row)) {
    }
  });
  return {packed, scales, zeros, bad.load()};
}

std::tuple<Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> row_scale, std::optional<Tensor> column_scale,
                                   std::optional<Tensor> mask, ScalarType out_dtype) {
  dsc::SoftmaxCall call = dsc::softmax_call(logits, row_scale, column_scale, mask, out_dtype);
  const int64_t rows_at_once = std::max<int64_t>(1, (1 << 15) / call.job.columns);
  torch::stable::parallel_for(0, call.job.rows, rows_at_once,
                              [&](int64_t first, int64_t last) { dsc::softmax_rows(call.job, first, last); });
  return {call.out, call.out_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepseek_compress, CPU, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("softmax", TORCH_BOX(&softmax));
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_compress, CompositeExplicitAutograd, m) {
  m.impl("limit_isa", TORCH_BOX(&dsc::limit_isa));
}
