// The loops of gptq.h on CUDA, sm_80 to sm_120, in the bits of gptq_rows.h, where the rule stands. A thread has one row,
// so neighbouring threads read and write neighbouring numbers, nothing is reduced across threads, and the order of every
// sum is that of the reference. Two kernels for each loop:
//
//   naive    everything read from and written to global memory; the obvious one, takes every shape
//   tile     search: the groups of 64 rows in shared memory, read from there for every range that is tried
//            rounding: sixteen columns at a time in registers, what earlier columns missed in shared memory
//
// Bound by arithmetic: the search takes about twelve instructions for each weight and range, the rounding a product and
// a sum, two roundings, for each pair of columns.
#include <cuda_bf16.h>

#include "exact.cuh"
#include "gptq.h"
#include "launch.cuh"

namespace dsc {
namespace {

constexpr int kThreads = 64;      // rows of a block
constexpr int kSearchSize = 128;  // the longest group that the tile holds
constexpr int kSums = 8;          // see gptq_rows.h

// Where the search finds weight k of a row and its importance. Both read zeros and ones behind the end of the group, to a
// whole eight: they change no sum.
struct InMemory {
  const float* weights;
  const float* shares;
  int64_t step;
  int size;
  __device__ float weight(int k) const { return k < size ? __ldg(weights + k * step) : 0.0f; }
  __device__ float share(int k) const { return shares && k < size ? __ldg(shares + k) : 1.0f; }
};
struct InTile {
  const float (*weights)[kThreads];
  const float* shares;
  int row, size;
  __device__ float weight(int k) const { return weights[k][row]; }
  __device__ float share(int k) const { return shares[k]; }
};

struct Range {
  float scale, zero;
};

__device__ inline float stored(float scale) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(scale))) << 16);
}

__device__ inline Range fit(const SearchJob& job, float top, float low, float high) {
  const float middle = 0.5f * (top + 1.0f);
  low = least(low, 0.0f), high = greatest(high, 0.0f);
  const float scale = job.symmetric ? greatest(__fdiv_rn(low, -middle), __fdiv_rn(high, sub(top, middle)))
                                    : __fdiv_rn(sub(high, low), top);
  Range range{stored(scale > kSmallestRange ? scale : 1.0f), middle};
  if (!job.symmetric) range.zero = least(greatest(rintf(__fdiv_rn(low, -range.scale)), 0.0f), top);
  return range;
}

__device__ inline float total_of(const float (&sums)[kSums]) {
  const float even = add(add(sums[0], sums[4]), add(sums[2], sums[6]));
  return add(even, add(add(sums[1], sums[5]), add(sums[3], sums[7])));
}

template <typename Group>
__device__ float error_of(const Group& group, const Range& range, float top) {
  const float reciprocal = __frcp_rn(range.scale), low = -range.zero, high = sub(top, range.zero);
  float sums[kSums] = {};
#pragma unroll 1
  for (int k = 0; k < group.size; k += kSums) {
#pragma unroll
    for (int i = 0; i < kSums; i++) {
      const float scaled = quotient(group.weight(k + i), range.scale, reciprocal);
      const float off = sub(fminf(fmaxf(whole(scaled), low), high), scaled);
      sums[i] = add(sums[i], mul(mul(off, off), group.share(k + i)));
    }
  }
  return mul(total_of(sums), mul(range.scale, range.scale));
}

// The least-squares scale for the codes that `range` gives.
template <typename Group>
__device__ Range refit(const Group& group, const Range& range, float top) {
  const float reciprocal = __frcp_rn(range.scale), low = -range.zero, high = sub(top, range.zero);
  float above[kSums] = {}, below[kSums] = {};
#pragma unroll 1
  for (int k = 0; k < group.size; k += kSums) {
#pragma unroll
    for (int i = 0; i < kSums; i++) {
      const float weight = group.weight(k + i);
      const float code = fminf(fmaxf(whole(quotient(weight, range.scale, reciprocal)), low), high);
      const float weighted = mul(code, group.share(k + i));
      above[i] = add(above[i], mul(weighted, weight)), below[i] = add(below[i], mul(weighted, code));
    }
  }
  const float scale = __fdiv_rn(total_of(above), fmaxf(total_of(below), kSmallestRange));
  return {stored(scale > kSmallestRange ? scale : range.scale), range.zero};
}

template <typename Group>
__device__ Range search(const SearchJob& job, const Group& group) {
  const float top = static_cast<float>((1 << job.num_bits) - 1);
  float low = group.weight(0), high = low;
  for (int k = 1; k < group.size; k++) low = least(low, group.weight(k)), high = greatest(high, group.weight(k));
  Range best = fit(job, top, low, high);
  float lowest = error_of(group, best, top);
  const int steps = static_cast<int>(job.steps);
#pragma unroll 1
  for (int step = 1; step <= steps; step++) {
    const float shrink = step < steps ? __ldg(job.shrink + step) : 1.0f;
    const Range other = step < steps ? fit(job, top, mul(low, shrink), mul(high, shrink)) : refit(group, best, top);
    const float found = error_of(group, other, top);
    if (found < lowest) best = other, lowest = found;
  }
  return best;
}

__device__ inline void store_range(const SearchJob& job, int64_t at, const Range& range) {
  __stcg(job.scale + at, range.scale);
  __stcg(job.zero_point + at, range.zero);
}

__global__ void __launch_bounds__(kThreads) naive_search_kernel(const SearchJob job) {
  const auto tiles = static_cast<unsigned>((job.rows + kThreads - 1) / kThreads);
  const int64_t g = blockIdx.x / tiles, row = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (row >= job.rows) return;
  const float* shares = job.importance ? job.importance + g * job.size : nullptr;
  const InMemory group{job.groups + g * job.size * job.rows + row, shares, job.rows, static_cast<int>(job.size)};
  store_range(job, g * job.rows + row, search(job, group));
}

__global__ void __launch_bounds__(kThreads) tile_search_kernel(const SearchJob job) {
  __shared__ float weights[kSearchSize][kThreads], shares[kSearchSize];
  const auto tiles = static_cast<unsigned>((job.rows + kThreads - 1) / kThreads);
  const int64_t g = blockIdx.x / tiles, row = blockIdx.x % tiles * kThreads + threadIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const float* own = job.importance ? job.importance + g * job.size : nullptr;
  const InMemory from{job.groups + g * job.size * job.rows + row, own, job.rows,
                      row < job.rows ? static_cast<int>(job.size) : 0};
  const int size = static_cast<int>(job.size), padded = (size + kSums - 1) / kSums * kSums;
#pragma unroll 8
  for (int k = 0; k < padded; k++) weights[k][thread] = from.weight(k);
  for (int k = thread; k < padded; k += kThreads) shares[k] = own && k < size ? __ldg(own + k) : 1.0f;
  __syncthreads();  // for `shares`: a thread reads only its own weights
  if (row < job.rows) store_range(job, g * job.rows + row, search(job, InTile{weights, shares, thread, size}));
}

// What has to be known of a weight to decide it, read long before: the columns of a tile ask for theirs together.
struct RoundCell {
  float target, scale, zero;
  bool fixed;
};
struct UnroundedCell {
  float target;
};

__device__ inline RoundCell cell_of(const RoundJob& job, int64_t j, int64_t row) {
  const int64_t at = j * job.rows + row, grid = __ldg(job.group + j) * job.rows + row;
  return {__ldg(job.target + at), __ldg(job.scale + grid), __ldg(job.zero_point + grid),
          job.fixed && __ldg(job.fixed + at)};
}
__device__ inline UnroundedCell cell_of(const UnroundedJob& job, int64_t j, int64_t row) {
  return {__ldg(job.target + j * job.rows + row)};
}

// Decides a weight and writes it; returns what it misses.
__device__ inline float decide(const RoundJob& job, const RoundCell& cell, int64_t at, float updated) {
  const float scaled = quotient(updated, cell.scale, __frcp_rn(cell.scale));
  const float nearest = least(greatest(rintf(scaled), sub(0.0f, cell.zero)), sub(job.top, cell.zero));
  const float value = cell.fixed ? 0.0f : nearest;
  const float residual = sub(cell.target, mul(value, cell.scale));
  __stcg(job.codes + at, static_cast<uint8_t>(add(value, cell.zero)));
  __stcg(job.residual + at, residual);
  return residual;
}
__device__ inline float decide(const UnroundedJob& job, const UnroundedCell& cell, int64_t at, float updated) {
  __stcg(job.values + at, updated);
  return sub(cell.target, updated);
}

// That again, of a weight this thread has decided; not through the read-only cache.
__device__ inline float missed_of(const RoundJob& job, int64_t at) { return __ldcg(job.residual + at); }
__device__ inline float missed_of(const UnroundedJob& job, int64_t at) {
  return sub(__ldg(job.target + at), __ldcg(job.values + at));
}

template <typename Job>
__global__ void __launch_bounds__(kThreads) naive_feed_kernel(const Job batch) {
  const auto tiles = static_cast<unsigned>((batch.rows + kThreads - 1) / kThreads);
  const Job job = batch.matrix(blockIdx.x / tiles);
  const int64_t row = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (row >= job.rows) return;
  for (int64_t j = 0; j < job.columns; j++) {
    const int64_t at = j * job.rows + row;
    float updated = __ldg(job.base + at);
    for (int64_t i = 0; i < j; i++)
      updated = add(updated, mul(__ldg(job.feedback + j * job.columns + i), missed_of(job, i * job.rows + row)));
    decide(job, cell_of(job, j, row), at, updated);
  }
}

constexpr int kTile = 16;           // columns in registers: as many sums that do not wait for each other
constexpr int kTilePitch = 20;      // floats from one column's shares to the next: fewer bank conflicts when they are
                                    // written, and still whole vectors of four
constexpr int kColumnsAtOnce = 128;  // earlier columns whose shares are in shared memory

// feedback[start + j][first + i] for the tile's columns j, at shares[i][j]: what one earlier column gives to all of them
// lies together, and is read by all threads at once.
__device__ inline void load_shares(const FeedJob& job, int start, int first, int count,
                                   float (&shares)[kColumnsAtOnce][kTilePitch]) {
  const int columns = static_cast<int>(job.columns);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
#pragma unroll
    for (int j = 0; j < kTile; j++)
      shares[i][j] = start + j < columns ? __ldg(job.feedback + (start + j) * job.columns + first + i) : 0.0f;
  }
}

// Adds what an earlier column gives to the tile's columns.
__device__ inline void feed(const float* shares, float missed, float (&updated)[kTile]) {
#pragma unroll
  for (int j = 0; j < kTile; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(shares + j);
    updated[j] = add(updated[j], mul(four.x, missed));
    updated[j + 1] = add(updated[j + 1], mul(four.y, missed));
    updated[j + 2] = add(updated[j + 2], mul(four.z, missed));
    updated[j + 3] = add(updated[j + 3], mul(four.w, missed));
  }
}

// The columns of a tile take the feedback of all columns before it, one after the other but sixteen sums at a time, and
// are then decided in turn. `resident`: at most kColumnsAtOnce columns, what they missed stays in shared memory; else it
// is read back, and the shares come in pieces.
template <typename Job, bool resident>
__global__ void __launch_bounds__(kThreads) tile_feed_kernel(const Job batch) {
  __shared__ float missed[resident ? kColumnsAtOnce : 1][kThreads];
  __shared__ __align__(16) float shares[kColumnsAtOnce][kTilePitch];
  const auto tiles = static_cast<unsigned>((batch.rows + kThreads - 1) / kThreads);
  const Job job = batch.matrix(blockIdx.x / tiles);
  const int64_t rows = job.rows, row = blockIdx.x % tiles * kThreads + threadIdx.x;
  const bool inside = row < rows;  // the others help to load the shares
  const int thread = static_cast<int>(threadIdx.x), columns = static_cast<int>(job.columns);
#pragma unroll 1
  for (int start = 0; start < columns; start += kTile) {
    float updated[kTile];
    decltype(cell_of(job, 0, 0)) cells[kTile];
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      const bool there = inside && start + j < columns;
      updated[j] = there ? __ldg(job.base + (start + j) * rows + row) : 0.0f;
      cells[j] = there ? cell_of(job, start + j, row) : decltype(cell_of(job, 0, 0)){};
    }
#pragma unroll 1
    for (int first = 0; first < start; first += kColumnsAtOnce) {
      const int count = min(kColumnsAtOnce, start - first);
      __syncthreads();  // the shares from before are used up
      load_shares(job, start, first, count, shares);
      __syncthreads();
      if (!inside) continue;
#pragma unroll 4
      for (int i = 0; i < count; i++)
        feed(shares[i], resident ? missed[i][thread] : missed_of(job, (first + i) * rows + row), updated);
    }
    __syncthreads();
    load_shares(job, start, start, min(kTile, columns - start), shares);
    __syncthreads();
    if (!inside) continue;
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      if (start + j >= columns) continue;
      const float off = decide(job, cells[j], (start + j) * rows + row, updated[j]);
      if constexpr (resident) missed[start + j][thread] = off;
#pragma unroll
      for (int later = j + 1; later < kTile; later++) updated[later] = add(updated[later], mul(shares[j][later], off));
    }
  }
}

enum class GptqKernel : int32_t { automatic = 0, naive = 1, tile = 2 };

template <typename Stream>
int launch_search(const SearchJob& job, GptqKernel kernel, [[maybe_unused]] Stream stream) {
  if (job.count == 0 || job.rows == 0) return 0;
  const dim3 grid(static_cast<unsigned>(job.count * ((job.rows + kThreads - 1) / kThreads)));
  if (kernel == GptqKernel::automatic) kernel = job.size <= kSearchSize ? GptqKernel::tile : GptqKernel::naive;
  if (kernel == GptqKernel::tile && job.size > kSearchSize) return 1;
  if (kernel == GptqKernel::tile) DSC_LAUNCH((tile_search_kernel), grid, dim3(kThreads), stream, job);
  else DSC_LAUNCH((naive_search_kernel), grid, dim3(kThreads), stream, job);
  return 0;
}

template <typename Job, typename Stream>
int launch_feed(const Job& job, GptqKernel kernel, [[maybe_unused]] Stream stream) {
  if (job.matrices == 0 || job.rows == 0 || job.columns == 0) return 0;
  const dim3 grid(static_cast<unsigned>(job.matrices * ((job.rows + kThreads - 1) / kThreads)));
  if (kernel == GptqKernel::naive) DSC_LAUNCH((naive_feed_kernel<Job>), grid, dim3(kThreads), stream, job);
  else if (job.columns <= kColumnsAtOnce) DSC_LAUNCH((tile_feed_kernel<Job, true>), grid, dim3(kThreads), stream, job);
  else DSC_LAUNCH((tile_feed_kernel<Job, false>), grid, dim3(kThreads), stream, job);
  return 0;
}

}  // namespace
}  // namespace dsc

DSC_ENTRY(search, dsc::SearchJob, dsc::GptqKernel, dsc::launch_search)
DSC_ENTRY(round, dsc::RoundJob, dsc::GptqKernel, dsc::launch_feed)
DSC_ENTRY(unrounded, dsc::UnroundedJob, dsc::GptqKernel, dsc::launch_feed)
