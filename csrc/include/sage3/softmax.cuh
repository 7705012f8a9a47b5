// Online softmax on one tile of scores: a warp's 16 queries x 128 keys, as wgmma and mma.sync leave them.
//
// Fragment: lane = 4 * g + t. Value 4j, 4j+1 of a thread is row g, columns 8j+2t, 8j+2t+1; value 4j+2, 4j+3 is row g+8.
// All exponents are base 2: a row's factor c = q_scale * k_scale holds scale * log2(e) already.
//
// P is quantised per row and tile to 0..255 with the tile's own maximum at 255, so flat and peaked rows keep eight bits
// in every tile. O is kept relative to a reference m of the row that moves only when a tile's maximum passes it by
// a power of two (after FlashAttention-4's conditional rescaling): fp32 has the range, and the final division is exact either
// way. The row's sum is taken from the quantised P, so that its rounding cancels in the division.
#pragma once

#include "sage3/launch.h"
#include "sage3/numeric.cuh"

namespace sage3 {

constexpr int kTileScores = 64;             // per thread: 16 * 128 / 32
constexpr int kTileWords = kTileScores / 4; // of quantised P: the A operands of four k-steps of 32 tokens
constexpr float kLazy = 40.0f;              // 2^40 * 2^24 codes * 2^18 tokens stay far inside fp32
constexpr float kNearLazy = 2.0f;           // where the reference is used as the row's maximum, too
constexpr float kLog2TopCode = 7.994353436858858f;  // log2(255)
constexpr float kNobody = -1e30f;           // the maximum of a row that attends nothing: finite, so that no NaN arises

// What a thread keeps of its two rows (g and g + 8) over all tiles.
struct RowState {
  float m[2] = {kNegativeInfinity, kNegativeInfinity};  // reference of O and l
  float l[2] = {0.0f, 0.0f};  // sum of this thread's codes of P, relative to m; add up over the quad at the end
};

// The larger value of each of the quad's four threads; NaN wins.
__device__ __forceinline__ float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The tile's maximum of both rows, from integer scores: one factor per row and thread, and c >= 0. most: this thread's.
__device__ __forceinline__ void tile_max(const int (&s)[kTileScores], const float (&c)[2], int (&most)[2], float (&top)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int chain[4];  // to cover the latency
#pragma unroll
    for (int i = 0; i < 4; ++i) chain[i] = max(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]);
#pragma unroll
    for (int j = 4; j < kTileScores / 4; ++j) chain[j % 4] = max3(chain[j % 4], s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
    most[r] = max(max(chain[0], chain[1]), max(chain[2], chain[3]));
    top[r] = quad_max(c[r] * __int2float_rn(most[r]));
  }
}

// The tile's maximum from scores that are floats already (see scores_as_floats).
__device__ __forceinline__ void tile_max_of_floats(const int (&y)[kTileScores], float (&top)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = kNobody;
#pragma unroll
    for (int j = 0; j < kTileScores / 4; ++j) {
      most = max_nan(most, __int_as_float(y[4 * j + 2 * r]));
      most = max_nan(most, __int_as_float(y[4 * j + 2 * r + 1]));
    }
    top[r] = quad_max(most);
  }
}

// Codes of P in the order of the A operand: word 4k + {0, 1, 2, 3} of k-step k of 32 tokens is (row g, first 16 tokens),
// (row g + 8, first 16), (row g, last 16), (row g + 8, last 16); v8's token permutation makes that right.
// `exponent(i)` is log2 of 255 * P of value i. Adds the codes of each row to sum.
template <class Exponent>
__device__ __forceinline__ void quantize_p(uint32_t (&p)[kTileWords], uint32_t (&sum)[2], Exponent exponent) {
#pragma unroll
  for (int half = 0; half < kTileScores / 8; ++half) {  // 16 tokens: n8 tiles 2 * half and 2 * half + 1
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 8 * half + 2 * r;
      const uint32_t word = pack_u8(exp2_approx(exponent(i)), exp2_approx(exponent(i + 1)),
                                    exp2_approx(exponent(i + 4)), exp2_approx(exponent(i + 5)));
      sum[r] = add_bytes(word, sum[r]);
      p[2 * half + r] = word;
    }
  }
}

// The same from raw scores and without an exponential: 2^x is read off a number whose bits are x in fixed point, as
// Schraudolph did (Neural Computation 11, 1999): (1 + f) 2^n for x = n + f, which is 0 to 6 % too large, on average the
// 4 % that kBias takes off. One integer multiply-add a score; c too is fixed point, in units of 2^-23.
// The product may wrap around below -kFastSpan. Where it could, kClamp: scores that far below the thread's maximum `most`
// are lifted, at the price of an instruction each; they are code 0 either way.
constexpr float kFastSpan = 350.0f;

template <bool kClamp>
__device__ __forceinline__ void quantize_p_fast(uint32_t (&p)[kTileWords], uint32_t (&sum)[2], const int (&s)[kTileScores],
                                                const float (&c)[2], const int (&most)[2], const float (&top)[2]) {
  constexpr float kUnit = 8388608.0f;  // 2^23: one in the exponent of a float
  constexpr float kBias = 0.0575f;
  uint32_t factor[2], base[2];
  [[maybe_unused]] int least[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factor[r] = static_cast<uint32_t>(__float2int_rn(c[r] * kUnit));
    // The thread's maximum against the row's: where it is 2^-30 of it, all the thread has is code 0.
    const float below = fmaxf(c[r] * __int2float_rn(most[r]) - top[r], -30.0f) - kBias;
    base[r] = static_cast<uint32_t>(__float2int_rn(below * kUnit) + __float_as_int(255.0f)) -
              static_cast<uint32_t>(most[r]) * factor[r];
    if constexpr (kClamp) least[r] = most[r] - max(1, __float2int_rd(fminf(__fdividef(kFastSpan, c[r]), 1e9f)));
  }
  auto power = [&](int i) {
    const int r = i / 2 % 2;
    const int score = kClamp ? max(s[i], least[r]) : s[i];
    return __uint_as_float(static_cast<uint32_t>(score) * factor[r] + base[r]);
  };
#pragma unroll
  for (int half = 0; half < kTileScores / 8; ++half) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 8 * half + 2 * r;
      const uint32_t word = pack_u8(power(i), power(i + 1), power(i + 4), power(i + 5));
      sum[r] = add_bytes(word, sum[r]);
      p[2 * half + r] = word;
    }
  }
}

// Moves m up where a tile's maximum has left it far behind: `rescale(r, factor)` must multiply row r of O. Returns in
// weight what the tile's codes count for relative to m, and adds the tile to l.
template <bool kNear = false, class Rescale>
__device__ __forceinline__ void update_rows(RowState& state, const float (&top)[2], const uint32_t (&sum)[2],
                                            float (&weight)[2], Rescale rescale) {
  constexpr float kMost = kNear ? kNearLazy : kLazy;
  const bool behind = top[0] - state.m[0] > kMost || top[1] - state.m[1] > kMost;
  if (__any_sync(0xffffffffu, behind)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!(top[r] - state.m[r] > kMost)) continue;
      const float factor = exp2_approx(state.m[r] - top[r]);  // 0 at the first tile, where m is -inf
      state.l[r] *= factor;
      state.m[r] = top[r];
      rescale(r, factor);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    weight[r] = exp2_approx(top[r] - state.m[r]);
    state.l[r] = fmaf(weight[r], __uint2float_rn(sum[r]), state.l[r]);
  }
}

// The rows' ends: the factor that turns O into an average, and the natural log-sum-exp (-inf for an empty row).
__device__ __forceinline__ void finish_rows(const RowState& state, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float l = quad_sum(state.l[r]);
    inverse[r] = l == 0.0f ? 0.0f : 1.0f / l;
    lse[r] = l == 0.0f ? kNegativeInfinity : kLn2 * (state.m[r] + log2_approx(l) - kLog2TopCode);
  }
}

}  // namespace sage3
