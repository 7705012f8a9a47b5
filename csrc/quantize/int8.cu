// Quantisation of the 8-bit attention: Q, K and V of any floating dtype and strides -> int8_format.cuh's workspace.
//
// Two launches.
//   statistics  one block per (batch, kv head) and K or V: k_mean, v_mean and v_norm, from a sample of the tokens
//   quantise    one block per 128 tokens of K, of V or of Q: read once, scale found, codes laid out and copied out
//
//   k8 * k_scale = k - k_mean                       per (token % 8) / 2 of a tile: four scales
//   v8 * v_scale = (v - v_mean) / v_norm            per 32 channels of a tile
//   q8 * q_scale = q * scale * log2(e)              per row, q_scale >= 0
//
// Subtracting the mean of K ("smoothing K") and the granularity of the scales are SageAttention's (arXiv 2410.02367,
// section 4.2; 2411.10958, section 3). The mean of V is taken away for the same reason and comes back whole at the end,
// and v_norm makes the channels of a group alike, so that one loud channel does not take the bits of 31 others.
//
// A NaN or an infinity makes its group's scale NaN or infinite: maxima propagate NaN, and nothing is clamped. The
// attention's result is then NaN, as it is without quantisation.

#include <climits>

#include "sage3/channels.cuh"
#include "sage3/launch.h"
#include "sage3/numeric.cuh"
#include "sage3/sample.cuh"

namespace sage3 {
namespace {

using int8::kChannelGroup;
using int8::kKeyGroups;
using int8::kKeyTile;
using int8::kQueryTile;

constexpr int kTile = kKeyTile;  // tokens that a block quantises: of Q these are two query tiles
constexpr float kMaxCode = 127.0f;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Params {
  Int8Quantize call;
  int8::Workspace at;
  unsigned query_items, key_tiles;  // blocks of one head

  template <class Part>
  __device__ __forceinline__ Part* part(int64_t offset) const {
    return reinterpret_cast<Part*>(static_cast<unsigned char*>(call.workspace) + offset);
  }
};

// How a block lies over 128 tokens x D channels. Eight chunks a thread (four and six for head dims 64 and 96): as
// 16-bit numbers 32 registers, and with four such blocks 128 KB in flight on each multiprocessor.
template <int D>
struct Layout {
  static constexpr int kThreads = D == 256 ? 512 : 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTileBytes = kTile * D;
  // K: whole rows, one chunk column a thread. Head dim 96 has 12 chunks: four of 16 lanes idle.
  static constexpr int kRowLanes = D == 64 ? 8 : D == 256 ? 32 : 16;
  static constexpr int kRows = kThreads / kRowLanes;  // at once
  static constexpr int kTurns = kTile / kRows;
  // V: a warp takes a group of 32 channels, of which 64 bytes lie side by side. Head dim 96 leaves two warps idle.
  static constexpr int kGroups = D / kChannelGroup;
  static constexpr int kGroupWarps = kWarps / kGroups;
  static constexpr int kValueTurns = D == 64 ? 1 : 2;
  // Q: a few lanes share the rows r and r + 8.
  static constexpr int kQueryLanes = kThreads / (kTile / 2);
  static constexpr int kQueryChunks = D / kChunk / kQueryLanes;

  // Whether there are such channels: false for what the idle lanes would take.
  static __device__ __forceinline__ bool has(int channel) { return D != 96 || channel < D; }

  static_assert(kRows % 8 == 0, "a thread's rows of K must share their token % 8, so that it has one scale");
  static_assert(kValueTurns * (D == 96 ? 2 : kGroupWarps) == 4, "the warps of a channel group must cover 128 tokens");
  static_assert(kQueryLanes * kQueryChunks * kChunk == D, "the lanes of a row of Q must cover it");
};

template <int D>
struct Shared {
  alignas(1024) unsigned char tile[Layout<D>::kTileBytes];  // codes in their final order
  alignas(16) float partial[Layout<D>::kThreads / 16];      // maxima of half warps (K) or warps (V)
};

// ------------------------------------------------------------------------------------------------- pieces

// The largest value of kLanes neighbouring lanes, for each of them; NaN wins.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = max_nan(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

template <int kCount>
__device__ __forceinline__ float largest(const float* x) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) most = max_nan(most, x[i]);
  return most;
}

// code = x * inverse, x = code * scale. Where everything is zero (or so small that the inverse would overflow) both are
// zero; a NaN is not "small" and stays.
struct Scale {
  float scale, inverse;

  __device__ __forceinline__ explicit Scale(float largest_magnitude) {
    const bool nothing = largest_magnitude < 1e-36f;
    scale = nothing ? 0.0f : largest_magnitude * (1.0f / kMaxCode);
    // A sixteenth: also the largest fp32 is then within the reciprocal's range.
    inverse = nothing ? 0.0f : reciprocal_approx(largest_magnitude * (1.0f / 16.0f)) * (kMaxCode / 16.0f);
  }
};

// (x - mean) * factor, for `shift` = -mean * factor. One multiply-add for 16-bit numbers, whose own rounding is coarser
// than that of shift; fp32 is subtracted first, as a large mean would leave shift without its last digits.
template <class T>
__device__ __forceinline__ float centred(float x, float mean, float factor, float shift) {
  if constexpr (sizeof(T) == 4) {
    return (x - mean) * factor;
  } else {
    return fmaf(x, factor, shift);
  }
}

__device__ __forceinline__ void load_channels(float (&x)[kChunk], const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void swap_if(bool condition, uint32_t& a, uint32_t& b) {
  const uint32_t old = a;
  a = condition ? b : a;
  b = condition ? old : b;
}

// Shared memory -> global memory, 16 bytes a thread, in order.
template <int D>
__device__ __forceinline__ void copy_out(unsigned char* to, const Shared<D>& shared,
                                         int bytes = Layout<D>::kTileBytes) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Layout<D>::kTileBytes; i += 16 * Layout<D>::kThreads) {
    const int at = i + 16 * threadIdx.x;
    if (at < bytes) *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(shared.tile + at);
  }
}

// ------------------------------------------------------------------------------------------------- K, V and Q

// Thread: one chunk column, rows row0 + i * kRows, which all have one scale. Stores: half a warp writes 128 bytes side
// by side, in whatever order the swizzle wants them (head dim 96: three lanes to a bank).
template <class T, int D, bool kDense>
__device__ __forceinline__ void quantize_keys(const Params& p, int batch, int head, int tile, Shared<D>& shared) {
  using L = Layout<D>;
  const int8::Shape& shape = p.call.shape;
  const int64_t bh = int64_t(batch) * shape.kv_heads + head, at_tile = bh * p.key_tiles + tile;
  const int row0 = threadIdx.x / L::kRowLanes, channel = threadIdx.x % L::kRowLanes * kChunk;
  const HeadRows<T, kDense> rows(p.call.k, batch, head, shape.head_dim);
  const int first = tile * kTile + row0, past = shape.keys - 1 - first;
  const int last = past < 0 ? first : first + past / L::kRows * L::kRows;  // of this thread's tokens

  Chunk<T> x[L::kTurns];
#pragma unroll
  for (int i = 0; i < L::kTurns; ++i) {  // past the end: the last one again, which changes no maximum
    x[i] = rows.load(min(first + i * L::kRows, last), channel, past >= 0);
  }
  float mean[kChunk] = {};
  if (L::has(channel)) load_channels(mean, p.part<const float>(p.at.k_mean) + bh * D + channel);

  Extremes<T> extremes(x[0]);
#pragma unroll
  for (int i = 1; i < L::kTurns; ++i) extremes.add(x[i]);
  float most = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) most = max_nan(most, extremes.distance(c, mean[c]));
  if (past < 0) most = 0.0f;
  // Half warps whose rows have one group follow each other kRun at a time: two rows of kRowLanes lanes.
  constexpr int kHalves = L::kThreads / 16, kRun = L::kRowLanes / 8, kPerGroup = kHalves / kKeyGroups;
  most = lanes_max<16>(most);
  const int half = threadIdx.x / 16, group = half / kRun % kKeyGroups;
  const int place = group * kPerGroup + half / (kRun * kKeyGroups) * kRun + half % kRun;
  if (threadIdx.x % 16 == 0) shared.partial[place] = most;
  __syncthreads();
  const Scale s(largest<kPerGroup>(shared.partial + group * kPerGroup));
  if (channel == 0 && row0 < 8 && row0 % 2 == 0) p.part<float>(p.at.k_scale)[at_tile * kKeyGroups + group] = s.scale;

  float shift[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) shift[c] = -mean[c] * s.inverse;
#pragma unroll
  for (int i = 0; i < L::kTurns; ++i) {
    float code[kChunk];
#pragma unroll
    for (int c = 0; c < kChunk; ++c) code[c] = centred<T>(x[i][c], mean[c], s.inverse, shift[c]);
    const uint32_t real = first + i * L::kRows <= last && past >= 0 ? 0xffffffffu : 0;
    const uint2 words = make_uint2(real & pack_s8(code[0], code[1], code[2], code[3]),
                                   real & pack_s8(code[4], code[5], code[6], code[7]));
    if (L::has(channel)) {
      *reinterpret_cast<uint2*>(shared.tile + int8::key_offset(row0 + i * L::kRows, channel, D)) = words;
    }
  }
  copy_out<D>(p.part<unsigned char>(p.at.k8) + at_tile * L::kTileBytes, shared);
}

// Thread: one chunk column of the tokens {2i, 2i+1, 8+2i, 9+2i} of a group of 16, which lie side by side in v8: each
// channel is one 32-bit word, and nothing has to be transposed. Lane = 16 * (group of tokens % 2) + 4 * i + chunk.
template <class T, int D, bool kDense>
__device__ __forceinline__ void quantize_values(const Params& p, int batch, int head, int tile, Shared<D>& shared) {
  using L = Layout<D>;
  const int8::Shape& shape = p.call.shape;
  const int64_t bh = int64_t(batch) * shape.kv_heads + head, at_tile = bh * p.key_tiles + tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = lane % 4, channel = warp / L::kGroupWarps * kChannelGroup + column * kChunk;
  const int token0 = 16 * (lane / 16 + 2 * (warp % L::kGroupWarps)) + 2 * (lane / 4 % 4);  // of the tile, first turn
  constexpr int kTurnTokens = 32 * L::kGroupWarps;
  const HeadRows<T, kDense> rows(p.call.v, batch, head, shape.head_dim);
  const auto token_of = [&](int turn, int i) { return token0 + turn * kTurnTokens + 8 * (i / 2) + i % 2; };
  const int real_tokens = shape.keys - tile * kTile;

  Chunk<T> x[L::kValueTurns][4];
#pragma unroll
  for (int turn = 0; turn < L::kValueTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // past the end: the last token again, which changes no maximum
      x[turn][i] = rows.load(min(tile * kTile + token_of(turn, i), shape.keys - 1), channel, true);
    }
  }
  float mean[kChunk] = {}, factor[kChunk] = {};
  if (L::has(channel)) {
    load_channels(mean, p.part<const float>(p.at.v_mean) + bh * D + channel);
    load_channels(factor, p.part<const float>(p.at.v_norm) + bh * D + channel);
  }

  Extremes<T> extremes(x[0][0]);
#pragma unroll
  for (int turn = 0; turn < L::kValueTurns; ++turn) {
#pragma unroll
    for (int i = turn == 0 ? 1 : 0; i < 4; ++i) extremes.add(x[turn][i]);
  }
  float most = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    factor[c] = L::has(channel) ? reciprocal_approx(factor[c]) : 0.0f;  // norms are never near the ends of fp32
    most = max_nan(most, extremes.distance(c, mean[c]) * factor[c]);
  }
  most = lanes_max<32>(most);
  if (lane == 0) shared.partial[warp] = most;
  __syncthreads();
  const auto scale_of = [&](int group) {
    return Scale(largest<L::kGroupWarps>(shared.partial + group * L::kGroupWarps));
  };
  constexpr int kScales = int8::value_scales(D);
  if (threadIdx.x < kScales) {
    const int group = threadIdx.x;
    p.part<float>(p.at.v_scale)[at_tile * kScales + group] = group < L::kGroups ? scale_of(group).scale : 0.0f;
  }

  if (L::has(channel)) {
    const float inverse = scale_of(warp / L::kGroupWarps).inverse;
    float shift[kChunk];
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      factor[c] *= inverse;
      shift[c] = -mean[c] * factor[c];
    }
#pragma unroll
    for (int turn = 0; turn < L::kValueTurns; ++turn) {
      uint32_t real = 0;  // the bytes of tokens before the end of the sequence
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        real |= token_of(turn, i) < real_tokens ? 0xffu << (8 * i) : 0;
      }
      uint32_t word[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        const auto code = [&](int i) { return centred<T>(x[turn][i][c], mean[c], factor[c], shift[c]); };
        word[c] = real & pack_s8(code(0), code(1), code(2), code(3));
      }
      // Stored one channel after the other, the lanes of a column would meet those of the others in their banks, which
      // the swizzle tells apart by channel % 8 alone. So column j stores channel n ^ 2j in turn n: all 32 banks.
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        if ((n & 2) == 0) swap_if(column & 1, word[n], word[n ^ 2]);
      }
#pragma unroll
      for (int n = 0; n < kChunk / 2; ++n) swap_if(column & 2, word[n], word[n ^ 4]);
      // The last three bits of a channel enter value_offset by exclusive or.
      const int base = int8::value_offset(token_of(turn, 0), channel + 2 * column);
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        *reinterpret_cast<uint32_t*>(shared.tile + (base ^ int8::value_offset(0, n))) = word[n];
      }
    }
  }
  copy_out<D>(p.part<unsigned char>(p.at.v8) + at_tile * L::kTileBytes, shared);
}

// Thread: chunks of the rows r and r + 8, which make 8 side by side bytes of the A operand for each four channels.
template <class T, int D, bool kDense>
__device__ __forceinline__ void quantize_queries(const Params& p, int batch, int head, int tile, Shared<D>& shared) {
  using L = Layout<D>;
  const int8::Shape& shape = p.call.shape;
  const int64_t bh = int64_t(batch) * shape.heads + head, padded = shape.query_tiles() * kQueryTile;
  const int pair = threadIdx.x / L::kQueryLanes, lane = threadIdx.x % L::kQueryLanes;
  const int row0 = pair / 8 * 16 + pair % 8;
  const HeadRows<T, kDense> rows(p.call.q, batch, head, shape.head_dim);

  Chunk<T> x[2][L::kQueryChunks];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < L::kQueryChunks; ++i) {
      const int row = tile * kTile + row0 + 8 * r;
      x[r][i] = rows.load(row, (lane + i * L::kQueryLanes) * kChunk, row < shape.queries);
    }
  }

  if (p.call.lse != nullptr) {
    const int64_t kv = int64_t(batch) * shape.kv_heads + head / (shape.heads / shape.kv_heads);
    float dot[2] = {};
#pragma unroll
    for (int i = 0; i < L::kQueryChunks; ++i) {
      float mean[kChunk];
      load_channels(mean, p.part<const float>(p.at.k_mean) + kv * D + (lane + i * L::kQueryLanes) * kChunk);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) dot[r] = fmaf(x[r][i][c], mean[c], dot[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = lanes_sum<L::kQueryLanes>(dot[r]);
      const int64_t row = tile * kTile + row0 + 8 * r;
      if (lane == 0 && row < shape.queries) p.call.lse[bh * shape.queries + row] = p.call.scale * sum;
    }
  }

  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    LargestMagnitude<T> most;
#pragma unroll
    for (int i = 0; i < L::kQueryChunks; ++i) most.add(x[r][i]);
    const Scale s(lanes_max<L::kQueryLanes>(most.value()));
    inverse[r] = copysignf(1.0f, p.call.scale) * s.inverse;  // a negative scale negates the codes
    const int64_t row = tile * kTile + row0 + 8 * r;
    if (lane == 0 && row < padded) {
      p.part<float>(p.at.q_scale)[bh * padded + row] = s.scale * (fabsf(p.call.scale) * kLog2e);
    }
  }

  unsigned char* const half = shared.tile + row0 / kQueryTile * (kQueryTile * D);
  // Half of the lanes store their second four channels first: then no two of a phase meet in a bank.
  const bool swapped = threadIdx.x / (32 / L::kQueryLanes) & 1;
#pragma unroll
  for (int i = 0; i < L::kQueryChunks; ++i) {
    uint32_t word[2][2];  // [row][four channels]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r][i].stay_packed();
      float code[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) code[c] = x[r][i][c] * inverse[r];
      word[r][0] = pack_s8(code[0], code[1], code[2], code[3]);
      word[r][1] = pack_s8(code[4], code[5], code[6], code[7]);
      swap_if(swapped, word[r][0], word[r][1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int channel = (lane + i * L::kQueryLanes) * kChunk + 4 * (n ^ int(swapped));
      *reinterpret_cast<uint2*>(half + int8::query_offset(row0 % kQueryTile, channel, D)) =
          make_uint2(word[0][n], word[1][n]);
    }
  }
  const int64_t first = int64_t(tile) * kTile;
  copy_out<D>(p.part<unsigned char>(p.at.q8) + (bh * padded + first) * D, shared,
              static_cast<int>(min(int64_t(kTile), padded - first)) * D);
}

// 16-bit numbers: four blocks of 256 threads on a multiprocessor, 64 registers; fp32: two, 128. Loads one by one take
// more registers and have no speed to lose. sm_75 cannot find maxima of packed words, and unpacks twice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kNarrowThreads = 512;
#else
constexpr int kNarrowThreads = 1024;
#endif
template <class T, int D, bool kDense>
constexpr int kBlocks = kDense ? (sizeof(T) == 2 ? kNarrowThreads : 512) / Layout<D>::kThreads : 1;

template <class T, int D, bool kDense>
__global__ void __launch_bounds__(Layout<D>::kThreads, kBlocks<T, D, kDense>)
    int8_quantize_tiles(const __grid_constant__ Params p) {
  __shared__ Shared<D> shared;
  const int8::Shape& shape = p.call.shape;
  const unsigned key_items = 2 * p.key_tiles * (shape.batch * shape.kv_heads);
  if (blockIdx.x < key_items) {  // the tiles of K and V take turns
    const unsigned bh = blockIdx.x / 2 / p.key_tiles, tile = blockIdx.x / 2 - bh * p.key_tiles;
    const unsigned batch = bh / shape.kv_heads, head = bh - batch * shape.kv_heads;
    if (blockIdx.x % 2 == 0) {
      quantize_keys<T, D, kDense>(p, batch, head, tile, shared);
    } else {
      quantize_values<T, D, kDense>(p, batch, head, tile, shared);
    }
  } else {
    const unsigned item = blockIdx.x - key_items, bh = item / p.query_items, tile = item - bh * p.query_items;
    const unsigned batch = bh / shape.heads, head = bh - batch * shape.heads;
    quantize_queries<T, D, kDense>(p, batch, head, tile, shared);
  }
}

// ------------------------------------------------------------------------------------------------- statistics

constexpr int kStatisticsThreads = 512;

template <int D>
struct StatisticsShared {
  float partial[kStatisticsThreads / 32][D];
  float channel[D];
};

// Adds up, over the block, a chunk of every thread. In threads below D: the sum of the channel that is the thread's
// number. The order is fixed, so the result is too.
template <int D>
__device__ __forceinline__ float channel_sum(float (&x)[kChunk], int channel, StatisticsShared<D>& shared) {
  constexpr int kRowLanes = Layout<D>::kRowLanes, kWarps = kStatisticsThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
#pragma unroll
    for (int step = kRowLanes; step < 32; step *= 2) x[c] += __shfl_xor_sync(kFullWarp, x[c], step);
    if (lane < kRowLanes && channel < D) shared.partial[warp][channel + c] = x[c];
  }
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < D) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.partial[w][threadIdx.x];
  }
  __syncthreads();
  return sum;
}

// Blocks 2h and 2h + 1: K and V of kv head h. Sums and squares are those of the distance to the first token: as that is
// one of the n in the sample, its own squared distance to the mean is at most n times the variance, and of fp32's 24
// bits no more than log2(n) = 9 cancel, however far from zero everything lies.
template <class T, int D, bool kDense>
__global__ void __launch_bounds__(kStatisticsThreads, 1) int8_statistics(const __grid_constant__ Params p) {
  using L = Layout<D>;
  constexpr int kRows = kStatisticsThreads / L::kRowLanes, kTurns = kSamples / kRows;
  constexpr int kFitting = (!kDense ? 8 : D == 256 ? 16 : 32) / int(sizeof(T));  // chunks that registers have room for
  constexpr int kBatch = kTurns < kFitting ? kTurns : kFitting;
  __shared__ StatisticsShared<D> shared;
  const int8::Shape& shape = p.call.shape;
  const int bh = blockIdx.x / 2, batch = bh / shape.kv_heads, head = bh % shape.kv_heads;
  const bool values = blockIdx.x % 2;
  const HeadRows<T, kDense> rows(values ? p.call.v : p.call.k, batch, head, shape.head_dim);
  const int row0 = threadIdx.x / L::kRowLanes, channel = threadIdx.x % L::kRowLanes * kChunk;
  const int samples = min(shape.keys, kSamples);

  const Chunk<T> origin = rows.load(0, channel, true);
  float sum[kChunk] = {}, square[kChunk] = {};
#pragma unroll 1
  for (int first = row0; first < samples; first += kBatch * kRows) {
    Chunk<T> x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int sample = first + i * kRows;
      x[i] = rows.load(sample_token(sample, shape.keys), channel, sample < samples);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kRows >= samples) break;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        const float off = x[i][c] - origin[c];
        sum[c] += off;
        square[c] = fmaf(off, off, square[c]);
      }
    }
  }
  if (row0 == 0 && channel < D) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) shared.channel[channel + c] = origin[c];
  }
  const float share = 1.0f / samples, mean = channel_sum<D>(sum, channel, shared) * share;
  const int64_t at = int64_t(bh) * D + threadIdx.x;
  if (threadIdx.x < D) p.part<float>(values ? p.at.v_mean : p.at.k_mean)[at] = shared.channel[threadIdx.x] + mean;
  if (!values) return;

  const float variance = channel_sum<D>(square, channel, shared) * share - mean * mean;
  const float rms = sqrtf(variance < 0.0f ? 0.0f : variance);  // a NaN stays
  if (threadIdx.x < D) shared.channel[threadIdx.x] = rms;
  __syncthreads();
  if (threadIdx.x >= D) return;
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < D; i += 32) most = max_nan(most, shared.channel[i + threadIdx.x % 32]);
  most = lanes_max<32>(most);
  // Channels of a constant must not divide by nothing. A head that is constant altogether has nothing to compare with.
  const bool constant = most < 1e-30f || threadIdx.x >= shape.head_dim;
  p.part<float>(p.at.v_norm)[at] = constant ? 1.0f : max_nan(rms, most * (1.0f / 16.0f));
}

// ------------------------------------------------------------------------------------------------- launch

template <class T, int D, bool kDense>
cudaError_t launch(const Int8Quantize& call, cudaStream_t stream) {
  const int8::Shape& shape = call.shape;
  const int64_t q_heads = int64_t(shape.batch) * shape.heads, kv_heads = int64_t(shape.batch) * shape.kv_heads;
  const int64_t query_items = int8::ceil_div(shape.queries, kTile), key_tiles = shape.key_tiles();
  const int64_t items = q_heads * query_items + 2 * kv_heads * key_tiles;
  if (items > INT_MAX) return cudaErrorInvalidValue;  // blocks of a grid
  const Params params{call, int8::Workspace(shape), static_cast<unsigned>(query_items),
                      static_cast<unsigned>(key_tiles)};
  int8_statistics<T, D, kDense><<<static_cast<unsigned>(2 * kv_heads), kStatisticsThreads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  int8_quantize_tiles<T, D, kDense><<<static_cast<unsigned>(items), Layout<D>::kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class T, int D>
cudaError_t launch(const Int8Quantize& call, cudaStream_t stream) {
  const int head_dim = call.shape.head_dim;
  const bool dense = is_dense(call.q, head_dim) && is_dense(call.k, head_dim) && is_dense(call.v, head_dim);
  return dense ? launch<T, D, true>(call, stream) : launch<T, D, false>(call, stream);
}

template <class T>
cudaError_t launch(const Int8Quantize& call, cudaStream_t stream) {
  return with_head_dim(call.shape.d(), [&](auto d) { return launch<T, decltype(d)::value>(call, stream); });
}

}  // namespace

cudaError_t int8_quantize(const Int8Quantize& call, cudaStream_t stream) {
  return with_dtype(call.q.dtype, [&](auto number) { return launch<decltype(number)>(call, stream); });
}

}  // namespace sage3
