// Sixteen numbers that share a scale: which scale, and their codes.
//
// The scale that puts the largest magnitude at 6 is a start; a few of its neighbours often leave a smaller error (see
// docs/numerics.md). Each is judged by the squares of what rounding changes, on pairs of fp16 numbers: seven
// instructions for two numbers and a scale. What was judged is what is stored: the codes are those of the same products.
//
// A pair is one register, and its halves add up apart. In Q and K it holds numbers i and i + 4 of eight neighbours; in V it
// holds two channels, so that the sums of a block are those of two registers. Either way a block's error is
// fp32(the sum over its numbers 0-3, 8-11) + fp32(that over 4-7, 12-15).
//
// comfy_sage3/reference/operands.py replays all of this bit by bit.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "sage3/numeric.cuh"
#include "sage3/nvfp4.cuh"

namespace sage3::nvfp4 {

__device__ constexpr int kSteps[] = {0, -1, 4, 5};  // from the first scale's code to those that are tried, in this order
constexpr int kChoices = 4, kLowestStep = -1, kHighestStep = 5;
constexpr int kNanCode = 127;  // the codes below are 0 to 448

// The e4m3 code of largest / 6, to nearest, at most 448; NaN for NaN and infinity.
__device__ __forceinline__ int first_code(float largest) {
  const int code = __nv_cvt_float_to_fp8(largest * (1.0f / 6.0f), __NV_SATFINITE, __NV_E4M3);
  return largest < -kNegativeInfinity ? code : kNanCode;
}

// What a scale is judged with.
struct Scale {
  __half2 inverse;  // in both halves; of 1 / 0: infinity
  float square;
};

// Every code that is tried has its scale here; what is no code has NaN, and is never better than anything.
struct Scales {
  static constexpr int kCount = kNanCode + kHighestStep - kLowestStep + 1;
  Scale made[kCount];

  __device__ __forceinline__ void fill(int thread, int threads) {
    for (int i = thread; i < kCount; i += threads) {
      const int code = i + kLowestStep;
      const auto bits = static_cast<__nv_fp8_storage_t>(code >= 0 && code < kNanCode ? code : kNanCode);
      const float scale = __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
      made[i] = {__float2half2_rn(1.0f / scale), scale * scale};
    }
  }

  __device__ __forceinline__ const Scale& operator[](int code) const { return made[code - kLowestStep]; }
};

// (a, b) of (a, a) and (b, b). A permutation of bytes, which is what this is, the compiler would do anew for every use.
__device__ __forceinline__ __half2 pair_of(__half2 a, __half2 b) {
  const uint32_t word = reinterpret_cast<const uint32_t&>(b) * 0x10000u + __half_as_ushort(__low2half(a));
  return reinterpret_cast<const __half2&>(word);
}

// sum + the squares of what rounding x * inverse to e2m1 changes, of each half. No limit of 6: whoever is beyond is
// judged as if the grid went on. 2^e of a number between 2^e and 2^(e+1) (1 below 1) is two steps of the grid; 768 of them
// make fp16 round at a step.
__device__ __forceinline__ __half2 add_error(__half2 x, __half2 inverse, __half2 sum) {
  const __half2 y = __hmul2_rn(x, inverse), most = __hmax2(__habs2(y), __float2half2_rn(1.0f));
  const uint32_t exponent = reinterpret_cast<const uint32_t&>(most) & 0x7C007C00;
  const __half2 power = reinterpret_cast<const __half2&>(exponent);
  const __half2 magic = __hfma2(power, __float2half2_rn(768.0f), y);
  const __half2 off = __hsub2_rn(__hfma2(power, __float2half2_rn(-768.0f), magic), y);
  return __hfma2(off, off, sum);
}

// The best scale so far. A NaN never replaces.
struct Choice {
  int code;
  __half2 inverse;
  float error;

  __device__ __forceinline__ Choice(int code_, const Scale& scale, __half low, __half high)
      : code(code_), inverse(scale.inverse), error(error_of(scale, low, high)) {}

  __device__ __forceinline__ void offer(int other, const Scale& scale, __half low, __half high) {
    const float its = error_of(scale, low, high);
    const bool better = its < error;
    code = better ? other : code, inverse = better ? scale.inverse : inverse, error = better ? its : error;
  }

  static __device__ __forceinline__ float error_of(const Scale& scale, __half low, __half high) {
    return (__half2float(low) + __half2float(high)) * scale.square;
  }

  // Whether the codes count for nothing, and are to be zero: then `inverse` is no number.
  __device__ __forceinline__ bool without_codes() const { return code == 0 || code == kNanCode; }
};

// 0xFF where a half is negative, else 0: of the halves (a.low, b.low, a.high, b.high). PRMT
__device__ __forceinline__ uint32_t negative(__half2 a, __half2 b) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, 0xFBD9;"  // the signs of bytes 1, 5, 3 and 7
      : "=r"(bytes)
      : "r"(reinterpret_cast<const uint32_t&>(a)), "r"(reinterpret_cast<const uint32_t&>(b)));
  return bytes;
}

// The e2m1 codes of four pairs times `inverse`, nearest, ties to even, at most 6: four half bytes in each half of the word,
// in order.
__device__ __forceinline__ uint32_t codes(const __half2* x, __half2 inverse) {
#if SAGE3_HAS_NVFP4_MMA
  float y[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(__hmul2_rn(x[i], inverse));
    y[i] = pair.x, y[i + 4] = pair.y;
  }
  return pack_e2m1(y);
#else
  // As in add_error: the last bits of `magic` count steps above a power of two, and each power is two codes. Whatever else
  // is in the differences is the same for all, and taken away beforehand; what is carried out of the word is nothing.
  constexpr uint32_t kRest = (9 << 10 | 1 << 9) + 2 * 15;  // magic is 1.5 * 2^9 powers; fp16's exponents start at 15
  uint32_t word = 0u - (kRest << 16 | kRest) * 0x1111u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 y = __hmin2(__habs2(__hmul2_rn(x[i], inverse)), __float2half2_rn(6.0f));
    const __half2 most = __hmax2(y, __float2half2_rn(1.0f));
    const uint32_t exponent = reinterpret_cast<const uint32_t&>(most) & 0x7C007C00;
    const __half2 magic = __hfma2(reinterpret_cast<const __half2&>(exponent), __float2half2_rn(768.0f), y);
    word += (reinterpret_cast<const uint32_t&>(magic) - exponent + (exponent >> 9)) << 4 * i;
  }
  return word | (negative(x[0], x[2]) & 0x08080808) | (negative(x[1], x[3]) & 0x80808080);
#endif
}

}  // namespace sage3::nvfp4
