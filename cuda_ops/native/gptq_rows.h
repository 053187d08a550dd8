// Both kernels do the arithmetic of the torch code in numerics/grid.py and numerics/gptq.py operation by operation, in
// float32 and in the same order, without fused multiply-add, and so give the same bits.
//
//   low = min(0, w...)   high = max(0, w...), each times a shrink
//   scale = (high - low) / top, symmetric max(low / -middle, high / (top - middle)); 1 where not above 1e-30; to BF16
//   zero  = clamp(round(-low / scale), 0, top), symmetric middle
//   value = clamp(round(w / scale), -zero, top - zero)
//   error = scale^2 * sum of importance * (value - w / scale)^2; column k goes to sum k % 8, the eight are added as
//           ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
//
// The least error wins, the first among equals; then the least-squares scale of the winner's codes, if it is better.
// Included once for each set of instructions; see simd.h.

static inline F to_stored(F scale) {
  Bf16 words[kLanes];
  store(words, select_less(set(kSmallestRange), scale, scale, set(1.0f)));
  return load(words);
}

static inline F to_value(F scaled, F low, F high) { return min(max(round_even(scaled), low), high); }

struct Range {
  F scale, zero;
};

static inline Range fit(const SearchJob& job, F low, F high) {
  const float top = static_cast<float>((1 << job.num_bits) - 1), middle = static_cast<float>(1 << (job.num_bits - 1));
  low = min(low, set(0.0f)), high = max(high, set(0.0f));
  Range range;
  if (job.symmetric) {
    range.scale = max(divide(low, set(-middle)), divide(high, set(top - middle)));
  } else {
    range.scale = divide(sub(high, low), set(top));
  }
  range.scale = to_stored(range.scale);
  range.zero = set(middle);
  if (!job.symmetric) {
    const F zero = round_even(divide(low, sub(set(0.0f), range.scale)));
    range.zero = min(max(zero, set(0.0f)), set(top));
  }
  return range;
}

static inline F total_of(const F* sums) {
  const F even = add(add(sums[0], sums[4]), add(sums[2], sums[6]));
  return add(even, add(add(sums[1], sums[5]), add(sums[3], sums[7])));
}

struct Limits {
  F reciprocal, low, high;
};

static inline Limits limits_of(const Range& range, float top) {
  return {divide(set(1.0f), range.scale), sub(set(0.0f), range.zero), sub(set(top), range.zero)};
}

// importance * (value - w / scale)^2
static inline F squared_off(const float* weight, const float* importance, const Range& range, const Limits& limits) {
  const F scaled = quotient(load(weight), range.scale, limits.reciprocal);
  const F off = sub(to_value(scaled, limits.low, limits.high), scaled);
  const F squared = mul(off, off);
  return importance ? mul(squared, set(*importance)) : squared;
}

// `group` (size, kLanes)
static inline F error_of(const SearchJob& job, const float* group, const float* importance, float top,
                         const Range& range) {
  const Limits limits = limits_of(range, top);
  F sums[8];
  for (F& sum : sums) sum = set(0.0f);
  int64_t k = 0;
  for (; k + 8 <= job.size; k += 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const float* share = importance ? importance + k + i : nullptr;
      sums[i] = add(sums[i], squared_off(group + (k + i) * kLanes, share, range, limits));
    }
  }
  for (int i = 0; k < job.size; k++, i++) {
    const float* share = importance ? importance + k : nullptr;
    sums[i] = add(sums[i], squared_off(group + k * kLanes, share, range, limits));
  }
  return mul(total_of(sums), mul(range.scale, range.scale));
}

// The least-squares scale for the codes that `range` gives.
static inline Range refit(const SearchJob& job, const float* group, const float* importance, float top,
                          const Range& range) {
  const Limits limits = limits_of(range, top);
  F above[8], below[8];
  for (int i = 0; i < 8; i++) above[i] = below[i] = set(0.0f);
  for (int64_t k = 0; k < job.size; k++) {
    const F weight = load(group + k * kLanes);
    const F code = to_value(quotient(weight, range.scale, limits.reciprocal), limits.low, limits.high);
    const F weighted = importance ? mul(code, set(importance[k])) : code;
    above[k % 8] = add(above[k % 8], mul(weighted, weight));
    below[k % 8] = add(below[k % 8], mul(weighted, code));
  }
  const F scale = divide(total_of(above), max(total_of(below), set(kSmallestRange)));
  return {to_stored(select_less(set(kSmallestRange), scale, scale, range.scale)), range.zero};
}

static inline void search_rows(const SearchJob& job, const float* group, const float* importance, float* scale,
                               float* zero_point) {
  const float top = static_cast<float>((1 << job.num_bits) - 1);
  F low = load(group), high = low;
  for (int64_t k = 1; k < job.size; k++) {
    const F weight = load(group + k * kLanes);
    low = min(low, weight), high = max(high, weight);
  }
  Range best = fit(job, low, high);
  F lowest = error_of(job, group, importance, top, best);
  for (int64_t step = 1; step <= job.steps; step++) {
    const F shrink = set(job.shrink[step < job.steps ? step : 0]);
    const Range other = step < job.steps ? fit(job, mul(low, shrink), mul(high, shrink))
                                         : refit(job, group, importance, top, best);
    const F found = error_of(job, group, importance, top, other);
    best.scale = select_less(found, lowest, other.scale, best.scale);
    best.zero = select_less(found, lowest, other.zero, best.zero);
    lowest = select_less(found, lowest, found, lowest);
  }
  store(scale, best.scale);
  store(zero_point, best.zero);
}

// Whole vectors of rows from `first` on; returns the first row that is left. `scratch` holds size * kLanes floats.
static inline int64_t search_grid(const SearchJob& job, int64_t first, int64_t last, float* scratch) {
  for (int64_t g = 0; g < job.count; g++) {
    for (int64_t row = first; row + kLanes <= last; row += kLanes) {
      const float* group = job.groups + g * job.size * job.rows + row;
      for (int64_t k = 0; k < job.size; k++) store(scratch + k * kLanes, load(group + k * job.rows));
      const float* importance = job.importance ? job.importance + g * job.size : nullptr;
      const int64_t at = g * job.rows + row;
      search_rows(job, scratch, importance, job.scale + at, job.zero_point + at);
    }
  }
  return first + (last - first) / kLanes * kLanes;
}

// kVectors vectors of rows of column j after the feedback of the columns before it in this block, one product and one
// sum each and in their order; `scratch` (columns, kVectors * kLanes) keeps what those missed.
template <int kVectors>
static inline void feed(const FeedJob& job, int64_t row, int64_t j, const float* scratch, F* updated) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) updated[v] = load(job.base + j * job.rows + row + v * kLanes);
  for (int64_t i = 0; i < j; i++) {
    const F share = set(job.feedback[j * job.columns + i]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++)
      updated[v] = add(updated[v], mul(share, load(scratch + (i * kVectors + v) * kLanes)));
  }
}

// Column by column to the nearest value of its grid.
template <int kVectors>
static inline void work_rows(const RoundJob& job, int64_t row, float* scratch) {
  for (int64_t j = 0; j < job.columns; j++) {
    F updated[kVectors];
    feed<kVectors>(job, row, j, scratch, updated);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const int64_t at = j * job.rows + row + v * kLanes, grid = job.group[j] * job.rows + row + v * kLanes;
      const F scale = load(job.scale + grid), zero = load(job.zero_point + grid);
      const F scaled = quotient(updated[v], scale, divide(set(1.0f), scale));
      F code = to_value(scaled, sub(set(0.0f), zero), sub(set(job.top), zero));
      if (job.fixed) code = zero_where(job.fixed + at, code);
      const F residual = sub(load(job.target + at), mul(code, scale));
      store(job.codes + at, add(code, zero));
      store(job.residual + at, residual);
      store(scratch + (j * kVectors + v) * kLanes, residual);
    }
  }
}

template <int kVectors>
static inline void work_rows(const UnroundedJob& job, int64_t row, float* scratch) {
  for (int64_t j = 0; j < job.columns; j++) {
    F updated[kVectors];
    feed<kVectors>(job, row, j, scratch, updated);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const int64_t at = j * job.rows + row + v * kLanes;
      store(job.values + at, updated[v]);
      store(scratch + (j * kVectors + v) * kLanes, sub(load(job.target + at), updated[v]));
    }
  }
}

// Whole vectors of rows from `first` on; returns the first row that is left. `scratch` holds columns * 4 * kLanes.
template <typename Job>
static inline int64_t work(const Job& job, int64_t first, int64_t last, float* scratch) {
  for (; first + 4 * kLanes <= last; first += 4 * kLanes) work_rows<4>(job, first, scratch);
  for (; first + kLanes <= last; first += kLanes) work_rows<1>(job, first, scratch);
  return first;
}
