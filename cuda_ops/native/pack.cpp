// The three builds of pack_rows.h and the choice between them.
#include "pack.h"

#include <vector>

#include "simd.h"

namespace dsc {

#define ROWS "pack_rows.h"
#include "builds.h"

static Isa limit = Isa::avx512;

static Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa isa() {
  static const Isa best = best_isa();
  return best < limit ? best : limit;
}

int64_t limit_isa(int64_t level) {
  limit = static_cast<Isa>(level);
  return static_cast<int64_t>(isa());
}

int64_t pack_words(const PackJob& job, int64_t first, int64_t last) {
  std::vector<float> buffer(static_cast<size_t>(job.group_size < 1024 ? 1024 : job.group_size));
#if defined(__x86_64__)
  // A group, and with it every block border inside a row, is a whole number of vectors, or the scalar code takes it.
  const bool whole = job.group_size % 16 == 0 && (job.encoding != Encoding::fp8_block || job.block_columns % 16 == 0);
  if (whole && isa() == Isa::avx512) return avx512::pack_words(job, first, last, buffer.data());
  if (whole && isa() >= Isa::avx2) return avx2::pack_words(job, first, last, buffer.data());
#endif
  return scalar::pack_words(job, first, last, buffer.data());
}

}  // namespace dsc
