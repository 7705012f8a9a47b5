// A multiprocessor on a CPU. Every CUDA thread is a fiber, so a kernel's source runs as it is written, registers, shared
// memory, barriers and all; what Hopper does for several threads at once (shuffles, mbarriers, bulk copies, stmatrix, wgmma)
// is done when the last of them arrives. Blocks run one after the other, or some at once.
//
// wgmma runs as late as it may: at the wait that needs it, with its accumulators full of garbage until then. A kernel that
// reads a product too early, or touches its operands under it, gives wrong numbers here as it would there. So do additions of
// the copy engine: they read shared memory when their thread waits for that, and are there when it waits for that, or at the
// block's end. Its copies arrive a while later, in any order. Where all that is left to do is to wait, the run ends with an
// exception, as it does after other things that are never right.
//
// Nothing here is fast, or about speed. What it cannot show: the order of memory between the copy engine, wgmma and ordinary
// accesses (fences), the bits that a tensor core drops from a sum of e4m3 products, and hardware that differs from its manual.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
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
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
// NaN and what does not fit as the instruction has it.
inline int rounded_to_int(float x) {
  return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : static_cast<int>(x);
}
inline int __float2int_rn(float x) { return rounded_to_int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return rounded_to_int(std::floor(x)); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
  return sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xff) * (b >> i & 0xff);
  return sum;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
}
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
struct __half2 { __half x, y; };
inline float2 __half22float2(__half2 h) { return {static_cast<float>(h.x), static_cast<float>(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }

// ---- threads

namespace emulator {

constexpr int kStack = 512 << 10;

// What the host may set before a run.
inline unsigned at_once = 1;    // blocks that share the machine
inline uint32_t seed = 12345;   // of the paces of warps and copies
inline int omitted = -1;        // the number of the statement that a translated source (emulated.py) leaves out
inline const unsigned char *readable_begin = nullptr, *readable_end = nullptr;  // where bulk copies may read; null: anywhere

struct Gate {  // a barrier that is used again and again
  int arrived = 0;
  unsigned round = 0;
  int count = 0, counted = 0;  // of those who come now, of those who came last: for how many something is so, which a barrier may tell
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

enum Kind { kS8, kU8, kBf16, kE4m3 };  // kU8: A is unsigned, B is not

struct Addition {  // one cp.reduce of a thread
  _Float16* to;
  const _Float16* from;
  std::vector<_Float16> read;  // from there, once it has been
  size_t count;
};

struct Barrier {  // an mbarrier
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  void check() {
    if (pending == 0 && bytes == 0) ++phase, pending = count;
  }
};

struct Copy {  // one bulk copy
  void* to;
  const void* from;
  uint32_t bytes;
  Barrier* full;
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

struct Wait {  // for a number in memory to be another
  const unsigned* at = nullptr;
  unsigned value = 0;
  bool over() const { return at == nullptr || *at != value; }
};

struct Dice {
  uint32_t state;
  int roll(int sides) { return static_cast<int>((state = state * 1664525u + 1013904223u) >> 16) % sides; }
};

struct Block {
  unsigned index;
  int threads, left;
  std::vector<unsigned char> memory;
  unsigned char* shared;  // 1024-byte aligned
  std::vector<ucontext_t> context;
  std::vector<std::unique_ptr<unsigned char[]>> stack;
  std::vector<bool> finished;
  std::vector<Wait> waits;               // of each thread
  std::vector<int> hold_warp, hold_group;  // turns that they are held up for
  std::vector<Copy> copies;              // under way
  Gate all;
  std::map<int, Gate> named;
  std::vector<Gate> warp;
  std::vector<std::vector<uint64_t>> slot;  // of each thread, for what lanes exchange
  std::vector<Warpgroup> group;
  std::vector<std::vector<Addition>> additions;  // of each thread, in order
  std::map<const void*, Barrier> barrier;
  std::function<void()> body;
};
inline Block* block = nullptr;
inline ucontext_t scheduler;
inline bool in_thread = false;
inline std::string trouble;  // of a thread: an exception cannot leave its stack

inline void leave_thread() { swapcontext(&block->context[threadIdx.x], &scheduler); }

[[noreturn]] inline void fail(const char* text) {
  trouble = std::string(text) + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
  if (in_thread) leave_thread();
  throw std::runtime_error(trouble);
}

// Lets others run for as long as `at` is `value`.
inline void wait_while(const unsigned& at, unsigned value) {
  while (at == value) {
    block->waits[threadIdx.x] = {&at, value};
    leave_thread();
  }
}

inline void pass(Gate& gate, int count, const std::function<void()>& last = {}) {
  const unsigned round = gate.round;
  if (++gate.arrived == count) {
    if (last) last();
    gate.arrived = 0, ++gate.round;
  } else {
    wait_while(gate.round, round);
  }
}

inline Barrier& barrier_at(const void* b) {
  const auto found = block->barrier.find(b);
  if (found == block->barrier.end()) fail("no mbarrier has been made here");
  return found->second;
}

// ---- copies in the background

inline void copy(void* to, const void* from, uint32_t bytes, Barrier& full) {
  const auto *begin = static_cast<unsigned char*>(to), *source = static_cast<const unsigned char*>(from);
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("a bulk copy that is not aligned");
  }
  if (begin < block->shared || begin + bytes > block->memory.data() + block->memory.size()) {
    fail("a bulk copy to where there is no shared memory");
  }
  if (readable_begin != nullptr && (source < readable_begin || source + bytes > readable_end)) {
    fail("a bulk copy from where there is nothing to read");
  }
  block->copies.push_back({to, from, bytes, &full});
}

inline void arrive(std::vector<Copy>& copies, int which) {
  const Copy x = copies[which];
  copies.erase(copies.begin() + which);
  std::memcpy(x.to, x.from, x.bytes);
  x.full->bytes -= x.bytes;
  x.full->check();
}

// ---- additions in the background

inline void read(std::vector<Addition>& additions) {
  for (Addition& x : additions) {
    if (x.read.empty()) x.read.assign(x.from, x.from + x.count);
  }
}

inline void add(std::vector<Addition>& additions) {
  for (const Addition& x : additions) {
    for (size_t i = 0; i < x.count; ++i) x.to[i] = static_cast<_Float16>(float(x.to[i]) + float(x.read[i]));
  }
  additions.clear();
}

// ---- blocks

inline void start() {
  block->body();
  for (const Addition& x : block->additions[threadIdx.x]) {
    if (x.read.empty()) fail("a thread that leaves while its additions are still to be read");
  }
  block->finished[threadIdx.x] = true, --block->left;
  leave_thread();
}

inline std::vector<std::unique_ptr<unsigned char[]>> spare_stacks;

inline std::unique_ptr<Block> make_block(unsigned index, int threads, int shared_bytes, const std::function<void()>& body) {
  auto made = std::make_unique<Block>();
  Block& b = *made;
  b.index = index, b.threads = b.left = threads, b.body = body;
  b.memory.assign(shared_bytes + 2048, 0xff);
  b.shared = b.memory.data() + (1024 - reinterpret_cast<uintptr_t>(b.memory.data()) % 1024) % 1024;
  b.context.resize(threads), b.finished.assign(threads, false), b.warp.resize((threads + 31) / 32);
  b.waits.resize(threads), b.hold_warp.resize((threads + 31) / 32), b.hold_group.resize((threads + 127) / 128);
  b.slot.assign(threads, std::vector<uint64_t>(8)), b.group.resize((threads + 127) / 128);
  b.additions.resize(threads);
  for (int t = 0; t < threads; ++t) {
    if (spare_stacks.empty()) spare_stacks.emplace_back(new unsigned char[kStack]);
    b.stack.push_back(std::move(spare_stacks.back()));
    spare_stacks.pop_back();
    getcontext(&b.context[t]);
    b.context[t].uc_stack.ss_sp = b.stack[t].get(), b.context[t].uc_stack.ss_size = kStack, b.context[t].uc_link = nullptr;
    makecontext(&b.context[t], start, 0);
  }
  return made;
}

// Every thread that does not wait runs until it does. False where nothing happened, and nothing will.
inline bool advance(Block& b, Dice& dice) {
  block = &b, blockIdx.x = b.index;
  bool alive = !b.copies.empty();
  if (alive && dice.roll(4) == 0) arrive(b.copies, dice.roll(static_cast<int>(b.copies.size())));
  // Warps and warpgroups are held up now and then, each for as long as it happens: what only their pace keeps in order goes
  // wrong.
  for (int& turns : b.hold_group) turns = turns > 0 ? turns - 1 : dice.roll(16) == 0 ? dice.roll(128) : 0;
  for (int& turns : b.hold_warp) turns = turns > 0 ? turns - 1 : dice.roll(64) == 0 ? dice.roll(128) : 0;
  for (int t = 0; t < b.threads; ++t) {
    if (b.finished[t] || !b.waits[t].over()) continue;
    alive = true;
    if (b.hold_warp[t / 32] > 0 || b.hold_group[t / 128] > 0) continue;
    threadIdx.x = t, in_thread = true;
    swapcontext(&scheduler, &b.context[t]);
    in_thread = false;
    if (!trouble.empty()) throw std::runtime_error(trouble);
  }
  return alive;
}

inline void finish(Block& b) {
  for (const Warpgroup& g : b.group) {
    if (g.done != g.products.size()) fail("a product that nobody waited for");
  }
  if (!b.copies.empty()) fail("a copy that nobody waited for");
  for (int t = 0; t < b.threads; ++t) add(b.additions[t]);
  for (auto& stack : b.stack) spare_stacks.push_back(std::move(stack));
}

template <class Body>
void run(unsigned blocks, int threads, int shared_bytes, Body body) {
  constexpr int kMost = 1000000;  // twenty times what a test takes
  gridDim.x = blocks, trouble.clear(), in_thread = false;
  Dice dice{seed};
  std::vector<std::unique_ptr<Block>> resident;
  unsigned next = 0;
  for (int turn = 0; next < blocks || !resident.empty(); ++turn) {
    while (next < blocks && resident.size() < at_once) resident.push_back(make_block(next++, threads, shared_bytes, body));
    bool alive = false;
    for (auto& b : resident) alive |= advance(*b, dice);
    if (!alive) fail("everybody waits");
    if (turn == kMost) fail("no end is in sight");
    for (auto& b : resident) {
      if (b->left == 0) block = b.get(), finish(*b), b.reset();
    }
    std::erase(resident, nullptr);
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

// Number k of a row of an operand, whose bytes `byte` gives.
template <class Byte>
float number(Kind kind, int k, Byte byte) {
  if (kind == kBf16) return __uint_as_float(uint32_t(byte(2 * k + 1)) << 24 | uint32_t(byte(2 * k)) << 16);
  if (kind == kE4m3) return from_e4m3(byte(k));
  return kind == kU8 ? byte(k) : static_cast<signed char>(byte(k));
}

inline void execute(const Product& x) {
  constexpr int kMostColumns = 128;
  const int depth = x.kind == kBf16 ? 16 : 32;
  float b[32][kMostColumns] = {};
  for (int column = 0; column < x.columns; ++column) {
    for (int k = 0; k < depth; ++k) {
      const auto byte = [&](int i) { return operand_byte(x.b_at, column, i); };
      b[k][column] = number(x.kind == kU8 ? kS8 : x.kind, k, byte);
    }
  }
  for (int row = 0; row < 64; ++row) {
    const auto byte = [&](int i) -> unsigned char {
      if (!x.a_in_registers) return operand_byte(x.a_at, row, i);
      const int thread = row / 16 * 32 + row % 8 * 4 + i % 16 / 4, reg = row % 16 / 8 + 2 * (i / 16);
      return x.a[thread][reg] >> (8 * (i % 4));
    };
    float sum[kMostColumns] = {};  // of 32 products of bytes: below 2^24, and exact
    for (int k = 0; k < depth; ++k) {
      const float a = number(x.kind, k, byte);
      for (int column = 0; column < kMostColumns; ++column) sum[column] += a * b[k][column];
    }
    for (int column = 0; column < x.columns; ++column) {
      int& d = x.d[row / 16 * 32 + row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
      if (x.kind == kS8 || x.kind == kU8) {
        d = (x.adds ? d : 0) + static_cast<int>(sum[column]);
      } else {
        d = __float_as_int((x.adds ? __int_as_float(d) : 0.0f) + sum[column]);
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
inline int __reduce_max_sync(unsigned, int x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = std::max(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}
inline bool __any_sync(unsigned, bool x) {
  bool all[32];
  emulator::exchange(x, all);
  return std::any_of(all, all + 32, [](bool y) { return y; });
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x |= __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}
inline bool __all_sync(unsigned lanes, bool x) { return !__any_sync(lanes, !x); }
inline int atomicAdd(int* to, int x) {
  const int old = *to;
  *to = old + x;
  return old;
}
inline int atomicMax(int* to, int x) {
  const int old = *to;
  *to = std::max(old, x);
  return old;
}
