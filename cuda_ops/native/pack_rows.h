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

// FP8: elements [k, k + count) of a row that share one block of scales are multiplied by one number.
static inline void decode_fp8(const PackJob& job, int64_t row, int64_t k, int64_t count, float* out) {
  const auto* codes = static_cast<const uint8_t*>(job.weight) + row * job.columns;
  const int64_t blocks = (job.columns + job.block_columns - 1) / job.block_columns;
  const float* scales = job.block_scale + row / job.block_rows * blocks;
  for (int64_t i = k; i < k + count;) {
    const int64_t end = least(k + count, (i / job.block_columns + 1) * job.block_columns);
    const F scale = set(scales[i / job.block_columns]);
    for (; i < end; i += kLanes) store(out + (i - k), mul(load_e4m3(codes + i), scale));
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

template <typename T>
static inline void decode_plain(const PackJob& job, int64_t row, int64_t k, int64_t count, float* out) {
  const T* weight = static_cast<const T*>(job.weight) + row * job.columns + k;
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(weight + i));
}

static inline void decode(const PackJob& job, int64_t row, int64_t k, int64_t count, float* out) {
  switch (job.encoding) {
    case Encoding::float32: return decode_plain<float>(job, row, k, count, out);
    case Encoding::float16: return decode_plain<Half>(job, row, k, count, out);
    case Encoding::bfloat16: return decode_plain<Bf16>(job, row, k, count, out);
    case Encoding::fp8_block: return decode_fp8(job, row, k, count, out);
    case Encoding::mxfp4: return decode_mxfp4(job, row, k, count, out);
  }
}

// One group: its codes go to elements [k, k + count) of the packed row. False where the range is not finite.
static inline bool pack_group(const float* weight, int64_t count, bool symmetric, uint8_t* row, int64_t k,
                              uint16_t* stored_scale, uint32_t* stored_zero) {
  F low_lanes = set(0.0f), high_lanes = set(0.0f);
  F finite = set(0.0f);  // stays 0 until a weight is NaN or infinite, then NaN
  for (int64_t i = 0; i < count; i += kLanes) {
    const F w = load(weight + i);
    low_lanes = min(low_lanes, w);
    high_lanes = max(high_lanes, w);
    finite = fma(w, set(0.0f), finite);
  }
  const float low = lowest(low_lanes), high = highest(high_lanes), width = high - low;
  if (any_nan(finite) || width == kInfinity) return false;

  float scale = symmetric ? std::max(low / -8.0f, high / 7.0f) : width / 15.0f;
  *stored_scale = float_to_bf16(scale > kSmallestScale ? scale : 1.0f);
  scale = bf16_to_float(*stored_scale);
  const float zero = symmetric ? 8.0f : std::min(std::nearbyint(low / -scale), 15.0f);  // low <= 0: never negative
  *stored_zero = static_cast<uint32_t>(zero);
  const F divisor = set(scale), reciprocal = set(1.0f / scale);
  for (int64_t i = 0; i < count; i += kLanes)
    store_codes(row, k + i, quotient(load(weight + i), divisor, reciprocal), zero);
  return true;
}

static inline int64_t pack_words(const PackJob& job, int64_t first, int64_t last, float* buffer) {
  const int64_t groups = job.columns / job.group_size, row_bytes = (job.columns + 7) / 8 * 4;
  // About a thousand floats at a time stay in the first cache between decoding and the two passes over them.
  const int64_t groups_at_once = job.group_size >= 1024 ? 1 : 1024 / job.group_size;
  for (int64_t row = first * kRowsPerWord; row < least(last * kRowsPerWord, job.rows); row++) {
    uint8_t* packed = job.packed + row * row_bytes;
    for (int64_t b = (job.columns + 1) / 2; b < row_bytes; b++) packed[b] = 0;
    for (int64_t group = 0; group < groups; group++) {
      if (group % groups_at_once == 0) {
        const int64_t span = least(groups_at_once, groups - group) * job.group_size;
        decode(job, row, group * job.group_size, span, buffer);
      }
      uint32_t zero = 0;
      const float* weight = buffer + group % groups_at_once * job.group_size;
      uint16_t* scale = job.scale + row * groups + group;
      if (!pack_group(weight, job.group_size, job.symmetric, packed, group * job.group_size, scale, &zero)) return row;
      uint32_t* word = job.zero_point + row / kRowsPerWord * groups + group;
      *word = (row % kRowsPerWord ? *word : 0) | zero << row % kRowsPerWord * 4;
    }
  }
  return -1;
}
