// What smoothing Q takes from the scores of the 4-bit attention: delta of nvfp4_format.cuh, for a chunk of the jobs.
//
// delta = (q_mean * sign / q_level) . ((k - k_mean) / k_level) of every tile of queries and every token, in fp32: a product
// of matrices, a hundredth of the attention's. One block: one tile of keys, which it reads once, and up to 64 tiles of
// queries that share its head; a thread computes 8 x 8, and the contraction goes through shared memory 32 channels at a
// time. Causal: tiles of keys that no query of the block sees are left out.

#include <algorithm>
#include <climits>

#include "sage3/channels.cuh"
#include "sage3/launch_fp4.h"

namespace sage3 {
namespace {

using nvfp4::kTile;

constexpr int kThreads = 128;
constexpr int kJobs = 64;      // query tiles of a block
constexpr int kChannels = 32;  // at a time
// Blocks of a multiprocessor. Loads one by one take more registers and have no speed to lose.
template <bool kDense>
constexpr int kBlocks = kDense ? 4 : 2;

struct Params {
  Fp4Correct call;
  nvfp4::Workspace at;
  int d;
  int first_head;    // of K, with the batch
  int parts;         // blocks of a tile of keys

  template <class Part>
  __device__ __forceinline__ const Part* part(int64_t offset) const {
    return reinterpret_cast<const Part*>(static_cast<const unsigned char*>(call.workspace) + offset);
  }
};

// The query tiles that share a head of K, in the order of their jobs, so that those of a chunk follow each other. There are
// fewer than 2^31 jobs: fp4_quantize refuses more.
struct SharedJobs {
  int first_head, heads, all_heads, query_tiles;
  bool causal;

  SAGE3_HD int job(int i) const {
    return causal ? i / heads * all_heads + first_head + i % heads : first_head * query_tiles + i;
  }

  // How many of them are jobs below `end`.
  SAGE3_HD int below(int end) const {
    const int all = heads * query_tiles;
    const int rest = end % all_heads - first_head;  // of the last, partial row of jobs
    const int count =
        causal ? end / all_heads * heads + (rest < 0 ? 0 : rest < heads ? rest : heads) : end - first_head * query_tiles;
    return count < 0 ? 0 : count < all ? count : all;
  }
};

// Both operands, channel by channel. Four numbers lie together; which four is mixed with the channel, so that writing a
// column of channels meets no bank twice.
struct Shared {
  float4 queries[kChannels][kJobs / 4], keys[kChannels][kTile / 4];
  float factor[kJobs];  // of q_mean
  int mean_of[kJobs];   // number of the query tile among all
  int row_of[kJobs];    // of delta
};

__device__ __forceinline__ float& query_at(Shared& shared, int channel, int job) {
  return reinterpret_cast<float*>(shared.queries[channel])[job ^ (channel / 4 % 8 * 4)];
}
__device__ __forceinline__ float& key_at(Shared& shared, int channel, int token) {
  return reinterpret_cast<float*>(shared.keys[channel])[token ^ (channel / 8 * 8)];
}

// x in a register of its own: ptxas sees a product (blockDim.y is 1). Each pair of sums is stored twice side by side, and
// ptxas would keep it in such a group of four registers through the loop, whose other two it then lacks.
__device__ __forceinline__ float copied(float x) { return __uint_as_float(__float_as_uint(x) * blockDim.y); }

template <class T, bool kDense>
__global__ void __launch_bounds__(kThreads, kBlocks<kDense>) fp4_correct_tiles(const __grid_constant__ Params p) {
  __shared__ Shared shared;
  const nvfp4::Shape& shape = p.call.shape;
  const unsigned key_tiles = p.at.key_tiles, of_head = blockIdx.x / p.parts;
  const int part = blockIdx.x % p.parts, tile = of_head % key_tiles, kv = p.first_head + of_head / key_tiles;
  const int group = shape.heads / shape.kv_heads;
  const SharedJobs mine{kv * group, group, shape.batch * shape.heads, int(p.at.query_tiles), p.call.causal};
  const int first_job = p.call.first_job, first = mine.below(first_job) + part * kJobs;
  const int count = min(mine.below(first_job + int(p.call.jobs)) - first, kJobs);
  if (count <= 0) return;
  const auto job_of = [&](int i) {
    return nvfp4::Job(mine.job(first + i), p.at.query_tiles, mine.all_heads, p.call.causal);
  };
  if (p.call.causal && tile > job_of(0).tile) return;  // the others come before it

  if (threadIdx.x < kJobs) {
    const int i = min(int(threadIdx.x), count - 1);
    const nvfp4::Job job = job_of(i);
    const int at = job.head * mine.query_tiles + job.tile, record = nvfp4::query_record(p.d);
    const auto* const level = p.part<float>(p.at.queries + int64_t(at + 1) * record - nvfp4::kLevelBytes);
    shared.factor[threadIdx.x] = copysignf(1.0f, p.call.scale) / *level;
    shared.mean_of[threadIdx.x] = at, shared.row_of[threadIdx.x] = mine.job(first + i) - first_job;
  }
  const int64_t key_record = nvfp4::key_record(p.d), at_tile = int64_t(kv) * p.at.key_tiles + tile;
  const float key_factor = 1.0f / *p.part<float>(p.at.keys + (at_tile + 1) * key_record - nvfp4::kLevelBytes);
  // Reading keys: four threads a token and every 32nd one after it. Query tiles: eight threads a job and every 16th.
  constexpr int kChunks = kChannels / kChunk, kRows = kThreads / kChunks, kTurns = kTile / kRows;
  constexpr int kFours = kChannels / 4, kQueryRows = kThreads / kFours, kQueryTurns = kJobs / kQueryRows;
  const int column = threadIdx.x % kChunks * kChunk, token = tile * kTile + threadIdx.x / kChunks;
  const int channel = threadIdx.x % kFours * 4, job = threadIdx.x / kFours;
  HeadRows<T, kDense> rows(p.call.k, kv / shape.kv_heads, kv % shape.kv_heads, shape.head_dim);
  rows.data += int64_t(token) * rows.token_bytes;
  const float* const k_mean = p.part<float>(p.at.k_mean) + int64_t(kv) * p.d + column;
  const char* q_mean = p.part<char>(p.at.q_mean + 4 * channel);
  float* const keys = &key_at(shared, column, threadIdx.x / kChunks);

  const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // tokens 4x.. and 64 + 4x.., jobs 8y..
  float sum[8][8] = {};                                  // [job][token]
#pragma unroll 1
  for (int slab = 0; slab < p.d; slab += kChannels) {
    __syncthreads();
    Chunk<T> k[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) k[i] = rows.load(i * kRows, column, token + i * kRows < shape.keys);
    // Moved on, for ptxas would keep an address for every row.
    rows.data += kChannels * (kDense ? int64_t(sizeof(T)) : rows.channel_bytes), rows.head_dim -= kChannels;
    float4 query[kQueryTurns];
#pragma unroll
    for (int i = 0; i < kQueryTurns; ++i) {
      query[i] = *reinterpret_cast<const float4*>(q_mean + int64_t(shared.mean_of[job + i * kQueryRows]) * (4 * p.d));
    }
    q_mean += kChannels * 4;
#pragma unroll
    for (int i = 0; i < kQueryTurns; ++i) {
      const float factor = shared.factor[job + i * kQueryRows];
      float* const to = &query_at(shared, channel, job + i * kQueryRows);
      to[0] = query[i].x * factor, to[kJobs] = query[i].y * factor;
      to[2 * kJobs] = query[i].z * factor, to[3 * kJobs] = query[i].w * factor;
    }
#pragma unroll
    for (int c = 0; c < kChunk; c += 4) {
      const float4 four = *reinterpret_cast<const float4*>(k_mean + slab + c);
      const float mean[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const bool there = token + i * kRows < shape.keys;
          keys[(c + n) * kTile + i * kRows] = there ? (k[i][c + n] - mean[n]) * key_factor : 0.0f;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x / 32 * 16 >= count) continue;  // a warp without jobs
#pragma unroll 8
    for (int c = 0; c < kChannels; ++c) {
      float4 a[2], b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i] = shared.queries[c][(2 * y + i) ^ c / 4 % 8];
        b[i] = shared.keys[c][(x + 16 * i) ^ c / 8 * 2];
      }
      const float query[8] = {a[0].x, a[0].y, a[0].z, a[0].w, a[1].x, a[1].y, a[1].z, a[1].w};
      const float key[8] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[i][n] = fmaf(query[i], key[n], sum[i][n]);
      }
    }
  }

  float* const delta = reinterpret_cast<float*>(static_cast<unsigned char*>(p.call.workspace) + p.at.delta);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int n = 8 * y + i;
    if (n >= count) break;
    float* const to = delta + (int64_t(shared.row_of[n]) * key_tiles + tile) * nvfp4::kDeltaFloats;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float d0 = copied(sum[i][2 * pair]), d1 = copied(sum[i][2 * pair + 1]);
      const int token = pair / 2 * 64 + 4 * x + pair % 2 * 2;
      *reinterpret_cast<float4*>(to + nvfp4::delta_offset(token)) = make_float4(d0, d1, d0, d1);
    }
  }
}

template <class T>
cudaError_t launch(const Fp4Correct& call, cudaStream_t stream) {
  const nvfp4::Shape& shape = call.shape;
  Params params{call, nvfp4::Workspace(shape), nvfp4::padded_head_dim(shape.head_dim)};
  const int64_t group = shape.heads / shape.kv_heads, per_head = group * params.at.query_tiles;
  int64_t heads = int64_t(shape.batch) * shape.kv_heads, most = std::min(per_head, call.jobs);
  if (call.causal) {  // rows of jobs go through all heads, and the chunk may begin and end inside of one
    most = std::min(per_head, (call.jobs / (heads * group) + 2) * group);
  } else {
    params.first_head = static_cast<int>(call.first_job / per_head);
    heads = (call.first_job + call.jobs - 1) / per_head - params.first_head + 1;
  }
  params.parts = static_cast<int>(nvfp4::ceil_div(most, kJobs));
  const int64_t blocks = heads * params.at.key_tiles * params.parts;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  const auto kernel = is_dense(call.k, shape.head_dim) ? fp4_correct_tiles<T, true> : fp4_correct_tiles<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t fp4_correct(const Fp4Correct& call, cudaStream_t stream) {
  return with_dtype(call.k.dtype, [&](auto number) { return launch<decltype(number)>(call, stream); });
}

}  // namespace sage3
