// The part of cuda_bf16.h that the kernels use, for the CPU.
#pragma once

#include "cuda_cpu.h"
#include "simd.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
struct __nv_bfloat162_raw {
  unsigned short x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) { return dsc::bf16_to_float(h.bits); }
inline __nv_bfloat162_raw __floats2bfloat162_rn(float a, float b) {
  return {dsc::float_to_bf16(a), dsc::float_to_bf16(b)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {dsc::float_to_bf16(x)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
