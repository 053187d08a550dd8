// The packing of pack.h on CUDA, sm_80 to sm_120, in the bits of pack_rows.h, where the rule stands: three kernels.
//
//   naive    a thread eight rows, one weight at a time; the obvious one, takes every shape
//   warp     groups of 32, 64, 128 or 256: a warp eight rows of 256 columns, one reading
//   block    groups of any multiple of 8: a block one group of eight rows, read twice, the second time from the cache
//
// Memory bound, so what counts is bytes. The unit of both fast kernels is eight rows by eight columns a thread: a row of
// it is one word of codes (and 16 stored bytes in BF16), so neighbouring threads read and write neighbouring words; eight
// rows share a word of zero points, so no two threads write one word; and eight loads are asked for before the first is
// used. Fewer rows at the lower end of the matrix are read as zeros and not written.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "exact.cuh"
#include "launch.cuh"
#include "pack.h"

namespace dsc {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kCodes = 8;  // in a word
constexpr int kRows = static_cast<int>(kRowsPerWord);
constexpr int kPackWarps = 4;       // of a block of the warp kernel
constexpr int kPackThreads = 128;   // the most that the block kernel has
constexpr float kInf = INFINITY;

__device__ inline float nan() { return __uint_as_float(0x7fc00000u); }

// The fields of a small float moved into those of a float make a value whose exponent is off by the difference of the
// biases; the product with that power of two is exact and gets subnormals right.
__device__ inline float e4m3(unsigned x) {  // bias 7 against 127
  const float value = mul(__uint_as_float((x & 0x7f) << 20 | (x & 0x80) << 24), 0x1p120f);
  return (x & 0x7f) == 0x7f ? nan() : value;
}
__device__ inline float e2m1(unsigned x) {  // bias 1 against 127
  return mul(__uint_as_float((x & 7) << 22 | (x & 8) << 28), 0x1p126f);
}
__device__ inline float e8m0(unsigned x) {  // 2^(x - 127)
  return x == 255 ? nan() : __uint_as_float(x == 0 ? 0x00400000u : x << 23);
}

__device__ inline float block_scale(const PackJob& job, unsigned row, unsigned column) {
  const auto height = static_cast<unsigned>(job.block_rows), width = static_cast<unsigned>(job.block_columns);
  const unsigned blocks = (static_cast<unsigned>(job.columns) + width - 1) / width;
  return __ldg(job.block_scale + (row / height) * static_cast<int64_t>(blocks) + column / width);
}
__device__ inline float exponent_of(const PackJob& job, int64_t row, int64_t column) {
  return e8m0(__ldg(job.exponent + row * (job.columns / kMxfp4Block) + column / kMxfp4Block));
}

// One weight.
template <Encoding kind>
__device__ float weight_at(const PackJob& job, int64_t row, int64_t column) {
  const int64_t at = row * job.columns + column;
  if constexpr (kind == Encoding::float32) return __ldg(static_cast<const float*>(job.weight) + at);
  if constexpr (kind == Encoding::float16) return __half2float(__ldg(static_cast<const __half*>(job.weight) + at));
  if constexpr (kind == Encoding::bfloat16)
    return __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(job.weight) + at));
  if constexpr (kind == Encoding::fp8_block)
    return mul(e4m3(__ldg(static_cast<const uint8_t*>(job.weight) + at)),
               block_scale(job, static_cast<unsigned>(row), static_cast<unsigned>(column)));
  if constexpr (kind == Encoding::mxfp4) {
    const unsigned pair = __ldg(static_cast<const uint8_t*>(job.weight) + at / 2);
    return mul(e2m1(pair >> (column % 2 * 4) & 15), exponent_of(job, row, column));
  }
}

// Eight weights as they are stored.
template <Encoding kind>
struct Stored {
  using Raw = uint4;
};
template <>
struct Stored<Encoding::fp8_block> {
  using Raw = uint2;
};
template <>
struct Stored<Encoding::mxfp4> {
  using Raw = unsigned;
};

template <Encoding kind>
struct Eight {
  typename Stored<kind>::Raw raw, more;  // `more`: the upper four of float32
  float scale;

  // Columns 8 * word on of a row; zeros beyond the last.
  __device__ void load(const PackJob& job, int64_t row, int64_t word, float block) {
    using Raw = typename Stored<kind>::Raw;
    raw = Raw{}, more = Raw{}, scale = block;
    if (row >= job.rows) return;
    const int64_t at = row * (job.columns / kCodes) + word;
    if constexpr (kind == Encoding::float32) {
      raw = __ldg(static_cast<const Raw*>(job.weight) + 2 * at);
      more = __ldg(static_cast<const Raw*>(job.weight) + 2 * at + 1);
    } else {
      raw = __ldg(static_cast<const Raw*>(job.weight) + at);
    }
    if constexpr (kind == Encoding::mxfp4) scale = exponent_of(job, row, word * kCodes);
  }

  __device__ void decode(float (&w)[kCodes]) const {
    if constexpr (kind == Encoding::mxfp4) {
#pragma unroll
      for (int i = 0; i < kCodes; i++) w[i] = mul(e2m1(raw >> 4 * i), scale);
    } else if constexpr (kind == Encoding::fp8_block) {
#pragma unroll
      for (int i = 0; i < kCodes; i++) w[i] = mul(e4m3((i < 4 ? raw.x : raw.y) >> 8 * (i % 4)), scale);
    } else {
      const unsigned words[8] = {raw.x, raw.y, raw.z, raw.w, more.x, more.y, more.z, more.w};
#pragma unroll
      for (int i = 0; i < kCodes; i++) {
        const unsigned own = words[kind == Encoding::float32 ? i : i / 2] >> (kind == Encoding::float32 ? 0 : i % 2 * 16);
        if constexpr (kind == Encoding::float32) w[i] = __uint_as_float(own);
        if constexpr (kind == Encoding::bfloat16) w[i] = __uint_as_float(own << 16);  // the upper half of a float
        if constexpr (kind == Encoding::float16) w[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(own)));
      }
    }
  }
};

// The rows of word `line` of the zero points, columns 8 * word on. All are asked for before one is decoded.
template <Encoding kind>
__device__ void load_rows(const PackJob& job, int64_t line, int64_t word, Eight<kind> (&rows)[kRows]) {
  float block = 1.0f;
  if constexpr (kind == Encoding::fp8_block)  // eight rows and columns are in one block: see `fits`
    block = block_scale(job, static_cast<unsigned>(line * kRows), static_cast<unsigned>(word * kCodes));
#pragma unroll
  for (int r = 0; r < kRows; r++) rows[r].load(job, line * kRows + r, word, block);
}

__device__ inline void refuse(const PackJob& job, int64_t row) {
  // -1 is the greatest number without sign.
  atomicMin(reinterpret_cast<unsigned long long*>(job.bad), static_cast<unsigned long long>(row));
}

// Widens low and high by eight weights of a row. 0 * w is 0 unless w is NaN or infinite.
__device__ inline void widen(const PackJob& job, int64_t row, const float (&w)[kCodes], float& low, float& high) {
  float finite = 0.0f;
#pragma unroll
  for (int i = 0; i < kCodes; i++) low = fminf(low, w[i]), high = fmaxf(high, w[i]), finite = __fmaf_rn(w[i], 0.0f, finite);
  if (finite != 0.0f) refuse(job, row);
}

// Scale and zero point of a group, in one word so that one shuffle moves both: BF16 above, zero below.
__device__ inline unsigned grid_of(const PackJob& job, int64_t row, float low, float high) {
  const float width = sub(high, low);
  if (width == kInf) refuse(job, row);
  float scale = job.symmetric ? fmaxf(__fdiv_rn(low, -8.0f), __fdiv_rn(high, 7.0f)) : __fdiv_rn(width, 15.0f);
  const unsigned stored = __bfloat16_as_ushort(__float2bfloat16_rn(scale > kSmallestScale ? scale : 1.0f));
  scale = __uint_as_float(stored << 16);
  const float zero = job.symmetric ? 8.0f : fminf(whole(__fdiv_rn(low, -scale)), 15.0f);  // low <= 0: never negative
  return stored << 16 | (static_cast<unsigned>(static_cast<int>(zero)) & 15);
}
__device__ inline float scale_in(unsigned grid) { return __uint_as_float(grid & 0xffff0000u); }
__device__ inline void store_scale(const PackJob& job, int64_t row, int64_t group, unsigned grid) {
  if (row < job.rows) __stcs(job.scale + row * (job.columns / job.group_size) + group, static_cast<uint16_t>(grid >> 16));
}

// Bits of the code of w: round(w / scale) + zero is never negative (see simd.h), and above 15 by rounding alone.
__device__ inline unsigned code_of(float w, unsigned grid, float scale, float reciprocal) {
  const unsigned shifted = __float_as_uint(add(quotient(w, scale, reciprocal), kWhole));
  return static_cast<unsigned>(min(static_cast<int>(shifted - __float_as_uint(kWhole) + (grid & 15)), 15));
}
__device__ inline unsigned codes_of(const float (&w)[kCodes], unsigned grid) {
  const float scale = scale_in(grid), reciprocal = __frcp_rn(scale);
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < kCodes; i++) word |= code_of(w[i], grid, scale, reciprocal) << 4 * i;
  return word;
}
__device__ inline void store_codes(const PackJob& job, int64_t row, int64_t word, unsigned codes) {
  const int64_t words = (job.columns + kCodes - 1) / kCodes;
  if (row < job.rows) __stcs(reinterpret_cast<unsigned*>(job.packed) + row * words + word, codes);
}
__device__ inline void store_zeros(const PackJob& job, int64_t line, int64_t group, const unsigned (&grid)[kRows]) {
  unsigned zeros = 0;
#pragma unroll
  for (int r = 0; r < kRows; r++)
    if (line * kRows + r < job.rows) zeros |= (grid[r] & 15) << 4 * r;
  __stcs(job.zero_point + line * (job.columns / job.group_size) + group, zeros);
}

template <Encoding kind>
__global__ void naive_pack_kernel(const PackJob job) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, first = line * kRows;
  const int64_t groups = job.columns / job.group_size;
  for (int64_t row = first; row < first + kRows && row < job.rows; row++) {
    unsigned word = 0;
    for (int64_t g = 0; g < groups; g++) {
      float low = 0.0f, high = 0.0f;
      for (int64_t c = g * job.group_size; c < (g + 1) * job.group_size; c++) {
        const float w = weight_at<kind>(job, row, c);
        if (mul(w, 0.0f) != 0.0f) refuse(job, row);
        low = fminf(low, w), high = fmaxf(high, w);
      }
      const unsigned grid = grid_of(job, row, low, high);
      const float scale = scale_in(grid), reciprocal = __frcp_rn(scale);
      store_scale(job, row, g, grid);
      uint32_t* zeros = job.zero_point + line * groups + g;
      __stcs(zeros, static_cast<uint32_t>((row > first ? __ldcg(zeros) : 0) | (grid & 15) << (row - first) * 4));
      for (int64_t c = g * job.group_size; c < (g + 1) * job.group_size; c++) {
        word |= code_of(weight_at<kind>(job, row, c), grid, scale, reciprocal) << c % kCodes * 4;
        if (c % kCodes == kCodes - 1 || c == job.columns - 1) {
          store_codes(job, row, c / kCodes, word);
          word = 0;
        }
      }
    }
  }
}

struct Least {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Greatest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of eight rows, x[r] in each of L lanes: combined over the lanes, the row (or rows) that a lane is left with, from
// lane % L * 8 / L on. At each step two lanes that still have the same rows share them out, so that a row is combined
// with one shuffle less at each step: seven, not eight times log2 L, and each range is then fitted in one lane, not in all.
template <int L, typename Op>
__device__ void share_out(float (&x)[kRows], Op op) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  int rows = kRows;
#pragma unroll
  for (int step = L / 2; step; step /= 2) {
    if (rows == 1) {
      x[0] = op(x[0], __shfl_xor_sync(kAllLanes, x[0], step));
      continue;
    }
    rows /= 2;
    const bool upper = lane & step;
#pragma unroll
    for (int r = 0; r < kRows / 2; r++) {
      if (r >= rows) continue;
      const float kept = upper ? x[r + rows] : x[r], given = upper ? x[r] : x[r + rows];
      x[r] = op(kept, __shfl_xor_sync(kAllLanes, given, step));
    }
  }
}

template <Encoding kind, int L>
__global__ void __launch_bounds__(kLanes* kPackWarps, 5) warp_pack_kernel(const PackJob job) {
  constexpr int kLeft = L < kRows ? kRows / L : 1;  // rows a lane fits
  const auto words = static_cast<unsigned>(job.columns / kCodes), pieces = (words + kLanes - 1) / kLanes;
  const unsigned index = blockIdx.x * kPackWarps + threadIdx.y;
  const int64_t line = index / pieces;
  if (line * kRows >= job.rows) return;  // the whole warp
  const int lane = static_cast<int>(threadIdx.x), within = lane % L;
  const int64_t word = index % pieces * kLanes + lane, group = word / L;
  const bool inside = word < words;

  Eight<kind> rows[kRows];
  float w[kRows][kCodes], low[kRows], high[kRows];
  load_rows(job, line, inside ? word : words - 1, rows);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    low[r] = high[r] = 0.0f;
    rows[r].decode(w[r]);
    widen(job, line * kRows + r, w[r], low[r], high[r]);
  }
  share_out<L>(low, Least());
  share_out<L>(high, Greatest());

  unsigned own[kLeft], grid[kRows];
#pragma unroll
  for (int r = 0; r < kLeft; r++) {
    const int64_t row = line * kRows + within * kRows / L + r;
    own[r] = grid_of(job, row, low[r], high[r]);
    if (inside && within % (L / kRows > 1 ? L / kRows : 1) == 0) store_scale(job, row, group, own[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) grid[r] = __shfl_sync(kAllLanes, own[r % kLeft], lane - within + r * L / kRows);
  if (!inside) return;
#pragma unroll
  for (int r = 0; r < kRows; r++) store_codes(job, line * kRows + r, word, codes_of(w[r], grid[r]));
  if (within == 0) store_zeros(job, line, group, grid);
}

template <Encoding kind>
__global__ void __launch_bounds__(kPackThreads, 3) block_pack_kernel(const PackJob job) {
  __shared__ float lows[kPackThreads / kLanes][kRows], highs[kPackThreads / kLanes][kRows];
  __shared__ unsigned grids[kRows];
  const auto groups = static_cast<unsigned>(job.columns / job.group_size);
  const auto words = static_cast<int>(job.group_size / kCodes), threads = static_cast<int>(blockDim.x);
  const int64_t line = blockIdx.x / groups, group = blockIdx.x % groups, first = group * words;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;

  Eight<kind> rows[kRows];
  float w[kCodes], low[kRows], high[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) low[r] = high[r] = 0.0f;
#pragma unroll 1
  for (int i = thread; i < words; i += threads) {
    load_rows(job, line, first + i, rows);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      rows[r].decode(w);
      widen(job, line * kRows + r, w, low[r], high[r]);
    }
  }
  share_out<kLanes>(low, Least());
  share_out<kLanes>(high, Greatest());
  if (lane % (kLanes / kRows) == 0) lows[warp][lane * kRows / kLanes] = low[0], highs[warp][lane * kRows / kLanes] = high[0];
  __syncthreads();
  if (thread < kRows) {
    for (int i = 0; i < threads / kLanes; i++) low[1] = fminf(i ? low[1] : 0.0f, lows[i][thread]);
    for (int i = 0; i < threads / kLanes; i++) high[1] = fmaxf(i ? high[1] : 0.0f, highs[i][thread]);
    grids[thread] = grid_of(job, line * kRows + thread, low[1], high[1]);
    store_scale(job, line * kRows + thread, group, grids[thread]);
  }
  __syncthreads();
  unsigned grid[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) grid[r] = grids[r];
  if (thread == 0) store_zeros(job, line, group, grid);
#pragma unroll 1
  for (int i = thread; i < words; i += threads) {
    load_rows(job, line, first + i, rows);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      rows[r].decode(w);
      store_codes(job, line * kRows + r, first + i, codes_of(w, grid[r]));
    }
  }
}

enum class PackKernel : int32_t { automatic = 0, naive = 1, warp = 2, block = 3 };

// Whether the fast kernels can take the job: whole words, of one block of scales each, where vectors can be read.
inline bool fits(const PackJob& job) {
  const bool blocks = job.encoding != Encoding::fp8_block ||
                      (job.block_rows % kRows == 0 && job.block_columns % kCodes == 0);
  return job.group_size % kCodes == 0 && blocks && reinterpret_cast<uintptr_t>(job.weight) % 16 == 0;
}

template <Encoding kind, typename Stream>
int launch_encoding(const PackJob& job, PackKernel kernel, [[maybe_unused]] Stream stream) {
  const auto lines = static_cast<unsigned>((job.rows + kRows - 1) / kRows);
  const auto pieces = static_cast<unsigned>((job.columns / kCodes + kLanes - 1) / kLanes);
  const int64_t size = job.group_size;
  const bool small = size == 32 || size == 64 || size == 128 || size == 256;
  if (kernel == PackKernel::automatic)
    kernel = !fits(job) ? PackKernel::naive : small ? PackKernel::warp : PackKernel::block;
  if (kernel != PackKernel::naive && (!fits(job) || (kernel == PackKernel::warp && !small))) return 1;
  if (kernel == PackKernel::naive) {
    DSC_LAUNCH((naive_pack_kernel<kind>), dim3((lines + 63) / 64), dim3(64), stream, job);
  } else if (kernel == PackKernel::block) {
    const auto threads = static_cast<unsigned>((size / kCodes + kLanes - 1) / kLanes * kLanes);
    const dim3 grid(lines * static_cast<unsigned>(job.columns / size)), block(threads < kPackThreads ? threads : kPackThreads);
    DSC_LAUNCH((block_pack_kernel<kind>), grid, block, stream, job);
  } else {
    const dim3 grid((lines * pieces + kPackWarps - 1) / kPackWarps), block(kLanes, kPackWarps);
    if (size == 32) DSC_LAUNCH((warp_pack_kernel<kind, 4>), grid, block, stream, job);
    if (size == 64) DSC_LAUNCH((warp_pack_kernel<kind, 8>), grid, block, stream, job);
    if (size == 128) DSC_LAUNCH((warp_pack_kernel<kind, 16>), grid, block, stream, job);
    if (size == 256) DSC_LAUNCH((warp_pack_kernel<kind, 32>), grid, block, stream, job);
  }
  return 0;
}

template <typename Stream>
int launch_pack(const PackJob& job, PackKernel kernel, Stream stream) {
  if (job.rows == 0 || job.columns == 0) return 0;
  switch (job.encoding) {
    case Encoding::float32: return launch_encoding<Encoding::float32>(job, kernel, stream);
    case Encoding::float16: return launch_encoding<Encoding::float16>(job, kernel, stream);
    case Encoding::bfloat16: return launch_encoding<Encoding::bfloat16>(job, kernel, stream);
    case Encoding::fp8_block: return launch_encoding<Encoding::fp8_block>(job, kernel, stream);
    case Encoding::mxfp4: return launch_encoding<Encoding::mxfp4>(job, kernel, stream);
  }
  return 1;
}

}  // namespace
}  // namespace dsc

DSC_ENTRY(pack, dsc::PackJob, dsc::PackKernel, dsc::launch_pack)
