// Number formats and the vector interface shared by the CPU kernels.
//
// A kernel (pack_rows.h, gptq_rows.h, softmax_rows.h) is written once, in terms of F (kLanes floats) and I (kLanes
// int32), and included three times, after simd_scalar.h, simd_avx2.h and simd_avx512.h, each time inside its own
// namespace and its own `#pragma GCC target`. So there is one statement of each algorithm, and the three can only differ
// in the order of a sum. For a few whole steps (the largest of a row, range and codes of a group of BF16, a run of FP8)
// simd_avx512.h has a faster version with the same result, preferred to the kernel's template. No lambdas inside the
// kernels: GCC does not give them the target of the function around them.
//
//   load(p), store(p, x)      kLanes numbers of the pointed-to type, converted to and from float, round to nearest even
//   load_e4m3, load_e2m1      FP8 (NaN kept) and FP4 codes as float
//   load_keep(p, x)           x where the mask byte is not 0, else -infinity
//   first(x, n)               the first n lanes of x, -infinity in the others
//   zero_where(p, x)          0 where the byte is not 0, else x
//   select_less(a, b, x, y)   x where a < b, else y
//   round_even(x)             to the nearest whole number, ties to even
//   fma(a, b, c)              a * b + c, in one rounding where the machine has it
//   min, max(a, b)            a NaN in b is dropped
//   exp2_of<fine>(t)          2^t for t < 9, 0 below 2^-110 or less, a NaN kept; fine: relative error about 1e-7, else
//                             3e-6, far below half a unit of FP16, 5e-4
//   quotient(a, b, 1 / b)     a / b rounded once, for b with at most 8 significant bits (a BF16 number). Dividing is the
//                             slowest instruction there is, so the vector versions correct a guess. Why that is exact:
//                             the guess q is within 1.5 ulp of Q = a / b and the remainder a - q b has no rounding, so
//                             the sum before its one rounding is Q up to 2^-23 ulp. With b an 8-bit and a a 24-bit
//                             whole number (times powers of two), Q is never a midpoint of two floats, and never
//                             nearer to one than ulp / 512. Underflow only touches |Q| far below one half.
//   store_codes(row, k, r, z) 4-bit codes min(round(r) + z, 15) of elements k.., low nibble first; the sum is never
//                             negative, for r >= low / scale and z = round(-low / scale) <= 15
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsc {

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};
struct E4m3 {
  uint8_t bits;
};

enum class Isa : int64_t { scalar = 0, avx2 = 1, avx512 = 2 };

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// E2M1: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats v1.0, section 5.3.3).
alignas(64) constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline float bf16_to_float(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  // The exponent of a half has bias 15, that of a float 127: 2^112 apart. Subnormals come out right by the product.
  float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  if ((x & 0x7c00) == 0x7c00) value = std::bit_cast<float>(magnitude | 0x7f800000);
  return x & 0x8000 ? -value : value;
}

inline uint16_t float_to_half(float x) {
  const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
  const uint32_t bits = std::bit_cast<uint32_t>(x) & 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // below 2^-14: subnormal, a whole multiple of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(std::bit_cast<float>(bits) * 0x1p24f));
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline float to_float(Bf16 x) { return bf16_to_float(x.bits); }
inline float to_float(Half x) { return half_to_float(x.bits); }

inline float e4m3_to_float(uint8_t x) {  // OCP FP8 E4M3: bias 7, no infinity, 0x7f and 0xff are NaN
  const uint32_t magnitude = x & 0x7f;
  if (magnitude == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return x & 0x80 ? -value : value;
}

inline float e8m0_to_float(uint8_t x) {  // 2^(x - 127); 255 is NaN
  if (x == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(x == 0 ? 0x00400000u : static_cast<uint32_t>(x) << 23);
}

// The best instructions this processor has, or fewer where a test asked for fewer.
Isa isa();
int64_t limit_isa(int64_t level);  // returns the level now in use

}  // namespace dsc
