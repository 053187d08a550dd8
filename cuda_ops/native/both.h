// DSC_BOTH marks what host and device code share, in headers that any compiler reads.
#pragma once

#if defined(__CUDACC__) || defined(DSC_EMULATED)
#define DSC_BOTH __host__ __device__
#else
#define DSC_BOTH
#endif
