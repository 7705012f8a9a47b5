// The gradient of 8-bit attention on Hopper: S, dV and dK by INT8 products on wgmma, dP and dQ in bf16.
//
// One block is one tile of 128 keys of one head: a producer warp and two consumer warpgroups of 64 keys each. It walks over
// the queries in tiles of 64, of every query head that shares the keys. Per tile a warpgroup computes, keys along the rows,
//
//   S^T  = K Q^T      exact integers, the forward pass's own
//   dP^T = V dO^T     bf16
//   P    = 2^(S - lse),  dS = P (dP - delta)
//   dV  += P^T dO     P in u8, one scale for each key and tile: the A operand from registers, without a shuffle
//   dK  += dS^T Q     dS in s8, likewise
//   dQ  += dS K       bf16: dS through shared memory, as the other warpgroup's keys count as well; half the channels each
//
// P and dS are quantised per key and 64 queries, because that is what one row of the accumulators is: their largest value is
// found in a thread's own registers and its quad's. A static scale for P would have to span e^-10 (uniform attention over
// thousands of keys) to 1, and a scale for a whole tile would leave most rows of dS with three bits. The sums are therefore
// taken out of the integers after every tile, as P V is in the forward kernel.
//
// dK and dV are stored by their block alone; dQ is added up in global memory, four floats at a time, in the accumulators' own
// order. With `deterministic` the blocks of a head take turns at each tile of it, in the order of their keys.
// Structure after FlashAttention-3's backward pass (arXiv 2407.08608), algorithm after SageBwd (arXiv 2505.11594, 3).

#include <algorithm>
#include <climits>
#include <type_traits>

#include "sage3/launch_backward.h"
#include "sage3/mask_tiles.cuh"
#include "sage3/numeric.cuh"
#include "sage3/ptx_sm90_backward.cuh"
#include "sage3/rounds.cuh"

namespace sage3 {
namespace {

using int8::kKeyTile;
using int8::kQueryTile;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

constexpr int kScores = 32;  // of a thread: 64 keys x 64 queries / 128

template <int D>
struct Config {
  static constexpr int kThreads = 3 * 128;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8));  // what the launch got
  static constexpr int kStages = 2;
  static constexpr int kBlock = D == 96 ? 48 : 64, kBlocks = D / kBlock;  // channels of one dV or dK product
  static constexpr sm90::Old kFirst = D == 128 ? sm90::kReplaced : sm90::kIgnored;  // what spills least
};

template <int D>
struct Shared {
  alignas(1024) unsigned char k8[kKeyTile * D];
  alignas(1024) int8::KeyBlock<D> keys;
  alignas(1024) int8::QueryBlock<D> queries[Config<D>::kStages];
  alignas(1024) unsigned char ds[2][2 * kKeyTile * kQueryTile];  // two, so that one barrier a tile is enough
  alignas(16) float k_scale[int8::kKeyGroups];
  // Which queries these are: of the head, of the workspace (negative: there are no more); and their MaskTile.
  int tile[Config<D>::kStages], number[Config<D>::kStages], mask[Config<D>::kStages];
  uint64_t keys_full, full[Config<D>::kStages], empty[Config<D>::kStages];
};

struct Params {
  Int8Backward call;
  int8::Workspace from;
  int8::GradWorkspace at;
};

// One tile of keys of one head, and the tiles of queries that see it.
struct Job {
  int batch, kv_head, tile;  // of keys
  int first, count, heads;   // query tiles of each of the group's heads
  int start;                 // where the walk begins: blocks of one head should not add to the same sums at once

  __device__ Job(const Params& p, int block) {
    const int8::Shape& shape = p.call.shape;
    const int tiles = static_cast<int>(shape.key_tiles()), all = static_cast<int>(shape.query_tiles());
    const int bh = block / tiles;
    tile = block - bh * tiles;
    batch = bh / shape.kv_heads, kv_head = bh - batch * shape.kv_heads;
    heads = shape.heads / shape.kv_heads;
    first = p.call.causal ? min(all, tile * (kKeyTile / kQueryTile)) : 0;
    count = all - first;
    start = p.call.causal || p.call.deterministic ? 0 : static_cast<int>(int64_t(tile) * count / tiles);
  }

  __device__ __forceinline__ int query_tile(int i) const { return first + (i + start < count ? i + start : i + start - count); }

  // Number of a query tile in the workspace; the launch has seen that they fit an int.
  __device__ __forceinline__ int number(const int8::Shape& shape, int head, int query_tile) const {
    return (batch * shape.heads + kv_head * heads + head) * static_cast<int>(shape.query_tiles()) + query_tile;
  }
};

template <int D, bool kDeterministic, bool kMask>
__device__ __forceinline__ void produce(const Params& p, Shared<D>& shared) {
  using C = Config<D>;
  const Job job(p, blockIdx.x);
  const auto* const saved = static_cast<const unsigned char*>(p.call.saved);
  const auto* const made = static_cast<const unsigned char*>(p.call.workspace);
  const int64_t key_tile = blockIdx.x;
  sm90::barrier_expect(&shared.keys_full, sizeof(shared.k8) + sizeof(shared.keys) + sizeof(shared.k_scale));
  const auto bring = [&](auto& to, const unsigned char* from) {
    sm90::bulk_copy(&to, from + key_tile * sizeof(to), sizeof(to), &shared.keys_full);
  };
  bring(shared.k_scale, saved + p.from.k_scale);
  bring(shared.k8, saved + p.from.k8);
  bring(shared.keys, made + p.at.key_blocks);
  Place<C::kStages> place;
  for (int head = 0; head < job.heads; ++head) {
    for (int i = 0; i < job.count; ++i) {
      constexpr uint32_t kBytes = sizeof(int8::QueryBlock<D>);
      const int tile = job.query_tile(i), number = job.number(p.call.shape, head, tile);
      int mask = kMaskAll;
      if constexpr (kMask) {
        const MaskTileIndex index(p.call.shape, p.call.mask);
        mask = p.call.mask_tiles[index(job.batch, job.kv_head * job.heads + head, tile) + job.tile];
        if (mask == kMaskNone && !kDeterministic) continue;  // where blocks take turns, each must take its own
      }
      sm90::barrier_await(&shared.empty[place.stage], place.parity ^ 1);
      shared.tile[place.stage] = tile, shared.number[place.stage] = number, shared.mask[place.stage] = mask;
      sm90::barrier_expect(&shared.full[place.stage], kBytes);
      sm90::bulk_copy(&shared.queries[place.stage], made + p.at.query_blocks + int64_t(number) * kBytes, kBytes,
                      &shared.full[place.stage]);
      place.advance();
    }
  }
  sm90::barrier_await(&shared.empty[place.stage], place.parity ^ 1);
  shared.number[place.stage] = -1;
  sm90::barrier_arrive(&shared.full[place.stage]);
}

// The 32 bytes of a contraction's step, of a tile of `rows` rows that lies in blocks of kWidth bytes of each (block_offset).
template <int kWidth>
__device__ __forceinline__ uint64_t operand(const unsigned char* tile, int rows, int step) {
  const int byte = 32 * step;
  return sm90::operand(tile, kWidth) + (byte / kWidth * rows * kWidth + byte % kWidth) / 16;
}

__device__ __forceinline__ float as_float(int x) { return __int_as_float(x); }

__device__ __forceinline__ float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The largest number of both keys' rows, of the thread's quad; NaN wins. Numbers that are not negative compare as integers
// do, three at a time.
__device__ __forceinline__ void largest(const int (&x)[kScores], float (&most)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int chain[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) chain[j % 2] = max3(chain[j % 2], x[4 * j + 2 * r], x[4 * j + 2 * r + 1]);
    most[r] = quad_max(as_float(max(chain[0], chain[1])));
  }
}

// The largest magnitude; taking it is free in FMNMX.
__device__ __forceinline__ void largest_magnitude(const int (&x)[kScores], float (&most)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float chain[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) chain[i] = max_nan(chain[i], fabsf(as_float(x[4 * j + 2 * r + i])));
    }
    most[r] = quad_max(max_nan(chain[0], chain[1]));
  }
}

// code * scale = x for codes up to kTop. A row of zeros, or near enough, has codes of 0.
template <int kTop>
__device__ __forceinline__ void row_scale(const float (&most)[2], float (&scale)[2], float (&inverse)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = max_nan(most[r], 1e-30f);
    scale[r] = top * (1.0f / kTop);
    inverse[r] = reciprocal_approx(top) * kTop;
  }
}

// sums += products * weight[row][group of 32 channels], now, and not after the product in flight.
template <int kCount, int kAll>
__device__ __forceinline__ void promote(float (&sums)[kAll], int first, const int (&product)[kCount], const float (&row)[2],
                                        const float* groups) {
  const int start = first / 16;
  float weight[2][2];  // of the two groups that a product reaches into
#pragma unroll
  for (int i = 0; i < 2; ++i) weight[0][i] = row[0] * groups[start + i], weight[1][i] = row[1] * groups[start + i];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[first + i] = fmaf(__int2float_rn(product[i]), weight[i / 2 % 2][(first + i) / 16 - start], sums[first + i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sm90::pin(sums[first + i]);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// 16 keys x D channels of a warp -> dk or dv.
template <class T, int D>
__device__ __forceinline__ void store_rows_as(const float (&x)[D / 2], const Tensor4& to, int batch, int head, int row, int rows,
                                              int head_dim) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= rows) continue;
    T* const at = static_cast<T*>(const_cast<void*>(to.data)) + batch * to.stride[0] + head * to.stride[1] +
                  int64_t(row + 8 * r) * to.stride[2];
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const int channel = 8 * j + 2 * t;
      T pair[2] = {static_cast<T>(x[4 * j + 2 * r]), static_cast<T>(x[4 * j + 2 * r + 1])};
      if (channel + 2 <= head_dim && reinterpret_cast<uintptr_t>(at + channel) % (2 * sizeof(T)) == 0) {
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(at + channel) = reinterpret_cast<const uint32_t&>(pair);
        } else {
          *reinterpret_cast<float2*>(at + channel) = make_float2(pair[0], pair[1]);
        }
      } else {
        if (channel < head_dim) at[channel] = pair[0];
        if (channel + 1 < head_dim) at[channel + 1] = pair[1];
      }
    }
  }
}

template <int D>
__device__ __forceinline__ void store_rows(const float (&x)[D / 2], const Tensor4& to, int batch, int head, int row, int rows,
                                           int head_dim) {
  switch (to.dtype) {
    case Dtype::kFloat16: store_rows_as<__half, D>(x, to, batch, head, row, rows, head_dim); break;
    case Dtype::kBFloat16: store_rows_as<__nv_bfloat16, D>(x, to, batch, head, row, rows, head_dim); break;
    default: store_rows_as<float, D>(x, to, batch, head, row, rows, head_dim); break;
  }
}

// What a mask's element adds to an exponent, base 2.
__device__ __forceinline__ float mask_bias(const void* at, Dtype dtype) {
  switch (dtype) {
    case Dtype::kBool: return *static_cast<const unsigned char*>(at) ? 0.0f : kNegativeInfinity;
    case Dtype::kFloat16: return static_cast<float>(*static_cast<const __half*>(at)) * kLog2e;
    case Dtype::kBFloat16: return static_cast<float>(*static_cast<const __nv_bfloat16*>(at)) * kLog2e;
    default: return *static_cast<const float*>(at) * kLog2e;
  }
}

// Adds a mask to a tile's exponents. Four at a time, in a loop that turns the registers on: addresses of all of them at
// once are more than fit. Past the ends of the sequences the last element stands in: those rows are hidden otherwise.
__device__ __forceinline__ void add_mask(int (&x)[kScores], const Params& p, int number, int first_key) {
  const int8::Shape& shape = p.call.shape;
  const Tensor4& mask = p.call.mask;
  const int tiles = static_cast<int>(shape.query_tiles()), bh = number / tiles, batch = bh / shape.heads;
  const int lane = opaque(threadIdx.x % 32), size = mask.dtype == Dtype::kBool ? 1 : mask.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* const head = static_cast<const char*>(mask.data) +
                           size * (batch * mask.stride[0] + (bh - batch * shape.heads) * mask.stride[1]);
  const int first_query = (number - bh * tiles) * kQueryTile + lane % 4 * 2;
#pragma unroll 1
  for (int j = 0; j < kScores / 4; ++j) {
    int done[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t query = min(first_query + 8 * j + e % 2, shape.queries - 1);
      const int64_t key = min(first_key + lane / 4 + e / 2 * 8, shape.keys - 1);
      const float bias = mask_bias(head + size * (query * mask.stride[2] + key * mask.stride[3]), mask.dtype);
      done[e] = __float_as_int(bias == kNegativeInfinity ? bias : as_float(x[e]) + bias);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = i < kScores - 4 ? x[i + 4] : done[i + 4 - kScores];
  }
}

template <int D, bool kDeterministic, bool kMask>
__device__ __forceinline__ void consume(const Params& p, Shared<D>& shared, int half) {
  using C = Config<D>;
  constexpr int kBlocks = C::kBlocks, kCount = C::kBlock / 2;
  constexpr int kRow8 = int8::key_block(D), kRow16 = int8::wide_block(D), kSums = D / 4;
  const int8::Shape& shape = p.call.shape;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_key = Job(p, blockIdx.x).tile * kKeyTile + 64 * half + 16 * warp;  // of the warp

  float dv[D / 2], dk[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0.0f, dk[i] = 0.0f;
  int x[kScores] = {}, y[kScores] = {};  // S, then P; dP, then dS; then the products of dV, dK and dQ in turns
  uint32_t p8[kScores / 4], ds8[kScores / 4];
  float p_scale[2], ds_scale[2];

  // A product of 64 channels of dV or dK, in flight when this returns.
  const auto multiply = [](auto block, auto& to, const uint32_t (&a)[kScores / 4], const unsigned char* turned, auto is_signed) {
    auto& acc = reinterpret_cast<int(&)[kCount]>(to);
    const uint64_t b = sm90::operand(turned + block * C::kBlock * kQueryTile, kQueryTile);
    sm90::wgmma_begin();
    if constexpr (is_signed) {
      sm90::multiply_s8<C::kFirst>(acc, a, b);
      sm90::multiply_s8<sm90::kAdded>(acc, a + 4, b + 2);
    } else {
      sm90::multiply_u8<C::kFirst>(acc, a, b);
      sm90::multiply_u8<sm90::kAdded>(acc, a + 4, b + 2);
    }
    sm90::wgmma_commit();
  };
  const auto finish = [](auto block, float (&sums)[D / 2], auto& from, const float (&row)[2], const float* groups) {
    promote(sums, block * C::kBlock / 2, reinterpret_cast<int(&)[kCount]>(from), row, groups);
  };
  constexpr std::true_type kSigned;
  constexpr std::false_type kUnsigned;

  sm90::barrier_wait(&shared.keys_full, 0);

  static_assert(C::kStages == 2);
#pragma unroll 1
  for (int n = 0;; ++n) {
    const int stage = n % 2;
    const auto& queries = shared.queries[stage];
    sm90::barrier_wait(&shared.full[stage], n / 2 % 2);
    if (shared.number[stage] < 0) break;

    sm90::wgmma_begin();
#pragma unroll
    for (int step = 0; step < D / 32; ++step) {
      const uint64_t a = operand<kRow8>(shared.k8 + 64 * half * kRow8, kKeyTile, step);
      const uint64_t b = operand<kRow8>(queries.q8, kQueryTile, step);
      step == 0 ? sm90::multiply_s8<C::kFirst>(x, a, b) : sm90::multiply_s8<sm90::kAdded>(x, a, b);
    }
    sm90::wgmma_commit();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t a = operand<kRow16>(shared.keys.v16 + 64 * half * kRow16, kKeyTile, step);
      const uint64_t b = operand<kRow16>(queries.dout16, kQueryTile, step);
      step == 0 ? sm90::multiply_bf16<C::kFirst>(y, a, b) : sm90::multiply_bf16<sm90::kAdded>(y, a, b);
    }
    sm90::wgmma_commit();

    // P of the thread's keys g and g + 8, queries 8j + 2t and the next.
    const float k_scale = shared.k_scale[opaque(lane) / 8];  // of both keys: token % 8 is g
    sm90::wgmma_wait<1>();
    sm90::pin(x);
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(queries.q_scale + 8 * j + 2 * t);
      const float2 lse = *reinterpret_cast<const float2*>(queries.lse + 8 * j + 2 * t);
      const float factor[2] = {scale.x * k_scale, scale.y * k_scale}, shift[2] = {lse.x, lse.y};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[4 * j + e] = __float_as_int(fmaf(__int2float_rn(x[4 * j + e]), factor[e % 2], -shift[e % 2]));
      }
    }
    if constexpr (kMask) {
      if (shared.mask[stage] != kMaskAll) add_mask(x, p, shared.number[stage], first_key);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = __float_as_int(exp2_approx(as_float(x[i])));
    const bool late = first_key + 16 > shape.keys;
    if (late || (p.call.causal && shared.tile[stage] * kQueryTile < first_key + 15)) {
      const int me = opaque(lane);
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key + me / 4 + 8 * (e / 2), query = shared.tile[stage] * kQueryTile + 8 * j + me % 4 * 2 + e % 2;
          if (key >= shape.keys || (p.call.causal && key > query)) x[4 * j + e] = 0;
        }
      }
    }
    float most[2], inverse[2];
    largest(x, most);
    row_scale<255>(most, p_scale, inverse);
#pragma unroll
    for (int w = 0; w < kScores / 4; ++w) {  // word w: queries 16 (w / 2) on, row w % 2
      const int i = 8 * (w / 2) + 2 * (w % 2);
      const float by = inverse[w % 2];
      p8[w] = pack_u8(as_float(x[i]) * by, as_float(x[i + 1]) * by, as_float(x[i + 4]) * by, as_float(x[i + 5]) * by);
    }

    sm90::wgmma_wait<0>();
    sm90::pin(y);
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const float2 delta = *reinterpret_cast<const float2*>(queries.delta + 8 * j + 2 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y[4 * j + e] = __float_as_int(as_float(x[4 * j + e]) * (as_float(y[4 * j + e]) - (e % 2 ? delta.y : delta.x)));
      }
    }
    multiply(Int<0>{}, x, p8, queries.dout8, kUnsigned);  // under the quantisation of dS
    largest_magnitude(y, most);
    row_scale<127>(most, ds_scale, inverse);
#pragma unroll
    for (int w = 0; w < kScores / 4; ++w) {
      const int i = 8 * (w / 2) + 2 * (w % 2);
      const float by = inverse[w % 2];
      ds8[w] = pack_s8(as_float(y[i]) * by, as_float(y[i + 1]) * by, as_float(y[i + 4]) * by, as_float(y[i + 5]) * by);
    }
    {  // matrix m of a store: queries 8 (j + m / 2) on, keys 8 (m % 2) on of the warp's 16; lane % 8 is the query's row
      const int me = opaque(threadIdx.x % 128), query = me % 32 / 16 * 8 + me % 8, key = 16 * (me / 32) + me % 16 / 8 * 8;
      unsigned char* const ds = shared.ds[stage] + half * kQueryTile * 128 + int8::swizzle(query * 128 + 2 * key, 128);
#pragma unroll
      for (int j = 0; j < kScores / 4; j += 2) {
        const auto pair = [&](int i) { return pack_bf16(as_float(y[i]), as_float(y[i + 1])); };
        sm90::store_turned(ds + j * (8 * 128), pair(4 * j), pair(4 * j + 2), pair(4 * j + 4), pair(4 * j + 6));
      }
    }
    sm90::fence_shared();

    // Two products in flight, the older one's sums taken out under the younger.
    int(&sums)[kSums] = reinterpret_cast<int(&)[kSums]>(x);
    if constexpr (kBlocks == 1) {
      multiply(Int<0>{}, y, ds8, queries.q8t, kSigned);
      sm90::wgmma_wait<1>();
      sm90::pin(x);
      finish(Int<0>{}, dv, x, p_scale, queries.dout_group);
    } else {
      multiply(Int<1>{}, y, p8, queries.dout8, kUnsigned);
      sm90::wgmma_wait<1>();
      sm90::pin(x);
      finish(Int<0>{}, dv, x, p_scale, queries.dout_group);
      multiply(Int<0>{}, x, ds8, queries.q8t, kSigned);
      sm90::wgmma_wait<1>();
      sm90::pin(y);
      finish(Int<1>{}, dv, y, p_scale, queries.dout_group);
      multiply(Int<1>{}, y, ds8, queries.q8t, kSigned);
      sm90::wgmma_wait<1>();
      sm90::pin(x);
      finish(Int<0>{}, dk, x, ds_scale, queries.q_group);
    }

    sm90::sync_threads<1, 256>();  // dS of all keys is there; and the other buffer has been read
    sm90::wgmma_begin();
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step) {
      const int block = step / 4;  // of 64 keys
      const uint64_t a = sm90::operand(shared.ds[stage] + block * kQueryTile * 128, 128) + step % 4 * 2;
      const uint64_t b = sm90::operand(shared.keys.k16 + (block * D + half * (D / 2)) * 128, 128) + step % 4 * 2;
      step == 0 ? sm90::multiply_bf16<C::kFirst>(sums, a, b) : sm90::multiply_bf16<sm90::kAdded>(sums, a, b);
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<1>();
    sm90::pin(y);
    finish(Int<kBlocks - 1>{}, dk, y, ds_scale, queries.q_group);
    const int number = shared.number[stage];
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(&shared.empty[stage]);

    sm90::wgmma_wait<0>();
    sm90::pin(sums);
    auto* const workspace = static_cast<unsigned char*>(p.call.workspace);
    const int thread = opaque(threadIdx.x % 128);
    int* const turns = reinterpret_cast<int*>(workspace + p.at.turns) + int64_t(number) * 2 + half;
    if constexpr (kDeterministic) {
      if (thread == 0) sm90::await_count(turns, first_key / kKeyTile);
      half == 0 ? sm90::sync_threads<2, 128>() : sm90::sync_threads<3, 128>();
    }
    float* const to = reinterpret_cast<float*>(workspace + p.at.sums) + int64_t(number) * (kQueryTile * D) +
                      int8::grad_sum_offset(half, 0, thread, D);
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      sm90::add_to_global(to + int8::grad_sum_offset(0, i, 0, D), as_float(sums[i]), as_float(sums[i + 1]),
                          as_float(sums[i + 2]), as_float(sums[i + 3]));
    }
    if constexpr (kDeterministic) {
      __threadfence();
      half == 0 ? sm90::sync_threads<2, 128>() : sm90::sync_threads<3, 128>();
      if (thread == 0) sm90::count_one(turns);
    }
  }
  const Job done(p, opaque(blockIdx.x));
  const int head_dim = shape.head_dim, row = first_key + g;
  store_rows<D>(dv, p.call.dv, done.batch, done.kv_head, row, shape.keys, head_dim);
  store_rows<D>(dk, p.call.dk, done.batch, done.kv_head, row, shape.keys, head_dim);
}

template <int D, bool kDeterministic, bool kMask>
__global__ void __launch_bounds__(Config<D>::kThreads, 1) int8_grad(const __grid_constant__ Params p) {
  using C = Config<D>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared<D>& shared = *reinterpret_cast<Shared<D>*>(memory);
  if (threadIdx.x == 0) {
    sm90::barrier_init(&shared.keys_full, 1);
    for (int i = 0; i < C::kStages; ++i) sm90::barrier_init(&shared.full[i], 1), sm90::barrier_init(&shared.empty[i], 8);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    sm90::register_budget_down<C::kProducerRegisters>();
    if (threadIdx.x == 0) produce<D, kDeterministic, kMask>(p, shared);
  } else {
    sm90::register_budget_up<C::kConsumerRegisters>();
    consume<D, kDeterministic, kMask>(p, shared, __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1);
  }
}

template <int D, bool kDeterministic, bool kMask>
cudaError_t launch(const Int8Backward& call, cudaStream_t stream) {
  const int8::Shape& shape = call.shape;
  const int64_t blocks = int64_t(shape.batch) * shape.kv_heads * shape.key_tiles();
  if (blocks > INT_MAX || int64_t(shape.batch) * shape.heads * shape.query_tiles() > INT_MAX) return cudaErrorInvalidValue;
  const Params params{call, int8::Workspace(shape), int8::GradWorkspace(shape)};
  const auto kernel = int8_grad<D, kDeterministic, kMask>;
  const int bytes = sizeof(Shared<D>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Config<D>::kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t int8_backward_multiply_sm90(const Int8Backward& call, cudaStream_t stream) {
  return with_grad_head_dim(call.shape.d(), [&](auto d) {
    constexpr int D = decltype(d)::value;
    if (call.mask.data != nullptr) {
      return call.deterministic ? launch<D, true, true>(call, stream) : launch<D, false, true>(call, stream);
    }
    return call.deterministic ? launch<D, true, false>(call, stream) : launch<D, false, false>(call, stream);
  });
}

}  // namespace sage3
