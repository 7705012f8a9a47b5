// The gradient of 8-bit attention on Hopper: S by INT8 products on wgmma, dV, dK and dQ by FP8 ones, dP in bf16.
//
// One block is one tile of 128 keys of one head: a producer warp and two consumer warpgroups of 64 keys each. It walks over
// the queries in tiles of 64, of every query head that shares the keys. Per tile a warpgroup computes, keys along the rows,
//
//   S^T  = K Q^T      exact integers, the forward pass's own
//   dP^T = V dO^T     bf16
//   P    = 2^(S - shift),  dS = P (dP - delta), in the units of backward_format.cuh
//   dV  += P^T dO     e4m3: the A operand from registers, without a shuffle
//   dK  += dS^T Q     e4m3, likewise
//   dQ  += dS K       e4m3: dS through shared memory, as the other warpgroup's keys count as well; half the channels each
//
// e4m3 has 17 octaves. Units of queries (backward_format.cuh) bring P and dS there as long as a query's weights are alike. Where
// one key takes most of them, those of all others are lifted by one more power of two: a warp's 16 keys by their own for dV and
// dK, the block's by one for dQ (lift_weights, agree). Sharp scores look the same to a warp, now and then; there, two warps
// without need of a lift spare the others theirs.
//
// dV and dK stay in the tensor cores' accumulators from the first tile to the last. With INT8 in their place every tile
// needs scales of its own, and both sums must be taken out of the integers after each: 450 of 950 instructions a warp and
// tile, and no product in flight meanwhile. It was right to 0.9998 and ran at 0.79 of cuDNN's bf16 (docs/performance.md).
//
// dK and dV are stored by their block alone; dQ is added up in global memory by the copy engine, in fp16 and in the
// accumulators' own order. With `deterministic` the blocks of a head take turns at each tile of it, in the order of their keys.
// Head dim 128 has too few registers: a few words lie in local memory.
// sass: 19 accesses to local memory in the main loops of int8_grad<128
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

template <int kStage>
using Stage = std::integral_constant<int, kStage>;

constexpr int kScores = 32;  // of a thread: 64 keys x 64 queries / 128

template <int D>
struct Config {
  static constexpr int kThreads = 3 * 128;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8));  // what the launch got
  static constexpr int kStages = 2;
  // Threads that add their sums to global memory in one piece: a warp or a warpgroup. Pieces of 4 KB took 4 % more time at
  // head dim 128 than those of 16 KB; at 64 it is the warpgroup's barrier that takes 4 % more.
  static constexpr int kWriters = D == 128 ? 128 : 32;
};

template <int D>
struct Shared {
  alignas(1024) unsigned char k8[kKeyTile * D];
  alignas(1024) int8::KeyBlock<D> keys;
  alignas(1024) int8::QueryBlock<D> queries[Config<D>::kStages];
  alignas(1024) unsigned char ds[2][kKeyTile * kQueryTile];  // two, so that one barrier a tile is enough
  alignas(128) __half sums[2][kQueryTile * D / 2];
  alignas(16) float k_scale[int8::kKeyGroups];
  int lifts[8], suits[8];  // of the warps, and what would suit their dS
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

// Where Shared's parts begin, in units of 16 bytes.
template <int D>
struct Part {
  using Query = int8::QueryBlock<D>;
  using Key = int8::KeyBlock<D>;
  static constexpr uint32_t kK8 = offsetof(Shared<D>, k8) / 16;
  static constexpr uint32_t kV16 = (offsetof(Shared<D>, keys) + offsetof(Key, v16)) / 16;
  static constexpr uint32_t kK8t = (offsetof(Shared<D>, keys) + offsetof(Key, k8t)) / 16;
  static constexpr uint32_t kDs = offsetof(Shared<D>, ds) / 16, kDsBytes = kKeyTile * kQueryTile;
  static constexpr uint32_t query(int stage, size_t offset) {
    return static_cast<uint32_t>(offsetof(Shared<D>, queries) + stage * sizeof(Query) + offset) / 16;
  }
  static constexpr uint32_t q8(int stage) { return query(stage, offsetof(Query, q8)); }
  static constexpr uint32_t dout16(int stage) { return query(stage, offsetof(Query, dout16)); }
  static constexpr uint32_t q8t(int stage) { return query(stage, offsetof(Query, q8t)); }
  static constexpr uint32_t dout8(int stage) { return query(stage, offsetof(Query, dout8)); }
  static constexpr uint32_t ds(int stage) { return kDs + stage * kDsBytes / 16; }
};

// The 32 bytes of a contraction's step, of a tile of `rows` rows that lies in blocks of kWidth bytes of each (block_offset).
template <int kWidth>
__device__ __forceinline__ uint64_t operand(uint32_t tile, int rows, int step) {
  const int byte = 32 * step;
  return sm90::operand_at(tile + (byte / kWidth * rows * kWidth + byte % kWidth) / 16, kWidth);
}

// The first of two arrays, or the second.
template <bool kFirst, class First, class Second>
__device__ __forceinline__ auto& either(First& first, Second& second) {
  if constexpr (kFirst) {
    return first;
  } else {
    return second;
  }
}

__device__ __forceinline__ float as_float(int x) { return __int_as_float(x); }

// Exponents as floats have them. A warp whose largest P is 2 or more needs no lift, and none has one where it is 8 or more. Others
// take the block's, where that makes it 2 to 64, or one of their own, which makes it 16 to 32 at first and stays while it is 8 to
// 64: no more than what is not lifted, for dS of much larger P could pass 448. Where two warps of the block had 2 or more in the
// last tile, 1/8 is enough: what lies below counts for little beside theirs. With sharp scores some warp has less than 2 in almost
// every tile, and not the same one: lifts changed and warps had to agree all the time, which took 35 % longer.
constexpr int kLiftedTo = 127 + 4, kLeast = 127 + 3, kMost = 127 + 5, kLeastOfBlocks = 127 + 1;
constexpr int kLeastBeside = 127 - 3;
constexpr int kWarpsBeside = 2;
constexpr int kNoLift = 127;  // more than any: of a warp whose dS is 0
// Bits of four e4m3 codes: those that are kLeastOfBlocks or more have the first, those of kLeastBeside or more one of the second.
constexpr uint32_t kLarge = 0x40404040u, kNotSmall = 0x60606060u, kAlways = 0x80000000u;

__device__ __forceinline__ bool is_kept(int exponent) { return kLeast <= exponent && exponent <= kMost; }

// 16 keys x D channels of a warp, times `factor` -> dk or dv.
template <class T, int D>
__device__ __forceinline__ void store_rows_as(const int (&x)[D / 2], float factor, const Tensor4& to, int batch, int head, int row, int rows,
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
      T pair[2] = {static_cast<T>(as_float(x[4 * j + 2 * r]) * factor), static_cast<T>(as_float(x[4 * j + 2 * r + 1]) * factor)};
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
__device__ __forceinline__ void store_rows(const int (&x)[D / 2], float factor, const Tensor4& to, int batch, int head, int row,
                                           int rows, int head_dim) {
  switch (to.dtype) {
    case Dtype::kFloat16: store_rows_as<__half, D>(x, factor, to, batch, head, row, rows, head_dim); break;
    case Dtype::kBFloat16: store_rows_as<__nv_bfloat16, D>(x, factor, to, batch, head, row, rows, head_dim); break;
    default: store_rows_as<float, D>(x, factor, to, batch, head, row, rows, head_dim); break;
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
  constexpr int kRow8 = int8::key_block(D), kRow16 = int8::wide_block(D), kSums = D / 4;
  const int8::Shape& shape = p.call.shape;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_key = Job(p, blockIdx.x).tile * kKeyTile + 64 * half + 16 * warp;  // of the warp

  int dv[D / 2], dk[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0, dk[i] = 0;
  int x[kScores] = {}, y[kScores] = {};  // S, then P, then dQ; dP, then dS
  [[maybe_unused]] int apart[kSums] = {};  // dQ where it is not as large: registers of a part of x would be copied
  uint32_t p8[kScores / 4], ds8[kScores / 4];

  // Products' operands are told anew for every tile, from the address of Shared, in units of 16 bytes, and the half. Where ptxas
  // sees that they stay the same in the loop it makes all descriptors before it: at head dim 128 they then lay in local memory,
  // and 50 instructions brought them back for dP alone. It does not see through a signed division. A mask takes more registers;
  // there a reduction leaves both in uniform ones.
  struct Origin {
    uint32_t base, half;
  };
  const int origin = static_cast<int>(sm90::shared_address(&shared)) / 16 | half << 16;
  const auto locate = [&]() {
    const uint32_t both = kMask ? __reduce_max_sync(0xffffffffu, opaque(origin)) : origin;
    return Origin{both & 0xffff, both >> 16};
  };

  // dV or dK, in flight when this returns.
  const auto multiply = [](int (&sums)[D / 2], const uint32_t (&a)[kScores / 4], uint32_t turned) {
    sm90::wgmma_begin();
    sm90::multiply_e4m3(sums, a, sm90::operand_at(turned, kQueryTile));
    sm90::multiply_e4m3(sums, a + 4, sm90::operand_at(turned + 2, kQueryTile));
    sm90::wgmma_commit();
  };
  // Word w: queries 16 (w / 2) on, row w % 2.
  const auto pack = [](uint32_t (&words)[kScores / 4], const int (&from)[kScores]) {
#pragma unroll
    for (int w = 0; w < kScores / 4; ++w) {
      const int i = 8 * (w / 2) + 2 * (w % 2);
      words[w] = sm90::pack_e4m3(as_float(from[i]), as_float(from[i + 1]), as_float(from[i + 4]), as_float(from[i + 5]));
    }
  };

  sm90::barrier_wait(&shared.keys_full, 0);
  // Exponents: of what P and dS are multiplied by, the warp's; the least of the block's when they last differed; of the unit of dV
  // and dK, which is a tile's gain less the lift.
  int lift = 0, common = 0, unit = 0;
  uint32_t bits = kAlways;  // of all codes of the warp's P, and a sign, which none of them has
  bool low = true;          // whether all of the block's warps but one had P below 2 in the last tile
  uint32_t asks;            // for which of these bits the lane counts where the block meets
  const auto speak = [&]() {
    const int me = opaque(lane);
    asks = me >= 16 ? kLarge : me == 0 && lift != common ? kAlways : 0;
  };
  speak();

  // S of the tile in a stage, in flight when this returns; and dP of it.
  const auto multiply_scores = [&](const Origin& at, int stage, int (&to)[kScores]) {
    const uint32_t keys = at.base + Part<D>::kK8 + at.half * (64 * kRow8 / 16);
    sm90::wgmma_begin();
#pragma unroll
    for (int step = 0; step < D / 32; ++step) {
      const uint64_t a = operand<kRow8>(keys, kKeyTile, step);
      const uint64_t b = operand<kRow8>(at.base + Part<D>::q8(stage), kQueryTile, step);
      step == 0 ? sm90::multiply_s8<sm90::kReplaced>(to, a, b) : sm90::multiply_s8<sm90::kAdded>(to, a, b);
    }
    sm90::wgmma_commit();
  };
  const auto multiply_values = [&](const Origin& at, int stage, int (&to)[kScores]) {
    const uint32_t values = at.base + Part<D>::kV16 + at.half * (64 * kRow16 / 16);
    sm90::wgmma_begin();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t a = operand<kRow16>(values, kKeyTile, step);
      const uint64_t b = operand<kRow16>(at.base + Part<D>::dout16(stage), kQueryTile, step);
      step == 0 ? sm90::multiply_bf16<sm90::kReplaced>(to, a, b) : sm90::multiply_bf16<sm90::kAdded>(to, a, b);
    }
    sm90::wgmma_commit();
  };

  // P, in place of S.
  const auto weigh = [&](int stage, int (&x)[kScores]) {
    const auto& queries = shared.queries[stage];
    // P of the thread's keys g and g + 8, queries 8j + 2t and the next.
    const float k_scale = shared.k_scale[opaque(lane) / 8];  // of both keys: token % 8 is g
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(queries.q_scale + 8 * j + 2 * t);
      const float2 by = *reinterpret_cast<const float2*>(queries.shift + 8 * j + 2 * t);
      const float factor[2] = {scale.x * k_scale, scale.y * k_scale}, shift[2] = {by.x, by.y};
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
  };

  // P as an operand, lifted where it is small: to where the block was last, if that suits. Without a lift P is at most 128 in
  // any case.
  const auto lift_weights = [&](int stage, int (&x)[kScores]) {
    pack(p8, x);
    bits = __reduce_or_sync(0xffffffffu, kAlways | p8[0] | p8[1] | p8[2] | p8[3] | p8[4] | p8[5] | p8[6] | p8[7]);
    if (shared.queries[stage].rises) low = true;
    if ((lift | common) != 0 || (bits & (low ? kLarge : kNotSmall)) == 0) {
      int top[4] = {};  // bits of floats that are not negative
#pragma unroll
      for (int i = 0; i < kScores; i += 8) {
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e] = max3(top[e], x[i + e], x[i + e + 4]);
      }
      const int largest = __reduce_max_sync(0xffffffffu, max(max3(top[0], top[1], top[2]), top[3])) >> 23;
      const bool is_number = largest != 0 && largest < 255;
      if (!is_number || (kLeastOfBlocks <= largest + common && largest + common <= kMost)) {
        lift = common;
      } else if (!is_kept(largest + lift)) {
        lift = kLiftedTo - largest;
      }
      if (largest >= (low ? kLeast : kLeastBeside)) lift = 0;
      lift = min(lift, shared.queries[stage].most_lift);
      if (lift != 0) {
        const float factor = power_of_two(lift);
#pragma unroll
        for (int i = 0; i < kScores; ++i) x[i] = __float_as_int(as_float(x[i]) * factor);
        pack(p8, x);
      }
      speak();
    }
  };

  // Brings what the warps have stored of a tile's dS from their lifts to one that suits all, which is returned: as high as it can
  // be, for dS is less than P would allow, and most where one key's P is far above the others'. To know it before dS is stored
  // they would have to wait for each other in every tile, which took 13 % more time; here they do where a lift is a new one.
  const auto agree = [&](int stage) {
    const auto mine = [&](int i) {
      const int query = 32 * i + opaque(lane);
      return reinterpret_cast<uint4*>(shared.ds[stage] + int8::swizzle(query * 128 + 64 * half + 16 * warp, 128));
    };
    uint32_t most = 0;  // of the bytes without their signs, in bytes 1 and 3
#pragma unroll 1
    for (int i = 0; i < kQueryTile / 32; ++i) {
      const uint4 x = *mine(i);
      const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) most = max3_pair(most, word[w] & 0x7f007f00u, word[w] << 8 & 0x7f007f00u);
    }
    const int largest = __reduce_max_sync(0xffffffffu, static_cast<int>(max(most >> 24, most >> 8 & 0x7f)));
    if (lane == 0) {
      shared.lifts[4 * half + warp] = largest != 0 ? lift : kNoLift;
      shared.suits[4 * half + warp] = largest != 0 ? lift + max(14 - largest / 8, 0) : kNoLift;
    }
    sm90::sync_threads<1, 256>();
    const auto least = [&](const int (&of)[8]) {
      const int found = -__reduce_max_sync(0xffffffffu, -of[opaque(lane) % 8]);
      return found == kNoLift ? 0 : found;
    };
    common = least(shared.lifts);
    speak();
    const int level = least(shared.suits);
    const float by = power_of_two(min(max(level - lift, -126), 15));  // above 14 only of a warp whose dS is 0
#pragma unroll 1
    for (int i = 0; i < kQueryTile / 32; ++i) {
      const uint4 x = *mine(i);
      *mine(i) = make_uint4(sm90::scale_e4m3(x.x, by), sm90::scale_e4m3(x.y, by), sm90::scale_e4m3(x.z, by),
                            sm90::scale_e4m3(x.w, by));
    }
    sm90::fence_shared();
    sm90::sync_threads<4, 256>();
    return level;
  };

  // The tile in `stage`, whose P and dP are x and y; then P and dP of the next tile, in y and x. False if there is none.
  // Nothing is in flight before and after: ptxas puts all products in line where some are over the end of a loop.
  const auto work = [&](auto stage, uint32_t next_parity, int (&x)[kScores], int (&y)[kScores]) {
    constexpr int kNext = decltype(stage)::value ^ 1;
    const auto& queries = shared.queries[stage];
    if (queries.gain - lift != unit) {
      const float factor = power_of_two(unit - (queries.gain - lift));
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        dv[i] = __float_as_int(as_float(dv[i]) * factor), dk[i] = __float_as_int(as_float(dk[i]) * factor);
      }
      unit = queries.gain - lift;
    }
    const Origin at = locate();
    multiply(dv, p8, at.base + Part<D>::dout8(stage));  // under dS
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const float2 delta = *reinterpret_cast<const float2*>(queries.delta + 8 * j + 2 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y[4 * j + e] = __float_as_int(as_float(x[4 * j + e]) * (as_float(y[4 * j + e]) - (e % 2 ? delta.y : delta.x)));
      }
    }
    pack(ds8, y);
    {  // Matrix m of a store: queries 8 (j + m) on, the warp's 16 keys, two to a number; lane % 8 is the query's row.
      const int me = opaque(threadIdx.x % 128);
      unsigned char* const ds = shared.ds[stage] + int8::swizzle(me % 32 * 128 + 64 * half + 16 * (me / 32), 128);
      // The codes of dK, in another order.
      const auto two = [&](int j) { return __byte_perm(ds8[j / 2 * 2], ds8[j / 2 * 2 + 1], j % 2 ? 0x7362 : 0x5140); };
#pragma unroll
      for (int j = 0; j < kScores / 4; j += 4) sm90::store_turned(ds + j * (8 * 128), two(j), two(j + 1), two(j + 2), two(j + 3));
    }
    sm90::fence_shared();

    multiply(dk, ds8, at.base + Part<D>::q8t(stage));
    const int number = shared.number[stage];
    sm90::barrier_wait(&shared.full[kNext], next_parity);
    const bool more = shared.number[kNext] >= 0;
    multiply_scores(at, kNext, y);
    int(&sums)[kSums] = either<kSums == kScores>(x, apart);
    if (threadIdx.x % C::kWriters == 0) sm90::await_additions_read();
    // Then dS of all keys is there; the other buffer has been read, and so have the last sums. Of a warp whose lift is not the
    // block's one lane says so, of one with large P 16.
    int said = 0;
    sm90::sync_threads_count<1, 256>((bits & asks) != 0, said);
    low = said < 16 * kWarpsBeside;
    const int level = said % 16 != 0 ? agree(stage) : common;
    const uint32_t turned_keys = at.base + Part<D>::kK8t + at.half * (D / 2 * 128 / 16);
    sm90::wgmma_begin();
#pragma unroll
    for (int step = 0; step < kKeyTile / 32; ++step) {
      const uint64_t a = sm90::operand_at(at.base + Part<D>::ds(stage) + 2 * step, 128);
      const uint64_t b = sm90::operand_at(turned_keys + 2 * step, 128);
      step == 0 ? sm90::multiply_e4m3<sm90::kReplaced>(sums, a, b) : sm90::multiply_e4m3<sm90::kAdded>(sums, a, b);
    }
    sm90::wgmma_commit();
    float fits[2];  // of rows g and g + 8 of the warp's
#pragma unroll
    for (int r = 0; r < 2; ++r) fits[r] = power_of_two(max(queries.sum[16 * warp + g + 8 * r] - level, -126));
    sm90::wgmma_wait<1>();
    sm90::pin(y);
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(&shared.empty[stage]);

    if (more) weigh(kNext, y);  // under dQ's product
    sm90::wgmma_wait<0>();
    sm90::pin(sums);
    constexpr int kPart = kQueryTile * D / int8::kGradWriters;  // what a warp has of the tile's sums
    constexpr int kPiece = kPart * (C::kWriters / 32);
    const int thread = opaque(threadIdx.x % 128);
#pragma unroll
    for (int i = 0; i < kSums; i += 8) {
      uint32_t pair[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float by = fits[e % 2];
        const __half2 two = __floats2half2_rn(as_float(sums[i + 2 * e]) * by, as_float(sums[i + 2 * e + 1]) * by);
        pair[e] = reinterpret_cast<const uint32_t&>(two);
      }
      *reinterpret_cast<uint4*>(shared.sums[half] + int8::grad_sum_offset(0, i, thread, D)) =
          make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
    sm90::fence_shared();
    if constexpr (C::kWriters == 32) {
      __syncwarp();
    } else {
      half == 0 ? sm90::sync_threads<2, 128>() : sm90::sync_threads<3, 128>();
    }
    if (thread % C::kWriters == 0) {
      auto* const workspace = static_cast<unsigned char*>(p.call.workspace);
      const int64_t part = int64_t(number) * int8::kGradWriters + half * 4 + thread / 32;
      [[maybe_unused]] int* const turns = reinterpret_cast<int*>(workspace + p.at.turns) + part;
      auto* const to = reinterpret_cast<__half*>(workspace + p.at.sums) + part * kPart;
      if constexpr (kDeterministic) sm90::await_count(turns, first_key / kKeyTile);
      sm90::add_to_global(to, shared.sums[half] + thread / 32 * kPart, kPiece * 2);
      if constexpr (kDeterministic) {
        sm90::await_additions();
        __threadfence();
        sm90::count_one(turns);
      }
    }
    multiply_values(at, kNext, x);
    if (more) lift_weights(kNext, y);
    sm90::wgmma_wait<0>();
    sm90::pin(x);
    return more;
  };

  static_assert(C::kStages == 2);
  sm90::barrier_wait(&shared.full[0], 0);
  if (shared.number[0] >= 0) {
    multiply_scores(locate(), 0, x);
    multiply_values(locate(), 0, y);
    sm90::wgmma_wait<1>();
    sm90::pin(x);
    weigh(0, x);
    lift_weights(0, x);
    sm90::wgmma_wait<0>();
    sm90::pin(y);
    uint32_t parity = 0;
#pragma unroll 1
    while (work(Stage<0>(), parity, x, y) && work(Stage<1>(), parity ^ 1, y, x)) parity ^= 1;
  }
  if (threadIdx.x % C::kWriters == 0) sm90::await_additions_read();
  sm90::pin(dv);
  sm90::pin(dk);
  const Job done(p, opaque(blockIdx.x));
  const int head_dim = shape.head_dim, row = first_key + g;
  const auto* const levels = reinterpret_cast<const int8::GradLevel*>(static_cast<unsigned char*>(p.call.workspace) + p.at.levels);
  const int8::GradLevel level = levels[done.batch * shape.kv_heads + done.kv_head];
  const float factor = exp2_approx(static_cast<float>(unit));
  store_rows<D>(dv, factor * (1.0f / int8::kGradTop), p.call.dv, done.batch, done.kv_head, row, shape.keys, head_dim);
  store_rows<D>(dk, factor / level.value * level.query, p.call.dk, done.batch, done.kv_head, row, shape.keys, head_dim);
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
