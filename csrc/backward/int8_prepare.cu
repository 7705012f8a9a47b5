// Before and after the 8-bit backward pass's products (backward_format.cuh).
//
//   save_output      the output in 8 bits, at the end of the forward pass
//   find_levels      a kv head: the levels of its queries, keys and values
//   prepare_keys     128 keys: what v8 stands for in bf16, what k8 stands for in e4m3, turned
//   prepare_queries  64 queries: q8 as wgmma's B operand, q8 and dO turned, in e4m3, dO in bf16, delta
//   choose_gains     a head: the gains of its tiles of queries
//   finish_queries   the sums of dQ, times the softmax scale, in the caller's dtype
//
// dO is rounded to bf16 once, and everything is made from that: rows of dS then add up to zero as they should.

#include <climits>

#include "sage3/channels.cuh"
#include "sage3/launch_backward.h"
#include "sage3/numeric.cuh"
#include "sage3/ptx_sm90_backward.cuh"

namespace sage3 {
namespace {

using int8::kChannelGroup;
using int8::GradLevel;
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
  __device__ __forceinline__ GradLevel& level(int64_t batch, int64_t head) const {  // of a query head
    const int64_t kv = batch * call.shape.kv_heads + head / (call.shape.heads / call.shape.kv_heads);
    return reinterpret_cast<GradLevel*>(part(at.levels))[kv];
  }
};

// The power of two at a magnitude: 2^floor(log2(x)), from 2^-126 to 2^126. 1 for what is no number.
__device__ __forceinline__ float power_below(float x) {
  if (!(x < -kNegativeInfinity)) return 1.0f;
  const int exponent = min(max(__float_as_int(x) >> 23, 1), 253);
  return __int_as_float(exponent << 23);
}
__device__ __forceinline__ float inverse_of_power(float power) { return __int_as_float((254 << 23) - __float_as_int(power)); }

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

__device__ __forceinline__ float unpack_bf16(const uint32_t (&pairs)[kChunk / 2], int i) {
  return __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// ------------------------------------------------------------------------------------------------- save_output

constexpr int kSaveThreads = 256;

// Lanes that share a token, of eight channels each, and the tokens of a block.
template <int D>
constexpr int kSaveLanes = D == 64 ? 8 : 16;
constexpr int kSaveTurns = 4;  // so many tokens of a thread are read before the first is computed with
template <int D>
constexpr int kSaveTokens = kSaveThreads / kSaveLanes<D> * kSaveTurns;

template <class T, int D, bool kDense>
__global__ void __launch_bounds__(kSaveThreads) int8_save_tokens(const __grid_constant__ Int8SaveOutput call) {
  constexpr int kLanes = kSaveLanes<D>, kRows = kSaveThreads / kLanes;
  const int8::Shape& shape = call.shape;
  const int tiles = (shape.queries + kSaveTokens<D> - 1) / kSaveTokens<D>, bh = blockIdx.x / tiles;
  const int first = (blockIdx.x - bh * tiles) * kSaveTokens<D> + threadIdx.x / kLanes, channel = threadIdx.x % kLanes * kChunk;
  const HeadRows<T, kDense> rows(call.out, bh / shape.heads, bh % shape.heads, shape.head_dim);
  Chunk<T> x[kSaveTurns];
#pragma unroll
  for (int i = 0; i < kSaveTurns; ++i) x[i] = rows.load(first + i * kRows, channel, first + i * kRows < shape.queries);
#pragma unroll
  for (int i = 0; i < kSaveTurns; ++i) {
    float most = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) most = max_nan(most, fabsf(x[i][c]));
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) most = max_nan(most, __shfl_xor_sync(0xffffffffu, most, step));
    const int token = first + i * kRows;
    if (token >= shape.queries) continue;
    const Scale s(most);
    const int64_t row = int64_t(bh) * shape.queries + token;
    if (channel == 0) call.out_scale[row] = s.scale;
    const auto code = [&](int c) { return x[i][c] * s.inverse; };
    const uint32_t word[2] = {pack_s8(code(0), code(1), code(2), code(3)), pack_s8(code(4), code(5), code(6), code(7))};
    signed char* const to = call.out8 + row * shape.head_dim + channel;
    if (shape.head_dim % kChunk == 0) {
      if (channel < shape.head_dim) *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (channel + c < shape.head_dim) to[c] = static_cast<signed char>(word[c / 4] >> (8 * (c % 4)));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- find_levels

constexpr int kLevelThreads = 256;

// A block a kv head.
template <int D>
__global__ void __launch_bounds__(kLevelThreads) int8_grad_levels(const __grid_constant__ Params p) {
  const int8::Shape& shape = p.call.shape;
  const int64_t kv = blockIdx.x, group = shape.heads / shape.kv_heads, tiles = shape.query_tiles(), rows = tiles * kQueryTile;
  const int64_t batch = kv / shape.kv_heads, first = batch * shape.heads + (kv - batch * shape.kv_heads) * group;
  __shared__ int most_q, most_k, most_v[D / 32];  // bits of floats that are not negative
  __shared__ int varied[D / 32];
  __shared__ float square[D];
  if (threadIdx.x == 0) most_q = most_k = 0;
  if (threadIdx.x < D / 32) most_v[threadIdx.x] = varied[threadIdx.x] = 0;
  __syncthreads();
  float most = 0.0f;
  for (int64_t head = first; head < first + group; ++head) {
    const float* const scales = p.saved<float>(p.from.q_scale) + head * rows;
    for (int64_t i = threadIdx.x; i < shape.queries; i += kLevelThreads) most = max_nan(most, scales[i]);
  }
  atomicMax(&most_q, __float_as_int(most));
  most = 0.0f;
  const float* const k_scales = p.saved<float>(p.from.k_scale) + kv * shape.key_tiles() * int8::kKeyGroups;
  for (int64_t i = threadIdx.x; i < shape.key_tiles() * int8::kKeyGroups; i += kLevelThreads) most = max_nan(most, k_scales[i]);
  atomicMax(&most_k, __float_as_int(most));
  constexpr int kGroups = D / 32;
  float largest[kGroups] = {};
  const float* const scales = p.saved<float>(p.from.v_scale) + kv * shape.key_tiles() * int8::value_scales(D);
  for (int64_t i = threadIdx.x; i < shape.key_tiles(); i += kLevelThreads) {
#pragma unroll
    for (int c = 0; c < kGroups; ++c) largest[c] = max_nan(largest[c], scales[i * int8::value_scales(D) + c]);
  }
#pragma unroll
  for (int c = 0; c < kGroups; ++c) atomicMax(&most_v[c], __float_as_int(largest[c]));
  float norm = 1.0f;
  if (threadIdx.x < D) {
    norm = p.saved<float>(p.from.v_norm)[kv * D + threadIdx.x];
    if (norm != 1.0f) varied[threadIdx.x / 32] = 1;
  }
  __syncthreads();
  if (threadIdx.x < D) {  // the farthest that a value lies from its channel's mean
    // A norm of 1 is that of a constant, unless it is all 32 channels' and there are codes: then they vary by just that.
    const bool constant = norm == 1.0f && varied[threadIdx.x / 32] != 0;
    square[threadIdx.x] = constant ? 0.0f : 127.0f * __int_as_float(most_v[threadIdx.x / 32]) * norm;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  float top = 0.0f, sum = 0.0f;  // of values below 1, for their squares are to be numbers
  for (int c = 0; c < D; ++c) top = max_nan(top, square[c]);
  const float unit = power_below(top), inverse = inverse_of_power(unit);
  for (int c = 0; c < D; ++c) sum = fmaf(square[c] * inverse, square[c] * inverse, sum);
  // How far dP may lie from delta: with one channel 4 times the farthest value, for dO / a is below 2; with many, dO and V are
  // not alike, and on N(0,1) this is ten times the typical distance at 128 channels. What is beyond it is limited.
  const float reach = 4.0f * (0.35f + 0.65f / static_cast<float>(shape.head_dim)) * sqrtf(sum);  // times unit
  GradLevel& level = p.level(batch, (kv - batch * shape.kv_heads) * group);
  level.value = top == 0.0f || !(top < -kNegativeInfinity) ? 1.0f : inverse_of_power(power_below(unit * (reach * (256.0f / 448.0f)))) * 0.5f;
  const float query = __int_as_float(most_q) * (127.0f * kLn2);
  level.query = query == 0.0f ? 1.0f : power_below(query) * (1.0f / 128.0f);
  const float key = __int_as_float(most_k) * 127.0f;
  level.key = key == 0.0f ? 1.0f : power_below(key) * (1.0f / 128.0f);
}

// ------------------------------------------------------------------------------------------------- prepare_keys

template <int D>
__global__ void __launch_bounds__(256) int8_prepare_keys(const __grid_constant__ Params p) {
  const int8::Shape& shape = p.call.shape;
  const int64_t tiles = shape.key_tiles(), bh = blockIdx.x / tiles, tile = blockIdx.x - bh * tiles;
  const int keys = static_cast<int>(min(int64_t(kKeyTile), shape.keys - tile * kKeyTile));  // that there are
  unsigned char* const block = p.part(p.at.key_blocks + int64_t(blockIdx.x) * sizeof(int8::KeyBlock<D>));
  unsigned char* const v16 = block;
  unsigned char* const k8t = block + kKeyTile * D * 2;
  const unsigned char* const k8 = p.saved<unsigned char>(p.from.k8) + int64_t(blockIdx.x) * kKeyTile * D;
  const unsigned char* const v8 = p.saved<unsigned char>(p.from.v8) + int64_t(blockIdx.x) * kKeyTile * D;
  const float* const k_scale = p.saved<float>(p.from.k_scale) + int64_t(blockIdx.x) * int8::kKeyGroups;
  const float* const v_scale = p.saved<float>(p.from.v_scale) + int64_t(blockIdx.x) * int8::value_scales(D);
  const float* const v_norm = p.saved<float>(p.from.v_norm) + bh * D;
  const float* const v_mean = p.saved<float>(p.from.v_mean) + bh * D;
  const GradLevel level = reinterpret_cast<const GradLevel*>(p.part(p.at.levels))[bh];
  const float value = level.value;

  // K: four channels of 16 keys, which are side by side in k8t. Codes past the end are 0.
  for (int item = threadIdx.x; item < kKeyTile / 16 * (D / 4); item += 256) {
    const int key = item % (kKeyTile / 16) * 16, channel = item / (kKeyTile / 16) * 4;
    uint32_t word[16];
    float scale[int8::kKeyGroups];
#pragma unroll
    for (int i = 0; i < 16; ++i) word[i] = *reinterpret_cast<const uint32_t*>(k8 + int8::key_offset(key + i, channel, D));
#pragma unroll
    for (int i = 0; i < int8::kKeyGroups; ++i) scale[i] = k_scale[i] * inverse_of_power(level.key);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // keys 2i, 2i + 8, 2i + 1, 2i + 9
        four[i] = sm90::pack_e4m3(byte_of(word[2 * i], c) * scale[i], byte_of(word[2 * i + 8], c) * scale[i],
                                  byte_of(word[2 * i + 1], c) * scale[i], byte_of(word[2 * i + 9], c) * scale[i]);
      }
      *reinterpret_cast<uint4*>(k8t + int8::grad_key_offset(key, channel + c)) = make_uint4(four[0], four[1], four[2], four[3]);
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
      const float factor = v_scale[channel / kChannelGroup] * v_norm[channel + c] * value, mean = v_mean[channel + c] * value;
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

// ------------------------------------------------------------------------------------------------- prepare_queries

constexpr int kNoUnit = -32768;  // of a row that attends nothing, or whose weight is no number

// The exponent of a row's unit without its a, from its largest weight, of which the forward pass knows no more than that it may
// be four times as much: p is at most 2^7. It is kSpan octaves below the tile's largest at the least. With a unit of its own a row
// of many small weights would fill e4m3, and leave no room for a lift to those, as small, of a row beside it that has a large one
// too; without one its weights would vanish beside that. N(0,1) inputs are the same either way.
constexpr int kSpan = 2;
__device__ __forceinline__ int unit_of(float peak) {
  return peak > 0.0f && peak < -kNegativeInfinity ? (__float_as_int(peak) >> 23) - 127 - 4 : kNoUnit;
}

// The exponent of a tile's gain, from the largest unit of its rows. Where that is less than the last tile's, but not by more
// than the exponents of two may differ by, the last one's stands, and so it does where there is no gradient. The sums are
// multiplied by what lies between two gains: that stays a number as the gains of a kv head's tiles are kGainSpan apart at most,
// and none, below 1, beyond kLeastGain. What a gain so raised rounds to 0 is 2^-80 of the largest.
constexpr int kKeptOctaves = 3, kGainSpan = 80, kLeastGain = -120, kMostLift = 40;
__device__ __forceinline__ int gain_after(int last, bool first, int unit, int most) {
  if (unit < kLeastGain) return last;
  return first || unit > last || unit < last - kKeptOctaves ? max(unit, most - kGainSpan) : last;
}

// Thread: eight channels of the queries {2i, 2i+1, 8+2i, 9+2i} of a group of 16, which are one word of each channel's row in
// the turned blocks.
template <class T, int D, bool kDense>
__global__ void __launch_bounds__(2 * D) int8_prepare_queries(const __grid_constant__ Params p) {
  constexpr int kColumns = D / kChunk;
  __shared__ int8::QueryBlock<D> block;
  __shared__ float products[kQueryTile][kColumns], largest[kQueryTile][kColumns], inverse[kQueryTile];
  __shared__ int units[kQueryTile], most, largest_unit;  // with a, and without
  const int8::Shape& shape = p.call.shape;
  const int64_t tiles = shape.query_tiles(), bh = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x - bh * tiles), batch = static_cast<int>(bh / shape.heads);
  const int head = static_cast<int>(bh - int64_t(batch) * shape.heads);
  const int column = threadIdx.x % kColumns, four = threadIdx.x / kColumns, channel = column * kChunk;
  const int first = 16 * (four / 4) + 2 * (four % 4);
  const auto query_of = [&](int i) { return first + 8 * (i / 2) + i % 2; };
  const GradLevel level = p.level(batch, head);
  if (threadIdx.x == 0) most = largest_unit = kNoUnit;

  const HeadRows<T, kDense> rows(p.call.dout, batch, head, shape.head_dim);
  const unsigned char* const q8 = p.saved<unsigned char>(p.from.q8) + int64_t(blockIdx.x) * kQueryTile * D;
  const float* const q_scale = p.saved<float>(p.from.q_scale) + int64_t(blockIdx.x) * kQueryTile;
  uint32_t dout[4][kChunk / 2];  // pairs of bf16
  uint2 codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = query_of(i), token = tile * kQueryTile + query;
    const bool there = token < shape.queries;
    const Chunk<T> x = rows.load(token, channel, there);
#pragma unroll
    for (int c = 0; c < kChunk / 2; ++c) dout[i][c] = pack_bf16(x[2 * c], x[2 * c + 1]);
    codes[i].x = *reinterpret_cast<const uint32_t*>(q8 + int8::query_offset(query, channel, D));
    codes[i].y = *reinterpret_cast<const uint32_t*>(q8 + int8::query_offset(query, channel + 4, D));

    float product = 0.0f, top = 0.0f;
    if (there) {
      const int64_t row = bh * shape.queries + token;
      const signed char* const out8 = p.call.out8 + row * shape.head_dim;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        const float o = channel + c < shape.head_dim ? static_cast<float>(out8[channel + c]) : 0.0f;
        product = fmaf(unpack_bf16(dout[i], c), o, product);
        top = max_nan(top, fabsf(unpack_bf16(dout[i], c)));
      }
      product *= p.call.out_scale[row];
    }
    products[query][column] = product, largest[query][column] = top;
    *reinterpret_cast<uint2*>(block.q8 + int8::grad_query_offset(query, channel, D)) = codes[i];
  }
  __syncthreads();

  const int token = tile * kQueryTile + threadIdx.x;
  const int64_t row = bh * shape.queries + token;
  int unit = kNoUnit;
  if (threadIdx.x < kQueryTile && token < shape.queries) {
    if (p.call.lse[row] != kNegativeInfinity) unit = unit_of(p.call.peak[row]);
    atomicMax(&largest_unit, unit);
  }
  __syncthreads();

  if (threadIdx.x < kQueryTile) {
    float delta = 0.0f, top = 0.0f, shift = -kNegativeInfinity, scale = 0.0f;
    int own = kNoUnit, fits = 0;  // of the row
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      delta += products[threadIdx.x][c];
      top = max_nan(top, largest[threadIdx.x][c]);
    }
    float dlse = 0.0f;
    if (token < shape.queries && p.call.dlse != nullptr) dlse = p.call.dlse[row];  // dS = P (dP - delta + dlse)
    const float reach = max_nan(top, fabsf(dlse) * level.value), a = power_below(reach);
    // An infinity becomes NaN: e4m3 has none, and what scales a loss must see it in dV too.
    inverse[threadIdx.x] = top < -kNegativeInfinity ? inverse_of_power(a) : __int_as_float(0x7fffffff);
    if (token < shape.queries) {
      scale = q_scale[threadIdx.x];
      const float natural = p.call.lse[row];
      if (natural != kNegativeInfinity) {
        shift = natural * kLog2e;
        if (unit != kNoUnit) {
          unit = max(unit, largest_unit - kSpan);
          shift += static_cast<float>(unit);
          own = unit + (__float_as_int(a) >> 23) - 127;
          atomicMax(&most, own);
          // A row of p adds up to 1 / unit; k and dP make at most 2^14 of that, and fp16 ends at 2^16.
          fits = min(max(unit, -126), 0);
        }
      }
    }
    block.q_scale[threadIdx.x] = scale, block.shift[threadIdx.x] = shift;
    units[threadIdx.x] = own;
    block.row[threadIdx.x] = static_cast<short>(own - fits), block.sum[threadIdx.x] = static_cast<signed char>(fits);
    const float value = reach < -kNegativeInfinity ? level.value : __int_as_float(0x7fffffff);  // of dlse alone: not in dV
    block.delta[threadIdx.x] = (delta - dlse) * inverse[threadIdx.x] * value;
  }
  __syncthreads();

  if (threadIdx.x == 0) *reinterpret_cast<int*>(p.part(p.at.units + int64_t(blockIdx.x) * 4)) = most;
  const float q_inverse = inverse_of_power(level.query) * kLn2;  // q8 * q_scale holds log2(e) as well
  float q[4][kChunk], turned[4][kChunk];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = query_of(i);
    // What p holds of a row's unit dout16 and ds do not: it is q's and dout8's.
    const float below = units[query] == kNoUnit ? 1.0f : power_of_two(max(units[query] - most, -126));
    const float by = inverse[query], q_by = block.q_scale[query] * q_inverse * below;
    uint32_t words[kChunk / 2];
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      q[i][c] = byte_of(c < 4 ? codes[i].x : codes[i].y, c % 4) * q_by;
      turned[i][c] = unpack_bf16(dout[i], c) * by;
    }
#pragma unroll
    for (int c = 0; c < kChunk / 2; ++c) words[c] = pack_bf16(turned[i][2 * c], turned[i][2 * c + 1]);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) turned[i][c] *= below * int8::kGradTop;
    *reinterpret_cast<uint4*>(block.dout16 + int8::grad_dout_offset(query, channel, D)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    const int at = int8::grad_turned_offset(first, channel + c);
    *reinterpret_cast<uint32_t*>(block.q8t + at) = sm90::pack_e4m3(q[0][c], q[1][c], q[2][c], q[3][c]);
    *reinterpret_cast<uint32_t*>(block.dout8 + at) =
        sm90::pack_e4m3(turned[0][c], turned[1][c], turned[2][c], turned[3][c]);
  }
  __syncthreads();

  unsigned char* const to = p.part(p.at.query_blocks + int64_t(blockIdx.x) * sizeof(block));
  const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(&block);
  for (int at = 16 * threadIdx.x; at < static_cast<int>(sizeof(block)); at += 16 * 2 * D) {
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(bytes + at);
  }
}

// ------------------------------------------------------------------------------------------------- choose_gains

// Octaves that a tile's unit may be above that of the tile before. Where it is more, one of them has a sink, perhaps, and what a
// block has found of its P in the one says nothing of the other.
constexpr int kRise = 2;

// A block a query head.
template <int D>
__global__ void __launch_bounds__(kLevelThreads) int8_choose_gains(const __grid_constant__ Params p) {
  __shared__ int unit[kLevelThreads], gain[kLevelThreads], largest;
  const int tiles = static_cast<int>(p.call.shape.query_tiles());
  const int64_t start = int64_t(blockIdx.x) * tiles;
  const int* const units = reinterpret_cast<const int*>(p.part(p.at.units)) + start;
  auto* const blocks = reinterpret_cast<int8::QueryBlock<D>*>(p.part(p.at.query_blocks)) + start;
  if (threadIdx.x == 0) largest = kNoUnit;
  __syncthreads();
  const int group = p.call.shape.heads / p.call.shape.kv_heads;
  const int* const of_group = units - int64_t(blockIdx.x % group) * tiles;
  int mine = kNoUnit;
  for (int64_t i = threadIdx.x; i < int64_t(group) * tiles; i += kLevelThreads) mine = max(mine, of_group[i]);
  atomicMax(&largest, mine);
  __syncthreads();
  const int most = largest < kLeastGain ? 0 : largest;
  int last = most;
  for (int from = 0; from < tiles; from += kLevelThreads) {
    const int count = min(tiles - from, kLevelThreads);
    if (static_cast<int>(threadIdx.x) < count) unit[threadIdx.x] = units[from + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < count; ++i) gain[i] = last = gain_after(last, from + i == 0, unit[i], most);
    }
    __syncthreads();
    last = gain[count - 1];
    if (static_cast<int>(threadIdx.x) < count) {
      auto& block = blocks[from + threadIdx.x];
      block.gain = gain[threadIdx.x];
      block.most_lift = min(kMostLift, block.gain - max(most - kGainSpan, -126));
      const int tile = from + threadIdx.x;
      block.rises = tile == 0 || unit[threadIdx.x] > units[tile - 1] + kRise;
    }
    for (int i = threadIdx.x; i < count * kQueryTile; i += kLevelThreads) {
      auto& block = blocks[from + i / kQueryTile];
      const int down = unit[i / kQueryTile] == kNoUnit ? 0 : gain[i / kQueryTile] - unit[i / kQueryTile];
      block.shift[i % kQueryTile] += static_cast<float>(down);
      block.sum[i % kQueryTile] = static_cast<signed char>(min(block.sum[i % kQueryTile] + down, 126));
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------- finish_queries

// A block a tile; a thread as in the products, for both warpgroups' halves. Rows are put together in shared memory, for whole
// sectors of the result.
template <class T, int D>
__global__ void __launch_bounds__(256) int8_finish_queries(const __grid_constant__ Params p) {
  constexpr int kHeld = 16 / sizeof(T), kRow = D + kHeld;  // of one store; so that eight rows do not meet in a bank
  __shared__ alignas(16) T tile_of[kQueryTile * kRow];
  const int8::Shape& shape = p.call.shape;
  const int64_t tiles = shape.query_tiles(), bh = blockIdx.x / tiles, batch = bh / shape.heads, head = bh - batch * shape.heads;
  const int tile = static_cast<int>(blockIdx.x - bh * tiles), half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4, column = half * (D / 2) + thread % 4 * 2;
  const auto* const sums = reinterpret_cast<const __half*>(p.part(p.at.sums)) + int64_t(blockIdx.x) * kQueryTile * D;
  const auto* const made = reinterpret_cast<const int8::QueryBlock<D>*>(p.part(p.at.query_blocks)) + blockIdx.x;
  const GradLevel level = p.level(batch, head);
  const float all = p.call.scale / level.value * level.key;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) factor[r] = all * exp2_approx(static_cast<float>(made->row[row + 8 * r]));
#pragma unroll
  for (int i = 0; i < D / 4; i += 8) {
    const uint4 eight = *reinterpret_cast<const uint4*>(sums + int8::grad_sum_offset(half, i, thread, D));
    const uint32_t word[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word[e / 2]));
      tile_of[(row + 8 * (e / 2 % 2)) * kRow + column + 2 * (i + e / 4 * 4) + e % 2] =
          static_cast<T>((e % 2 ? pair.y : pair.x) * factor[e / 2 % 2]);
    }
  }
  __syncthreads();
  const Tensor4& dq = p.call.dq;
  T* const to = static_cast<T*>(const_cast<void*>(dq.data)) + batch * dq.stride[0] + head * dq.stride[1];
  constexpr int kPieces = D / kHeld;
  for (int i = threadIdx.x; i < kQueryTile * kPieces; i += 256) {
    const int query = i / kPieces, channel = i % kPieces * kHeld, token = tile * kQueryTile + query;
    if (token >= shape.queries || channel >= shape.head_dim) continue;
    T* const at = to + int64_t(token) * dq.stride[2] + channel;
    const T* const from = tile_of + query * kRow + channel;
    if (channel + kHeld <= shape.head_dim && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int c = 0; c < kHeld && channel + c < shape.head_dim; ++c) at[c] = from[c];
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
  const int64_t kv_heads = int64_t(shape.batch) * shape.kv_heads;
  int8_grad_levels<D><<<static_cast<unsigned>(kv_heads), kLevelThreads, 0, stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  int8_prepare_keys<D><<<static_cast<unsigned>(keys), 256, 0, stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  int8_prepare_queries<T, D, kDense><<<static_cast<unsigned>(queries), 2 * D, 0, stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  int8_choose_gains<D><<<static_cast<unsigned>(shape.batch * shape.heads), kLevelThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t int8_save_output(const Int8SaveOutput& call, cudaStream_t stream) {
  const int8::Shape& shape = call.shape;
  return with_dtype(call.out.dtype, [&](auto x) {
    return with_grad_head_dim(shape.d(), [&](auto d) {
      using T = decltype(x);
      constexpr int D = decltype(d)::value;
      const int64_t blocks = int64_t(shape.batch) * shape.heads * int8::ceil_div(shape.queries, kSaveTokens<D>);
      if (check_grid(blocks) != cudaSuccess) return cudaErrorInvalidValue;
      if (is_dense(call.out, shape.head_dim)) {
        int8_save_tokens<T, D, true><<<static_cast<unsigned>(blocks), kSaveThreads, 0, stream>>>(call);
      } else {
        int8_save_tokens<T, D, false><<<static_cast<unsigned>(blocks), kSaveThreads, 0, stream>>>(call);
      }
      return cudaGetLastError();
    });
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
