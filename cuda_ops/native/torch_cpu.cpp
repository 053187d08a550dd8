// CPU implementations of the operators whose schemas cuda_ops/ops.py declares, on torch's stable ABI: shape contract,
// checks, outputs, dispatch. What the kernels compute is said in pack_rows.h, gptq_rows.h and softmax_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "gptq.h"
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

const float* floats(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
                  " must be contiguous float32 with ", count, " elements");
  return tensor.const_data_ptr<float>();
}

constexpr int64_t kRowsAtOnce = 64;  // threads share out whole vectors, whatever their number

// run(first, last) over all rows.
template <typename Run>
void over_rows(int64_t rows, Run run) {
  torch::stable::parallel_for(0, ceil_div(rows, kRowsAtOnce), 1, [&](int64_t first, int64_t last) {
    run(first * kRowsAtOnce, std::min(last * kRowsAtOnce, rows));
  });
}

// groups float32 (count, size, rows), importance (count, size), shrink (steps); returns scale and zero point float32
// (count, rows).
std::tuple<Tensor, Tensor> search_grid(Tensor groups, std::optional<Tensor> importance, Tensor shrink, int64_t num_bits,
                                       bool symmetric) {
  STD_TORCH_CHECK(groups.dim() == 3 && groups.size(1) > 0, "groups must be (count, size, rows)");
  STD_TORCH_CHECK(num_bits >= 2 && num_bits <= 8, num_bits, " bits: 2 to 8 are possible");
  const int64_t count = groups.size(0), size = groups.size(1), rows = groups.size(2);
  Tensor scale = torch::stable::new_empty(groups, {count, rows});
  Tensor zero_point = torch::stable::new_empty(groups, {count, rows});
  dsc::SearchJob job{};
  job.groups = floats(groups, "groups", count * size * rows);
  job.importance = importance ? floats(*importance, "importance", count * size) : nullptr;
  job.shrink = floats(shrink, "shrink", shrink.numel());
  job.count = count, job.size = size, job.rows = rows, job.steps = shrink.numel();
  job.num_bits = num_bits, job.symmetric = symmetric;
  job.scale = scale.mutable_data_ptr<float>(), job.zero_point = zero_point.mutable_data_ptr<float>();
  over_rows(rows, [&](int64_t first, int64_t last) { dsc::search_grid(job, first, last); });
  return {scale, zero_point};
}

void feed_arguments(dsc::FeedJob& job, const Tensor& base, const Tensor& target, const Tensor& feedback) {
  STD_TORCH_CHECK(base.dim() == 2, "base must be (columns, rows)");
  job.columns = base.size(0), job.rows = base.size(1);
  job.base = floats(base, "base", base.numel()), job.target = floats(target, "target", base.numel());
  job.feedback = floats(feedback, "feedback", job.columns * job.columns);
}

// base, target float32 (columns, rows), feedback (columns, columns); returns float32 (columns, rows).
Tensor unrounded(Tensor base, Tensor target, Tensor feedback) {
  dsc::UnroundedJob job{};
  feed_arguments(job, base, target, feedback);
  Tensor values = torch::stable::empty_like(base);
  job.values = values.mutable_data_ptr<float>();
  over_rows(job.rows, [&](int64_t first, int64_t last) { dsc::unrounded(job, first, last); });
  return values;
}

// base, target float32 (columns, rows), feedback (columns, columns), scale and zero point (groups, rows), group int64
// (columns), fixed bool (columns, rows); fills codes uint8 and residual float32 (columns, rows).
void round_columns(Tensor base, Tensor target, Tensor feedback, Tensor scale, Tensor zero_point, Tensor group,
                   std::optional<Tensor> fixed, int64_t top, Tensor codes, Tensor residual) {
  dsc::RoundJob job{};
  feed_arguments(job, base, target, feedback);
  const int64_t columns = job.columns, rows = job.rows, cells = columns * rows;
  job.scale = floats(scale, "scale", scale.size(0) * rows);
  job.zero_point = floats(zero_point, "zero_point", scale.size(0) * rows);
  STD_TORCH_CHECK(group.scalar_type() == ScalarType::Long && group.is_contiguous() && group.numel() == columns,
                  "group must be contiguous int64, one number a column");
  job.group = group.const_data_ptr<int64_t>();
  for (int64_t j = 0; j < columns; j++)
    STD_TORCH_CHECK(job.group[j] >= 0 && job.group[j] < scale.size(0), "column ", j, " is of group ", job.group[j],
                    ", there are ", scale.size(0));
  STD_TORCH_CHECK(!fixed || (fixed->scalar_type() == ScalarType::Bool && fixed->is_contiguous() &&
                             fixed->numel() == cells),
                  "fixed must be contiguous bool (columns, rows)");
  job.fixed = fixed ? static_cast<const uint8_t*>(fixed->const_data_ptr()) : nullptr;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && codes.numel() == cells,
                  "codes must be contiguous uint8 (columns, rows)");
  floats(residual, "residual", cells);
  job.top = static_cast<float>(top);
  job.codes = codes.mutable_data_ptr<uint8_t>(), job.residual = residual.mutable_data_ptr<float>();
  over_rows(rows, [&](int64_t first, int64_t last) { dsc::round_columns(job, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepseek_compress, CPU, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("search_grid", TORCH_BOX(&search_grid));
  m.impl("round_columns", TORCH_BOX(&round_columns));
  m.impl("unrounded", TORCH_BOX(&unrounded));
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_compress, CompositeExplicitAutograd, m) {
  m.impl("limit_isa", TORCH_BOX(&dsc::limit_isa));
}
