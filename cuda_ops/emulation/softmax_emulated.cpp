// The kernels of native/softmax.cu on the CPU, with their memory traffic, behind plain C functions for ctypes; and two
// faulty kernels with which the tests show that the emulation finds what it is for.
#include "cuda_cpu.h"

namespace emulated {
static int thread_order = 0;
}
#define DSC_UNPACK(...) __VA_ARGS__
#define DSC_LAUNCH(kernel, grid, block, stream, ...) \
  emulated::launch(grid, block, emulated::thread_order, DSC_UNPACK kernel, __VA_ARGS__)
#include "softmax.cu"

#define DSC_EXPORT extern "C" __attribute__((visibility("default")))

static thread_local std::string last_error;

template <typename Call>
static int guarded(Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

DSC_EXPORT const char* dsc_emulated_error() { return last_error.c_str(); }

// spans: pairs of addresses, begin and end, that the kernel may touch. counts: for each span bytes read, bytes written,
// loads, and loads of 16 bytes. Returns what dsc_softmax_cuda returns, or -1 with a message.
DSC_EXPORT int dsc_softmax_emulated(const dsc::SoftmaxJob* job, int kernel, int order, const uint64_t* spans, int count,
                                    int64_t* counts) {
  return guarded([&] {
    auto& declared = emulated::machine.spans;
    declared.clear();
    for (int i = 0; i < count; i++) {
      declared.push_back({reinterpret_cast<const char*>(spans[2 * i]), reinterpret_cast<const char*>(spans[2 * i + 1])});
    }
    emulated::thread_order = order;
    const int result = dsc::launch(*job, static_cast<dsc::Kernel>(kernel), 0);
    for (int i = 0; i < count; i++) {
      counts[4 * i] = declared[i].read_bytes, counts[4 * i + 1] = declared[i].written_bytes;
      counts[4 * i + 2] = declared[i].reads, counts[4 * i + 3] = declared[i].wide_reads;
    }
    return result;
  });
}

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
  return guarded([&] {
    emulated::launch(dim3(1), dim3(64), order, which == 0 ? kernel_without_barrier : kernel_that_never_ends, out);
    return 0;
  });
}
