// Eight lanes: AVX2, FMA, F16C. See simd.h for the meaning of each function.

using F = __m256;
using I = __m256i;
constexpr int kLanes = 8;

static inline F set(float x) { return _mm256_set1_ps(x); }
static inline I bits_of(F x) { return _mm256_castps_si256(x); }
static inline F float_of(I x) { return _mm256_castsi256_ps(x); }

static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline F load(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline __m128i load_words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline F load(const Bf16* p) { return float_of(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p)), 16)); }
static inline F load(const Half* p) { return _mm256_cvtph_ps(load_words(p)); }
static inline __m128i load_bytes(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
static inline F load_keep(const uint8_t* p, F x) {
  const I drop = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(load_bytes(p)), _mm256_setzero_si256());
  return _mm256_blendv_ps(x, _mm256_set1_ps(-kInfinity), float_of(drop));
}

// E4M3 in the fields of a half is 2^-8 of the value; see simd_avx512.h.
static inline F load_e4m3(const uint8_t* p) {
  const __m128i codes = _mm_cvtepu8_epi16(load_bytes(p));
  const __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i half = _mm_or_si128(_mm_or_si128(sign, _mm_slli_epi16(magnitude, 7)), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

// Eight int32 in [0, 65535] as eight uint16, in order.
static inline __m128i narrow(I x) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
}

static inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline void store(Bf16* p, F x) {
  const I bits = bits_of(x);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  I rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), bits_of(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(rounded));
}
static inline void store(Half* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store(uint8_t* p, F x) {
  const __m128i words = narrow(_mm256_cvtps_epi32(x));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
static inline F first(F x, int count) {
  const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_blendv_ps(_mm256_set1_ps(-kInfinity), x, float_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}

static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F divide(F a, F b) { return _mm256_div_ps(a, b); }
static inline F round_even(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F select_less(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline F zero_where(const uint8_t* p, F x) {
  const I keep = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(load_bytes(p)), _mm256_setzero_si256());
  return _mm256_and_ps(x, float_of(keep));
}
static inline F quotient(F a, F b, F reciprocal) {
  const F guess = _mm256_mul_ps(a, reciprocal);
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(guess, b, a), reciprocal, guess);
}
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F min(F a, F b) { return _mm256_min_ps(b, a); }  // the instruction returns its second operand for a NaN
static inline F max(F a, F b) { return _mm256_max_ps(b, a); }

// 2^t = 2^n 2^f, n = round(t): adding 1.5 * 2^23 leaves n in the low bits of the sum. Minimax polynomials for 2^f on
// [-1/2, 1/2], constant held at 1: relative error 2.8e-6 and 1.1e-7. Below 2^-110 the result is 0, so that no subnormal
// float, which traps into microcode, is made.
template <bool kFine>
static inline F exp2_of(F t) {
  const F magic = set(0x1.8p23f), shifted = add(t, magic), n = sub(shifted, magic), f = sub(t, n);
  F p;
  if constexpr (kFine) {
    p = fma(set(0x1.5bba12p-10f), f, set(0x1.3cea88p-7f));
    p = fma(p, f, set(0x1.c6b752p-5f));
    p = fma(p, f, set(0x1.ebf9bcp-3f));
    p = fma(p, f, set(0x1.62e42ap-1f));
  } else {
    p = fma(set(0x1.3a02ccp-7f), f, set(0x1.c9fc46p-5f));
    p = fma(p, f, set(0x1.ec0378p-3f));
    p = fma(p, f, set(0x1.62e12cp-1f));
  }
  p = fma(p, f, set(1.0f));
  const F e = float_of(_mm256_add_epi32(bits_of(p), _mm256_slli_epi32(bits_of(shifted), 23)));
  return _mm256_and_ps(e, _mm256_cmp_ps(t, set(-110.0f), _CMP_NLT_UQ));  // a NaN passes
}

static inline bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
static inline float lowest(F a) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
static inline float highest(F a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline float total(F a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline void store_codes(uint8_t* row, int64_t k, F ratio, float zero_point) {
  I code = _mm256_add_epi32(_mm256_cvtps_epi32(ratio), _mm256_set1_epi32(static_cast<int32_t>(zero_point)));
  code = _mm256_min_epi32(code, _mm256_set1_epi32(15));
  // Two codes share a 64-bit lane; byte 0 of each of the four lanes is gathered into four bytes.
  const I pair = _mm256_or_si256(code, _mm256_srli_epi64(code, 28));
  const I gather = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                    -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const I bytes = _mm256_shuffle_epi8(pair, gather);
  const __m128i both = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  const int32_t word = _mm_cvtsi128_si32(both);
  std::memcpy(row + k / 2, &word, 4);
}
static inline F load_e2m1(const uint8_t* row, int64_t k) {
  int32_t word;
  std::memcpy(&word, row + k / 2, 4);
  const __m128i bytes = _mm_cvtsi32_si128(word);
  const I code = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)));
  const F magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kE2M1), code);  // reads 3 bits of each index
  const I sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28);
  return _mm256_or_ps(magnitude, float_of(sign));
}
