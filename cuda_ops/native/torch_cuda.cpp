// The CUDA implementation of torch.ops.deepseek_compress.softmax, on torch's stable ABI. The kernels are in softmax.cu.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "softmax_arguments.h"

extern "C" int dsc_softmax_cuda(const dsc::SoftmaxJob* job, int kernel, void* stream);
// Declared in shim.h only under USE_CUDA, which would ask for more than this one function.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> row_scale, std::optional<Tensor> column_scale,
                                   std::optional<Tensor> mask, ScalarType out_dtype) {
  dsc::SoftmaxCall call = dsc::softmax_call(logits, row_scale, column_scale, mask, out_dtype);
  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = dsc_softmax_cuda(&call.job, 0, stream);
  STD_TORCH_CHECK(error == 0, "the softmax kernel could not be launched: CUDA error ", error - 1000);
  return {call.out, call.out_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepseek_compress, CUDA, m) { m.impl("softmax", TORCH_BOX(&softmax)); }
