// CUDA implementations of the operators whose schemas cuda_ops/ops.py declares, on torch's stable ABI: the kernels on the
// current stream, without waiting for them. Shapes, checks and outputs are in *_arguments.h, the kernels in the .cu files.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "gptq_arguments.h"
#include "pack_arguments.h"
#include "softmax_arguments.h"

extern "C" int dsc_pack_cuda(const dsc::PackJob* job, int kernel, void* stream);
extern "C" int dsc_search_cuda(const dsc::SearchJob* job, int kernel, void* stream);
extern "C" int dsc_round_cuda(const dsc::RoundJob* job, int kernel, void* stream);
extern "C" int dsc_unrounded_cuda(const dsc::UnroundedJob* job, int kernel, void* stream);
extern "C" int dsc_softmax_cuda(const dsc::SoftmaxJob* job, int kernel, void* stream);
// Declared in shim.h only under USE_CUDA, which would ask for more than this one function.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Job>
void launch(int (*run)(const Job*, int, void*), const Job& job, const Tensor& on, const char* name) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = run(&job, 0, stream);
  STD_TORCH_CHECK(error == 0, "the kernel of ", name, " could not be launched: CUDA error ", error - 1000);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_weights(Tensor weight, std::optional<Tensor> scale, int64_t encoding,
                                                        int64_t block_rows, int64_t block_columns, int64_t group_size,
                                                        bool symmetric) {
  dsc::PackCall call = dsc::pack_call(weight, scale, encoding, block_rows, block_columns, group_size, symmetric);
  launch(dsc_pack_cuda, call.job, weight, "pack_weights");
  return {call.packed, call.scales, call.zeros, call.bad};
}

std::tuple<Tensor, Tensor> search_grid(Tensor groups, std::optional<Tensor> importance, Tensor shrink, int64_t num_bits,
                                       bool symmetric) {
  dsc::SearchCall call = dsc::search_call(groups, importance, shrink, num_bits, symmetric);
  launch(dsc_search_cuda, call.job, groups, "search_grid");
  return {call.scale, call.zero_point};
}

void round_columns(Tensor base, Tensor target, Tensor feedback, Tensor scale, Tensor zero_point, Tensor group,
                   std::optional<Tensor> fixed, int64_t top, Tensor codes, Tensor residual) {
  const dsc::RoundJob job =
      dsc::round_job(base, target, feedback, scale, zero_point, group, fixed, top, codes, residual);
  launch(dsc_round_cuda, job, base, "round_columns");
}

Tensor unrounded(Tensor base, Tensor target, Tensor feedback) {
  dsc::UnroundedCall call = dsc::unrounded_call(base, target, feedback);
  launch(dsc_unrounded_cuda, call.job, base, "unrounded");
  return call.values;
}

std::tuple<Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> row_scale, std::optional<Tensor> column_scale,
                                   std::optional<Tensor> mask, ScalarType out_dtype) {
  dsc::SoftmaxCall call = dsc::softmax_call(logits, row_scale, column_scale, mask, out_dtype);
  launch(dsc_softmax_cuda, call.job, logits, "softmax");
  return {call.out, call.out_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepseek_compress, CUDA, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("search_grid", TORCH_BOX(&search_grid));
  m.impl("round_columns", TORCH_BOX(&round_columns));
  m.impl("unrounded", TORCH_BOX(&unrounded));
  m.impl("softmax", TORCH_BOX(&softmax));
}
