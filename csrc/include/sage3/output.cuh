// The last step: O of a warp (16 rows x D channels, fp32, fragment layout) -> the output tensor.
//
// out = O * inverse * v_norm + v_mean undoes the centring of V, exactly, because the weights of a row add up to one. A row
// that attends nothing (inverse 0) is 0.
#pragma once

#include <cstddef>
#include <type_traits>

#include "sage3/launch.h"
#include "sage3/numeric.cuh"

namespace sage3 {

// Two floats -> one word of two 16-bit numbers, a in the lower half. F2FP
__device__ __forceinline__ uint32_t pack_16bit(float a, float b, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Transposes a 4 x 4 matrix of words held by the quad: thread t gives word i to thread i, as its word t.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4], int t) {
  const bool odd = t & 1, high = t & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + 2], 2);
    (high ? w[i] : w[i + 2]) = got;
  }
}

// `row0` is the query of the warp's first row; v_mean and v_norm are those of the kv head; no v_norm (null) is ones. The
// channels are those from channel0 on.
template <int D, class Norm, class Call>
__device__ __forceinline__ void store_output(const float (&o)[D / 2], const float (&inverse)[2], const float* v_mean,
                                             Norm v_norm, const Call& call, int batch, int head, int row0,
                                             int lane = threadIdx.x % 32, int channel0 = 0) {
  constexpr bool kNorms = !std::is_same_v<Norm, std::nullptr_t>;
  const int g = lane / 4, t = lane % 4;
  const int head_dim = call.shape.head_dim;
  const Tensor4& out = call.out;
  const bool wide = out.dtype != Dtype::kFloat32;
  char* const base = static_cast<char*>(const_cast<void*>(out.data));
  constexpr int kAhead = D < 128 ? D / 32 : 4;  // blocks whose means and norms are fetched at once
  float2 mean[4 * kAhead], norm[4 * kAhead];
#pragma unroll
  for (int block = 0; block < D / 32; ++block) {  // 32 channels: four n8 tiles
    if (block % kAhead == 0) {
#pragma unroll
      for (int i = 0; i < 4 * kAhead; ++i) {
        const int channel = channel0 + 32 * block + 8 * i + 2 * t;
        mean[i] = *reinterpret_cast<const float2*>(v_mean + channel);
        norm[i] = make_float2(1.0f, 1.0f);
        if constexpr (kNorms) norm[i] = *reinterpret_cast<const float2*>(v_norm + channel);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = row0 + g + 8 * r;
      const bool mine = query < call.shape.queries;
      const int64_t row = batch * out.stride[0] + head * out.stride[1] + query * out.stride[2];
      float value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float centred = o[16 * block + 4 * (i / 2) + 2 * r + i % 2] * inverse[r];
        const int pair = 4 * (block % kAhead) + i / 2;
        const float scaled = i % 2 ? fmaf(centred, norm[pair].y, mean[pair].y) : fmaf(centred, norm[pair].x, mean[pair].x);
        value[i] = inverse[r] == 0.0f ? 0.0f : scaled;
      }
      if (wide) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = pack_16bit(value[2 * i], value[2 * i + 1], out.dtype);
        quad_transpose(word, t);  // now word i holds channels 2i, 2i + 1 of n8 tile t
        const int channel = channel0 + 32 * block + 8 * t;
        uint16_t* const to = reinterpret_cast<uint16_t*>(base) + row + channel;
        if (mine && channel + 8 <= head_dim && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
          *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
        } else if (mine) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (channel + i < head_dim) to[i] = static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
          }
        }
      } else if (mine) {
        float* const to = reinterpret_cast<float*>(base) + row;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int channel = channel0 + 32 * block + 8 * (i / 2) + 2 * t + i % 2;
          if (channel < head_dim) to[channel] = value[i];
        }
      }
    }
  }
}

}  // namespace sage3
