// The arithmetic of simd.h on a GPU, with its bits. Each of the _rn functions rounds once and is never contracted to a
// fused multiply-add, whatever the compiler's flags; subnormals are kept. A division takes some twenty instructions and
// a branch, so it is left to what happens once a group; once a weight, `quotient` corrects a guess (why it is exact: simd.h).
#pragma once

namespace dsc {
namespace {

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float quotient(float a, float b, float reciprocal) {
  const float guess = mul(a, reciprocal);
  return __fmaf_rn(__fmaf_rn(-guess, b, a), reciprocal, guess);
}
// Of equal numbers the first, as simd.h has it: of two zeros fminf may return the other one. Where the sign of a zero is
// lost anyway, fminf and fmaxf are one instruction instead of two.
__device__ inline float least(float a, float b) { return b < a ? b : a; }
__device__ inline float greatest(float a, float b) { return b > a ? b : a; }

// x to the nearest whole number, ties to even, for |x| < 2^22: at 1.5 * 2^23 floats are whole numbers, and the sum's low
// bits are x. Additions run at full speed; the instruction that rounds has an eighth of it or less.
constexpr float kWhole = 0x1.8p23f;
__device__ inline float whole(float x) { return sub(add(x, kWhole), kWhole); }

}  // namespace
}  // namespace dsc
