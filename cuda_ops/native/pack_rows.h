// The rule, for one group of one row, all in float32 (the reference is cuda_ops/reference.py, equal bit for bit):
//
//   low = min(0, w...)   high = max(0, w...)
//   scale = (high - low) / 15, symmetric max(low / -8, high / 7); 1 where not above 1e-30; rounded to BF16
//   zero  = clamp(round(-low / scale), 0, 15), symmetric 8
//   code  = clamp(round(w / scale) + zero, 0, 15)          round to nearest, ties to even
//
// The range contains 0 and the zero point is whole, so a weight of exactly 0 comes back as exactly 0.
// Included once for each set of instructions; see simd.h.

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
static inline void decode_e4m3(const T* codes, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, mul(load_e4m3(&codes[i].bits), set(scale)));
}

// FP8: elements [k, k + count) of a row that share one block of scales are multiplied by one number.
static inline void decode_fp8(const PackJob& job, int64_t row, int64_t k, int64_t count, float* out) {
  const auto* codes = static_cast<const uint8_t*>(job.weight) + row * job.columns;
  const int64_t blocks = (job.columns + job.block_columns - 1) / job.block_columns;
  const float* scales = job.block_scale + row / job.block_rows * blocks;
  for (int64_t i = k; i < k + count;) {
    const int64_t end = least(k + count, (i / job.block_columns + 1) * job.block_columns);
    decode_e4m3(reinterpret_cast<const E4m3*>(codes + i), end - i, scales[i / job.block_columns], out + (i - k));
    i = end;
  }
}

static inline void decode_mxfp4(const PackJob& job, int64_t row, int64_t k, int64_t count, float* out) {
  const auto* codes = static_cast<const uint8_t*>(job.weight) + row * (job.columns / 2);
  const uint8_t* exponents = job.exponent + row * (job.columns / kMxfp4Block);
  for (int64_t i = k; i < k + count;) {
    const int64_t end = least(k + count, (i / kMxfp4Block + 1) * kMxfp4Block);
    const F scale = set(e8m0_to_float(exponents[i / kMxfp4Block]));
    for (; i < end; i += kLanes) store(out + (i - k), mul(load_e2m1(codes, i), scale));
  }
}

// The least and the greatest of a group's weights and 0; false where one is NaN or infinite.
template <typename T>
static inline bool range_of(const T* weight, int64_t count, float* low, float* high) {
  F low_lanes = set(0.0f), high_lanes = set(0.0f);
  F finite = set(0.0f);  // stays 0 until a weight is NaN or infinite, then NaN
  for (int64_t i = 0; i < count; i += kLanes) {
    const F w = load(weight + i);
    low_lanes = min(low_lanes, w);
    high_lanes = max(high_lanes, w);
    finite = fma(w, set(0.0f), finite);
  }
  *low = lowest(low_lanes), *high = highest(high_lanes);
  return !any_nan(finite);
}

// Codes of a group, which go to elements [k, k + count) of the packed row.
template <typename T>
static inline void round_group(const T* weight, int64_t count, float scale, float zero, uint8_t* row, int64_t k) {
  const F divisor = set(scale), reciprocal = set(1.0f / scale);
  for (int64_t i = 0; i < count; i += kLanes)
    store_codes(row, k + i, quotient(load(weight + i), divisor, reciprocal), zero);
}

// Groups [group, group + count) of a row, `weight` being their first. False where one of them has no finite range.
// Three loops, so that the divisions of one group do not wait for those of the group before.
template <typename T>
static inline bool pack_groups(const PackJob& job, const T* weight, int64_t row, int64_t group, int64_t count) {
  float low[kGroupsAtOnce], high[kGroupsAtOnce], scale[kGroupsAtOnce], zero[kGroupsAtOnce];
  const int64_t groups = job.columns / job.group_size, size = job.group_size;
  for (int64_t g = 0; g < count; g++)
    if (!range_of(weight + g * size, size, low + g, high + g) || high[g] - low[g] == kInfinity) return false;

  uint16_t* stored = job.scale + row * groups + group;
  uint32_t* word = job.zero_point + row / kRowsPerWord * groups + group;
  const int64_t shift = row % kRowsPerWord * 4;
  for (int64_t g = 0; g < count; g++) {
    const float wanted = job.symmetric ? std::max(low[g] / -8.0f, high[g] / 7.0f) : (high[g] - low[g]) / 15.0f;
    stored[g] = float_to_bf16(wanted > kSmallestScale ? wanted : 1.0f);
    scale[g] = bf16_to_float(stored[g]);
    zero[g] = job.symmetric ? 8.0f : std::min(std::nearbyint(low[g] / -scale[g]), 15.0f);  // low <= 0: never negative
    word[g] = (shift ? word[g] : 0) | static_cast<uint32_t>(zero[g]) << shift;
  }

  uint8_t* packed = job.packed + row * ((job.columns + 7) / 8 * 4);
  for (int64_t g = 0; g < count; g++)
    round_group(weight + g * size, size, scale[g], zero[g], packed, (group + g) * size);
  return true;
}

// The same from the stored form; what is not a plain number is decoded into `buffer`.
static inline bool pack_stored(const PackJob& job, int64_t row, int64_t group, int64_t count, float* buffer) {
  const int64_t k = group * job.group_size, place = row * job.columns + k, span = count * job.group_size;
  switch (job.encoding) {
    case Encoding::float32: return pack_groups(job, static_cast<const float*>(job.weight) + place, row, group, count);
    case Encoding::float16: return pack_groups(job, static_cast<const Half*>(job.weight) + place, row, group, count);
    case Encoding::bfloat16: return pack_groups(job, static_cast<const Bf16*>(job.weight) + place, row, group, count);
    case Encoding::fp8_block: decode_fp8(job, row, k, span, buffer); break;
    case Encoding::mxfp4: decode_mxfp4(job, row, k, span, buffer); break;
  }
  return pack_groups(job, const_cast<const float*>(buffer), row, group, count);
}

static inline int64_t pack_words(const PackJob& job, int64_t first, int64_t last, float* buffer) {
  const int64_t groups = job.columns / job.group_size, row_bytes = (job.columns + 7) / 8 * 4;
  // About a thousand floats at a time stay in the first cache between decoding and the two passes over them.
  const int64_t at_once = job.group_size >= 1024 ? 1 : least(1024 / job.group_size, kGroupsAtOnce);
  for (int64_t row = first * kRowsPerWord; row < least(last * kRowsPerWord, job.rows); row++) {
    uint8_t* packed = job.packed + row * row_bytes;
    for (int64_t b = (job.columns + 1) / 2; b < row_bytes; b++) packed[b] = 0;
    for (int64_t group = 0; group < groups; group += at_once)
      if (!pack_stored(job, row, group, least(at_once, groups - group), buffer)) return row;
  }
  return -1;
}
