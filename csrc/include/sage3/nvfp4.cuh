// NVFP4 on tensor cores: the 4-bit format, the block-scaled product of sm_120 and sm_121, and an emulation of both.
//
// The two instructions that older GPUs lack are cvt to e2m1 and mma.sync ... kind::mxf4nvf4 m16n8k64. Each has two bodies
// with the same operands in the same registers, so that a kernel written on them runs, slowly, on any GPU from sm_75 on,
// and its results can be held against the reference there. What is below the line "emulation" compiles for the host as
// well, where tests/kernels/test_nvfp4.py checks it against the layouts of the PTX ISA ("Warp-level matrix instructions",
// "mma with block scaling").
//
// Fragments: lane = 4 * g + t, a word holds eight e2m1 codes, the first in the lowest four bits.
//   A, 16 x 64   word 0: row g, k 8t..8t+7; 1: row g + 8; 2: row g, k 32+8t..; 3: row g + 8
//   B, 64 x 8    word 0: column g, k 8t..8t+7; 1: k 32+8t..
//   C, 16 x 8    0, 1: row g, columns 2t, 2t + 1; 2, 3: row g + 8
// Scales: a word holds the four e4m3 scales of a row of A (a column of B), one for 16 k each, the first in the lowest byte.
// With selector s, A's row g comes from lane 4g + 2s and row g + 8 from lane 4g + 2s + 1 (s = 0, 1); B's column n from
// lane 4n + s (s = 0..3): one word a lane serves two products on A's side and four on B's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sage3/host_device.h"

// The instructions are those of one architecture ("a") or family ("f"), not of a number and all above it.
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL) || \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH_FAMILY_SPECIFIC__ == 1200)
#define SAGE3_HAS_NVFP4_MMA 1
#else
#define SAGE3_HAS_NVFP4_MMA 0
#endif

namespace sage3::nvfp4 {

// ------------------------------------------------------------------------------------------------ emulation

// The e2m1 code of x, 0..15: nearest, ties to even, at most 6; NaN is +6, as cvt.rn.satfinite has it.
SAGE3_HD uint32_t encode_e2m1(float x) {
  if (x != x) return 7;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const float y = fabsf(x);
  const uint32_t code = (y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) + (y > 5.0f);
  return code | (bits >> 31) << 3;
}

// The value of an e4m3 code whose sign bit is ignored (ue4m3). 0x7F is NaN.
SAGE3_HD float decode_ue4m3(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  return ldexpf(static_cast<float>(exponent != 0 ? 8 + mantissa : mantissa), (exponent != 0 ? static_cast<int>(exponent) : 1) - 10);
}

// Bytes picked from the eight of (high, low) by the four lowest hexadecimal digits of `which`, each 0..7. PRMT
SAGE3_HD uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, which);
#else
  const uint64_t all = uint64_t(high) << 32 | low;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(all >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return word;
#endif
}

// sum + the products of four signed bytes. IDP.4A
SAGE3_HD int multiply_bytes(uint32_t a, uint32_t b, int sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
#endif
}

// Four e2m1 codes -> four signed bytes of twice their values: 0 1 2 3 4 6 8 12, all whole.
SAGE3_HD uint32_t doubled(uint32_t codes) {
  const uint32_t magnitude = codes & 0x7777;
  const uint32_t negative = pick_bytes(0x0000FF00, 0, codes >> 3 & 0x1111);  // FF where the sign is set
  const uint32_t plus = pick_bytes(0x03020100, 0x0C080604, magnitude), minus = pick_bytes(0xFDFEFF00, 0xF4F8FAFC, magnitude);
  return (plus & ~negative) | (minus & negative);
}

// Four times the product of eight codes with eight others.
SAGE3_HD int multiply_codes(uint32_t a, uint32_t b, int sum) {
  sum = multiply_bytes(doubled(a & 0xFFFF), doubled(b & 0xFFFF), sum);
  return multiply_bytes(doubled(a >> 16), doubled(b >> 16), sum);
}

// Lanes whose words a lane's results need: `part` (0..3) counts the lanes that share a row of A or a column of B.
SAGE3_HD constexpr int lane_of_a(int lane, int part) { return lane / 4 * 4 + part; }
SAGE3_HD constexpr int lane_of_b(int lane, int column, int part) { return 4 * (lane % 4 * 2 + column) + part; }
SAGE3_HD constexpr int lane_of_scale_a(int lane, int row, int selector) { return lane / 4 * 4 + 2 * selector + row; }
SAGE3_HD constexpr int lane_of_scale_b(int lane, int column, int selector) { return 4 * (lane % 4 * 2 + column) + selector; }

// D = A B * scales + C of one lane, where get(word, lane) is a word as another lane has it: __shfl_sync on a GPU. Every
// block of 16 is exact (integers of 12 bits times scales of 8); blocks and C are added in double, and rounded once. In what
// order and width the instruction adds them NVIDIA does not say.
template <class Get>
SAGE3_HD void mma_emulated(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                               const uint32_t& scale_a, int selector_a, const uint32_t& scale_b, int selector_b, int lane,
                               Get get) {
  int sum[2][2][4] = {};  // [row g, row g + 8][column][block]
  for (int part = 0; part < 4; ++part) {
    uint32_t from_a[4], from_b[2][2];
    for (int i = 0; i < 4; ++i) from_a[i] = get(a[i], lane_of_a(lane, part));
    for (int column = 0; column < 2; ++column) {
      for (int i = 0; i < 2; ++i) from_b[column][i] = get(b[i], lane_of_b(lane, column, part));
    }
    for (int row = 0; row < 2; ++row) {
      for (int column = 0; column < 2; ++column) {
        for (int half = 0; half < 2; ++half) {  // 32 k each
          int& to = sum[row][column][2 * half + part / 2];
          to = multiply_codes(from_a[2 * half + row], from_b[column][half], to);
        }
      }
    }
  }
  uint32_t of_row[2], of_column[2];
  for (int i = 0; i < 2; ++i) {
    of_row[i] = get(scale_a, lane_of_scale_a(lane, i, selector_a));
    of_column[i] = get(scale_b, lane_of_scale_b(lane, i, selector_b));
  }
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      double total = c[2 * row + column];
      for (int block = 0; block < 4; ++block) {
        const float scale = decode_ue4m3(of_row[row] >> 8 * block & 255) * decode_ue4m3(of_column[column] >> 8 * block & 255);
        total += 0.25 * sum[row][column][block] * scale;
      }
      d[2 * row + column] = static_cast<float>(total);
    }
  }
}

// ------------------------------------------------------------------------------------------------ instructions
#ifdef __CUDACC__

// Eight floats -> a word of e2m1 codes, the first in the lowest bits. 4 F2FP.E2M1
__device__ __forceinline__ uint32_t pack_e2m1(const float (&x)[8]) {
#if SAGE3_HAS_NVFP4_MMA
  uint32_t word;
  asm("{.reg .b8 b0, b1, b2, b3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3};}\n"
      : "=r"(word)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return word;
#else
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) word |= encode_e2m1(x[i]) << 4 * i;
  return word;
#endif
}

#if !SAGE3_HAS_NVFP4_MMA
// One copy of the emulation a kernel: it is long, and kernels have a hundred products.
__device__ __noinline__ inline float4 mma_called(uint4 a, uint2 b, float4 c, uint32_t scale_a, int selector_a, uint32_t scale_b,
                                                 int selector_b) {
  const uint32_t of_a[4] = {a.x, a.y, a.z, a.w}, of_b[2] = {b.x, b.y};
  const float from[4] = {c.x, c.y, c.z, c.w};
  float d[4];
  mma_emulated(d, of_a, of_b, from, scale_a, selector_a, scale_b, selector_b, static_cast<int>(threadIdx.x % 32),
               [](uint32_t word, int lane) { return __shfl_sync(0xffffffffu, word, lane); });
  return make_float4(d[0], d[1], d[2], d[3]);
}
#endif

// D = A B * scales + C; the selectors say which lanes' scales count. All 32 lanes. OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X
template <int kSelectorA, int kSelectorB>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                    uint32_t scale_a, uint32_t scale_b) {
  static_assert(kSelectorA == 0 || kSelectorA == 1);
  static_assert(kSelectorB >= 0 && kSelectorB < 4);
#if SAGE3_HAS_NVFP4_MMA
  asm(
      "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}, {%14}, {0, %16}, {%15}, {0, %17};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]),
        "r"(scale_a), "r"(scale_b), "n"(kSelectorA), "n"(kSelectorB));
#else
  const float4 sum = mma_called(make_uint4(a[0], a[1], a[2], a[3]), make_uint2(b[0], b[1]), make_float4(c[0], c[1], c[2], c[3]),
                                scale_a, kSelectorA, scale_b, kSelectorB);
  d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
#endif
}

#endif  // __CUDACC__

}  // namespace sage3::nvfp4
