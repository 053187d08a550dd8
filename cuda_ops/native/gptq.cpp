// The three builds of gptq_rows.h and the choice between them; rows that fill no vector go to the scalar code.
#include "gptq.h"

#include <vector>

#include "simd.h"

namespace dsc {

#define ROWS "gptq_rows.h"
#include "builds.h"

static constexpr size_t kWidest = 64;  // rows that are in work at once: four vectors of AVX-512

void search_grid(const SearchJob& job, int64_t first, int64_t last) {
  std::vector<float> scratch(static_cast<size_t>(job.size) * kWidest / 4);
#if defined(__x86_64__)
  if (isa() == Isa::avx512) first = avx512::search_grid(job, first, last, scratch.data());
  if (isa() >= Isa::avx2) first = avx2::search_grid(job, first, last, scratch.data());
#endif
  scalar::search_grid(job, first, last, scratch.data());
}

template <typename Job>
static void feed_columns(const Job& job, int64_t first, int64_t last) {
  std::vector<float> scratch(static_cast<size_t>(job.columns) * kWidest);
#if defined(__x86_64__)
  if (isa() == Isa::avx512) first = avx512::work(job, first, last, scratch.data());
  if (isa() >= Isa::avx2) first = avx2::work(job, first, last, scratch.data());
#endif
  scalar::work(job, first, last, scratch.data());
}

void round_columns(const RoundJob& job, int64_t first, int64_t last) { feed_columns(job, first, last); }
void unrounded(const UnroundedJob& job, int64_t first, int64_t last) { feed_columns(job, first, last); }

}  // namespace dsc
