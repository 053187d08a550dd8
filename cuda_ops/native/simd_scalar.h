// One lane: the slow, obvious version of the vector interface that pack_rows.h, gptq_rows.h and softmax_rows.h are written against.
// Included inside a namespace; see simd.h for the meaning of each function.

using F = float;
using I = int32_t;
constexpr int kLanes = 1;

static inline F set(float x) { return x; }
static inline I bits_of(F x) { return std::bit_cast<int32_t>(x); }
static inline F float_of(I x) { return std::bit_cast<float>(x); }

static inline F load(const float* p) { return *p; }
static inline F load(const int32_t* p) { return static_cast<float>(*p); }
static inline F load(const Bf16* p) { return bf16_to_float(p->bits); }
static inline F load(const Half* p) { return half_to_float(p->bits); }
static inline F load_e4m3(const uint8_t* p) { return e4m3_to_float(*p); }
static inline F load_keep(const uint8_t* p, F x) { return *p ? x : -kInfinity; }

static inline void store(float* p, F x) { *p = x; }
static inline void store(Bf16* p, F x) { p->bits = float_to_bf16(x); }
static inline void store(Half* p, F x) { p->bits = float_to_half(x); }
static inline void store(uint8_t* p, F x) { *p = static_cast<uint8_t>(x < 255.0f ? std::nearbyint(x) : 255.0f); }
static inline F first(F x, int count) { return count > 0 ? x : -kInfinity; }

static inline F add(F a, F b) { return a + b; }
static inline F sub(F a, F b) { return a - b; }
static inline F divide(F a, F b) { return a / b; }
static inline F round_even(F x) { return std::nearbyint(x); }
static inline F select_less(F a, F b, F x, F y) { return a < b ? x : y; }
static inline F zero_where(const uint8_t* p, F x) { return *p ? 0.0f : x; }
static inline F mul(F a, F b) { return a * b; }
static inline F quotient(F a, F b, F) { return a / b; }
static inline F fma(F a, F b, F c) { return a * b + c; }  // not fused: without the instruction that is a slow call
static inline F min(F a, F b) { return b < a ? b : a; }
static inline F max(F a, F b) { return b > a ? b : a; }  // a NaN in a stays, a NaN in b is dropped
template <bool kFine>
static inline F exp2_of(F t) {
  return t < -110.0f ? 0.0f : std::exp2(t);
}

static inline bool any_nan(F a) { return a != a; }
static inline float lowest(F a) { return a; }
static inline float highest(F a) { return a; }
static inline float total(F a) { return a; }

// The 4-bit code of element k, low nibble first: an even element writes the byte, an odd one completes it.
static inline void store_codes(uint8_t* row, int64_t k, F ratio, float zero_point) {
  const float code = std::min(std::nearbyint(ratio) + zero_point, 15.0f);
  const auto nibble = static_cast<uint8_t>(code);
  row[k / 2] = k % 2 ? static_cast<uint8_t>(row[k / 2] | nibble << 4) : nibble;
}
static inline F load_e2m1(const uint8_t* row, int64_t k) { return kE2M1[row[k / 2] >> (k % 2 * 4) & 15]; }
