// The part of cuda_fp16.h that the kernels use, for the CPU.
#pragma once

#include "cuda_cpu.h"
#include "simd.h"

struct __half {
  unsigned short bits;
};
struct __half2_raw {
  unsigned short x, y;
};
inline float __half2float(__half h) { return dsc::half_to_float(h.bits); }
inline float2 __half22float2(__half2_raw h) { return {dsc::half_to_float(h.x), dsc::half_to_float(h.y)}; }
inline __half2_raw __floats2half2_rn(float a, float b) { return {dsc::float_to_half(a), dsc::float_to_half(b)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
