// Runs CUDA C++ device code on the CPU, for tests: the unchanged .cu file is compiled by the host compiler after this
// header. One fiber per CUDA thread, one block at a time, in an order of threads that the test chooses; so a result that
// depends on the order, which a GPU shows once a year, shows every time.
//
//   __shared__      static storage in a section of its own, filled with NaN before each block
//   __shfl_*_sync   a slot per lane, written, synchronised, read; two sets of slots, so that a fast lane that is already
//                   in the next shuffle does not overwrite what a slow one has yet to read
//   __ldg, __stcs   checked against the spans of memory the test declared, and counted; so are __ldcg, __stcg, atomicMin
//   __fadd_rn ...   one rounding each: the host compiler is told not to contract
//   a wait that can never end (a barrier not all threads reach) is reported, with what each thread waits for
//
// Left out: dynamic shared memory, tensor cores, asynchronous copies. Each fiber's stack has 64 KiB.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define DSC_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class Wait { none, block, warp, finished };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  bool started;
  Wait wait;
  dim3 thread;
  unsigned linear;
};

struct Warp {
  unsigned members, exited, arrived, generation;
  uint64_t slot[2][kWarp];
};

// A span of memory that a kernel may touch, and how much it did.
struct Span {
  const char* begin;
  const char* end;
  int64_t read_bytes = 0, written_bytes = 0, reads = 0, wide_reads = 0;
};

struct Machine {
  dim3 grid, block, block_index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Span> spans;
  std::function<void()> body;
  std::string error;
  unsigned current = 0, alive = 0, arrived = 0, generation = 0;
  jmp_buf scheduler;
};
inline Machine machine;

inline Fiber& fiber() { return machine.fibers[machine.current]; }
inline Warp& warp() { return machine.warps[fiber().linear / kWarp]; }
inline unsigned lane() { return fiber().linear % kWarp; }

inline void yield_to_scheduler() {
  if (!_setjmp(fiber().resume)) _longjmp(machine.scheduler, 1);
}

// An exception must not leave a fiber: the message is kept and the scheduler throws it.
[[noreturn]] inline void fail(const std::string& message) {
  if (machine.error.empty()) machine.error = message;
  _longjmp(machine.scheduler, 1);
}

inline void block_barrier() {
  const unsigned generation = machine.generation;
  if (++machine.arrived == machine.alive) {
    machine.arrived = 0;
    machine.generation++;
    return;
  }
  fiber().wait = Wait::block;
  while (machine.generation == generation) yield_to_scheduler();
  fiber().wait = Wait::none;
}

inline void warp_barrier(unsigned mask) {
  Warp& w = warp();
  mask &= w.members & ~w.exited;
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask it gave");
  const unsigned generation = w.generation;
  w.arrived |= 1u << lane();
  if ((w.arrived & mask) == mask) {
    w.arrived &= ~mask;
    w.generation++;
    return;
  }
  fiber().wait = Wait::warp;
  while (w.generation == generation) yield_to_scheduler();
  fiber().wait = Wait::none;
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  Warp& w = warp();
  const unsigned set = w.generation & 1;
  if (!(w.members >> (source % kWarp) & 1)) fail("a shuffle reads a lane that does not exist");
  std::memcpy(&w.slot[set][lane()], &value, sizeof value);
  warp_barrier(mask);
  std::memcpy(&value, &w.slot[set][source % kWarp], sizeof value);
  return value;
}

inline void run_fiber() {
  machine.body();
  Warp& w = warp();
  fiber().wait = Wait::finished;
  machine.alive--;
  w.exited |= 1u << lane();
  const unsigned left = w.members & ~w.exited;
  if (machine.arrived && machine.arrived == machine.alive) {  // the others wait for a thread that has returned
    machine.arrived = 0;
    machine.generation++;
  }
  if (left && (w.arrived & left) == left) {
    w.arrived = 0;
    w.generation++;
  }
  _longjmp(machine.scheduler, 1);
}

inline void enter(Fiber& f) {
  if (_setjmp(machine.scheduler)) return;
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
  setcontext(&f.context);
}

inline void prepare_block(unsigned threads) {
  Machine& m = machine;
  m.alive = threads;
  m.arrived = m.generation = 0;
  for (Warp& w : m.warps) {
    w = Warp{};
    std::memset(w.slot, 0xff, sizeof w.slot);
  }
  for (unsigned i = 0; i < threads; i++) {
    Fiber& f = m.fibers[i];
    f.started = false;
    f.wait = Wait::none;
    f.linear = i;
    f.thread = dim3(i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y));
    m.warps[i / kWarp].members |= 1u << i % kWarp;
  }
  if (__start_cuda_shared) std::memset(__start_cuda_shared, 0xff, size_t(__stop_cuda_shared - __start_cuda_shared));
}

inline uint64_t progress() {
  uint64_t sum = machine.generation + (uint64_t{1} << 40) * machine.alive;
  for (const Warp& w : machine.warps) sum += w.generation;
  return sum;
}

inline void run_block(std::vector<unsigned>& order, int kind, std::mt19937& random) {
  Machine& m = machine;
  while (m.alive) {
    const uint64_t before = progress();
    bool ran = false;
    std::iota(order.begin(), order.end(), 0u);
    if (kind == 1) std::reverse(order.begin(), order.end());
    if (kind > 1) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      if (m.fibers[i].wait == Wait::finished) continue;
      ran |= m.fibers[i].wait == Wait::none;
      m.current = i;
      enter(m.fibers[i]);
      if (!m.error.empty()) throw std::runtime_error(m.error);
    }
    if (!ran && progress() == before) {
      const auto at_block = std::count_if(m.fibers.begin(), m.fibers.end(), [](auto& f) { return f.wait == Wait::block; });
      throw std::runtime_error("deadlock: " + std::to_string(at_block) + " of " + std::to_string(m.alive) +
                               " threads wait for the block, the others for their warp");
    }
  }
}

// order: 0 ascending threads, 1 descending, others the seed of a new shuffle at every turn.
template <typename Kernel, typename... Arguments>
void launch(dim3 grid, dim3 block, int order, Kernel kernel, Arguments... arguments) {
  Machine& m = machine;
  const unsigned threads = block.x * block.y * block.z;
  m.grid = grid, m.block = block;
  m.error.clear();
  m.fibers.resize(std::max<size_t>(m.fibers.size(), threads));
  for (auto& f : m.fibers) f.wait = Wait::finished;
  m.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  m.body = [=] { kernel(arguments...); };
  std::mt19937 random(static_cast<unsigned>(order));
  std::vector<unsigned> turn(threads);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        m.block_index = dim3(x, y, z);
        prepare_block(threads);
        run_block(turn, order, random);
      }
}

template <typename T>
Span& span_of(const T* p, const char* what) {
  const char* at = reinterpret_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail(std::string(what) + " is not aligned to its size");
  for (Span& span : machine.spans)
    if (at >= span.begin && at + sizeof(T) <= span.end) return span;
  fail(std::string(what) + " of " + std::to_string(sizeof(T)) + " bytes outside every tensor, block " +
       std::to_string(machine.block_index.x) + " thread " + std::to_string(fiber().linear));
}

}  // namespace emulated

#define threadIdx (emulated::fiber().thread)
#define blockIdx (emulated::machine.block_index)
#define blockDim (emulated::machine.block)
#define gridDim (emulated::machine.grid)

inline void __syncthreads() { emulated::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::warp_barrier(mask); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulated::exchange(mask, value, emulated::lane() ^ static_cast<unsigned>(bits));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulated::exchange(mask, value, static_cast<unsigned>(source));
}

template <typename T>
T __ldg(const T* p) {
  emulated::Span& span = emulated::span_of(p, "a load");
  span.read_bytes += sizeof(T);
  span.reads++;
  span.wide_reads += sizeof(T) == 16;
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  emulated::span_of(p, "a store").written_bytes += sizeof(T);
  *p = value;
}

template <typename T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <typename T>
void __stcg(T* p, T value) {
  __stcs(p, value);
}
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long value) {
  const unsigned long long before = __ldg(p);
  __stcs(p, std::min(before, value));
  return before;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int min(int a, int b) { return std::min(a, b); }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float2int_rn(float x) { return x == x ? static_cast<int>(std::nearbyint(x)) : 0; }
