// The three builds of softmax_rows.h and the choice between them.
#include "softmax.h"

#include <vector>

#include "simd.h"

namespace dsc {

constexpr int64_t kRowsTogether = 8;

// Rows whose floats stay in the first cache between the passes.
static int64_t rows_together(int64_t columns) { return std::clamp<int64_t>(2048 / columns, 1, kRowsTogether); }

// Floats a row takes in the buffer: its last vector may be partly filled.
static int64_t buffer_columns(int64_t columns) { return (columns + 31) / 16 * 16; }

#define ROWS "softmax_rows.h"
#include "builds.h"

void softmax_rows(const SoftmaxJob& job, int64_t first, int64_t last) {
  thread_local std::vector<float> buffer;  // kept: pages fresh from the system cost more than a row
  const int64_t floats = rows_together(job.columns) * buffer_columns(job.columns);
  buffer.resize(std::max(buffer.size(), static_cast<size_t>(floats)));
#if defined(__x86_64__)
  if (isa() == Isa::avx512) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // subnormal floats count as 0: they trap into microcode
    avx512::softmax_rows(job, first, last, buffer.data());
    _mm_setcsr(before);
    return;
  }
  if (isa() == Isa::avx2) return avx2::softmax_rows(job, first, last, buffer.data());
#endif
  scalar::softmax_rows(job, first, last, buffer.data());
}

}  // namespace dsc
