// Quantisation of the 4-bit attention: Q, K and V of any floating dtype and strides -> nvfp4_format.cuh's workspace.
//
// Two launches, the second of which begins under the first.
//   statistics  one block per (batch, kv head) and K or V: k_mean, v_mean and v_level, from a sample of the tokens
//   quantise    one block per 128 tokens of Q, of K or of V: read once, laid out as it came in shared memory, where threads
//               find their blocks of 16; codes laid out and copied out. Q comes first, for it needs no statistics
//
// (delta is nvfp4_correct.cu's.) How a block gets its scale is nvfp4_block.cuh's; what is subtracted and divided by is
// nvfp4_format.cuh's. Every step rounds as comfy_sage3/reference/operands.py has it: the same inputs give the same bits.
//
// A NaN or an infinity makes its block's scale NaN. In Q and K it does so to the whole tile, whose level it enters.

#include <climits>
#include <type_traits>

#include "sage3/channels.cuh"
#include "sage3/divisor.cuh"
#include "sage3/launch_fp4.h"
#include "sage3/nvfp4_block.cuh"
#include "sage3/sample.cuh"

namespace sage3 {
namespace {

using nvfp4::kBlock;
using nvfp4::kTile;

constexpr unsigned kFullWarp = 0xffffffffu;

struct Params {
  Fp4Quantize call;
  nvfp4::Workspace at;
  Divisor key_tiles, query_tiles, kv_heads, heads;

  template <class Part>
  __device__ __forceinline__ Part* part(int64_t offset) const {
    return reinterpret_cast<Part*>(static_cast<unsigned char*>(call.workspace) + offset);
  }
};

// How a thread block lies over 128 tokens x D channels.
template <class T, int D>
struct Layout {
  static constexpr int kThreads = 2 * D;
  // Reading: whole rows, one chunk column a thread.
  static constexpr int kRowLanes = D / kChunk;
  static constexpr int kRows = kThreads / kRowLanes;  // at once
  static constexpr int kTurns = kTile / kRows;
  // Shared memory holds a tile, or half a tile at a time of the widest, which is read a second time (from L2) for that.
  static constexpr int kPieces = D * sizeof(T) > 512 ? 2 : 1;
  static constexpr int kPieceTokens = kTile / kPieces, kPieceTurns = kTurns / kPieces;
  static constexpr int kPieceBytes = kPieceTokens * D * int(sizeof(T));
  static constexpr int kRecord = nvfp4::query_record(D);  // the longest
};

template <class T, int D>
struct Shared {
  alignas(128) unsigned char tokens[Layout<T, D>::kPieceBytes];  // as they came (chunk_at)
  union {
    alignas(16) unsigned char record[Layout<T, D>::kRecord];  // codes, scales and level in their final order
    float sums[Layout<T, D>::kRows][D];                       // of rows of Q
  };
  alignas(16) float mean[D];
  nvfp4::Scales scales;
  float partial[Layout<T, D>::kThreads / 32];
};

// Where a chunk of a piece lies. Column and row are mixed so that neither eight columns of a row side by side, nor every
// second one (two make a block of Q or K), nor one of every 16th row (a block of V each) meet in a bank.
template <class T, int D>
__device__ __forceinline__ int chunk_at(int sixteen, int row, int column) {
  const int mixed = column ^ (sixteen & 7) ^ (D == 64 ? row & 1 : column >> 3 & 1);
  return ((sixteen * 16 + row) * (D / kChunk) + mixed) * (kChunk * int(sizeof(T)));
}
template <class T, int D>
__device__ __forceinline__ int chunk_at(int row, int column) {
  return chunk_at<T, D>(row / 16, row % 16, column);
}

// ------------------------------------------------------------------------------------------------- pieces

// The largest value of a warp's lanes, for each of them; NaN wins.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = max_nan(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

__device__ __forceinline__ void load_floats(float (&x)[kChunk], const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// The second level of a tile's scales: the power of two that brings its largest magnitude to 2^9 or a little more, so that
// without its mean it is below 2^11 still; 1 where so that
// without its mean it is below 2^11 still; 1 where it is zero. From 2^-126 up, so that the inverse is a number too.
struct Level {
  float value, inverse;

  __device__ __forceinline__ explicit Level(float largest) {
    const int exponent = max((__float_as_int(largest) >> 23) - 9, 1);  // biased, of the level
    const bool nothing = largest == 0.0f, number = largest < -kNegativeInfinity;
    value = nothing ? 1.0f : number ? __int_as_float(exponent << 23) : __int_as_float(0x7FC00000);
    inverse = nothing ? 1.0f : number ? __int_as_float((254 - exponent) << 23) : __int_as_float(0x7FC00000);
  }
};

// How many of a tile's tokens there are, where that is all of them, of D channels each; otherwise it is an int.
using Whole = std::integral_constant<int, kTile>;

// A thread's chunks of the turns from `turn` on: as many as the array has room for. Tokens past the end are zeros.
template <class T, int D, bool kDense, int kCount, class Real>
__device__ __forceinline__ void fetch(Chunk<T> (&x)[kCount], const HeadRows<T, kDense>& rows, int first, Real real,
                                      int turn) {
  using L = Layout<T, D>;
  const int row0 = threadIdx.x / L::kRowLanes, channel = threadIdx.x % L::kRowLanes * kChunk;
  if constexpr (std::is_same_v<Real, Whole>) {
    rows.template load_every<L::kRows>(x, first + row0 + turn * L::kRows, channel);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row0 + (turn + i) * L::kRows;
      x[i] = rows.load(first + row, channel, row < real);
    }
  }
}

template <class T, int D, int kCount>
__device__ __forceinline__ void put(const Chunk<T> (&x)[kCount], Shared<T, D>& shared) {
  using L = Layout<T, D>;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    static_assert(L::kRows == 16);
    const int at = chunk_at<T, D>(i, threadIdx.x / L::kRowLanes, threadIdx.x % L::kRowLanes);
    auto* const to = reinterpret_cast<uint4*>(shared.tokens + at);
#pragma unroll
    for (int n = 0; n < Chunk<T>::kWords; n += 4) {
      to[n / 4] = make_uint4(x[i].word[n], x[i].word[n + 1], x[i].word[n + 2], x[i].word[n + 3]);
    }
  }
}

// Brings a piece of a tile that shared memory does not hold whole, in place of the last one.
template <class T, int D, bool kDense, class Real>
__device__ __forceinline__ void put_piece(const HeadRows<T, kDense>& rows, int first, Real real, int piece, Shared<T, D>& shared) {
  using L = Layout<T, D>;
  Chunk<T> again[L::kPieceTurns];
  fetch<T, D>(again, rows, first, real, piece * L::kPieceTurns);
  __syncthreads();
  put<T, D>(again, shared);
  __syncthreads();
}

template <class T, int D>
__device__ __forceinline__ Chunk<T> get(const Shared<T, D>& shared, int row, int column) {
  Chunk<T> x;
  const auto* const from = reinterpret_cast<const uint4*>(shared.tokens + chunk_at<T, D>(row, column));
#pragma unroll
  for (int n = 0; n < Chunk<T>::kWords; n += 4) {
    const uint4 four = from[n / 4];
    x.word[n] = four.x, x.word[n + 1] = four.y, x.word[n + 2] = four.z, x.word[n + 3] = four.w;
  }
  return x;
}

// Shared memory -> global memory, 16 bytes a thread, in order.
template <int kBytes, class T, int D>
__device__ __forceinline__ void copy_out(unsigned char* to, const Shared<T, D>& shared) {
  constexpr int kTurn = 16 * Layout<T, D>::kThreads;
  __syncthreads();
#pragma unroll
  for (int i = 0; i * kTurn < kBytes; ++i) {
    const int at = i * kTurn + 16 * threadIdx.x;
    if ((i + 1) * kTurn > kBytes && at >= kBytes) return;
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(shared.record + at);
  }
}

// The largest magnitude of a thread's tokens.
template <class T, int D, int kCount, class Real>
__device__ __forceinline__ float thread_max(const Chunk<T> (&x)[kCount], Real real) {
  using L = Layout<T, D>;
  LargestMagnitude<T> largest;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (int(threadIdx.x) / L::kRowLanes + i * L::kRows < real) largest.add(x[i]);
  }
  return largest.value();
}

// The largest of the threads' numbers, for each of them. A barrier.
template <class T, int D>
__device__ __forceinline__ float tile_max(float most, Shared<T, D>& shared) {
  most = warp_max(most);
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = most;
  __syncthreads();
  most = shared.partial[0];
#pragma unroll
  for (int w = 1; w < Layout<T, D>::kThreads / 32; ++w) most = max_nan(most, shared.partial[w]);
  return most;
}

// ------------------------------------------------------------------------------------------------- Q and K

// A block of 16 channels of a row: its two words of codes, and its scale's code.
struct RowBlock {
  uint32_t words[2];
  int scale;

  // x holds (x - mean) * factor.
  __device__ __forceinline__ RowBlock(const float (&x)[kBlock], const nvfp4::Scales& scales) {
    __half2 pair[8], most = __float2half2_rn(0.0f);  // (i, i + 4) of eight
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pair[i] = __floats2half2_rn(x[i / 4 * 8 + i % 4], x[i / 4 * 8 + i % 4 + 4]);
      most = __hmax2_nan(most, __habs2(pair[i]));
    }

    const int first = nvfp4::first_code(max_nan(__low2float(most), __high2float(most)));
    const auto judged = [&](const nvfp4::Scale& with) {
      __half2 sum = __float2half2_rn(0.0f);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = nvfp4::add_error(pair[i], with.inverse(), sum);
      return sum;
    };
    const nvfp4::Scale start = scales[first];
    const __half2 sum = judged(start);
    nvfp4::Choice best(first, start, __low2half(sum), __high2half(sum));
#pragma unroll
    for (int i = 1; i < nvfp4::kChoices; ++i) {
      const int code = first + nvfp4::kSteps[i];
      const nvfp4::Scale other = scales[code];
      const __half2 its = judged(other);
      best.offer(code, other, __low2half(its), __high2half(its));
    }
    scale = best.code;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = nvfp4::codes(pair + 4 * i, best.inverse);
      words[i] = best.without_codes() ? 0 : word;
    }
  }
};

// A thread's blocks of a tile of Q or K: a row and the same channels of every 32nd row after it. Wherever the first one's
// codes and scale go, the others' lie at equal distances from there (nvfp4_format.cuh).
constexpr int kRowStep = 32;

template <int D>
struct FirstRow {
  static constexpr int kBlocks = D / kBlock;
  static_assert(2 * D / kBlocks == kRowStep);
  int row = threadIdx.x / kBlocks, block = threadIdx.x % kBlocks;
};

// The blocks of a piece in shared memory; `factor` is the inverse of the level, and a sign. store(turn, RowBlock) gets that
// of row + 32 * turn.
template <class T, int D, class Real, class Store>
__device__ __forceinline__ void quantize_rows(const Shared<T, D>& shared, int piece, Real real, float factor, Store store) {
  using L = Layout<T, D>;
  constexpr int kPieceTurns = L::kPieceTokens / kRowStep;
  const FirstRow<D> mine;
  const int block = mine.block;
  float below[kBlock];  // -mean * factor: a power of two, so one multiply-add rounds as the difference does
#pragma unroll
  for (int c = 0; c < kBlock; c += 4) {
    const float4 four = *reinterpret_cast<const float4*>(shared.mean + block * kBlock + c);
    below[c] = four.x * -factor, below[c + 1] = four.y * -factor;
    below[c + 2] = four.z * -factor, below[c + 3] = four.w * -factor;
  }
#pragma unroll 1
  for (int turn = 0; turn < kPieceTurns; ++turn) {
    const int row = mine.row + kRowStep * turn, of_tile = piece * kPieceTurns + turn;
    float x[kBlock];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Chunk<T> chunk = get<T, D>(shared, row, 2 * block + i);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) x[i * kChunk + c] = fmaf(chunk[c], factor, below[i * kChunk + c]);
    }
    RowBlock made(x, shared.scales);
    if (!std::is_same_v<Real, Whole> && mine.row + kRowStep * of_tile >= real) made.words[0] = made.words[1] = made.scale = 0;
    store(of_tile, made);
  }
}

template <class T, int D>
__device__ __forceinline__ void put_level(Shared<T, D>& shared, const Level& level, int record) {
  if (threadIdx.x != 0) return;
  *reinterpret_cast<float4*>(shared.record + record - nvfp4::kLevelBytes) = make_float4(level.value, 0.0f, 0.0f, 0.0f);
}

template <class T, int D, bool kDense, class Real>
__device__ __forceinline__ void quantize_keys(const Params& p, int batch, int head, int tile, Real real, Shared<T, D>& shared) {
  using L = Layout<T, D>;
  const nvfp4::Shape& shape = p.call.shape;
  const int64_t bh = int64_t(batch) * shape.kv_heads + head;
  const HeadRows<T, kDense> rows(p.call.k, batch, head, shape.head_dim);
  const int first = tile * kTile;

  Chunk<T> x[L::kTurns];
  fetch<T, D>(x, rows, first, real, 0);
  if (threadIdx.x < D) shared.mean[threadIdx.x] = p.part<const float>(p.at.k_mean)[bh * D + threadIdx.x];
  if constexpr (L::kPieces == 1) put<T, D>(x, shared);
  float mean[kChunk], most = thread_max<T, D>(x, real);  // and the mean's, for a tile may be all but zero
  load_floats(mean, p.part<const float>(p.at.k_mean) + bh * D + threadIdx.x % L::kRowLanes * kChunk);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) most = max_nan(most, fabsf(mean[c]));
  const Level level(tile_max<T, D>(most, shared));
  put_level<T, D>(shared, level, nvfp4::key_record(D));
  const FirstRow<D> mine;
  auto* const words = reinterpret_cast<uint32_t*>(shared.record) + nvfp4::key_code(mine.row, mine.block * kBlock, D) / 8;
  unsigned char* const scales = shared.record + nvfp4::code_bytes(D) + nvfp4::key_scale(mine.row, mine.block);
#pragma unroll 1
  for (int piece = 0; piece < L::kPieces; ++piece) {
    if constexpr (L::kPieces > 1) put_piece<T, D>(rows, first, real, piece, shared);
    quantize_rows<T, D>(shared, piece, real, level.inverse, [&](int turn, const RowBlock& made) {
      uint32_t* const to = words + turn * (nvfp4::key_code(kRowStep, 0, D) / 8);
      to[0] = made.words[0];
      to[nvfp4::key_code(0, 8, D) / 8] = made.words[1];  // always as far from the first
      scales[turn * nvfp4::key_scale(kRowStep, 0)] = made.scale;
    });
  }
  const int64_t at = bh * p.at.key_tiles + tile;
  copy_out<nvfp4::key_record(D)>(p.part<unsigned char>(p.at.keys) + at * nvfp4::key_record(D), shared);
}

// x[0] + x[1] + .., halves onto each other.
template <int kCount>
__device__ __forceinline__ float halving_sum(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    float half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) half[i] = x[i] + x[i + kCount / 2];
    return halving_sum(half);
  }
}

// q_mean of a tile, into shared memory. Rows are added in halves: row r and r + 64, then r and r + 32, and so on.
template <class T, int D>
__device__ __forceinline__ void average(const Chunk<T> (&x)[Layout<T, D>::kTurns], int real, Shared<T, D>& shared) {
  using L = Layout<T, D>;
  float* const to = shared.sums[threadIdx.x / L::kRowLanes] + threadIdx.x % L::kRowLanes * kChunk;
#pragma unroll
  for (int c = 0; c < kChunk; c += 4) {
    float four[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float sum[L::kTurns];
#pragma unroll
      for (int i = 0; i < L::kTurns; ++i) sum[i] = x[i][c + n];
      four[n] = halving_sum(sum);
    }
    *reinterpret_cast<float4*>(to + c) = make_float4(four[0], four[1], four[2], four[3]);
  }
  __syncthreads();
  if (threadIdx.x < D) {
    float sum[L::kRows];
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) sum[i] = shared.sums[i][threadIdx.x];
    shared.mean[threadIdx.x] = __fdiv_rn(halving_sum(sum), static_cast<float>(real));
  }
  __syncthreads();
}

// The part of the log-sum-exp that K's mean made. Where shared memory holds a thread's chunks they are read from there: of
// those in registers ptxas would keep the floats, which the average needs as well, and spill.
template <class T, int D>
__device__ __forceinline__ void write_lse(const Params& p, const Chunk<T> (&x)[Layout<T, D>::kTurns], const float* k_mean,
                                          float* lse, int real, const Shared<T, D>& shared) {
  using L = Layout<T, D>;
  const int column = threadIdx.x % L::kRowLanes;
  float mean[kChunk];
  load_floats(mean, k_mean + column * kChunk);
#pragma unroll(L::kPieces == 1 ? 2 : L::kTurns)
  for (int i = 0; i < L::kTurns; ++i) {
    const Chunk<T> chunk = L::kPieces == 1 ? get<T, D>(shared, threadIdx.x / L::kRowLanes + i * L::kRows, column) : x[i];
    float dot = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) dot = fmaf(chunk[c], mean[c], dot);
#pragma unroll
    for (int step = L::kRowLanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kFullWarp, dot, step);
    const int row = threadIdx.x / L::kRowLanes + i * L::kRows;
    if (threadIdx.x % L::kRowLanes == 0 && row < real) lse[row] = p.call.scale * dot;
  }
}

template <class T, int D, bool kDense, class Real>
__device__ __forceinline__ void quantize_queries(const Params& p, int batch, int head, int tile, Real real, Shared<T, D>& shared) {
  using L = Layout<T, D>;
  const nvfp4::Shape& shape = p.call.shape;
  const int64_t bh = int64_t(batch) * shape.heads + head, at = bh * p.at.query_tiles + tile;
  const HeadRows<T, kDense> rows(p.call.q, batch, head, shape.head_dim);
  const int first = tile * kTile;

  Chunk<T> x[L::kTurns];
  fetch<T, D>(x, rows, first, real, 0);
  if constexpr (L::kPieces == 1) put<T, D>(x, shared);
  if (p.call.lse != nullptr) {
    const int64_t kv = int64_t(batch) * shape.kv_heads + head / (shape.heads / shape.kv_heads);
    write_lse<T, D>(p, x, p.part<const float>(p.at.k_mean) + kv * D, p.call.lse + bh * shape.queries + first, real, shared);
  }
  const float most = thread_max<T, D>(x, real);
  average<T, D>(x, real, shared);
  if (threadIdx.x < D) p.part<float>(p.at.q_mean)[at * D + threadIdx.x] = shared.mean[threadIdx.x];
  const Level level(tile_max<T, D>(most, shared));

  const FirstRow<D> mine;
  auto* const record = reinterpret_cast<uint32_t*>(shared.record);
  uint32_t* const words = record + nvfp4::query_code(mine.row, mine.block * kBlock, D) / 8;
  unsigned char* const scales = shared.record + nvfp4::code_bytes(D) + nvfp4::query_scale(mine.row, mine.block, D);
  if constexpr (D == 64) {  // half of these are nobody's
    for (int i = threadIdx.x; i < nvfp4::query_scale_words(D); i += L::kThreads) record[nvfp4::code_bytes(D) / 4 + i] = 0;
    __syncthreads();
  }
  put_level<T, D>(shared, level, nvfp4::query_record(D));
#pragma unroll 1
  for (int piece = 0; piece < L::kPieces; ++piece) {
    if constexpr (L::kPieces > 1) put_piece<T, D>(rows, first, real, piece, shared);
    const float factor = copysignf(1.0f, p.call.scale) * level.inverse;
    quantize_rows<T, D>(shared, piece, real, factor, [&](int turn, const RowBlock& made) {
      uint32_t* const to = words + turn * (nvfp4::query_code(kRowStep, 0, D) / 8);
      to[0] = made.words[0];
      to[nvfp4::query_code(0, 8, D) / 8] = made.words[1];
      scales[turn * nvfp4::query_scale(kRowStep, 0, D)] = made.scale;
    });
  }
  copy_out<nvfp4::query_record(D)>(p.part<unsigned char>(p.at.queries) + at * nvfp4::query_record(D), shared);
}

// ------------------------------------------------------------------------------------------------- V

// A block of 16 tokens of two channels that lie side by side: two words of codes of each, and the scales' codes.
struct ColumnBlocks {
  uint32_t words[2][2];
  int scale[2];

  // x holds (x - mean) * factor, by token and channel.
  __device__ __forceinline__ ColumnBlocks(const float (&x)[kBlock][2], const nvfp4::Scales& scales) {
    float largest[2] = {};
    __half2 pair[kBlock];
#pragma unroll
    for (int t = 0; t < kBlock; ++t) {
      largest[0] = max_nan(largest[0], fabsf(x[t][0])), largest[1] = max_nan(largest[1], fabsf(x[t][1]));
      pair[t] = __floats2half2_rn(x[t][0], x[t][1]);
    }

    const auto judged = [&](__half2 (&sum)[2], const nvfp4::Scale (&with)[2]) {
      const __half2 inverse = nvfp4::pair_of(with[0].inverse(), with[1].inverse());
      sum[0] = sum[1] = __float2half2_rn(0.0f);
#pragma unroll
      for (int t = 0; t < kBlock; ++t) sum[t / 4 % 2] = nvfp4::add_error(pair[t], inverse, sum[t / 4 % 2]);
    };
    const int first[2] = {nvfp4::first_code(largest[0]), nvfp4::first_code(largest[1])};
    const nvfp4::Scale start[2] = {scales[first[0]], scales[first[1]]};
    __half2 sum[2];
    judged(sum, start);
    nvfp4::Choice best[2] = {{first[0], start[0], __low2half(sum[0]), __low2half(sum[1])},
                             {first[1], start[1], __high2half(sum[0]), __high2half(sum[1])}};
#pragma unroll
    for (int i = 1; i < nvfp4::kChoices; ++i) {
      const int code[2] = {first[0] + nvfp4::kSteps[i], first[1] + nvfp4::kSteps[i]};
      const nvfp4::Scale other[2] = {scales[code[0]], scales[code[1]]};
      judged(sum, other);
      best[0].offer(code[0], other[0], __low2half(sum[0]), __low2half(sum[1]));
      best[1].offer(code[1], other[1], __high2half(sum[0]), __high2half(sum[1]));
    }
    const __half2 inverse = nvfp4::pair_of(best[0].inverse, best[1].inverse);
    uint32_t four[4];  // tokens of both channels
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = nvfp4::codes(pair + 4 * i, inverse);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      scale[c] = best[c].code;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = __byte_perm(four[2 * i], four[2 * i + 1], c == 0 ? 0x5410 : 0x7632);
        words[c][i] = best[c].without_codes() ? 0 : word;
      }
    }
  }
};

// Tokens `row`.. of a piece and two channels; the first `real` of them are there.
template <class T, int D>
__device__ __forceinline__ void load_pairs(float (&x)[kBlock][2], const Shared<T, D>& shared, int row, int channel, int real,
                                           float factor) {
  constexpr int kRowBytes = D * int(sizeof(T));
  const float2 mean = *reinterpret_cast<const float2*>(shared.mean + channel);
  const float below[2] = {mean.x * -factor, mean.y * -factor};
  const unsigned char* const from = shared.tokens + channel % kChunk * sizeof(T);
  const unsigned char* const rows[2] = {from + chunk_at<T, D>(row, channel / kChunk),  // even and odd ones
                                        from + chunk_at<T, D>(row + 1, channel / kChunk) - kRowBytes};
#pragma unroll
  for (int t = 0; t < kBlock; ++t) {
    const auto* const at = rows[t % 2] + t * kRowBytes;
    Chunk<T> pair;  // of which two are read
    pair.word[0] = *reinterpret_cast<const uint32_t*>(at);
    if constexpr (sizeof(T) == 4) pair.word[1] = *reinterpret_cast<const uint32_t*>(at + 4);
    x[t][0] = fmaf(pair[0], factor, below[0]), x[t][1] = fmaf(pair[1], factor, below[1]);
  }
  if (real >= kBlock) return;
#pragma unroll
  for (int t = 0; t < kBlock; ++t) {
    if (t >= real) x[t][0] = x[t][1] = 0.0f;
  }
}

template <class T, int D, bool kDense, class Real>
__device__ __forceinline__ void quantize_values(const Params& p, int batch, int head, int tile, Real real, Shared<T, D>& shared) {
  using L = Layout<T, D>;
  const nvfp4::Shape& shape = p.call.shape;
  const int64_t bh = int64_t(batch) * shape.kv_heads + head;
  const HeadRows<T, kDense> rows(p.call.v, batch, head, shape.head_dim);
  const int first = tile * kTile;
  constexpr int kBlocks = L::kPieceTokens / kBlock;
#pragma unroll 1
  for (int piece = 0; piece < L::kPieces; ++piece) {
    Chunk<T> x[L::kPieceTurns];
    fetch<T, D>(x, rows, first, real, piece * L::kPieceTurns);
    if (piece > 0) __syncthreads();
    put<T, D>(x, shared);
    if (threadIdx.x < D) shared.mean[threadIdx.x] = p.part<const float>(p.at.v_mean)[bh * D + threadIdx.x];
    const float factor = __int_as_float((254 << 23) - __float_as_int(p.part<const float>(p.at.v_level)[bh]));  // 1 / 2^n
    __syncthreads();
    // Lane: block of tokens * 4 + pair of a chunk column.
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < kBlocks * (D / 2); i += L::kThreads) {
      const int channel = i / (4 * kBlocks) * kChunk + i % 4 * 2, row = i / 4 % kBlocks * kBlock;
      const int token = piece * L::kPieceTokens + row;
      float numbers[kBlock][2];
      load_pairs<T, D>(numbers, shared, row, channel, real - token, factor);
      const ColumnBlocks made(numbers, shared.scales);
      auto* const words = reinterpret_cast<uint32_t*>(shared.record) + nvfp4::value_code(token, channel) / 8;
      auto* const scales = shared.record + nvfp4::code_bytes(D) + nvfp4::value_scale(channel, token / kBlock, D);
#pragma unroll
      for (int c = 0; c < 2; ++c) {  // the second channel, and the next eight tokens, are always as far from these
        words[nvfp4::value_code(0, c) / 8] = made.words[c][0];
        words[nvfp4::value_code(8, c) / 8] = made.words[c][1];
        scales[nvfp4::value_scale(c, 0, D)] = made.scale[c];
      }
    }
  }
  const int64_t at = bh * p.at.key_tiles + tile;
  copy_out<nvfp4::value_record(D)>(p.part<unsigned char>(p.at.values) + at * nvfp4::value_record(D), shared);
}

// 16-bit numbers: 1024 threads on a multiprocessor, of 64 registers; half as many where shared memory has room for no more.
// fp32: 512, of 128. Loads one by one take more registers and have no speed to lose.
template <class T, int D, bool kDense>
constexpr int kThreadBlocks = kDense ? (sizeof(T) == 2 ? 1024 : 512) / Layout<T, D>::kThreads : 1;

// run(how many of a tile's tokens there are): Whole for the tiles that most are.
template <class T, int D, bool kDense, class Run>
__device__ __forceinline__ void with_tokens(const nvfp4::Shape& shape, int left, Run run) {
  if constexpr (kDense && sizeof(T) == 2) {
    if (left >= kTile && shape.head_dim == D) return run(Whole());
  }
  run(min(left, kTile));
}

// Waits until the launch before this one is over, and sees what it wrote.
__device__ __forceinline__ void await_statistics() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <class T, int D, bool kDense>
__global__ void __launch_bounds__(Layout<T, D>::kThreads, kThreadBlocks<T, D, kDense>)
    fp4_quantize_tiles(const __grid_constant__ Params p) {
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<Shared<T, D>*>(memory);
  shared.scales.fill(threadIdx.x, Layout<T, D>::kThreads);
  const nvfp4::Shape& shape = p.call.shape;
  unsigned tile, head;
  if (blockIdx.x < p.at.jobs) {
    if (p.call.lse != nullptr) await_statistics();
    const unsigned batch = p.heads.divide(p.query_tiles.divide(blockIdx.x, tile), head);
    with_tokens<T, D, kDense>(shape, shape.queries - static_cast<int>(tile) * kTile, [&](auto real) {
      quantize_queries<T, D, kDense>(p, batch, head, tile, real, shared);
    });
  } else {  // the tiles of K and V take turns
    await_statistics();
    const unsigned item = blockIdx.x - static_cast<unsigned>(p.at.jobs);
    const unsigned batch = p.kv_heads.divide(p.key_tiles.divide(item / 2, tile), head);
    with_tokens<T, D, kDense>(shape, shape.keys - static_cast<int>(tile) * kTile, [&](auto real) {
      if (item % 2 == 0) {
        quantize_keys<T, D, kDense>(p, batch, head, tile, real, shared);
      } else {
        quantize_values<T, D, kDense>(p, batch, head, tile, real, shared);
      }
    });
  }
}

// ------------------------------------------------------------------------------------------------- statistics

constexpr int kStatisticsThreads = 512;

// Adds up, over the block, a chunk of every thread. In threads below D: the sum of the channel that is the thread's number.
template <int D>
__device__ __forceinline__ double channel_sum(double (&x)[kChunk], double (&partial)[kStatisticsThreads / 32][D]) {
  constexpr int kRowLanes = D / kChunk;
  const int lane = threadIdx.x % 32, channel = threadIdx.x % kRowLanes * kChunk;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
#pragma unroll
    for (int step = kRowLanes; step < 32; step *= 2) x[c] += __shfl_xor_sync(kFullWarp, x[c], step);
    if (lane < kRowLanes) partial[threadIdx.x / 32][channel + c] = x[c];
  }
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x < D) {
#pragma unroll
    for (int w = 0; w < kStatisticsThreads / 32; ++w) sum += partial[w][threadIdx.x];
  }
  __syncthreads();
  return sum;
}

// 2^(floor(log2(rms)) + 1), so that a typical block's scale is about a quarter, far from both ends of e4m3; 1 where there is
// nothing, or no number.
__device__ __forceinline__ float value_level(double square_sum, int64_t count) {
  const double rms = sqrt(square_sum / static_cast<double>(count));
  if (!(rms > 0.0) || isinf(rms)) return 1.0f;
  return ldexpf(1.0f, min(max(ilogb(rms) + 1, -126), 126));
}

// Blocks 2h and 2h + 1: K and V of kv head h. All in fp64, where the order of additions is not seen in the rounded mean.
// Squares are of distances to the first token, so that they are not large differences.
template <class T, int D, bool kDense>
__global__ void __launch_bounds__(kStatisticsThreads, 1) fp4_statistics(const __grid_constant__ Params p) {
  constexpr int kRowLanes = D / kChunk, kRows = kStatisticsThreads / kRowLanes, kTurns = kSamples / kRows;
  constexpr int kFitting = kDense ? 8 / int(sizeof(T)) : 1;  // chunks that registers have room for
  constexpr int kBatch = kTurns < kFitting ? kTurns : kFitting;
  __shared__ double partial[kStatisticsThreads / 32][D];
  __shared__ float origin_of[D];
  const nvfp4::Shape& shape = p.call.shape;
  const int bh = blockIdx.x / 2, batch = bh / shape.kv_heads, head = bh % shape.kv_heads;
  const bool values = blockIdx.x % 2;
  const HeadRows<T, kDense> rows(values ? p.call.v : p.call.k, batch, head, shape.head_dim);
  const int row0 = threadIdx.x / kRowLanes, channel = threadIdx.x % kRowLanes * kChunk;
  const int samples = min(shape.keys, kSamples);

  asm volatile("griddepcontrol.launch_dependents;");
  const Chunk<T> origin = rows.load(0, channel, true);
  double sum[kChunk] = {}, square[kChunk] = {};
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
        sum[c] += x[i][c];
        const double off = double(x[i][c]) - double(origin[c]);
        if (values) square[c] = fma(off, off, square[c]);
      }
    }
  }
  if (row0 == 0) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) origin_of[channel + c] = origin[c];
  }
  const double all = channel_sum<D>(sum, partial);
  float mean = 0.0f;
  if (threadIdx.x < D) {
    mean = static_cast<float>(all / samples);
    p.part<float>(values ? p.at.v_mean : p.at.k_mean)[int64_t(bh) * D + threadIdx.x] = mean;
  }
  if (!values) return;

  const double squares = channel_sum<D>(square, partial);
  if (threadIdx.x < D) {  // about the mean as it is stored
    const double from = origin_of[threadIdx.x], moved = mean - from;
    partial[0][threadIdx.x] = squares - 2.0 * moved * (all - samples * from) + samples * moved * moved;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  double total = 0.0;
#pragma unroll
  for (int c = 0; c < D; c += 32) total += partial[0][c + threadIdx.x];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kFullWarp, total, step);
  if (threadIdx.x == 0) p.part<float>(p.at.v_level)[bh] = value_level(total, int64_t(samples) * shape.head_dim);
}

// ------------------------------------------------------------------------------------------------- launch

template <class T, int D, bool kDense>
cudaError_t launch(const Fp4Quantize& call, cudaStream_t stream) {
  const nvfp4::Shape& shape = call.shape;
  const nvfp4::Workspace at(shape);
  const Params params{call, at, Divisor(at.key_tiles), Divisor(at.query_tiles), Divisor(shape.kv_heads), Divisor(shape.heads)};
  const int64_t kv_heads = int64_t(shape.batch) * shape.kv_heads;
  const int64_t items = params.at.jobs + 2 * kv_heads * params.at.key_tiles;
  if (items > INT_MAX) return cudaErrorInvalidValue;  // blocks of a grid
  fp4_statistics<T, D, kDense><<<static_cast<unsigned>(2 * kv_heads), kStatisticsThreads, 0, stream>>>(params);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const auto kernel = fp4_quantize_tiles<T, D, kDense>;
  constexpr int kBytes = sizeof(Shared<T, D>);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute under{};
  under.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  under.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(items)), config.blockDim = dim3(Layout<T, D>::kThreads);
  config.dynamicSmemBytes = kBytes, config.stream = stream, config.attrs = &under, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <class T, int D>
cudaError_t launch(const Fp4Quantize& call, cudaStream_t stream) {
  const int head_dim = call.shape.head_dim;
  const bool dense = is_dense(call.q, head_dim) && is_dense(call.k, head_dim) && is_dense(call.v, head_dim);
  return dense ? launch<T, D, true>(call, stream) : launch<T, D, false>(call, stream);
}

template <class T>
cudaError_t launch(const Fp4Quantize& call, cudaStream_t stream) {
  return with_fp4_head_dim(call.shape.head_dim, [&](auto d) { return launch<T, decltype(d)::value>(call, stream); });
}

}  // namespace

cudaError_t fp4_quantize(const Fp4Quantize& call, cudaStream_t stream) {
  return with_dtype(call.q.dtype, [&](auto number) { return launch<decltype(number)>(call, stream); });
}

}  // namespace sage3
