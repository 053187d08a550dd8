// Softmax of a row on the CPU in two or three passes over memory that fits the second-level cache:
//
//   1. the largest logit; with scales or a mask the scaled logits are kept as floats in `buffer`
//   2. e = 2^(l log2 e - largest log2 e), summed; uint8 codes leave here, for they need no sum
//   3. e / sum in the output type
//
// The rounding of `largest log2 e` is the same for all of a row and goes out with the sum.
// Included once for each set of instructions; see simd.h.

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLog2Of255 = 0x1.ffa37cp+2f;

// The last `count` < kLanes numbers of a row, -infinity in the other lanes.
template <typename T>
static inline F load_tail(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return first(load(lanes), static_cast<int>(count));
}

template <typename T>
static inline void store_tail(T* p, F x, int64_t count) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

template <typename In>
static inline float largest_of(const In* x, int64_t count) {
  F best[4] = {set(-kInfinity), set(-kInfinity), set(-kInfinity), set(-kInfinity)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) best[j] = max(best[j], load(x + i + j * kLanes));
  for (; i + kLanes <= count; i += kLanes) best[0] = max(best[0], load(x + i));
  if (i < count) best[1] = max(best[1], load_tail(x + i, count - i));
  return highest(max(max(best[0], best[1]), max(best[2], best[3])));
}

// Logits times `scale`, column scales and mask, into `buffer`: a whole number of vectors, filled up with -infinity.
template <typename In, bool kColumns, bool kKeep>
static inline float scaled_logits(const In* x, float scale, const float* column_scale, const uint8_t* keep,
                                  int64_t count, float* buffer) {
  const F by = set(scale);
  F best[4] = {set(-kInfinity), set(-kInfinity), set(-kInfinity), set(-kInfinity)};  // for the latency of the maximum
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; j++) {
      const int64_t k = i + j * kLanes;
      F l = mul(load(x + k), by);
      if constexpr (kColumns) l = mul(l, load(column_scale + k));
      if constexpr (kKeep) l = load_keep(keep + k, l);
      store(buffer + k, l);
      best[j] = max(best[j], l);
    }
  }
  for (; i < count; i += kLanes) {
    const int64_t rest = count - i < kLanes ? count - i : kLanes;
    F l = mul(load_tail(x + i, rest), by);
    if constexpr (kColumns) l = mul(l, load_tail(column_scale + i, rest));
    if constexpr (kKeep) {
      uint8_t lanes[kLanes] = {};
      std::memcpy(lanes, keep + i, static_cast<size_t>(rest));
      l = load_keep(lanes, l);
    }
    l = first(l, static_cast<int>(rest));
    store(buffer + i, l);
    best[0] = max(best[0], l);
  }
  return highest(max(max(best[0], best[1]), max(best[2], best[3])));
}

template <typename In>
static inline float scaled_logits(const In* x, float scale, const float* column_scale, const uint8_t* keep,
                                  int64_t count, float* buffer) {
  if (column_scale && keep) return scaled_logits<In, true, true>(x, scale, column_scale, keep, count, buffer);
  if (column_scale) return scaled_logits<In, true, false>(x, scale, column_scale, keep, count, buffer);
  if (keep) return scaled_logits<In, false, true>(x, scale, column_scale, keep, count, buffer);
  return scaled_logits<In, false, false>(x, scale, column_scale, keep, count, buffer);
}

// x - largest into `buffer`, which may be x itself.
template <typename T>
static inline void subtract(const T* x, int64_t count, float largest, float* buffer) {
  const F minus = set(-largest);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = count - i;
    store(buffer + i, add(rest < kLanes ? load_tail(x + i, rest) : load(x + i), minus));
  }
}

// What is touched after the exponentials of a row, fetched while they are computed: its output, and the next row.
struct Ahead {
  const uint8_t *next, *out;
  int64_t next_size, out_size;  // bytes of a number

  void fetch(int64_t i, int64_t count) const {
    for (int64_t b = i * next_size; b < (i + count) * next_size; b += 64) __builtin_prefetch(next + b, 0);
    for (int64_t b = i * out_size; b < (i + count) * out_size; b += 64) __builtin_prefetch(out + b, 1);
  }
};

// e = 2^(x log2 e - offset): with kCodes rounded to whole numbers into `codes`, else into `buffer`. Returns the sum of
// e, added up in blocks: its error grows with the length of a block plus their number, not with the product.
template <typename T, bool kFine, bool kCodes>
static inline float exponentials(const T* x, int64_t count, float offset, Ahead ahead, float* buffer, uint8_t* codes) {
  constexpr int64_t kBlock = 16 * kLanes;
  const F by = set(kLog2E), minus = set(-offset);
  F sum = set(0.0f);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = start + kBlock < count ? start + kBlock : count;
    ahead.fetch(start, end - start);
    F part = set(0.0f);
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      const F e = exp2_of<kFine>(fma(load(x + i), by, minus));
      part = add(part, e);
      if constexpr (kCodes) store(codes + i, e);
      else store(buffer + i, e);
    }
    if (i < end) {
      const F e = exp2_of<kFine>(fma(load_tail(x + i, end - i), by, minus));
      part = add(part, e);
      if constexpr (kCodes) store_tail(codes + i, e, end - i);
      else store(buffer + i, e);
    }
    sum = add(sum, part);
  }
  return total(sum);
}

template <typename Out>
static inline void write_out(const float* e, int64_t count, float factor, Out* out) {
  const F by = set(factor);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(load(e + i), by));
  if (i < count) store_tail(out + i, mul(load(e + i), by), count - i);
}

// A row on its way through the passes.
template <typename In>
struct Row {
  int64_t number, count;  // of its columns, those that can take part
  const In* x;            // their logits
  float* buffer;          // holds the logits once they are scaled, then the exponentials
  bool scaled;
  uint8_t* out;           // typed by job.out_type
  float largest, sum;
};

static inline int64_t out_size(const SoftmaxJob& job) {  // bytes of a number
  return job.out_type == Type::uint8 ? 1 : job.out_type == Type::float32 ? 4 : 2;
}

template <typename In>
static inline void find_largest(const SoftmaxJob& job, int64_t number, float* buffer, Row<In>& row) {
  const int64_t begin = job.begin_of(number), size = out_size(job);
  row.number = number, row.count = job.end_of(number) - begin, row.buffer = buffer;
  row.x = static_cast<const In*>(job.logits) + number * job.columns + begin;
  row.out = static_cast<uint8_t*>(job.out) + number * job.columns * size;
  if (row.count < job.columns) std::memset(row.out, 0, static_cast<size_t>(job.columns * size));
  row.out += begin * size;

  const float* column_scale = job.columns_of(number);
  const uint8_t* keep = job.keep_of(number);
  row.scaled = job.row_scale || column_scale || keep;
  if (!row.scaled) {
    row.largest = largest_of(row.x, row.count);
  } else {
    const float scale = job.row_scale ? job.row_scale[number] : 1.0f;
    row.largest = scaled_logits(row.x, scale, column_scale ? column_scale + begin : nullptr,
                                keep ? keep + begin : nullptr, row.count, buffer);
  }
  if (row.largest == -kInfinity) row.largest = 0.0f;  // nothing visible: every e is 0, or NaN stays NaN
  const bool far = std::fabs(row.largest * kLog2E) == kInfinity && std::fabs(row.largest) < kInfinity;
  if (far) {  // within a third of the end of float32
    if (row.scaled) subtract(buffer, row.count, row.largest, buffer);
    else subtract(row.x, row.count, row.largest, buffer);
    row.scaled = true, row.largest = 0.0f;
  }
}

template <typename T>
static inline float sum_exponentials(const SoftmaxJob& job, const T* x, int64_t count, float largest, Ahead ahead,
                                     float* buffer, uint8_t* out) {
  const float offset = largest * kLog2E;
  if (job.out_type == Type::uint8)
    return exponentials<T, false, true>(x, count, offset - kLog2Of255, ahead, nullptr, out);
  if (job.out_type == Type::float32) return exponentials<T, true, false>(x, count, offset, ahead, buffer, nullptr);
  return exponentials<T, false, false>(x, count, offset, ahead, buffer, nullptr);
}

template <typename In>
static inline void find_sum(const SoftmaxJob& job, int64_t rows_ahead, Row<In>& row) {
  const auto* next = reinterpret_cast<const uint8_t*>(row.x + rows_ahead * job.columns);
  const Ahead ahead{next, row.out, sizeof(In), out_size(job)};
  const float* logits = row.buffer;
  row.sum = row.scaled ? sum_exponentials(job, logits, row.count, row.largest, ahead, row.buffer, row.out)
                       : sum_exponentials(job, row.x, row.count, row.largest, ahead, row.buffer, row.out);
}

template <typename In>
static inline void finish(const SoftmaxJob& job, const Row<In>& row) {
  const float factor = row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
  if (job.out_type == Type::uint8) job.out_scale[row.number] = factor;
  else if (job.out_type == Type::float16) write_out(row.buffer, row.count, factor, reinterpret_cast<Half*>(row.out));
  else if (job.out_type == Type::bfloat16) write_out(row.buffer, row.count, factor, reinterpret_cast<Bf16*>(row.out));
  else write_out(row.buffer, row.count, factor, reinterpret_cast<float*>(row.out));
}

// Short rows go through each pass a few at a time: the last steps of a maximum or a sum wait for one another, and the
// processor fills that time with the next row.
template <typename In>
static inline void softmax_rows_of(const SoftmaxJob& job, int64_t first, int64_t last, float* buffer) {
  Row<In> rows[kRowsTogether];
  const int64_t together = rows_together(job.columns), stride = buffer_columns(job.columns);
  for (int64_t start = first; start < last; start += together) {
    const int64_t count = last - start < together ? last - start : together;
    for (int64_t r = 0; r < count; r++) find_largest(job, start + r, buffer + r * stride, rows[r]);
    for (int64_t r = 0; r < count; r++) find_sum(job, together, rows[r]);
    for (int64_t r = 0; r < count; r++) finish(job, rows[r]);
  }
}

static inline void softmax_rows(const SoftmaxJob& job, int64_t first, int64_t last, float* buffer) {
  if (job.in == Type::int32) softmax_rows_of<int32_t>(job, first, last, buffer);
  else if (job.in == Type::float16) softmax_rows_of<Half>(job, first, last, buffer);
  else if (job.in == Type::bfloat16) softmax_rows_of<Bf16>(job, first, last, buffer);
  else softmax_rows_of<float>(job, first, last, buffer);
}
