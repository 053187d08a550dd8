// A .cu file of native/ on the CPU, with its memory traffic, behind plain C functions for ctypes: include this, then it.
#pragma once

#include "cuda_cpu.h"

#define DSC_EXPORT extern "C" __attribute__((visibility("default")))
#define DSC_UNPACK(...) __VA_ARGS__
#define DSC_LAUNCH(kernel, grid, block, stream, ...) \
  emulated::launch(grid, block, emulated::thread_order, DSC_UNPACK kernel, __VA_ARGS__)

// int dsc_NAME_emulated: see `emulated::run`. Returns what dsc_NAME_cuda returns, or -1 with a message.
#define DSC_ENTRY(name, Job, Choice, launch)                                                                      \
  DSC_EXPORT int dsc_##name##_emulated(const Job* job, int kernel, int order, const uint64_t* spans, int count,   \
                                       int64_t* counts) {                                                         \
    return emulated::run(order, spans, count, counts, [&] { return launch(*job, static_cast<Choice>(kernel), 0); }); \
  }

namespace emulated {

inline int thread_order = 0;
inline thread_local std::string last_error;

template <typename Call>
int guarded(Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

// spans: pairs of addresses, begin and end, that the kernel may touch. counts: for each span bytes read, bytes written,
// loads, and loads of 16 bytes.
template <typename Launch>
int run(int order, const uint64_t* spans, int count, int64_t* counts, Launch launch) {
  return guarded([&] {
    machine.spans.clear();
    for (int i = 0; i < count; i++) {
      machine.spans.push_back(
          {reinterpret_cast<const char*>(spans[2 * i]), reinterpret_cast<const char*>(spans[2 * i + 1])});
    }
    thread_order = order;
    const int result = launch();
    for (int i = 0; i < count; i++) {
      const Span& span = machine.spans[i];
      counts[4 * i] = span.read_bytes, counts[4 * i + 1] = span.written_bytes;
      counts[4 * i + 2] = span.reads, counts[4 * i + 3] = span.wide_reads;
    }
    return result;
  });
}

}  // namespace emulated
