// The three builds of softmax_rows.h and the choice between them.
#include "softmax.h"

#include <vector>

#include "simd.h"

namespace dsc {

#define ROWS "softmax_rows.h"
#include "builds.h"

void softmax_rows(const SoftmaxJob& job, int64_t first, int64_t last) {
  thread_local std::vector<float> buffer;  // kept: pages fresh from the system cost more than a row
  // The last vector may be partly filled.
  buffer.resize(std::max(buffer.size(), static_cast<size_t>(job.columns) + 16));
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
