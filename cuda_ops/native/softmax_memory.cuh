// How the kernels of softmax.cu read a row of logits into registers and write a row of the output: 16 bytes at a time
// where rows start on such a border, a number at a time where they do not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "softmax.h"

// To the compiler `x` is a new, unknown number from here on: otherwise it keeps the outcome of a comparison with it for
// each of 32 columns in registers, to save comparing again.
#define DSC_RENEW(x) asm volatile("" : "+r"(x))

namespace dsc {

constexpr int kWarp = 32;
constexpr float kNothing = -INFINITY;

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
__device__ __forceinline__ void store_words(void* p, unsigned a, unsigned b) {
  __stcs(static_cast<uint2*>(p), make_uint2(a, b));
}
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
__device__ __forceinline__ void store_row(const SoftmaxJob& job, int64_t row, int first, float (&e)[M][N],
                                          float factor) {
  const int64_t at = row * job.columns + first;
  const int columns = static_cast<int>(job.columns) - first;
  const Type type = job.out_type;
  if (type == Type::uint8) store_vectors(static_cast<uint8_t*>(job.out) + at, columns, e, factor, type);
  else if (type == Type::float32) store_vectors(static_cast<float*>(job.out) + at, columns, e, factor, type);
  else store_vectors(static_cast<uint16_t*>(job.out) + at, columns, e, factor, type);
}

}  // namespace dsc
