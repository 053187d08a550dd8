// CPU implementations of the operators whose schemas cuda_ops/ops.py declares, on torch's stable ABI: what is shared out
// among threads. Shapes, checks and outputs are in *_arguments.h, what the kernels compute in pack_rows.h, gptq_rows.h
// and softmax_rows.h.
#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "gptq_arguments.h"
#include "pack_arguments.h"
#include "simd.h"
#include "softmax_arguments.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_weights(Tensor weight, std::optional<Tensor> scale, int64_t encoding,
                                                        int64_t block_rows, int64_t block_columns, int64_t group_size,
                                                        bool symmetric) {
  dsc::PackCall call = dsc::pack_call(weight, scale, encoding, block_rows, block_columns, group_size, symmetric);
  std::atomic<int64_t> bad{-1};
  const int64_t words_at_once = std::max<int64_t>(1, (1 << 16) / (dsc::kRowsPerWord * call.job.columns + 1));
  torch::stable::parallel_for(0, call.zeros.size(0), words_at_once, [&](int64_t first, int64_t last) {
    const int64_t row = dsc::pack_words(call.job, first, last);
    int64_t seen = bad.load();
    while (row >= 0 && (seen < 0 || row < seen) && !bad.compare_exchange_weak(seen, row)) {
    }
  });
  *call.job.bad = bad.load();
  return {call.packed, call.scales, call.zeros, call.bad};
}

std::tuple<Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> row_scale, std::optional<Tensor> column_scale,
                                   std::optional<Tensor> mask, ScalarType out_dtype) {
  dsc::SoftmaxCall call = dsc::softmax_call(logits, row_scale, column_scale, mask, out_dtype);
  const int64_t rows_at_once = std::max<int64_t>(1, (1 << 15) / call.job.columns);
  torch::stable::parallel_for(0, call.job.rows, rows_at_once,
                              [&](int64_t first, int64_t last) { dsc::softmax_rows(call.job, first, last); });
  return {call.out, call.out_scale};
}

constexpr int64_t kRowsAtOnce = 64;  // threads share out whole vectors, whatever their number

// run(matrix, first, last) over all rows of all matrices.
template <typename Run>
void over_rows(int64_t matrices, int64_t rows, Run run) {
  const int64_t pieces = dsc::ceil_div(rows, kRowsAtOnce);
  torch::stable::parallel_for(0, matrices * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first / std::max<int64_t>(1, pieces); first < last; m++) {
      const int64_t from = first - m * pieces, to = std::min(last - m * pieces, pieces);
      run(m, from * kRowsAtOnce, std::min(to * kRowsAtOnce, rows));
      first += to - from;
    }
  });
}

std::tuple<Tensor, Tensor> search_grid(Tensor groups, std::optional<Tensor> importance, Tensor shrink, int64_t num_bits,
                                       bool symmetric) {
  dsc::SearchCall call = dsc::search_call(groups, importance, shrink, num_bits, symmetric);
  over_rows(1, call.job.rows,
            [&](int64_t, int64_t first, int64_t last) { dsc::search_grid(call.job, first, last); });
  return {call.scale, call.zero_point};
}

Tensor unrounded(Tensor base, Tensor target, Tensor feedback) {
  dsc::UnroundedCall call = dsc::unrounded_call(base, target, feedback);
  over_rows(call.job.matrices, call.job.rows,
            [&](int64_t m, int64_t first, int64_t last) { dsc::unrounded(call.job.matrix(m), first, last); });
  return call.values;
}

void round_columns(Tensor base, Tensor target, Tensor feedback, Tensor scale, Tensor zero_point, Tensor group,
                   std::optional<Tensor> fixed, int64_t top, Tensor codes, Tensor residual) {
  const dsc::RoundJob job =
      dsc::round_job(base, target, feedback, scale, zero_point, group, fixed, top, codes, residual);
  const int64_t groups = scale.size(scale.dim() - 2);
  for (int64_t m = 0; m < job.matrices; m++) {
    const int64_t* own = job.group + m * job.group_step;
    for (int64_t j = 0; j < job.columns; j++)
      STD_TORCH_CHECK(own[j] >= 0 && own[j] < groups, "column ", j, " is of group ", own[j], ", there are ", groups);
  }
  over_rows(job.matrices, job.rows,
            [&](int64_t m, int64_t first, int64_t last) { dsc::round_columns(job.matrix(m), first, last); });
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
