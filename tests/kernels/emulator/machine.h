// A multiprocessor on a CPU. Every CUDA thread is a fiber, so a kernel's source runs as it is written, registers, shared
// memory, barriers and all; what Hopper does for several threads at once (shuffles, mbarriers, bulk copies, stmatrix, wgmma)
// is done when the last of them arrives. Blocks run one after the other.
//
// wgmma runs as late as it may: at the wait that needs it, with its accumulators full of garbage until then. A kernel that
// reads a product too early, or touches its operands under it, gives wrong numbers here as it would there. So do additions of
// the copy engine: they read shared memory when their thread waits for that, and are there when it waits for that, or at the
// block's end.
//
// Nothing here is fast, or about speed. What it cannot show: the order of memory between the copy engine, wgmma and ordinary
// accesses (fences), the bits that a tensor core drops from a sum of e4m3 products, and hardware that differs from its manual.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n)

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, gridDim;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) { return bytes <= 232448 ? cudaSuccess : cudaErrorInvalidValue; }

// ---- numbers

inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
template <class T>
T __ldcs(const T* at) { return *at; }
using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t word = __float_as_int(x);
    bits = x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) { const _Float16 h = static_cast<_Float16>(x); std::memcpy(&bits, &h, 2); }
  explicit operator float() const { _Float16 h; std::memcpy(&h, &bits, 2); return static_cast<float>(h); }
};
inline __half __ushort_as_half(unsigned short x) { __half h; h.bits = x; return h; }
inline float __half2float(__half h) { return static_cast<float>(h); }

// ---- threads

namespace emulator {

constexpr int kStack = 512 << 10;

struct Gate {  // a barrier that is used again and again
  int arrived = 0;
  unsigned round = 0;
};

// e4m3's 256 numbers. The byte nearest to a number, ties to even, at most 448; NaN stays NaN.
inline float value_of_e4m3(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float x = exponent == 15 && mantissa == 7 ? NAN
                  : exponent == 0                 ? std::ldexp(float(mantissa), -9)
                                                  : std::ldexp(float(8 + mantissa), exponent - 10);
  return byte & 0x80 ? -x : x;
}
inline float from_e4m3(int byte) {
  static const std::vector<float> all = [] {
    std::vector<float> made(256);
    for (int i = 0; i < 256; ++i) made[i] = value_of_e4m3(i);
    return made;
  }();
  return all[byte];
}
inline uint8_t to_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return sign | 0x7f;
  const float most = std::fmin(std::fabs(x), 448.0f);
  const int exponent = most < 0x1p-6f ? -6 : std::ilogb(most);
  const int eighths = static_cast<int>(std::nearbyint(std::ldexp(most, 3 - exponent)));  // 16 where it rounds up to a power
  return sign | (eighths < 8 ? eighths : (exponent + 6) * 8 + eighths);
}

enum Kind { kS8, kBf16, kE4m3 };

struct Addition {  // one cp.reduce of a thread
  float* to;
  const float* from;
  std::vector<float> read;  // from there, once it has been
  size_t count;
};

struct Product {  // one wgmma of a warpgroup
  Kind kind;
  bool a_in_registers, adds;
  int columns;
  int* d[128];
  const uint32_t* a[128];
  uint64_t a_at, b_at;
  int group = 0, seen = 0;
};

struct Warpgroup {
  std::vector<Product> products;
  size_t done = 0;              // products that have run
  size_t issued[128] = {};      // by each thread
  int committed[128] = {};
  Gate gate;
};

struct Barrier {  // an mbarrier
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  void check() {
    if (pending == 0 && bytes == 0) ++phase, pending = count;
  }
};

struct Block {
  int threads;
  std::vector<unsigned char> memory;
  unsigned char* shared;  // 1024-byte aligned
  std::vector<ucontext_t> context;
  std::vector<std::unique_ptr<unsigned char[]>> stack;
  std::vector<bool> finished;
  ucontext_t main;
  int current = 0;
  Gate all;
  std::map<int, Gate> named;
  std::vector<Gate> warp;
  std::vector<std::vector<uint64_t>> slot;  // of each thread, for what lanes exchange
  std::vector<Warpgroup> group;
  std::vector<std::vector<Addition>> additions;  // of each thread, in order
  std::map<const void*, Barrier> barrier;
  std::function<void()> body;
  long idle = 0;
};
inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* text) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", text, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void yield() {
  Block& b = *block;
  const unsigned me = threadIdx.x;
  if (++b.idle > 2000000) fail("everybody waits");
  swapcontext(&b.context[me], &b.main);
}

inline void pass(Gate& gate, int count, const std::function<void()>& last = {}) {
  const unsigned round = gate.round;
  if (++gate.arrived == count) {
    if (last) last();
    gate.arrived = 0, ++gate.round, block->idle = 0;
  } else {
    while (gate.round == round) yield();
  }
}

// ---- additions in the background

inline void read(std::vector<Addition>& additions) {
  for (Addition& x : additions) {
    if (x.read.empty()) x.read.assign(x.from, x.from + x.count);
  }
}

inline void add(std::vector<Addition>& additions) {
  for (const Addition& x : additions) {
    for (size_t i = 0; i < x.count; ++i) x.to[i] += x.read[i];
  }
  additions.clear();
}

inline void start() {
  block->body();
  for (const Addition& x : block->additions[threadIdx.x]) {
    if (x.read.empty()) fail("a thread that leaves while its additions are still to be read");
  }
  block->finished[threadIdx.x] = true, block->idle = 0;
  swapcontext(&block->context[threadIdx.x], &block->main);
}

template <class Body>
void run(unsigned blocks, int threads, int shared_bytes, Body body) {
  gridDim.x = blocks;
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    Block b;
    block = &b;
    b.threads = threads, b.body = body;
    b.memory.assign(shared_bytes + 2048, 0xff);
    b.shared = b.memory.data() + (1024 - reinterpret_cast<uintptr_t>(b.memory.data()) % 1024) % 1024;
    b.context.resize(threads), b.finished.assign(threads, false), b.warp.resize((threads + 31) / 32);
    b.slot.assign(threads, std::vector<uint64_t>(8)), b.group.resize((threads + 127) / 128);
    b.additions.resize(threads);
    for (int t = 0; t < threads; ++t) {
      b.stack.emplace_back(new unsigned char[kStack]);
      getcontext(&b.context[t]);
      b.context[t].uc_stack.ss_sp = b.stack[t].get(), b.context[t].uc_stack.ss_size = kStack, b.context[t].uc_link = nullptr;
      makecontext(&b.context[t], start, 0);
    }
    // Warpgroups are held up now and then, each for as long as it happens: what only their pace keeps in order goes wrong.
    std::vector<int> hold(b.group.size(), 0);
    uint32_t dice = 12345;
    for (bool left = true; left;) {
      left = false;
      for (int& rounds : hold) {
        dice = dice * 1664525u + 1013904223u;
        rounds = rounds > 0 ? rounds - 1 : dice >> 28 == 0 ? int(dice >> 20 & 127) : 0;
      }
      for (int t = 0; t < threads; ++t) {
        if (b.finished[t]) continue;
        left = true, threadIdx.x = t;
        if (hold[t / 128] > 0) continue;
        swapcontext(&b.main, &b.context[t]);
      }
    }
    for (const Warpgroup& g : b.group) {
      if (g.done != g.products.size()) fail("a product that nobody waited for");
    }
    for (int t = 0; t < threads; ++t) add(b.additions[t]);
  }
}

inline unsigned char* shared_memory() { return block->shared; }

// What every lane of the warp holds in `mine`, in `all`.
template <class T>
void exchange(const T& mine, T (&all)[32]) {
  static_assert(sizeof(T) <= 64);
  const int warp = threadIdx.x / 32 * 32;
  std::memcpy(block->slot[threadIdx.x].data(), &mine, sizeof(T));
  pass(block->warp[warp / 32], 32);
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], block->slot[warp + i].data(), sizeof(T));
  pass(block->warp[warp / 32], 32);
}

// ---- wgmma

inline unsigned char* at_address(uint32_t address) { return block->shared + address - 1024; }

// Byte `byte` (< 32) of row `row` of a K-major operand (PTX ISA: matrix descriptor; swizzling acts on address bits).
inline unsigned char operand_byte(uint64_t descriptor, int row, int byte) {
  const int mode = descriptor >> 62 & 3, width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
  if (width == 0) fail("an operand that is not swizzled");
  const uint32_t begin = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = begin + row / 8 * stride + row % 8 * width + byte;
  return *at_address(address ^ ((address >> 7 & (width / 16 - 1)) << 4));
}

// The numbers of row `row` of an operand, 32 or 16 of them: from a K-major tile, or from the registers of its threads.
using Row = std::vector<float>;
inline Row numbers_of(const Product& x, const std::function<unsigned char(int)>& byte) {
  Row found(x.kind == kBf16 ? 16 : 32);
  for (int k = 0; k < static_cast<int>(found.size()); ++k) {
    if (x.kind == kBf16) {
      found[k] = __uint_as_float(uint32_t(byte(2 * k + 1)) << 24 | uint32_t(byte(2 * k)) << 16);
    } else {
      found[k] = x.kind == kE4m3 ? from_e4m3(byte(k)) : static_cast<signed char>(byte(k));
    }
  }
  return found;
}

inline void execute(const Product& x) {
  std::vector<Row> b;
  for (int column = 0; column < x.columns; ++column) {
    b.push_back(numbers_of(x, [&](int byte) { return operand_byte(x.b_at, column, byte); }));
  }
  for (int row = 0; row < 64; ++row) {
    const Row a = numbers_of(x, [&](int byte) -> unsigned char {
      if (!x.a_in_registers) return operand_byte(x.a_at, row, byte);
      const int thread = row / 16 * 32 + row % 8 * 4 + byte % 16 / 4, reg = row % 16 / 8 + 2 * (byte / 16);
      return x.a[thread][reg] >> (8 * (byte % 4));
    });
    for (int column = 0; column < x.columns; ++column) {
      int& d = x.d[row / 16 * 32 + row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
      float sum = 0.0f;  // of 32 products of bytes: below 2^24, and exact
      for (size_t k = 0; k < a.size(); ++k) sum += a[k] * b[column][k];
      if (x.kind == kS8) {
        d = (x.adds ? d : 0) + static_cast<int>(sum);
      } else {
        d = __float_as_int((x.adds ? __int_as_float(d) : 0.0f) + sum);
      }
    }
  }
}

inline void issue(Kind kind, const uint32_t* a, uint64_t a_at, uint64_t b_at, bool adds, int* d, int columns) {
  const int thread = threadIdx.x % 128;
  Warpgroup& g = block->group[threadIdx.x / 128];
  if (g.issued[thread] == g.products.size()) {
    Product made{};
    made.kind = kind, made.a_in_registers = a != nullptr, made.adds = adds;
    made.columns = columns, made.a_at = a_at, made.b_at = b_at, made.group = g.committed[thread];
    g.products.push_back(made);
  }
  Product& mine = g.products[g.issued[thread]++];
  if (mine.a_at != a_at || mine.b_at != b_at || mine.columns != columns || mine.kind != kind || mine.group != g.committed[thread]) {
    fail("the threads of a warpgroup issue different products");
  }
  mine.d[thread] = d, mine.a[thread] = a, ++mine.seen;
  if (!adds) {
    for (int i = 0; i < columns / 2; ++i) d[i] = 0x7fc0dead;
  }
}

inline void commit() { ++block->group[threadIdx.x / 128].committed[threadIdx.x % 128]; }

inline void wait(int pending) {
  Warpgroup& g = block->group[threadIdx.x / 128];
  const int until = g.committed[threadIdx.x % 128] - pending;
  pass(g.gate, 128, [&] {
    for (; g.done < g.products.size() && g.products[g.done].group < until; ++g.done) {
      if (g.products[g.done].seen != 128) fail("a product that not every thread has issued");
      execute(g.products[g.done]);
    }
  });
}

}  // namespace emulator

inline void __syncthreads() { emulator::pass(emulator::block->all, emulator::block->threads); }
inline void __syncwarp() { emulator::pass(emulator::block->warp[threadIdx.x / 32], 32); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
  T all[32];
  emulator::exchange(x, all);
  return all[threadIdx.x % 32 ^ lanes];
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  T all[32];
  emulator::exchange(x, all);
  return all[lane];
}
inline int atomicMax(int* to, int x) {
  const int old = *to;
  *to = std::max(old, x);
  return old;
}
