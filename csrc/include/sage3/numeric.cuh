// Single instructions for numbers, each named by what it computes; the comment gives the SASS it becomes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sage3 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// 2^x, subnormal results flushed to zero. MUFU.EX2
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x). MUFU.LG2
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp, for x from 2^-126 to 2^126; subnormal numbers count as zero. MUFU.RCP
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one; NaN if either is, so that a bad number is seen and not rounded away. FMNMX.NAN
__device__ __forceinline__ float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // which has no such instruction
  return a > b || a != a ? a : b;
#else
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}

// Round to the nearest integer, ties to even. Written as PTX: with it ptxas makes F2IP of a pair that is packed next,
// which runs at full rate; the intrinsic becomes F2I on the slow unit.
__device__ __forceinline__ int round_to_int(float x) {
  int y;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Four floats -> four bytes, rounded and saturated to 0..255, a in the lowest byte. 2 F2IP.U8 (sm_86 on)
__device__ __forceinline__ uint32_t pack_u8(float a, float b, float c, float d) {
  uint32_t high, word;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(round_to_int(d)), "r"(round_to_int(c)));
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(round_to_int(b)), "r"(round_to_int(a)), "r"(high));
  return word;
}

// Four floats -> four bytes, rounded and saturated to -128..127, a in the lowest byte. 2 F2IP.S8 (sm_86 on)
__device__ __forceinline__ uint32_t pack_s8(float a, float b, float c, float d) {
  uint32_t high, word;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(round_to_int(d)), "r"(round_to_int(c)));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(round_to_int(b)), "r"(round_to_int(a)), "r"(high));
  return word;
}

// sum + the four unsigned bytes of word. IDP.4A
__device__ __forceinline__ uint32_t add_bytes(uint32_t word, uint32_t sum) { return __dp4a(word, 0x01010101u, sum); }

// sum + the squares of the four signed bytes of word. IDP.4A
__device__ __forceinline__ int square_bytes(uint32_t word, int sum) {
  return __dp4a(static_cast<int>(word), static_cast<int>(word), sum);
}

// 16 bytes, or zeros and no access: a load under a predicate, where an "if" becomes a branch around each. Read once and
// never again, so evicted first: L2 keeps what the attention will read.
__device__ __forceinline__ uint4 load_or_zero(const void* from, bool there) {
  uint4 x;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n"
      " mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      " @p ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(int(there)));
  return x;
}

// The same value, of which the compiler knows nothing. A pointer: constants added to it become offsets of the
// instructions that use it. An index: what follows from it is computed where it is needed, and kept in no register.
__device__ __forceinline__ const unsigned char* opaque(const unsigned char* p) {
  asm volatile("" : "+l"(p));
  return p;
}
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^exponent, from -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// The maximum of three integers. VIMNMX3 (sm_90); two VIMNMX before
__device__ __forceinline__ int max3(int a, int b, int c) { return max(max(a, b), c); }

// The same of two 16-bit numbers without signs each. VIMNMX3.U16x2
__device__ __forceinline__ uint32_t max3_pair(uint32_t a, uint32_t b, uint32_t c) { return __vimax3_u16x2(a, b, c); }

}  // namespace sage3
