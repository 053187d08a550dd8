// The softmax of softmax.h on CUDA, sm_80 to sm_120: a ladder of four kernels in one file.
//
//   naive    a thread a row, three readings; the obvious one
//   warp     a warp a row of up to 256 columns, the row stays in registers: one reading, one writing
//   block    a block a row of up to 32768 columns, likewise
//   online   a block a row of any length: maximum and sum in one reading (Milakov and Gimelshein 2018, arXiv
//            1805.02867), a second reading to write
//
// Memory bound, so what counts is bytes: a thread asks for all its logits before it uses the first, 16 bytes at a time
// wherever rows start on such a border (`aligned`), and columns outside a row's range are not read at all. Everything
// after the load is float32. Registers, not shared memory, hold the row: 32 floats a thread are 128 KiB a block, more
// than the shared memory of sm_86 and sm_89. The tests also build this file for the CPU (emulation/), where global
// memory is reached through __ldg and __stcs alone, counted and checked.
#include "launch.cuh"
#include "softmax_memory.cuh"

namespace dsc {

constexpr int kValues = 32;  // numbers of a row that one thread of a block holds
constexpr int kFew = 8;      // the same for a warp
constexpr int kWarpsPerBlock = 4;
constexpr int kLongestInWarp = kWarp * kFew;
constexpr int kLongestInBlock = 1024 * kValues;
constexpr int kOnlineThreads = 512;
constexpr float kLog2E = 1.44269504f;
constexpr unsigned kEveryLane = 0xffffffffu;

// What multiplies e on its way out, and the scale of a row of codes.
__device__ __forceinline__ float factor_of(const SoftmaxJob& job, float sum) {
  if (job.out_type == Type::uint8) return 255.0f;
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}
__device__ __forceinline__ void store_scale(const SoftmaxJob& job, int64_t row, float sum) {
  if (job.out_type == Type::uint8) __stcs(job.out_scale + row, sum == 0.0f ? 0.0f : 1.0f / (255.0f * sum));
}
__device__ __forceinline__ float exp_of(float x) { return exp2f(x * kLog2E); }  // the hardware has 2^x
// What is subtracted from logits: 0 where nothing is visible, so that every exponential is 0 and a NaN stays NaN.
__device__ __forceinline__ float offset_of(float largest) { return largest == kNothing ? 0.0f : largest; }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(kEveryLane, x, step));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

// The same over the block; every thread of it must call. The second barrier frees `part` for the next call.
__device__ __forceinline__ float block_max(float x) {
  __shared__ float part[kWarp];
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = warp_max(threadIdx.x % kWarp < blockDim.x / kWarp ? part[threadIdx.x % kWarp] : kNothing);
  __syncthreads();
  return x;
}
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float part[kWarp];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = warp_sum(threadIdx.x % kWarp < blockDim.x / kWarp ? part[threadIdx.x % kWarp] : 0.0f);
  __syncthreads();
  return x;
}

template <typename In>
__global__ void naive_kernel(const SoftmaxJob job) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= job.rows) return;
  const In* x = static_cast<const In*>(job.logits) + index * job.columns;
  const Row row = row_of(job, index);
  const int columns = static_cast<int>(job.columns);
  float l[1][1], largest = kNothing, sum = 0.0f;
  for (int c = 0; c < columns; c++) {
    load_logits(x, row, c, l);
    largest = fmaxf(largest, l[0][0]);
  }
  const float offset = offset_of(largest);
  for (int c = 0; c < columns; c++) {
    load_logits(x, row, c, l);
    sum += exp_of(l[0][0] - offset);
  }
  for (int c = 0; c < columns; c++) {
    load_logits(x, row, c, l);
    l[0][0] = exp_of(l[0][0] - offset);
    store_row(job, index, c, l, factor_of(job, sum));
  }
  store_scale(job, index, sum);
}

// The threads of a warp or of the block hold one row, `count` numbers each; a warp has consecutive columns.
template <bool aligned, bool whole_block, int count, typename In>
__device__ __forceinline__ void softmax_in_registers(const SoftmaxJob& job, const In* logits, int64_t index) {
  constexpr int N = aligned ? kPerLoad<In> : 1, M = count / N;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first = warp * kWarp * count + lane * N;
  float l[M][N], largest = kNothing, sum = 0.0f;
  load_logits(logits + index * job.columns, row_of(job, index), first, l);
#pragma unroll
  for (int j = 0; j < M; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) largest = fmaxf(largest, l[j][i]);
  }
  const float offset = offset_of(whole_block ? block_max(largest) : warp_max(largest));
#pragma unroll
  for (int j = 0; j < M; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) sum += l[j][i] = exp_of(l[j][i] - offset);
  }
  sum = whole_block ? block_sum(sum) : warp_sum(sum);
  store_row(job, index, first, l, factor_of(job, sum));
  if (threadIdx.x == 0) store_scale(job, index, sum);
}

template <typename In, bool aligned>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) warp_kernel(const SoftmaxJob job) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (index < job.rows) softmax_in_registers<aligned, false, kFew>(job, static_cast<const In*>(job.logits), index);
}

template <typename In, bool aligned>
__global__ void __launch_bounds__(1024) block_kernel(const SoftmaxJob job) {
  softmax_in_registers<aligned, true, kValues>(job, static_cast<const In*>(job.logits), blockIdx.x);
}

// Maximum and sum of a row in one reading: a thread keeps the sum relative to the largest it has seen so far.
template <bool aligned, typename In>
__device__ __forceinline__ void softmax_online(const SoftmaxJob& job, const In* logits, int64_t index) {
  constexpr int N = aligned ? kPerLoad<In> : 1;
  const In* x = logits + index * job.columns;
  const Row row = row_of(job, index);
  const int columns = static_cast<int>(job.columns), step = static_cast<int>(blockDim.x) * N;
  const int first = static_cast<int>(threadIdx.x) * N;
  float l[1][N], largest = kNothing, sum = 0.0f;
#pragma unroll 1
  for (int c = first; c < columns; c += step) {
    load_logits(x, row, c, l);
    float higher = largest;
#pragma unroll
    for (int i = 0; i < N; i++) higher = fmaxf(higher, l[0][i]);
    const float offset = offset_of(higher);
    sum *= exp_of(largest - offset);  // exp(-infinity) = 0 the first time, when the sum is 0 too
    largest = higher;
#pragma unroll
    for (int i = 0; i < N; i++) sum += exp_of(l[0][i] - offset);
  }
  const float offset = offset_of(block_max(largest));
  sum = block_sum(sum * exp_of(largest - offset));
  const float factor = factor_of(job, sum);
#pragma unroll 1
  for (int c = first; c < columns; c += step) {
    load_logits(x, row, c, l);
#pragma unroll
    for (int i = 0; i < N; i++) l[0][i] = exp_of(l[0][i] - offset);
    store_row(job, index, c, l, factor);
  }
  if (threadIdx.x == 0) store_scale(job, index, sum);
}

template <typename In, bool aligned>
__global__ void __launch_bounds__(kOnlineThreads, 2) online_kernel(const SoftmaxJob job) {
  softmax_online<aligned>(job, static_cast<const In*>(job.logits), blockIdx.x);
}

enum class Kernel : int32_t { automatic = 0, naive = 1, warp = 2, block = 3, online = 4 };

// Whether every row of logits, column scales and output starts where a whole vector can be read and written.
inline bool rows_are_aligned(const SoftmaxJob& job, int per_load) {
  const auto address = reinterpret_cast<uintptr_t>(job.logits) | reinterpret_cast<uintptr_t>(job.out) |
                       reinterpret_cast<uintptr_t>(job.column_scale);
  return job.columns % per_load == 0 && address % 16 == 0;
}

// Returns 0, or 1 where the kernel asked for cannot take rows this long.
template <typename In, bool aligned, typename Stream>
int launch_kernel(const SoftmaxJob& job, Kernel kernel, [[maybe_unused]] Stream stream) {
  const auto rows = static_cast<unsigned>(job.rows);
  if (kernel == Kernel::automatic) {
    kernel = job.columns <= kLongestInWarp    ? Kernel::warp
             : job.columns <= kLongestInBlock ? Kernel::block
                                              : Kernel::online;
  }
  if (kernel == Kernel::naive) {
    DSC_LAUNCH((naive_kernel<In>), dim3((rows + 127) / 128), dim3(128), stream, job);
  } else if (kernel == Kernel::warp) {
    if (job.columns > kLongestInWarp) return 1;
    const dim3 grid((rows + kWarpsPerBlock - 1) / kWarpsPerBlock), block(kWarp, kWarpsPerBlock);
    DSC_LAUNCH((warp_kernel<In, aligned>), grid, block, stream, job);
  } else if (kernel == Kernel::block) {
    if (job.columns > kLongestInBlock) return 1;
    const auto threads = static_cast<unsigned>((job.columns + kValues * kWarp - 1) / (kValues * kWarp) * kWarp);
    DSC_LAUNCH((block_kernel<In, aligned>), dim3(rows), dim3(threads), stream, job);
  } else {
    DSC_LAUNCH((online_kernel<In, aligned>), dim3(rows), dim3(kOnlineThreads), stream, job);
  }
  return 0;
}

template <typename In, typename Stream>
int launch_typed(const SoftmaxJob& job, Kernel kernel, Stream stream) {
  if (rows_are_aligned(job, kPerLoad<In>)) return launch_kernel<In, true>(job, kernel, stream);
  return launch_kernel<In, false>(job, kernel, stream);
}

template <typename Stream>
int launch(const SoftmaxJob& job, Kernel kernel, Stream stream) {
  if (job.rows == 0) return 0;
  if (job.in == Type::int32) return launch_typed<int32_t>(job, kernel, stream);
  if (job.in == Type::float16) return launch_typed<__half>(job, kernel, stream);
  if (job.in == Type::bfloat16) return launch_typed<__nv_bfloat16>(job, kernel, stream);
  return launch_typed<float>(job, kernel, stream);
}

}  // namespace dsc

DSC_ENTRY(softmax, dsc::SoftmaxJob, dsc::Kernel, dsc::launch)

#ifndef DSC_EMULATED
// For a TensorRT plugin made from this file's PTX: rows of FP16, a block each; launch with 512 threads.
extern "C" __global__ void __launch_bounds__(dsc::kOnlineThreads, 2)
    dsc_softmax_float16(const __half* logits, int columns, __half* out) {
  dsc::SoftmaxJob job{};
  job.logits = logits, job.out = out, job.columns = columns, job.rows = gridDim.x;
  job.in = job.out_type = dsc::Type::float16;
  if (columns % 8 == 0) dsc::softmax_online<true>(job, logits, blockIdx.x);
  else dsc::softmax_online<false>(job, logits, blockIdx.x);
}
#endif
