// 8-bit attention on Hopper: INT8 Q K^T and INT8 P V on wgmma.
//
// One block is one producer warpgroup, which brings K and V tiles of 128 tokens by bulk copies (int8_format.cuh: they
// lie in memory as wgmma wants them, so there are no tensor maps), and three consumer warpgroups of 64 queries (two for
// head dim 256). Per tile a consumer computes
//
//   S = Q K^T      exact integers
//   softmax -> P   row maximum on raw integers, 255 * 2^x packed to u8: the A operand without a shuffle
//   O += P V       block by block of channels: the exact integers of one tile, times 2^(tile's maximum - reference) and
//                  V's scale
//
// one after the other: what hides the latency of each is the other two warpgroups. Two with twice the registers, and the
// products of one tile under the softmax of the next, were slower (docs/performance.md).
//
// Both products are integer: u8 codes with the tile's own maximum at 255 are finer than e4m3's three bits of mantissa, and
// FP8's accumulator keeps 14 bits, so that it would have to be promoted every tile or two as well.
// Structure after FlashAttention-3 (arXiv 2407.08608: warp specialisation, setmaxnreg; its named barriers that make
// warpgroups take turns cost 5 % here). Quantisation after SageAttention2 (arXiv 2411.10958). The grid is persistent:
// every multiprocessor works on (head, query block) jobs, one after the other. Jobs that are alike are dealt out beforehand.
// Where their lengths differ (causal, masks) the slowest would then have 10 to 36 % more than the mean: there whoever is done
// takes the next, from a counter in memory.

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "sage3/launch.h"
#include "sage3/mask_tiles.cuh"
#include "sage3/output.cuh"
#include "sage3/ptx_sm90.cuh"
#include "sage3/rounds.cuh"
#include "sage3/softmax.cuh"
#include "sage3/visible.cuh"

namespace sage3 {
namespace {

using int8::kKeyTile;
using int8::kQueryTile;

constexpr int kJobSlots = 4;  // jobs that the producer may be ahead of the slowest consumer, and one

// What depends on the head dim. 65,536 registers: 32 and three times 160 a thread, or 24 and twice 240.
template <int D>
struct Config {
  static constexpr int kConsumers = D == 256 ? 2 : 3;
  static constexpr int kProducerRegisters = D == 256 ? 24 : 32;
  static constexpr int kConsumerRegisters = D == 256 ? 240 : 160;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // What setmaxnreg may hand out is what the block got at its launch; asking for more waits for ever.
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8));
  static constexpr int kQueries = kConsumers * kQueryTile;
  static constexpr int kTileBytes = kKeyTile * D;
  static constexpr int kStages = D == 256 ? 2 : 4;
  static constexpr int kValueScales = int8::value_scales(D);
  // Channels of one P V, whose accumulator takes half as many registers of S; at head dim 96 the second one has 32. Two are
  // in flight, and the first one's sums are added under the second, but for head dim 256, which has no registers for it.
  static constexpr int kBlock = D == 256 ? 128 : 64;
};

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// RowState's m of a thread, which is used once a tile.
template <int D>
struct alignas(D == 64 ? 16 : 8) Reference {
  float m[2];
};

template <int D>
struct Shared {
  alignas(1024) unsigned char k[Config<D>::kStages][Config<D>::kTileBytes];
  alignas(1024) unsigned char v[Config<D>::kStages][Config<D>::kTileBytes];
  alignas(16) unsigned char q[Config<D>::kConsumers][kQueryTile * D];
  alignas(16) float q_scale[Config<D>::kConsumers][kQueryTile];
  alignas(16) Reference<D> reference[Config<D>::kConsumers][D == 64 ? 4 * D : 128];  // hd64: laid out as q is
  // Twice as many as stages: a slot is filled again only after its readers have used, not only read, what it held. With
  // one slot a stage the copy engine could overtake an ordinary load still under way (seen: one tile in thousands with
  // its successor's scale), or a fence between the proxies had to prevent it, twice a tile.
  alignas(16) float k_scale[2 * Config<D>::kStages][int8::kKeyGroups];
  alignas(16) float v_scale[2 * Config<D>::kStages][Config<D>::kValueScales];
  uint64_t k_full[Config<D>::kStages], k_empty[Config<D>::kStages];
  uint64_t v_full[Config<D>::kStages], v_empty[Config<D>::kStages];
  uint64_t q_full[Config<D>::kConsumers], q_empty[Config<D>::kConsumers];
  // The number of the job of round n, in slot n % kJobSlots: the producer's choice, for all others.
  int job[kJobSlots];
  uint64_t job_full[kJobSlots], job_empty[kJobSlots];
};

struct Params {
  Int8Attend call;
  int8::Workspace at;
  int jobs;
  int blocks;      // query blocks of a head
  int head_group;  // causal: heads whose K and V fit the L2 cache together
};

// One block of queries of one head.
struct Job {
  int batch, head, kv, block;  // kv counts with the batch

  __device__ Job(const Params& p, int index) {
    const int8::Shape& shape = p.call.shape;
    int bh;
    if (p.call.causal) {  // longest blocks first; heads in groups, so that their K and V stay in L2
      const int first = index / (p.head_group * p.blocks) * p.head_group;
      const int within = index - first * p.blocks, heads = min(p.head_group, shape.batch * shape.heads - first);
      block = p.blocks - 1 - within / heads;
      bh = first + within % heads;
    } else {
      bh = index / p.blocks;
      block = index - bh * p.blocks;
    }
    batch = bh / shape.heads;
    head = bh - batch * shape.heads;
    kv = batch * shape.kv_heads + head / (shape.heads / shape.kv_heads);
  }
};

// The key tiles of a job, in order; with a mask, those that somebody in the block attends.
template <int D, bool kMask>
struct KeyTiles {
  int end;
  const unsigned char* classes = nullptr;  // MaskTile of the block's first query tile
  int stride = 0, last = 0;                // to the next query tile's, and how many of those there are

  __device__ KeyTiles(const Params& p, const Job& job) {
    constexpr int kTiles = Config<D>::kConsumers;
    const int8::Shape& shape = p.call.shape;
    const int keys = p.call.causal ? min(shape.keys, (job.block + 1) * Config<D>::kQueries) : shape.keys;
    end = (keys + kKeyTile - 1) / kKeyTile;
    if constexpr (kMask) {
      const MaskTileIndex index(shape, p.call.mask);
      classes = p.call.mask_tiles + index(job.batch, job.head, job.block * kTiles);
      stride = static_cast<int>(index.row_stride);
      last = static_cast<int>(shape.query_tiles()) - 1 - job.block * kTiles;  // the last block may hold fewer
    }
  }

  // The class of tile n for the i-th query tile of the block.
  __device__ __forceinline__ MaskTile mask(int n, int i) const {
    if constexpr (!kMask) return kMaskAll;
    return static_cast<MaskTile>(classes[min(i, last) * stride + n]);
  }

  // The first tile from n on that is needed; `end` or more when there is none.
  __device__ __forceinline__ int from(int n) const {
    if constexpr (kMask) {
#pragma unroll 1
      for (; n < end; ++n) {
        unsigned any = 0;
#pragma unroll
        for (int i = 0; i < Config<D>::kConsumers; ++i) any |= mask(n, i);
        if (any != kMaskNone) break;
      }
    }
    return n;
  }
};

// The producer: one thread fills the stages that the consumers have emptied.
template <int D, bool kMask, bool kDealt>
__device__ __forceinline__ void produce(const Params& p, Shared<D>& shared) {
  using C = Config<D>;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  Place<C::kStages> place;
  Place<kJobSlots> slot;
  int number = blockIdx.x;
  for (int round = 0;; ++round, slot.advance()) {
    if constexpr (kDealt) {
      number = job_of_round(round);
    } else {
      sm90::barrier_await(&shared.job_empty[slot.stage], slot.parity ^ 1);
      shared.job[slot.stage] = number;
      sm90::barrier_arrive(&shared.job_full[slot.stage]);
    }
    if (number >= p.jobs) return;
    const Job job(p, number);
    const KeyTiles<D, kMask> tiles(p, job);
    const int64_t first = job.kv * p.call.shape.key_tiles();
    for (int n = tiles.from(0); n < tiles.end; n = tiles.from(n + 1), place.advance()) {
      const int i = place.stage;
      const int64_t tile = first + opaque(n);  // four addresses kept from tile to tile would not fit in 32 registers
      auto bring = [&](auto& to, int64_t part, uint64_t* full) {
        sm90::bulk_copy(to, base + part + tile * sizeof(to), sizeof(to), full);
      };
      auto& k_scale = shared.k_scale[place.slot()];
      auto& v_scale = shared.v_scale[place.slot()];
      sm90::barrier_await(&shared.k_empty[i], place.parity ^ 1);
      sm90::barrier_expect(&shared.k_full[i], C::kTileBytes + sizeof(k_scale));
      bring(k_scale, p.at.k_scale, &shared.k_full[i]);
      bring(shared.k[i], p.at.k8, &shared.k_full[i]);
      sm90::barrier_await(&shared.v_empty[i], place.parity ^ 1);
      sm90::barrier_expect(&shared.v_full[i], C::kTileBytes + sizeof(v_scale));
      bring(v_scale, p.at.v_scale, &shared.v_full[i]);
      bring(shared.v[i], p.at.v8, &shared.v_full[i]);
    }
    // Only now, with the stages full: a job taken early is one that an idle multiprocessor cannot have.
    if constexpr (!kDealt) number = gridDim.x + (p.call.next_job != nullptr ? atomicAdd(p.call.next_job, 1) : number);
  }
}

// Brings Q to one consumer: one thread's work. The next job's Q comes while the consumer still finishes the last one.
template <int D, bool kDealt>
__device__ __forceinline__ void produce_queries(const Params& p, Shared<D>& shared, int consumer) {
  const int64_t query_tiles = p.call.shape.query_tiles();
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  auto& q = shared.q[consumer];
  auto& q_scale = shared.q_scale[consumer];
  uint64_t* const full = &shared.q_full[consumer];
  Place<kJobSlots> slot;
  for (int round = 0;; ++round, slot.advance()) {
    int number = job_of_round(round);
    if constexpr (!kDealt) {
      sm90::barrier_await(&shared.job_full[slot.stage], slot.parity);
      number = shared.job[slot.stage];
    }
    if (kDealt && number >= p.jobs) return;
    sm90::barrier_await(&shared.q_empty[consumer], static_cast<uint32_t>(round & 1) ^ 1);
    if (number >= p.jobs) {  // the consumer is to see it too
      sm90::barrier_arrive(full);
      return;
    }
    const Job job(p, number);
    const int tile = job.block * Config<D>::kConsumers + consumer;
    const int64_t at = (int64_t(job.batch) * p.call.shape.heads + job.head) * query_tiles + tile;
    if (tile < query_tiles) {
      sm90::barrier_expect(full, sizeof(q) + sizeof(q_scale));
      sm90::bulk_copy(q, base + p.at.q8 + at * sizeof(q), sizeof(q), full);
      sm90::bulk_copy(q_scale, base + p.at.q_scale + at * sizeof(q_scale), sizeof(q_scale), full);
    } else {  // the last block may hold fewer tiles: no row of this one is stored
      sm90::barrier_arrive(full);
    }
  }
}

// The thread's words of the A operand of four k-steps of Q K^T.
template <int D>
__device__ __forceinline__ void load_queries(uint32_t (&a)[kTileWords], const uint4* q, int first_step) {
#pragma unroll
  for (int i = 0; i < 4 && first_step + i < D / 32; ++i) {
    const uint4 word = q[(first_step + i) * 32];
    a[4 * i] = word.x, a[4 * i + 1] = word.y, a[4 * i + 2] = word.z, a[4 * i + 3] = word.w;
  }
}

// S = Q K^T of one tile, in flight when this returns; a holds Q's first four k-steps.
template <int D>
__device__ __forceinline__ void multiply_qk(int (&s)[kTileScores], uint32_t (&a)[kTileWords], const uint4* q,
                                            const unsigned char* tile) {
  constexpr int kRow = int8::key_block(D);
  const uint64_t k = sm90::operand(tile, kRow);
  sm90::wgmma_begin();
  sm90::wgmma_s8<false>(s, a, k);
#pragma unroll
  for (int step = 1; step < D / 32; ++step) {
    if (step == 4) {  // head dim 256
      sm90::wgmma_commit(), sm90::wgmma_wait<0>();
      load_queries<D>(a, q, step);
      sm90::wgmma_begin();
    }
    const int byte = step * 32, at = byte / kRow * kKeyTile * kRow + byte % kRow;
    sm90::wgmma_s8<true>(s, a + step % 4 * 4, k + at / 16);
  }
}

// 2 kCount channels of P V of one tile, in flight when this returns.
template <int kCount>
__device__ __forceinline__ void multiply_pv(int (&acc)[kCount], const uint32_t (&p)[kTileWords],
                                            const unsigned char* tile) {
  const uint64_t v = sm90::operand(tile, kKeyTile);
  sm90::wgmma_begin();
  sm90::wgmma_u8<false>(acc, p, v);
#pragma unroll
  for (int step = 1; step < kKeyTile / 32; ++step) sm90::wgmma_u8<true>(acc, p + 4 * step, v + 2 * step);
}

// O += (P V) * weight * v_scale for a block of channels, whose first sum in o is number `first`.
template <int kCount, int kAll, int kScales>
__device__ __forceinline__ void promote(float (&o)[kAll], int first, const int (&acc)[kCount], const float (&weight)[2],
                                        const float (&v_scale)[kScales]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    o[first + i] = fmaf(__int2float_rn(acc[i]), weight[i / 2 % 2] * v_scale[i / 16], o[first + i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sm90::pin(o[first + i]);  // now, under the product in flight, and not after it
}

// A consumer warpgroup. What a job's end needs is computed there once more: registers are what the loop is short of.
template <int D, bool kMask, bool kFast, bool kDealt>
__device__ __forceinline__ void consume(const Params& p, Shared<D>& shared, int consumer) {
  using C = Config<D>;
  constexpr int kBlocks = (D + C::kBlock - 1) / C::kBlock;
  constexpr bool kQueriesEarly = D != 256;  // a tile ahead: fetched under the sums of the last one
  constexpr bool kReferenceAside = D != 64 || !kFast;  // in shared memory, for want of registers
  const int8::Shape& shape = p.call.shape;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);  // the same in all lanes, and known to be
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  auto release = [&](uint64_t* barrier) {
    if (lane == 0) sm90::barrier_arrive(barrier);
  };

  Place<C::kStages> place;
  float o[D / 2];
  int s[kTileScores];
  uint32_t a8[kTileWords];  // the A operand of the product at hand: Q, read again for every tile, or P
  float weight[2];

  const uint4* const q = reinterpret_cast<const uint4*>(shared.q[consumer]) + warp * D + lane;  // D words a warp
  // P V of one block of channels, in flight when this returns; and its end.
  auto accumulator = [&](auto block) -> auto& {
    constexpr int kCount = std::min(C::kBlock, D - block * C::kBlock) / 2;
    return reinterpret_cast<int(&)[kCount]>(s[D == 256 ? 0 : block * 32]);
  };
  auto multiply = [&](auto block) {
    multiply_pv(accumulator(block), a8, shared.v[place.stage] + block * C::kBlock * kKeyTile);
    sm90::wgmma_commit();
  };
  auto finish = [&](auto block, auto pending) {
    constexpr int kScales = C::kBlock / int8::kChannelGroup;
    float v_scale[kScales];
#pragma unroll
    for (int i = 0; i < kScales; ++i) v_scale[i] = shared.v_scale[place.slot()][block * kScales + i];
    sm90::wgmma_wait<pending>();
    sm90::pin(accumulator(block));
    if constexpr (kQueriesEarly && block == kBlocks - 1) load_queries<D>(a8, q, 0);  // P has been used
    promote(o, block * C::kBlock / 2, accumulator(block), weight, v_scale);
  };
  auto rescale = [&](int r, float factor) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
  };

  const auto number_of = [&](int round) { return kDealt ? job_of_round(round) : shared.job[round % kJobSlots]; };

  for (int round = 0;; ++round) {
    const auto await_queries = [&] { sm90::barrier_wait(&shared.q_full[consumer], static_cast<uint32_t>(round & 1)); };
    if constexpr (!kDealt) await_queries();
    const int number = number_of(round);
    if (number >= p.jobs) return;
    const Job job(p, number);
    const KeyTiles<D, kMask> tiles(p, job);
    const int query_tile = job.block * C::kConsumers + consumer, first_row = query_tile * kQueryTile;
    const float* const q_scale = &shared.q_scale[consumer][16 * warp + g];
    if constexpr (kDealt) await_queries();
    [[maybe_unused]] float reach = 0.0f;  // times a tile's k_scale: no exponent of the rows is larger, either sign
    if constexpr (kFast) {
      int norm[2] = {0, 0};
#pragma unroll
      for (int step = 0; step < D / 32; ++step) {
        const uint4 word = q[step * 32];
        norm[0] = square_bytes(word.z, square_bytes(word.x, norm[0]));
        norm[1] = square_bytes(word.w, square_bytes(word.y, norm[1]));
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // |q . k| <= |q| |k|
        reach = fmaxf(reach, q_scale[8 * r] * sqrtf(quad_sum(__int2float_rn(norm[r])) * (127.0f * 127.0f * D)));
      }
    }

    RowState state;
    auto& reference = [&]() -> Reference<D>& {
      if constexpr (D != 64) return shared.reference[consumer][32 * warp + lane];
      // As far from the thread's words of Q in every thread, so that one register addresses both: 6 % of hd64's speed.
      constexpr int kApart = offsetof(Shared<D>, reference) - offsetof(Shared<D>, q);
      return *reinterpret_cast<Reference<D>*>(const_cast<uint4*>(q) + kApart / sizeof(uint4));
    }();
    if constexpr (kReferenceAside) reference = {state.m[0], state.m[1]};
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

    // With causality the last tiles of a block may be seen by its later queries only.
    const int end = p.call.causal ? min(tiles.end, (first_row + kQueryTile + kKeyTile - 1) / kKeyTile) : tiles.end;
    int n = tiles.from(0);
    if constexpr (kQueriesEarly) load_queries<D>(a8, q, 0);
    if (n >= end) release(&shared.q_empty[consumer]);
    while (n < end) {
      if constexpr (!kQueriesEarly) load_queries<D>(a8, q, 0);
      sm90::barrier_wait(&shared.k_full[place.stage], place.parity);
      multiply_qk<D>(s, a8, q, shared.k[place.stage]);
      sm90::wgmma_commit();
      const float k_scale = shared.k_scale[place.slot()][t];  // of the thread's columns
      const float c[2] = {q_scale[0] * k_scale, q_scale[8] * k_scale};
      const int after = (n + 1) * kKeyTile;
      const bool plain = after <= shape.keys && (!p.call.causal || after <= first_row + 1);
      const MaskTile mask = tiles.mask(n, consumer);
      sm90::wgmma_wait<0>();
      sm90::pin(s);
      release(&shared.k_empty[place.stage]);

      float top[2];
      uint32_t sum[2] = {0, 0};
      if (plain && mask == kMaskAll) {
        int most[2];
        tile_max(s, c, most, top);
        if constexpr (kFast) {
          if (__all_sync(0xffffffffu, 2.0f * reach * k_scale < kFastSpan)) {
            quantize_p_fast<false>(a8, sum, s, c, most, top);
          } else {
            quantize_p_fast<true>(a8, sum, s, c, most, top);
          }
        } else {
          const float bias[2] = {kLog2TopCode - top[0], kLog2TopCode - top[1]};
          quantize_p(a8, sum, [&](int i) { return fmaf(__int2float_rn(s[i]), c[i / 2 % 2], bias[i / 2 % 2]); });
        }
      } else {
        const int me = opaque(lane);
        const int row = first_row + 16 * warp + me / 4, column = n * kKeyTile + me % 4 * 2;  // the first; and row + 8
        const int visible[2] = {(p.call.causal ? min(shape.keys, row + 1) : shape.keys) - column,
                                (p.call.causal ? min(shape.keys, row + 9) : shape.keys) - column};
        scores_as_floats(s, c, visible);
        if constexpr (kMask) {
          if (mask != kMaskAll) {
            const Job here(p, number_of(opaque(round)));
            add_mask(s, p.call, here.batch, here.head, row, column);
          }
        }
        tile_max_of_floats(s, top);
        const float bias[2] = {kLog2TopCode - top[0], kLog2TopCode - top[1]};
        quantize_p(a8, sum, [&](int i) { return __int_as_float(s[i]) + bias[i / 2 % 2]; });
      }
      if constexpr (kReferenceAside) state.m[0] = reference.m[0], state.m[1] = reference.m[1];
      update_rows<!kFast>(state, top, sum, weight, rescale);
      if constexpr (kReferenceAside) reference = {state.m[0], state.m[1]};

      n = tiles.from(n + 1);
      if (n >= end) {
        __syncwarp();  // all lanes have read q_scale
        release(&shared.q_empty[consumer]);
      }
      sm90::barrier_wait(&shared.v_full[place.stage], place.parity);
      multiply(Int<0>{});
      if constexpr (kBlocks > 1 && D != 256) multiply(Int<1>{});
      if constexpr (kBlocks > 1) finish(Int<0>{}, Int<D == 256 ? 0 : 1>{});
      if constexpr (D == 256) multiply(Int<1>{});
      finish(Int<kBlocks - 1>{}, Int<0>{});
      __syncwarp();  // all lanes have read the tile's scales, whose slots the next round but one fills
      release(&shared.v_empty[place.stage]);
      place.advance();
    }
#pragma unroll 1
    for (; n < tiles.end; n = tiles.from(n + 1)) {
      sm90::barrier_wait(&shared.k_full[place.stage], place.parity);
      release(&shared.k_empty[place.stage]);
      sm90::barrier_wait(&shared.v_full[place.stage], place.parity);
      release(&shared.v_empty[place.stage]);
      place.advance();
    }

    const Job done(p, number_of(opaque(round)));
    const int row0 = (done.block * C::kConsumers + consumer) * kQueryTile + 16 * warp;
    float inverse[2], lse[2];
    if constexpr (kReferenceAside) state.m[0] = reference.m[0], state.m[1] = reference.m[1];
    finish_rows(state, inverse, lse);
    const float* const v_mean = reinterpret_cast<const float*>(base + p.at.v_mean) + int64_t(done.kv) * D;
    const float* const v_norm = reinterpret_cast<const float*>(base + p.at.v_norm) + int64_t(done.kv) * D;
    store_output<D>(o, inverse, v_mean, v_norm, p.call, done.batch, done.head, row0);
    if (p.call.lse != nullptr && t == 0) {
      float* const rows = p.call.lse + (int64_t(done.batch) * shape.heads + done.head) * shape.queries;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row0 + g + 8 * r < shape.queries) rows[row0 + g + 8 * r] += lse[r];
      }
    }
    if constexpr (!kFast) {
      if (p.call.peak != nullptr && t == 0) {
        float* const rows = p.call.peak + (int64_t(done.batch) * shape.heads + done.head) * shape.queries;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (row0 + g + 8 * r < shape.queries) rows[row0 + g + 8 * r] = 255.0f * inverse[r];
        }
      }
    }
    if constexpr (!kDealt) {
      __syncwarp();  // all lanes have read the job's number
      release(&shared.job_empty[round % kJobSlots]);
    }
  }
}

template <int D, bool kMask, bool kFast, bool kDealt>
__global__ void __launch_bounds__(Config<D>::kThreads, 1) int8_attention(const __grid_constant__ Params p) {
  using C = Config<D>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared<D>& shared = *reinterpret_cast<Shared<D>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      sm90::barrier_init(&shared.k_full[i], 1), sm90::barrier_init(&shared.v_full[i], 1);
      sm90::barrier_init(&shared.k_empty[i], 4 * C::kConsumers), sm90::barrier_init(&shared.v_empty[i], 4 * C::kConsumers);
    }
    for (int i = 0; i < C::kConsumers; ++i) sm90::barrier_init(&shared.q_full[i], 1), sm90::barrier_init(&shared.q_empty[i], 4);
    if constexpr (!kDealt) {
      for (int i = 0; i < kJobSlots; ++i) {
        sm90::barrier_init(&shared.job_full[i], 1), sm90::barrier_init(&shared.job_empty[i], 4 * C::kConsumers);
      }
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    sm90::register_budget_down<C::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (threadIdx.x % 32 == 0 && warp == 0) produce<D, kMask, kDealt>(p, shared);
    if (threadIdx.x % 32 == 0 && warp > 0 && warp <= C::kConsumers) produce_queries<D, kDealt>(p, shared, warp - 1);
  } else {
    sm90::register_budget_up<C::kConsumerRegisters>();
    consume<D, kMask, kFast, kDealt>(p, shared, __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1);
  }
}

template <int D, bool kMask, bool kFast, bool kDealt>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  using C = Config<D>;
  constexpr int64_t kCacheBytes = 8 << 20;  // of the 50 MB L2, for K and V of a group of heads: 24 MB cost 13 %, 4 MB 7 %
  const int8::Shape& shape = call.shape;
  const int64_t heads = int64_t(shape.batch) * shape.heads;
  const int per_kv = shape.heads / shape.kv_heads;
  const int64_t blocks = int8::ceil_div(shape.queries, C::kQueries);
  const int64_t fitting = std::max<int64_t>(1, kCacheBytes / (2 * shape.key_tiles() * C::kTileBytes)) * per_kv;
  if (heads * blocks > (1 << 30)) return cudaErrorInvalidValue;  // more Q than any memory holds
  const Params params{call, int8::Workspace(shape), static_cast<int>(heads * blocks), static_cast<int>(blocks),
                      static_cast<int>(std::min(fitting, heads))};
  const auto kernel = int8_attention<D, kMask, kFast, kDealt>;
  const int bytes = sizeof(Shared<D>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int grid = std::min(params.jobs, call.multiprocessors);
  kernel<<<grid, C::kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <int D>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  constexpr bool kFast = D != 256;  // there the products take twice as long as the exponentials: nothing to gain
  const bool fast = kFast && call.fast;
  const auto unmasked = [&](auto dealt) {
    return fast ? launch<D, false, kFast, dealt>(call, stream) : launch<D, false, false, dealt>(call, stream);
  };
  if (call.mask.data == nullptr) return call.next_job == nullptr ? unmasked(std::true_type()) : unmasked(std::false_type());
  return fast ? launch<D, true, kFast, false>(call, stream) : launch<D, true, false, false>(call, stream);
}

}  // namespace

cudaError_t int8_attend_sm90(const Int8Attend& call, cudaStream_t stream) {
  return with_head_dim(call.shape.d(), [&](auto d) { return launch<decltype(d)::value>(call, stream); });
}

}  // namespace sage3
