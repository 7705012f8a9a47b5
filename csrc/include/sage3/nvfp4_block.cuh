// Sixteen numbers that share a scale: which scale, and their codes.
//
// The scale that puts the largest magnitude at 6 is a start; a few of its neighbours often leave a smaller error (see
// docs/numerics.md). Each is judged by the squares of what rounding changes, on pairs of fp16 numbers: six
// instructions for two numbers and a scale. What was judged is what is stored: the codes are those of the same products.
//
// A pair is one register, and its halves add up apart. In Q and K it holds numbers i and i + 4 of eight neighbours; in V it
// holds two channels, so that the sums of a block are those of two registers. Either way a block's error is
// the sum over its numbers 0-3, 8-11, plus that over 4-7, 12-15, all in fp16.
//
// comfy_sage3/reference/operands.py replays all of this bit by bit.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "sage3/numeric.cuh"
#include "sage3/nvfp4.cuh"

namespace sage3::nvfp4 {

__device__ constexpr int kSteps[] = {0, -1, 5};  // from the first scale's code to those that are tried, in this order
constexpr int kChoices = 3, kLowestStep = -1, kHighestStep = 5;
constexpr int kNanCode = 127;  // the codes below are 0 to 448

// The e4m3 code of largest / 6, to nearest, at most 448; NaN for NaN and infinity. `largest` counts as it is in fp16.
__device__ __forceinline__ int first_code(float largest) {
  const float rounded = __half2float(__float2half_rn(largest));
  const int code = __nv_cvt_float_to_fp8(rounded * (1.0f / 6.0f), __NV_SATFINITE, __NV_E4M3);
  return largest < -kNegativeInfinity ? code : kNanCode;
}

// What a scale is judged with.
struct alignas(8) Scale {
  uint32_t twice_inverse;  // fp16, in both halves; of 1 / 0: infinity
  float square;

  __device__ __forceinline__ __half2 inverse() const { return reinterpret_cast<const __half2&>(twice_inverse); }
};

// Every code that is tried has its scale here; what is no code has NaN, and is never better than anything.
struct Scales {
  static constexpr int kCount = kNanCode + kHighestStep - kLowestStep + 1;
  Scale made[kCount];

  static constexpr Scale scale_of(int code) {
    if (code < 0 || code >= kNanCode) return {0x7FFF7FFF, __builtin_nanf("")};
    if (code == 0) return {0x7C007C00, 0.0f};
    int exponent = code / 8 > 0 ? code / 8 - 10 : -9;  // scale = significand * 2^exponent
    const int significand = code / 8 > 0 ? 8 + code % 8 : code % 8;
    double scale = significand;
    for (; exponent > 0; --exponent) scale *= 2.0;
    for (; exponent < 0; ++exponent) scale *= 0.5;
    double inverse = 1.0 / scale;  // from 2^-9 to 2^9: fp16's normal numbers
    int bits = 15;
    for (; inverse >= 2.0; inverse *= 0.5) ++bits;
    for (; inverse < 1.0; inverse *= 2.0) --bits;
    const uint32_t half = bits * 1024 + static_cast<uint32_t>((inverse - 1.0) * 1024.0 + 0.5);  // never halfway
    return {half << 16 | half, static_cast<float>(scale * scale)};
  }

  static constexpr Scales all() {
    Scales scales{};
    for (int i = 0; i < kCount; ++i) scales.made[i] = scale_of(i + kLowestStep);
    return scales;
  }

  // From global memory: where lanes want different ones, shared memory is what gives them.
  __device__ __forceinline__ void fill(int thread, int threads);

  __device__ __forceinline__ const Scale& operator[](int code) const { return made[code - kLowestStep]; }
};

__device__ constexpr Scales kScales = Scales::all();

__device__ __forceinline__ void Scales::fill(int thread, int threads) {
  for (int i = thread; i < kCount; i += threads) made[i] = kScales.made[i];
}

// (a, b) of (a, a) and (b, b). A permutation of bytes, which is what this is, the compiler would do anew for every use.
__device__ __forceinline__ __half2 pair_of(__half2 a, __half2 b) {
  const uint32_t word = reinterpret_cast<const uint32_t&>(b) * 0x10000u + __half_as_ushort(__low2half(a));
  return reinterpret_cast<const __half2&>(word);
}

// A pair of magnitudes rounded to e2m1's grid: as fp16 numbers 2^-14 of their size, the codes are bits 9 to 11 then. There
// fp16's own subnormal numbers are where e2m1 has its, and below 1 both have fixed steps, so the grid is the numbers whose
// nine last bits are zero, and rounding is an addition: of ties, away from zero. What is below the codes has no meaning.
// (An addition on the pipe of the multiplications: the other one has more to do here, at half the rate. blockDim.y is 1.)
__device__ __forceinline__ uint32_t rounded(__half2 y) {
  const __half2 low = __hmul2_rn(y, __float2half2_rn(1.0f / 16384));
  return reinterpret_cast<const uint32_t&>(low) * blockDim.y + 0x01000100;
}

// sum + the squares of what rounding x * inverse to e2m1 changes, of each half. No limit of 6: whoever is beyond is judged as
// if the grid went on.
__device__ __forceinline__ __half2 add_error(__half2 x, __half2 inverse, __half2 sum) {
  const __half2 y = __hmul2_rn(x, inverse);
  const uint32_t grid = rounded(y) & 0xFE00FE00;
  const __half2 off = __hfma2(reinterpret_cast<const __half2&>(grid), __float2half2_rn(16384.0f), __hneg2(y));
  return __hfma2(off, off, sum);
}

// The best scale so far. A NaN never replaces.
struct Choice {
  int code;
  __half2 inverse;
  float error;

  __device__ __forceinline__ Choice(int code_, const Scale& scale, __half low, __half high)
      : code(code_), inverse(scale.inverse()), error(error_of(scale, low, high)) {}

  __device__ __forceinline__ void offer(int other, const Scale& scale, __half low, __half high) {
    const float its = error_of(scale, low, high);
    const bool better = its < error;
    code = better ? other : code, inverse = better ? scale.inverse() : inverse, error = better ? its : error;
  }

  static __device__ __forceinline__ float error_of(const Scale& scale, __half low, __half high) {
    return __half2float(__hadd_rn(low, high)) * scale.square;
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

// The e2m1 codes of four pairs times `inverse`, at most 6: four half bytes in each half of the word, in order. By the steps
// that the scale was judged by, on every GPU.
__device__ __forceinline__ uint32_t codes(const __half2* x, __half2 inverse) {
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = rounded(__hmin2(__habs2(__hmul2_rn(x[i], inverse)), __float2half2_rn(6.0f)));
  const uint32_t first = (y[1] & 0x0E000E00) * 16 + y[0], second = (y[3] & 0x0E000E00) * 16 + y[2];
  const uint32_t word = __byte_perm(first, second, 0x7351) >> 1 & 0x77777777;
  return word | (negative(x[0], x[2]) & 0x08080808) | (negative(x[1], x[3]) & 0x80808080);
}

}  // namespace sage3::nvfp4
