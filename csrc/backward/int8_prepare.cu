// Before and after the 8-bit backward pass's products (backward_format.cuh).
//
//   save_output      the output in 8 bits, at the end of the forward pass
//   prepare_queries  64 queries: q8 as wgmma's B operand, q8 and dO turned and quantised anew, dO in bf16, delta
//   prepare_keys     128 keys: what v8 and k8 stand for, in bf16, K turned
//   finish_queries   the sums of dQ, times the softmax scale, in the caller's dtype
//
// dO is rounded to bf16 once, and everything is made from that: rows of dS then add up to zero as they should.

#include <climits>

#include "sage3/channels.cuh"
#include "sage3/launch_backward.h"
#include "sage3/numeric.cuh"

namespace sage3 {
namespace {

using int8::kChannelGroup;
using int8::kGradGroups;
using int8::kKeyTile;
using int8::kQueryTile;

struct Params {
  Int8Backward call;
  int8::Workspace from;
  int8::GradWorkspace at;

  template <class Part>
  __device__ __forceinline__ const Part* saved(int64_t offset) const {
    return reinterpret_cast<const Part*>(static_cast<const unsigned char*>(call.saved) + offset);
  }
  __device__ __forceinline__ unsigned char* part(int64_t offset) const {
    return static_cast<unsigned char*>(call.workspace) + offset;
  }
};

// code = x * inverse, x = code * scale; as in quantize/int8.cu.
struct Scale {
  float scale, inverse;

  __device__ __forceinline__ explicit Scale(float largest_magnitude) {
    const bool nothing = largest_magnitude < 1e-36f;
    scale = nothing ? 0.0f : largest_magnitude * (1.0f / 127.0f);
    inverse = nothing ? 0.0f : reciprocal_approx(largest_magnitude * (1.0f / 16.0f)) * (127.0f / 16.0f);
  }
};

__device__ __forceinline__ float byte_of(uint32_t word, int i) {
  return static_cast<float>(static_cast<signed char>(word >> (8 * i)));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// ------------------------------------------------------------------------------------------------- save_output

template <class T>
__device__ __forceinline__ float number(const void* data, int64_t at) {
  return static_cast<float>(static_cast<const T*>(data)[at]);
}

// A warp a token.
template <class T>
__global__ void __launch_bounds__(256) int8_save_tokens(const __grid_constant__ Int8SaveOutput call) {
  constexpr int kTurns = 8;  // of 32 channels, up to head dim 256
  const int8::Shape& shape = call.shape;
  const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32, rows = int64_t(shape.batch) * shape.heads * shape.queries;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t bh = row / shape.queries, token = row - bh * shape.queries;
  const int64_t batch = bh / shape.heads, head = bh - batch * shape.heads;
  const int64_t from = batch * call.out.stride[0] + head * call.out.stride[1] + token * call.out.stride[2];
  float x[kTurns], most = 0.0f;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int channel = lane + 32 * i;
    x[i] = channel < shape.head_dim ? number<T>(call.out.data, from + channel * call.out.stride[3]) : 0.0f;
    most = max_nan(most, fabsf(x[i]));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = max_nan(most, __shfl_xor_sync(0xffffffffu, most, step));
  const Scale s(most);
  if (lane == 0) call.out_scale[row] = s.scale;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int channel = lane + 32 * i;
    if (channel < shape.head_dim) {
      call.out8[row * shape.head_dim + channel] = static_cast<signed char>(round_to_int(x[i] * s.inverse));
    }
  }
}

// ------------------------------------------------------------------------------------------------- prepare_queries

// Thread: eight channels of the queries {2i, 2i+1, 8+2i, 9+2i} of a group of 16, which are one word of each channel's row in
// the turned blocks.
template <class T, int D, bool kDense>
__global__ void __launch_bounds__(2 * D) int8_prepare_queries(const __grid_constant__ Params p) {
  constexpr int kColumns = D / kChunk;
  __shared__ int8::QueryBlock<D> block;
  __shared__ float products[kQueryTile][kColumns];
  __shared__ int most_q[kGradGroups], most_dout[kGradGroups];  // bits of floats that are not negative, NaN above all
  const int8::Shape& shape = p.call.shape;
  const int64_t tiles = shape.query_tiles(), bh = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x - bh * tiles), batch = static_cast<int>(bh / shape.heads);
  const int head = static_cast<int>(bh - int64_t(batch) * shape.heads);
  const int column = threadIdx.x % kColumns, four = threadIdx.x / kColumns, channel = column * kChunk;
  const int first = 16 * (four / 4) + 2 * (four % 4);
  const auto query_of = [&](int i) { return first + 8 * (i / 2) + i % 2; };
  const int group = channel / kChannelGroup;

  if (threadIdx.x < kGradGroups) most_q[threadIdx.x] = 0, most_dout[threadIdx.x] = 0;

  const HeadRows<T, kDense> rows(p.call.dout, batch, head, shape.head_dim);
  const unsigned char* const q8 = p.saved<unsigned char>(p.from.q8) + int64_t(blockIdx.x) * kQueryTile * D;
  const float* const q_scale = p.saved<float>(p.from.q_scale) + int64_t(blockIdx.x) * kQueryTile;
  uint32_t dout[4][kChunk / 2];  // pairs of bf16
  uint2 codes[4];
  float scale[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = query_of(i), token = tile * kQueryTile + query;
    const bool there = token < shape.queries;
    const Chunk<T> x = rows.load(token, channel, there);
#pragma unroll
    for (int c = 0; c < kChunk / 2; ++c) dout[i][c] = pack_bf16(x[2 * c], x[2 * c + 1]);
    codes[i].x = *reinterpret_cast<const uint32_t*>(q8 + int8::query_offset(query, channel, D));
    codes[i].y = *reinterpret_cast<const uint32_t*>(q8 + int8::query_offset(query, channel + 4, D));
    scale[i] = q_scale[query];

    float product = 0.0f;
    if (there) {
      const int64_t row = bh * shape.queries + token;
      const signed char* const out8 = p.call.out8 + row * shape.head_dim;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        const float o = channel + c < shape.head_dim ? static_cast<float>(out8[channel + c]) : 0.0f;
        product = fmaf(__uint_as_float(c % 2 ? dout[i][c / 2] & 0xffff0000u : dout[i][c / 2] << 16), o, product);
      }
      product *= p.call.out_scale[row];
    }
    products[query][column] = product;
    *reinterpret_cast<uint4*>(block.dout16 + int8::grad_dout_offset(query, channel, D)) =
        make_uint4(dout[i][0], dout[i][1], dout[i][2], dout[i][3]);
    *reinterpret_cast<uint2*>(block.q8 + int8::grad_query_offset(query, channel, D)) = codes[i];
  }
  __syncthreads();

  const auto dout_of = [&](int i, int c) {
    return __uint_as_float(c % 2 ? dout[i][c / 2] & 0xffff0000u : dout[i][c / 2] << 16);
  };
  // With the softmax scale: q8 * q_scale holds log2(e) as well.
  const auto q_of = [&](int i, int c) { return byte_of(c < 4 ? codes[i].x : codes[i].y, c % 4) * (scale[i] * kLn2); };
  float q_most = 0.0f, dout_most = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      q_most = max_nan(q_most, fabsf(q_of(i, c)));
      dout_most = max_nan(dout_most, fabsf(dout_of(i, c)));
    }
  }
  atomicMax(&most_q[group], __float_as_int(q_most) & 0x7fffffff);
  atomicMax(&most_dout[group], __float_as_int(dout_most) & 0x7fffffff);
  if (threadIdx.x < kQueryTile) {
    const int token = tile * kQueryTile + threadIdx.x;
    float delta = 0.0f, lse = -kNegativeInfinity;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) delta += products[threadIdx.x][c];
    if (token < shape.queries) {
      const float natural = p.call.lse[bh * shape.queries + token];
      if (natural != kNegativeInfinity) lse = natural * kLog2e;
      if (p.call.dlse != nullptr) delta -= p.call.dlse[bh * shape.queries + token];  // dS = P (dP - delta + dlse)
    }
    block.q_scale[threadIdx.x] = q_scale[threadIdx.x], block.lse[threadIdx.x] = lse, block.delta[threadIdx.x] = delta;
  }
  __syncthreads();

  if (threadIdx.x < kGradGroups) {
    block.q_group[threadIdx.x] = Scale(__int_as_float(most_q[threadIdx.x])).scale;
    block.dout_group[threadIdx.x] = Scale(__int_as_float(most_dout[threadIdx.x])).scale;
  }
  const float q_inverse = Scale(__int_as_float(most_q[group])).inverse;
  const float dout_inverse = Scale(__int_as_float(most_dout[group])).inverse;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    const int at = int8::grad_turned_offset(first, channel + c);
    *reinterpret_cast<uint32_t*>(block.q8t + at) = pack_s8(q_of(0, c) * q_inverse, q_of(1, c) * q_inverse,
                                                           q_of(2, c) * q_inverse, q_of(3, c) * q_inverse);
    *reinterpret_cast<uint32_t*>(block.dout8 + at) =
        pack_s8(dout_of(0, c) * dout_inverse, dout_of(1, c) * dout_inverse, dout_of(2, c) * dout_inverse,
                dout_of(3, c) * dout_inverse);
  }
  __syncthreads();

  unsigned char* const to = p.part(p.at.query_blocks + int64_t(blockIdx.x) * sizeof(block));
  const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(&block);
  for (int at = 16 * threadIdx.x; at < static_cast<int>(sizeof(block)); at += 16 * 2 * D) {
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(bytes + at);
  }
}

// ------------------------------------------------------------------------------------------------- prepare_keys

template <int D>
__global__ void __launch_bounds__(256) int8_prepare_keys(const __grid_constant__ Params p) {
  const int8::Shape& shape = p.call.shape;
  const int64_t tiles = shape.key_tiles(), bh = blockIdx.x / tiles, tile = blockIdx.x - bh * tiles;
  const int keys = static_cast<int>(min(int64_t(kKeyTile), shape.keys - tile * kKeyTile));  // that there are
  unsigned char* const block = p.part(p.at.key_blocks + int64_t(blockIdx.x) * sizeof(int8::KeyBlock<D>));
  unsigned char* const v16 = block;
  unsigned char* const k16 = block + kKeyTile * D * 2;
  const unsigned char* const k8 = p.saved<unsigned char>(p.from.k8) + int64_t(blockIdx.x) * kKeyTile * D;
  const unsigned char* const v8 = p.saved<unsigned char>(p.from.v8) + int64_t(blockIdx.x) * kKeyTile * D;
  const float* const k_scale = p.saved<float>(p.from.k_scale) + int64_t(blockIdx.x) * int8::kKeyGroups;
  const float* const v_scale = p.saved<float>(p.from.v_scale) + int64_t(blockIdx.x) * int8::value_scales(D);
  const float* const v_norm = p.saved<float>(p.from.v_norm) + bh * D;
  const float* const v_mean = p.saved<float>(p.from.v_mean) + bh * D;

  // K: four channels of eight keys, which are side by side in k16. Codes past the end are 0.
  for (int item = threadIdx.x; item < kKeyTile / 8 * (D / 4); item += 256) {
    const int key = item % (kKeyTile / 8) * 8, channel = item / (kKeyTile / 8) * 4;
    uint32_t word[8];
    float scale[int8::kKeyGroups];
#pragma unroll
    for (int i = 0; i < 8; ++i) word[i] = *reinterpret_cast<const uint32_t*>(k8 + int8::key_offset(key + i, channel, D));
#pragma unroll
    for (int i = 0; i < int8::kKeyGroups; ++i) scale[i] = k_scale[i];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pair[i] = pack_bf16(byte_of(word[2 * i], c) * scale[i], byte_of(word[2 * i + 1], c) * scale[i]);
      }
      *reinterpret_cast<uint4*>(k16 + int8::grad_key_offset(key, channel + c, D)) =
          make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }
  // V: eight channels of the four keys of a word of v8. Keys past the end are 0, not the mean.
  for (int item = threadIdx.x; item < kKeyTile / 4 * (D / 8); item += 256) {
    const int column = item % (D / 8), four = item / (D / 8), channel = column * 8;
    const int first = 16 * (four / 4) + 2 * (four % 4);
    float x[8][4];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(v8 + int8::value_offset(first, channel + c));
      const float factor = v_scale[channel / kChannelGroup] * v_norm[channel + c], mean = v_mean[channel + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c][i] = fmaf(byte_of(word, i), factor, mean);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + 8 * (i / 2) + i % 2;
      uint4 words = make_uint4(pack_bf16(x[0][i], x[1][i]), pack_bf16(x[2][i], x[3][i]), pack_bf16(x[4][i], x[5][i]),
                               pack_bf16(x[6][i], x[7][i]));
      if (key >= keys) words = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(v16 + int8::grad_value_offset(key, channel, D)) = words;
    }
  }
}

// ------------------------------------------------------------------------------------------------- finish_queries

// A block a tile; a thread as in the products, for both warpgroups' halves.
template <class T, int D>
__global__ void __launch_bounds__(256) int8_finish_queries(const __grid_constant__ Params p) {
  const int8::Shape& shape = p.call.shape;
  const int64_t tiles = shape.query_tiles(), bh = blockIdx.x / tiles, batch = bh / shape.heads, head = bh - batch * shape.heads;
  const int tile = static_cast<int>(blockIdx.x - bh * tiles), half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int row = tile * kQueryTile + 16 * (thread / 32) + thread % 32 / 4, column = half * (D / 2) + thread % 4 * 2;
  const float* const sums = reinterpret_cast<const float*>(p.part(p.at.sums)) + int64_t(blockIdx.x) * kQueryTile * D;
  const Tensor4& dq = p.call.dq;
#pragma unroll
  for (int i = 0; i < D / 4; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(sums + int8::grad_sum_offset(half, i, thread, D));
    const float x[4] = {four.x, four.y, four.z, four.w};
    const int channel = column + 2 * i;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= shape.queries) continue;
      const int64_t at = batch * dq.stride[0] + head * dq.stride[1] + int64_t(row + 8 * r) * dq.stride[2] + channel;
      // A pair of 16-bit numbers at once where it lies on a word.
      T pair[2] = {static_cast<T>(x[2 * r] * p.call.scale), static_cast<T>(x[2 * r + 1] * p.call.scale)};
      T* const to = static_cast<T*>(const_cast<void*>(dq.data)) + at;
      if (channel + 2 <= shape.head_dim && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(to) = reinterpret_cast<const uint32_t&>(pair);
        } else {
          *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
        }
      } else {
        if (channel < shape.head_dim) to[0] = pair[0];
        if (channel + 1 < shape.head_dim) to[1] = pair[1];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- launch

cudaError_t check_grid(int64_t blocks) { return blocks > INT_MAX ? cudaErrorInvalidValue : cudaSuccess; }

template <class T, int D, bool kDense>
cudaError_t prepare(const Int8Backward& call, cudaStream_t stream) {
  const Params params{call, int8::Workspace(call.shape), int8::GradWorkspace(call.shape)};
  const int8::Shape& shape = call.shape;
  const int64_t queries = int64_t(shape.batch) * shape.heads * shape.query_tiles();
  const int64_t keys = int64_t(shape.batch) * shape.kv_heads * shape.key_tiles();
  if (check_grid(queries) != cudaSuccess || check_grid(keys) != cudaSuccess) return cudaErrorInvalidValue;
  unsigned char* const sums = static_cast<unsigned char*>(call.workspace) + params.at.sums;
  cudaError_t error = cudaMemsetAsync(sums, 0, params.at.zeroed(), stream);
  if (error != cudaSuccess) return error;
  int8_prepare_keys<D><<<static_cast<unsigned>(keys), 256, 0, stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  int8_prepare_queries<T, D, kDense><<<static_cast<unsigned>(queries), 2 * D, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t int8_save_output(const Int8SaveOutput& call, cudaStream_t stream) {
  const int64_t rows = int64_t(call.shape.batch) * call.shape.heads * call.shape.queries, blocks = int8::ceil_div(rows, 8);
  if (check_grid(blocks) != cudaSuccess) return cudaErrorInvalidValue;
  return with_dtype(call.out.dtype, [&](auto x) {
    int8_save_tokens<decltype(x)><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

cudaError_t int8_backward_prepare(const Int8Backward& call, cudaStream_t stream) {
  return with_dtype(call.dout.dtype, [&](auto x) {
    return with_grad_head_dim(call.shape.d(), [&](auto d) {
      using T = decltype(x);
      constexpr int D = decltype(d)::value;
      return is_dense(call.dout, call.shape.head_dim) ? prepare<T, D, true>(call, stream) : prepare<T, D, false>(call, stream);
    });
  });
}

cudaError_t int8_backward_finish(const Int8Backward& call, cudaStream_t stream) {
  const Params params{call, int8::Workspace(call.shape), int8::GradWorkspace(call.shape)};
  const int64_t blocks = int64_t(call.shape.batch) * call.shape.heads * call.shape.query_tiles();
  return with_dtype(call.dq.dtype, [&](auto x) {
    return with_grad_head_dim(call.shape.d(), [&](auto d) {
      int8_finish_queries<decltype(x), decltype(d)::value><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(params);
      return cudaGetLastError();
    });
  });
}

}  // namespace sage3
