// Sixteen lanes: AVX-512 F, BW, VL, DQ. See simd.h for the meaning of each function.

using F = __m512;
using I = __m512i;
constexpr int kLanes = 16;

static inline F set(float x) { return _mm512_set1_ps(x); }
static inline I bits_of(F x) { return _mm512_castps_si512(x); }
static inline F float_of(I x) { return _mm512_castsi512_ps(x); }

static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline F load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
static inline __m256i load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline F load(const Bf16* p) { return float_of(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p)), 16)); }
static inline F load(const Half* p) { return _mm512_cvtph_ps(load_words(p)); }
static inline __m128i load_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline F load_keep(const uint8_t* p, F x) {
  const __m128i keep = load_bytes(p);
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(keep, keep), _mm512_set1_ps(-kInfinity), x);
}

// E4M3 moved into the fields of a half is 2^-8 of the value (bias 7 against 15), subnormals included; the conversion
// from half is full speed for subnormals where a product of floats would trap into microcode.
static inline F load_e4m3(const uint8_t* p) {
  const __m256i codes = _mm256_cvtepu8_epi16(load_bytes(p));
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)), 8);
  __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
  half = _mm256_mask_set1_epi16(half, _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f)), 0x7e00);
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
// 32 codes at a time, for pack_rows.h: a code with its sign spread above it, times 2^7, has sign and fields in their
// places in a half; the sign's second copy, in the highest bit of the exponent, is masked away.
static inline void decode_e4m3(const E4m3* codes, int64_t count, float scale, float* out) {
  const F by = set(scale * 256.0f);
  int64_t i = 0;
  for (; scale < 0x1p119f && i + 32 <= count; i += 32) {
    const __m512i wide = _mm512_cvtepi8_epi16(load_words(codes + i)), magnitude = _mm512_set1_epi16(0x7f);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(wide, magnitude), magnitude);
    __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(-0x4080));
    half = _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
    store(out + i, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), by));
    store(out + i + 16, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), by));
  }
  for (; i < count; i += kLanes) store(out + i, _mm512_mul_ps(load_e4m3(&codes[i].bits), set(scale)));
}
static inline void store(Bf16* p, F x) {
  const I bits = bits_of(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
static inline void store(Half* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store(uint8_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
}
static inline F first(F x, int count) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), static_cast<__mmask16>((1u << count) - 1), x);
}

static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F divide(F a, F b) { return _mm512_div_ps(a, b); }
static inline F round_even(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F select_less(F a, F b, F x, F y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}
static inline F zero_where(const uint8_t* p, F x) {
  const __m128i fixed = load_bytes(p);
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm_test_epi8_mask(fixed, fixed)), x);
}
static inline F quotient(F a, F b, F reciprocal) {
  const F guess = _mm512_mul_ps(a, reciprocal);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(guess, b, a), reciprocal, guess);
}
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F min(F a, F b) { return _mm512_min_ps(b, a); }  // the instruction returns its second operand for a NaN
static inline F max(F a, F b) { return _mm512_max_ps(b, a); }

// 2^t = 2^floor(t) 2^f. The two instructions at the ends take -infinity (to 0) and everything below the smallest float
// by themselves. Minimax polynomials for 2^f on [0, 1), constant held at 1: relative error 2.9e-6 and 9e-8.
template <bool kFine>
static inline F exp2_of(F t) {
  const F f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
  F p;
  if constexpr (kFine) {
    p = fma(set(0x1.e974fcp-10f), f, set(0x1.277854p-7f));
    p = fma(p, f, set(0x1.c91ce6p-5f));
    p = fma(p, f, set(0x1.ebdb56p-3f));
    p = fma(p, f, set(0x1.62e4bap-1f));
  } else {
    p = fma(set(0x1.b7f732p-7f), f, set(0x1.abf868p-5f));
    p = fma(p, f, set(0x1.ee2450p-3f));
    p = fma(p, f, set(0x1.62d6c6p-1f));
  }
  return _mm512_scalef_ps(fma(p, f, set(1.0f)), t);
}

static inline bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
static inline float lowest(F a) { return _mm512_reduce_min_ps(a); }
static inline float highest(F a) { return _mm512_reduce_max_ps(a); }
static inline float total(F a) { return _mm512_reduce_add_ps(a); }

static inline uint16_t lowest_word(__m512i words) {  // unsigned
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
  const __m128i few = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(few)));
}
static inline __mmask32 lanes_of(int64_t count) { return count < 32 ? (1u << count) - 1 : ~0u; }

// The largest of a row of 16-bit floats without converting them: as integers, with the other bits of a negative number
// flipped, they are in the order of their values, and 32 go into one vector.
static inline __m512i ordered(__m512i x) {
  const __m512i flip = _mm512_and_si512(_mm512_srai_epi16(x, 15), _mm512_set1_epi16(0x7fff));
  return _mm512_xor_si512(x, flip);
}
template <typename T>
static inline float largest_of_words(const T* x, int64_t count) {
  __m512i best[2] = {_mm512_set1_epi16(-0x8000), _mm512_set1_epi16(-0x8000)};  // below every number, NaN included
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    for (int j = 0; j < 2; j++) best[j] = _mm512_max_epi16(best[j], ordered(_mm512_loadu_si512(x + i + 32 * j)));
  for (; i < count; i += 32) {
    const __mmask32 lanes = lanes_of(count - i);
    const __m512i words = ordered(_mm512_maskz_loadu_epi16(lanes, x + i));
    best[0] = _mm512_mask_max_epi16(best[0], lanes, best[0], words);
  }
  const __m512i both = _mm512_max_epi16(best[0], best[1]);
  const uint16_t top = lowest_word(_mm512_xor_si512(both, _mm512_set1_epi16(0x7fff))) ^ 0x7fff;
  const T largest{static_cast<uint16_t>(top & 0x8000 ? top ^ 0x7fff : top)};
  return to_float(largest);
}
static inline float largest_of(const Half* x, int64_t count) { return largest_of_words(x, count); }
static inline float largest_of(const Bf16* x, int64_t count) { return largest_of_words(x, count); }

// Of 32 BF16 numbers at a time, for pack_rows.h: least and greatest as whole numbers in their order, and the codes of
// pairs, since a nibble's place in its byte is that of a number in its 32-bit lane.
static inline bool range_of(const Bf16* x, int64_t count, float* low, float* high) {
  __m512i least = _mm512_setzero_si512(), greatest = least;
  for (int64_t i = 0; i < count; i += 32) {
    const __m512i words = ordered(_mm512_maskz_loadu_epi16(lanes_of(count - i), x + i));
    least = _mm512_min_epi16(least, words);
    greatest = _mm512_max_epi16(greatest, words);
  }
  const int down = lowest_word(_mm512_xor_si512(least, _mm512_set1_epi16(-0x8000)));
  const int up = lowest_word(_mm512_xor_si512(greatest, _mm512_set1_epi16(0x7fff)));
  // Both stand as their distance from the end of the order: `down` from below, `up` from above.
  *low = bf16_to_float(static_cast<uint16_t>(down < 0x8000 ? ~down : down ^ 0x8000));
  *high = bf16_to_float(static_cast<uint16_t>(up ^ 0x7fff));
  return down > 0x7f && up > 0x7f;  // infinity and NaN are the last 0x80 at either end
}
static inline void round_group(const Bf16* x, int64_t count, float scale, float zero, uint8_t* row, int64_t k) {
  const F divisor = set(scale), reciprocal = set(1.0f / scale);
  const I point = _mm512_set1_epi32(static_cast<int32_t>(zero)), top = _mm512_set1_epi32(15);
  for (int64_t i = 0; i < count; i += 32) {
    const auto lanes = lanes_of(count - i);
    const __m512i words = _mm512_maskz_loadu_epi16(lanes, x + i);
    const F even = float_of(_mm512_slli_epi32(words, 16));
    const F odd = float_of(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)));
    const I low = _mm512_add_epi32(_mm512_cvtps_epi32(quotient(even, divisor, reciprocal)), point);
    const I high = _mm512_add_epi32(_mm512_cvtps_epi32(quotient(odd, divisor, reciprocal)), point);
    const I pair = _mm512_or_si512(_mm512_min_epi32(low, top), _mm512_slli_epi32(_mm512_min_epi32(high, top), 4));
    _mm512_mask_cvtepi32_storeu_epi8(row + (k + i) / 2, count - i < 32 ? 0xff : 0xffff, pair);
  }
}

static inline void store_codes(uint8_t* row, int64_t k, F ratio, float zero_point) {
  I code = _mm512_add_epi32(_mm512_cvtps_epi32(ratio), _mm512_set1_epi32(static_cast<int32_t>(zero_point)));
  code = _mm512_min_epi32(code, _mm512_set1_epi32(15));
  // Two codes share a 64-bit lane, 32 bits apart: 28 down puts the odd one into the high nibble of the low byte.
  const I pair = _mm512_or_si512(code, _mm512_srli_epi64(code, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(row + k / 2), _mm512_cvtepi64_epi8(pair));
}
static inline F load_e2m1(const uint8_t* row, int64_t k) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k / 2));
  const __m128i nibbles = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(nibbles), _mm512_load_ps(kE2M1));  // reads 4 bits of each index
}
