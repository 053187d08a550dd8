// native/softmax.cu on the CPU; and two faulty kernels with which the tests show that the emulation finds what it is for.
#include "emulated.h"
//
#include "softmax.cu"

DSC_EXPORT const char* dsc_emulated_error() { return emulated::last_error.c_str(); }

// Reverses 64 numbers through shared memory without the barrier between writing and reading.
static void kernel_without_barrier(float* out) {
  __shared__ float part[64];
  part[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = part[63 - threadIdx.x];
}

// Thread 32 waits for thread 33, which waits for the whole block.
static void kernel_that_never_ends(float*) {
  if (threadIdx.x == 32) __syncwarp(3u);
  __syncthreads();
}

DSC_EXPORT int dsc_faulty_emulated(int which, int order, float* out) {
  return emulated::guarded([&] {
    emulated::launch(dim3(1), dim3(64), order, which == 0 ? kernel_without_barrier : kernel_that_never_ends, out);
    return 0;
  });
}
