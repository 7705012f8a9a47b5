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
// every multiprocessor walks over (head, query block) jobs.

#include <algorithm>

#include "sage3/launch.h"
#include "sage3/mask_tiles.cuh"
#include "sage3/output.cuh"
#include "sage3/ptx_sm90.cuh"
#include "sage3/softmax.cuh"
#include "sage3/visible.cuh"

namespace sage3 {
namespace {

using int8::kKeyTile;
using int8::kQueryTile;

// What depends on the head dim. 65,536 registers: 32 and three times 160 a thread, or 24 and twice 240.
template <int D>
struct Config {
  static constexpr int kConsumers = D == 256 ? 2 : 3;
  static constexpr int kProducerRegisters = D == 256 ? 24 : 32;
  static constexpr int kConsumerRegisters = D == 256 ? 240 : 160;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kQueries = kConsumers * kQueryTile;
  static constexpr int kTileBytes = kKeyTile * D;
  static constexpr int kStages = D == 256 ? 2 : 4;
  static constexpr int kSteps = D / 32;  // of the contraction of Q K^T
  static constexpr int kBlock = D == 256 ? 128 : D == 96 ? 96 : 64;  // channels of one P V: its accumulator takes half of it
  static constexpr int kValueScales = int8::value_scales(D);
  static constexpr bool kQueriesInRegisters = D < 128;
};

template <int D>
struct Shared {
  alignas(1024) unsigned char k[Config<D>::kStages][Config<D>::kTileBytes];
  alignas(1024) unsigned char v[Config<D>::kStages][Config<D>::kTileBytes];
  alignas(1024) unsigned char q[Config<D>::kConsumers][Config<D>::kQueriesInRegisters ? 1 : kQueryTile * D];
  alignas(16) float k_scale[Config<D>::kStages][int8::kKeyGroups];
  alignas(16) float v_scale[Config<D>::kStages][Config<D>::kValueScales];
  uint64_t k_full[Config<D>::kStages], k_empty[Config<D>::kStages];
  uint64_t v_full[Config<D>::kStages], v_empty[Config<D>::kStages];
};

// A place in a ring of stages, and the parity of its current round.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Params {
  Int8Attend call;
  int8::Workspace at;
  int64_t jobs;
  int blocks;       // query blocks of a head
  int head_group;   // causal: heads whose K and V fit the L2 cache together
};

// One block of queries of one head.
struct Job {
  int batch, head, kv, block;  // kv counts with the batch

  __device__ Job(const Params& p, int64_t index) {
    const int8::Shape& shape = p.call.shape;
    int64_t bh;
    if (p.call.causal) {  // longest blocks first; heads in groups, so that their K and V stay in L2
      const int64_t group = index / (int64_t(p.head_group) * p.blocks);
      const int64_t within = index - group * p.head_group * p.blocks;
      const int64_t first = group * p.head_group;
      const int64_t heads = min(int64_t(p.head_group), int64_t(shape.batch) * shape.heads - first);
      block = p.blocks - 1 - static_cast<int>(within / heads);
      bh = first + within % heads;
    } else {
      bh = index / p.blocks;
      block = static_cast<int>(index - bh * p.blocks);
    }
    batch = static_cast<int>(bh / shape.heads);
    head = static_cast<int>(bh - int64_t(batch) * shape.heads);
    kv = batch * shape.kv_heads + head / (shape.heads / shape.kv_heads);
  }
};

// The job a block takes in its n-th round: to and fro, so that with causal's falling lengths no block is always first.
__device__ __forceinline__ int64_t job_of_round(int64_t round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// The key tiles of a job, in order; with a mask, those that somebody in the block attends.
template <int D, bool kMask>
struct KeyTiles {
  const unsigned char* rows[Config<D>::kConsumers];  // mask bytes of the block's query tiles
  int end;

  __device__ KeyTiles(const Params& p, const Job& job) {
    const int8::Shape& shape = p.call.shape;
    const int last_query = (job.block + 1) * Config<D>::kQueries;
    const int keys = p.call.causal ? min(shape.keys, last_query) : shape.keys;
    end = (keys + kKeyTile - 1) / kKeyTile;
    if constexpr (kMask) {
      const MaskTileIndex index(shape, p.call.mask);
#pragma unroll
      for (int i = 0; i < Config<D>::kConsumers; ++i) {
        const int64_t tile = min(int64_t(job.block) * Config<D>::kConsumers + i, shape.query_tiles() - 1);
        rows[i] = p.call.mask_tiles + index(job.batch, job.head, tile);
      }
    }
  }

  // The first tile from n on that is needed; `end` when there is none.
  __device__ __forceinline__ int from(int n) const {
    if constexpr (kMask) {
      for (; n < end; ++n) {
        unsigned any = 0;
#pragma unroll
        for (int i = 0; i < Config<D>::kConsumers; ++i) any |= rows[i][n];
        if (any != kMaskNone) break;
      }
    }
    return n;
  }
};

// The producer: one thread fills the stages that the consumers have emptied.
template <int D, bool kMask>
__device__ __forceinline__ void produce(const Params& p, Shared<D>& shared) {
  using C = Config<D>;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const int64_t head_bytes = p.call.shape.key_tiles() * C::kTileBytes;
  Place<C::kStages> place;
  for (int64_t round = 0; job_of_round(round) < p.jobs; ++round) {
    const Job job(p, job_of_round(round));
    const KeyTiles<D, kMask> tiles(p, job);
    const unsigned char* const k = base + p.at.k8 + job.kv * head_bytes;
    const unsigned char* const v = base + p.at.v8 + job.kv * head_bytes;
    const int64_t first_tile = job.kv * p.call.shape.key_tiles();
    const auto* const k_scale = reinterpret_cast<const float*>(base + p.at.k_scale) + first_tile * int8::kKeyGroups;
    const auto* const v_scale = reinterpret_cast<const float*>(base + p.at.v_scale) + first_tile * C::kValueScales;
    for (int n = tiles.from(0); n < tiles.end; n = tiles.from(n + 1), place.advance()) {
      const int i = place.stage;
      sm90::barrier_wait(&shared.k_empty[i], place.parity ^ 1);
      sm90::barrier_expect(&shared.k_full[i], C::kTileBytes + sizeof(shared.k_scale[i]));
      sm90::bulk_copy(shared.k_scale[i], k_scale + n * int8::kKeyGroups, sizeof(shared.k_scale[i]), &shared.k_full[i]);
      sm90::bulk_copy(shared.k[i], k + int64_t(n) * C::kTileBytes, C::kTileBytes, &shared.k_full[i]);
      sm90::barrier_wait(&shared.v_empty[i], place.parity ^ 1);
      sm90::barrier_expect(&shared.v_full[i], C::kTileBytes + sizeof(shared.v_scale[i]));
      sm90::bulk_copy(shared.v_scale[i], v_scale + n * C::kValueScales, sizeof(shared.v_scale[i]), &shared.v_full[i]);
      sm90::bulk_copy(shared.v[i], v + int64_t(n) * C::kTileBytes, C::kTileBytes, &shared.v_full[i]);
    }
  }
}

// A warpgroup's operand of Q: one 16-byte word per k-step in registers, or, from head dim 128 on, in shared memory.
template <int D>
struct Queries {
  using C = Config<D>;
  uint4 word[C::kQueriesInRegisters ? C::kSteps : 1];
  unsigned char* tile;

  __device__ __forceinline__ Queries(Shared<D>& shared, int consumer) : tile(shared.q[consumer]) {}

  // `from` is the tile in q8; null where the sequence has ended.
  __device__ __forceinline__ void load(const uint4* from, int consumer) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if constexpr (!C::kQueriesInRegisters) sm90::named_wait(1 + consumer, 128);  // the last job's products are done
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      const uint4 loaded = from == nullptr ? make_uint4(0, 0, 0, 0) : from[(warp * C::kSteps + step) * 32 + lane];
      if constexpr (C::kQueriesInRegisters) {
        word[step] = loaded;
      } else {
        const uint32_t part[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * warp + lane / 4 + 8 * (i % 2), byte = 32 * step + 16 * (i / 2) + 4 * (lane % 4);
          const int at = byte / 128 * kQueryTile * 128 + int8::swizzle(row * 128 + byte % 128, 128);
          *reinterpret_cast<uint32_t*>(tile + at) = part[i];
        }
      }
    }
    if constexpr (!C::kQueriesInRegisters) {
      sm90::fence_shared();
      sm90::named_wait(1 + consumer, 128);
    }
  }
};

// S = Q K^T of one tile, in flight when this returns.
template <int D>
__device__ __forceinline__ void multiply_qk(int (&s)[kTileScores], const Queries<D>& q, const unsigned char* tile) {
  constexpr int kRow = int8::key_block(D);
  const uint64_t k = sm90::operand(tile, kRow);
  sm90::wgmma_begin();
#pragma unroll
  for (int step = 0; step < Config<D>::kSteps; ++step) {
    const int byte = step * 32, at = byte / kRow * kKeyTile * kRow + byte % kRow;
    if constexpr (Config<D>::kQueriesInRegisters) {
      if (step == 0) {
        sm90::wgmma_s8<false>(s, &q.word[step].x, k);
      } else {
        sm90::wgmma_s8<true>(s, &q.word[step].x, k + at / 16);
      }
    } else {
      const uint64_t a = sm90::operand(q.tile, 128) + (byte / 128 * kQueryTile * 128 + byte % 128) / 16;
      if (step == 0) {
        sm90::wgmma_s8<false>(s, a, k);
      } else {
        sm90::wgmma_s8<true>(s, a, k + at / 16);
      }
    }
  }
}

// One block of channels of P V of one tile, in flight when this returns.
template <int kChannels>
__device__ __forceinline__ void multiply_pv(int (&acc)[kChannels / 2], const uint32_t (&p)[kTileWords],
                                            const unsigned char* tile) {
  const uint64_t v = sm90::operand(tile, kKeyTile);
  sm90::wgmma_begin();
  sm90::wgmma_u8<false>(acc, p, v);
#pragma unroll
  for (int step = 1; step < kKeyTile / 32; ++step) sm90::wgmma_u8<true>(acc, p + 4 * step, v + 2 * step);
}

// O += (P V) * weight * v_scale for the channels from first_channel on.
template <int kCount, int kAll>
__device__ __forceinline__ void promote(float (&o)[kAll], int first_channel, const int (&acc)[kCount],
                                        const float (&weight)[2], const float* v_scale) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float factor = weight[i / 2 % 2] * v_scale[first_channel / int8::kChannelGroup + i / 16];
    float& to = o[first_channel / 2 + i];
    to = fmaf(__int2float_rn(acc[i]), factor, to);
  }
}

// A consumer warpgroup.
template <int D, bool kMask>
__device__ __forceinline__ void consume(const Params& p, Shared<D>& shared, int consumer) {
  using C = Config<D>;
  const int8::Shape& shape = p.call.shape;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);  // the same in all lanes, and known to be
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // A stage's scales were read by ordinary loads and will be overwritten by the copy engine: without the fence between
  // the two proxies it may overtake them (seen: one tile in thousands with its successor's scale).
  auto release = [&](uint64_t* barrier) {
    sm90::fence_shared();
    if (lane == 0) sm90::barrier_arrive(barrier);
  };

  Place<C::kStages> k_place, v_place;
  Queries<D> q(shared, consumer);
  float o[D / 2];
  int s[kTileScores];
  uint32_t p8[kTileWords];

  for (int64_t round = 0; job_of_round(round) < p.jobs; ++round) {
    const Job job(p, job_of_round(round));
    const KeyTiles<D, kMask> tiles(p, job);
    const int64_t bh = int64_t(job.batch) * shape.heads + job.head;
    const int64_t query_tile = int64_t(job.block) * C::kConsumers + consumer;
    const bool exists = query_tile < shape.query_tiles();  // the last block may hold fewer tiles
    const int64_t at = bh * shape.query_tiles() + query_tile;
    const int first_row = static_cast<int>(query_tile) * kQueryTile;
    const int row = first_row + 16 * warp + g;  // the thread's first; the other is row + 8

    q.load(exists ? reinterpret_cast<const uint4*>(base + p.at.q8 + at * kQueryTile * D) : nullptr, consumer);
    float q_scale[2] = {0.0f, 0.0f};
    if (exists) {
      const float* const scales = reinterpret_cast<const float*>(base + p.at.q_scale) + at * kQueryTile + 16 * warp + g;
      q_scale[0] = scales[0], q_scale[1] = scales[8];
    }
    const unsigned char* mask_row = nullptr;
    if constexpr (kMask) {
      const int64_t tile = min(query_tile, shape.query_tiles() - 1);
      mask_row = p.call.mask_tiles + MaskTileIndex(shape, p.call.mask)(job.batch, job.head, tile);
    }

    RowState state;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
    float weight[2];
    float k_scale;  // of the thread's columns of the tile in s

    int n = tiles.from(0);
    auto rescale = [&](int r, float factor) {
#pragma unroll
      for (int i = 0; i < D / 4; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
    };
    // Scores of tile n -> codes of P and the rows' weights.
    auto soften = [&] {
      const float c[2] = {q_scale[0] * k_scale, q_scale[1] * k_scale};
      const int after = (n + 1) * kKeyTile;
      bool plain = after <= shape.keys && (!p.call.causal || after <= first_row + 1);
      if constexpr (kMask) plain = plain && mask_row[n] == kMaskAll;
      float top[2];
      uint32_t sum[2] = {0, 0};
      if (plain) {
        tile_max(s, c, top);
        const float bias[2] = {kLog2TopCode - top[0], kLog2TopCode - top[1]};
        quantize_p(p8, sum, [&](int i) { return fmaf(__int2float_rn(s[i]), c[i / 2 % 2], bias[i / 2 % 2]); });
      } else {
        const int first_column = n * kKeyTile + 2 * t;
        const int end[2] = {p.call.causal ? min(shape.keys, row + 1) : shape.keys,
                            p.call.causal ? min(shape.keys, row + 9) : shape.keys};
        scores_as_floats(s, c, first_column, end);
        if constexpr (kMask) {
          if (mask_row[n] != kMaskAll) {
            add_mask(s, MaskRows(p.call.mask, shape, job.batch, job.head, row), first_column, shape.keys);
          }
        }
        tile_max_of_floats(s, top);
        const float bias[2] = {kLog2TopCode - top[0], kLog2TopCode - top[1]};
        quantize_p(p8, sum, [&](int i) { return __int_as_float(s[i]) + bias[i / 2 % 2]; });
      }
      update_rows(state, top, sum, weight, rescale);
    };

    auto wait_k = [&] { sm90::barrier_wait(&shared.k_full[k_place.stage], k_place.parity); };
    auto wait_v = [&] { sm90::barrier_wait(&shared.v_full[v_place.stage], v_place.parity); };
    auto release_k = [&] {
      release(&shared.k_empty[k_place.stage]);
      k_place.advance();
    };
    auto release_v = [&] {
      release(&shared.v_empty[v_place.stage]);
      v_place.advance();
    };
    // With causality the last tiles of a block may be seen by its later queries only.
    const int end = p.call.causal ? min(tiles.end, (first_row + kQueryTile + kKeyTile - 1) / kKeyTile) : tiles.end;
    for (; n < end; n = tiles.from(n + 1)) {
      wait_k();
      multiply_qk<D>(s, q, shared.k[k_place.stage]);
      sm90::wgmma_commit();
      k_scale = shared.k_scale[k_place.stage][t];
      sm90::wgmma_wait<0>();
      sm90::pin(s);
      release_k();
      soften();
      wait_v();
      int acc[C::kBlock / 2];
#pragma unroll
      for (int block = 0; block < D / C::kBlock; ++block) {
        multiply_pv<C::kBlock>(acc, p8, shared.v[v_place.stage] + block * kKeyTile * C::kBlock);
        sm90::wgmma_commit();
        sm90::wgmma_wait<0>();
        sm90::pin(acc);
        promote(o, block * C::kBlock, acc, weight, shared.v_scale[v_place.stage]);
      }
      release_v();
    }
    for (; n < tiles.end; n = tiles.from(n + 1)) {
      wait_k(), release_k();
      wait_v(), release_v();
    }

    float inverse[2], lse[2];
    finish_rows(state, inverse, lse);
    const float* const v_mean = reinterpret_cast<const float*>(base + p.at.v_mean) + int64_t(job.kv) * D;
    const float* const v_norm = reinterpret_cast<const float*>(base + p.at.v_norm) + int64_t(job.kv) * D;
    store_output<D>(o, inverse, v_mean, v_norm, p.call, job.batch, job.head, first_row + 16 * warp);
    if (p.call.lse != nullptr && t == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r < shape.queries) p.call.lse[bh * shape.queries + row + 8 * r] += lse[r];
      }
    }
  }
}

template <int D, bool kMask>
__global__ void __launch_bounds__(Config<D>::kThreads, 1) int8_attention(const __grid_constant__ Params p) {
  using C = Config<D>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared<D>& shared = *reinterpret_cast<Shared<D>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      sm90::barrier_init(&shared.k_full[i], 1), sm90::barrier_init(&shared.v_full[i], 1);
      sm90::barrier_init(&shared.k_empty[i], 4 * C::kConsumers), sm90::barrier_init(&shared.v_empty[i], 4 * C::kConsumers);
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    sm90::register_budget_down<C::kProducerRegisters>();
    if (threadIdx.x == 0) produce<D, kMask>(p, shared);
  } else {
    sm90::register_budget_up<C::kConsumerRegisters>();
    consume<D, kMask>(p, shared, __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1);
  }
}

template <int D, bool kMask>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  using C = Config<D>;
  constexpr int64_t kCacheBytes = 24 << 20;  // of the 50 MB L2: what K and V of a group of heads may take
  const int8::Shape& shape = call.shape;
  const int64_t heads = int64_t(shape.batch) * shape.heads;
  const int per_kv = shape.heads / shape.kv_heads;
  const int blocks = static_cast<int>(int8::ceil_div(shape.queries, C::kQueries));
  const int64_t fitting = std::max<int64_t>(1, kCacheBytes / (2 * shape.key_tiles() * C::kTileBytes)) * per_kv;
  const Params params{call, int8::Workspace(shape), heads * blocks, blocks, static_cast<int>(std::min(fitting, heads))};
  const auto kernel = int8_attention<D, kMask>;
  const int bytes = sizeof(Shared<D>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int grid = static_cast<int>(std::min<int64_t>(params.jobs, call.multiprocessors));
  kernel<<<grid, C::kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <int D>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  if (call.mask.data == nullptr) return launch<D, false>(call, stream);
  const cudaError_t error = classify_mask_tiles(call, stream);
  return error != cudaSuccess ? error : launch<D, true>(call, stream);
}

}  // namespace

cudaError_t int8_attend_sm90(const Int8Attend& call, cudaStream_t stream) {
  switch (call.shape.d()) {
    case 64: return launch<64>(call, stream);
    case 96: return launch<96>(call, stream);
    case 128: return launch<128>(call, stream);
    case 256: return launch<256>(call, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sage3
