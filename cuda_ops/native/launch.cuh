// How a kernel is launched, and the C function by which torch_cuda.cpp and ctypes launch it; the emulation brings its own.
#pragma once

#ifndef DSC_LAUNCH
#define DSC_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)

// int dsc_NAME_cuda(job, kernel, stream): 0, 1 where the kernel asked for cannot take the job, or 1000 + a cudaError_t.
#define DSC_ENTRY(name, Job, Choice, launch)                                                                        \
  extern "C" __attribute__((visibility("default"))) int dsc_##name##_cuda(const Job* job, int kernel, void* stream) { \
    const int refused = launch(*job, static_cast<Choice>(kernel), static_cast<cudaStream_t>(stream));                \
    if (refused) return refused;                                                                                     \
    const cudaError_t error = cudaGetLastError();                                                                    \
    return error == cudaSuccess ? 0 : 1000 + static_cast<int>(error);                                                \
  }
#endif
