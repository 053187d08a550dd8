// The three builds of a kernel, in the namespaces scalar, avx2 and avx512. Inside namespace dsc, define ROWS as the
// file that states the kernel (see simd.h), then include this; `isa()` says which of them the machine can run.
namespace scalar {
#include "simd_scalar.h"
//
#include ROWS
}  // namespace scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "simd_avx2.h"
//
#include ROWS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
namespace avx512 {
#include "simd_avx512.h"
//
#include ROWS
}  // namespace avx512
#pragma GCC pop_options
#endif
#undef ROWS
