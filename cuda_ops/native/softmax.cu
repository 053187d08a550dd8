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
// after the load is float32. Registers, not shared memory, hold the row:
// 32 floats a thread are 128 KiB a block, more than the shared memory of sm_86 and sm_89. The tests also build this file
// for the CPU (emulation/), where global memory is reached through the intrinsics below alone, counted and checked.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "softmax.h"

#ifndef DSC_LAUNCH
#define DSC_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

// To the compiler `x` is a new, unknown number from here on: otherwise it keeps the outcome of a comparison with it for
// each of 32 columns in registers, to save comparing again.
#define DSC_RENEW(x) asm volatile("" : "+r"(x))

namespace dsc {

constexpr int kWarp = 32;
constexpr int kValues = 32;  // numbers of a row that one thread of a block holds
constexpr int kFew = 8;      // the same for a warp
constexpr int kWarpsPerBlock = 4;
constexpr int kLongestInWarp = kWarp * kFew;
constexpr int kLongestInBlock = 1024 * kValues;
constexpr int kOnlineThreads = 512;
constexpr float kLog2E = 1.44269504f;
constexpr float kNothing = -INFINITY;
constexpr unsigned kEveryLane = 0xffffffffu;

template <typename In>
constexpr int kPerLoad = 16 / sizeof(In);

// What a thread has to know of its row before it can ask for the logits.
struct Row {
  const SoftmaxJob& job;
  int64_t index;
  int begin, end;  // the columns that can take part
};

__device__ __forceinline__ Row row_of(const SoftmaxJob& job, int64_t index) {
  Row row{job, index, 0, static_cast<int>(job.columns)};
  if (job.range) {
    row.begin = static_cast<int>(job.clamped(__ldg(job.range + 2 * index)));
    row.end = static_cast<int>(job.clamped(__ldg(job.range + 2 * index + 1)));
  }
  return row;
}

__device__ __forceinline__ float to_float(int32_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void unpack(const uint4& raw, const int32_t*, float (&out)[4]) {
  out[0] = static_cast<float>(static_cast<int>(raw.x)), out[1] = static_cast<float>(static_cast<int>(raw.y));
  out[2] = static_cast<float>(static_cast<int>(raw.z)), out[3] = static_cast<float>(static_cast<int>(raw.w));
}
__device__ __forceinline__ void unpack(const uint4& raw, const float*, float (&out)[4]) {
  out[0] = __uint_as_float(raw.x), out[1] = __uint_as_float(raw.y);
  out[2] = __uint_as_float(raw.z), out[3] = __uint_as_float(raw.w);
}
__device__ __forceinline__ void unpack(const uint4& raw, const __half*, float (&out)[8]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const __half2_raw pair{static_cast<unsigned short>(words[i] & 0xffff), static_cast<unsigned short>(words[i] >> 16)};
    const float2 two = __half22float2(pair);
    out[2 * i] = two.x, out[2 * i + 1] = two.y;
  }
}
__device__ __forceinline__ void unpack(const uint4& raw, const __nv_bfloat16*, float (&out)[8]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {  // a BF16 is the upper half of a float
    out[2 * i] = __uint_as_float(words[i] << 16), out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <int M, int N>
__device__ __forceinline__ void scale_columns(const float* scales, int end, float (&l)[M][N]) {
#pragma unroll
  for (int j = 0; j < M; j++) {
#pragma unroll
    for (int i = 0; i < N; i += N == 1 ? 1 : 4) {
      const int c = j * kWarp * N + i;
      if (c >= end) continue;
      if constexpr (N == 1) {
        l[j][i] *= __ldg(scales + c);
      } else {
        const float4 by = __ldg(reinterpret_cast<const float4*>(scales + c));
        l[j][i] *= by.x, l[j][i + 1] *= by.y, l[j][i + 2] *= by.z, l[j][i + 3] *= by.w;
      }
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void drop_masked(const uint8_t* keep, int end, float (&l)[M][N]) {
#pragma unroll
  for (int j = 0; j < M; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int c = j * kWarp * N + i;
      if (c < end && !__ldg(keep + c)) l[j][i] = kNothing;
    }
  }
}

// M vectors of N of a row's logits, vector j from column `first + 32 j N`: scaled, -infinity where masked or beyond the
// row. N is what 16 bytes hold, or 1 where rows do not start on a border of 16 bytes. All offsets from `first` are
// constants, so addresses and comparisons need no registers of their own.
template <typename In, int M, int N>
__device__ __forceinline__ void load_logits(const In* x, const Row& row, int first, float (&l)[M][N]) {
  int begin = row.begin - first, end = row.end - first;  // the visible offsets from `first`
  x += first;
  if constexpr (N == 1) {
#pragma unroll
    for (int j = 0; j < M; j++) {
      const int c = j * kWarp;
      l[j][0] = c >= begin && c < end ? to_float(__ldg(x + c)) : 0.0f;
    }
  } else {
    uint4 raw[M];
#pragma unroll
    for (int j = 0; j < M; j++) {
      const int c = j * kWarp * N;
      raw[j] = make_uint4(0, 0, 0, 0);
      if (c < end && c + N > begin) raw[j] = __ldg(reinterpret_cast<const uint4*>(x + c));
    }
#pragma unroll
    for (int j = 0; j < M; j++) unpack(raw[j], x, l[j]);
  }
  const float scale = row.job.row_scale ? __ldg(row.job.row_scale + row.index) : 1.0f;
#pragma unroll
  for (int j = 0; j < M; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) l[j][i] *= scale;
  }
  DSC_RENEW(begin);
  DSC_RENEW(end);
  if (row.job.column_scale) scale_columns(row.job.columns_of(row.index) + first, end, l);
#pragma unroll
  for (int j = 0; j < M; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int c = j * kWarp * N + i;
      if (c < begin || c >= end) l[j][i] = kNothing;
    }
  }
  DSC_RENEW(end);
  if (row.job.keep) drop_masked(row.job.keep_of(row.index) + first, end, l);
}

__device__ __forceinline__ unsigned code_of(float x) { return static_cast<unsigned>(__float2int_rn(fminf(x, 255.0f))); }
__device__ __forceinline__ void store_words(void* p, unsigned a) { __stcs(static_cast<unsigned*>(p), a); }
__device__ __forceinline__ void store_words(void* p, unsigned a, unsigned b) { __stcs(static_cast<uint2*>(p), make_uint2(a, b)); }
__device__ __forceinline__ void store_words(void* p, unsigned a, unsigned b, unsigned c, unsigned d) {
  __stcs(static_cast<uint4*>(p), make_uint4(a, b, c, d));
}

__device__ __forceinline__ unsigned codes_of(const float* v) {
  return code_of(v[0]) | code_of(v[1]) << 8 | code_of(v[2]) << 16 | code_of(v[3]) << 24;
}
// Two numbers of 16 bits, a in the lower half.
__device__ __forceinline__ unsigned word_of(Type type, float a, float b) {
  if (type == Type::float16) {
    const __half2_raw pair = __floats2half2_rn(a, b);
    return pair.x | static_cast<unsigned>(pair.y) << 16;
  }
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(a, b);
  return pair.x | static_cast<unsigned>(pair.y) << 16;
}

// N values v in the output type at p.
template <int N>
__device__ __forceinline__ void store_vector(uint8_t* p, const float (&v)[N], Type) {
  if constexpr (N == 1) __stcs(p, static_cast<uint8_t>(code_of(v[0])));
  else if constexpr (N == 4) store_words(p, codes_of(v));
  else store_words(p, codes_of(v), codes_of(v + 4));
}
template <int N>
__device__ __forceinline__ void store_vector(uint16_t* p, const float (&v)[N], Type type) {
  if constexpr (N == 1) __stcs(p, static_cast<uint16_t>(word_of(type, v[0], 0.0f)));
  else if constexpr (N == 4) store_words(p, word_of(type, v[0], v[1]), word_of(type, v[2], v[3]));
  else
    store_words(p, word_of(type, v[0], v[1]), word_of(type, v[2], v[3]), word_of(type, v[4], v[5]),
                word_of(type, v[6], v[7]));
}
template <int N>
__device__ __forceinline__ void store_vector(float* p, const float (&v)[N], Type) {
  if constexpr (N == 1) {
    __stcs(p, v[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      store_words(p + i, __float_as_uint(v[i]), __float_as_uint(v[i + 1]), __float_as_uint(v[i + 2]),
                  __float_as_uint(v[i + 3]));
  }
}

template <typename Out, int M, int N>
__device__ __forceinline__ void store_vectors(Out* p, int columns, float (&e)[M][N], float factor, Type type) {
#pragma unroll
  for (int j = 0; j < M; j++) {
    if (j * kWarp * N >= columns) continue;
#pragma unroll
    for (int i = 0; i < N; i++) e[j][i] *= factor;
    store_vector(p + j * kWarp * N, e[j], type);
  }
}

// e times `factor` (probabilities, or codes with factor 255), laid out as in load_logits, to a row of the output.
template <int M, int N>
__device__ __forceinline__ void store_row(const SoftmaxJob& job, int64_t row, int first, float (&e)[M][N], float factor) {
  const int64_t at = row * job.columns + first;
  const int columns = static_cast<int>(job.columns) - first;
  if (job.out_type == Type::uint8) store_vectors(static_cast<uint8_t*>(job.out) + at, columns, e, factor, Type::uint8);
  else if (job.out_type == Type::float32) store_vectors(static_cast<float*>(job.out) + at, columns, e, factor, Type::float32);
  else store_vectors(static_cast<uint16_t*>(job.out) + at, columns, e, factor, job.out_type);
}

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
    kernel = job.columns <= kLongestInWarp ? Kernel::warp : job.columns <= kLongestInBlock ? Kernel::block : Kernel::online;
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

#ifndef DSC_EMULATED
// For torch_cuda.cpp and ctypes: 0, 1 (row too long for the kernel) or 1000 + a cudaError_t.
extern "C" __attribute__((visibility("default"))) int dsc_softmax_cuda(const dsc::SoftmaxJob* job, int kernel,
                                                                       void* stream) {
  const int refused = dsc::launch(*job, static_cast<dsc::Kernel>(kernel), static_cast<cudaStream_t>(stream));
  if (refused) return refused;
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? 0 : 1000 + static_cast<int>(error);
}

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
