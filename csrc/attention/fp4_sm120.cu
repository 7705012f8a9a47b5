// 4-bit attention on Blackwell (sm_120, sm_121): Q K^T and P V in NVFP4 on the block-scaled tensor cores.
//
// One block is eight warps of 16 queries, which take turns in starting the bulk copies of tiles of 128 tokens (nvfp4_format.cuh:
// they lie in memory as the threads want them, so there are no tensor maps, no ldmatrix and no bank conflicts). Per tile a warp
// computes
//
//   S = delta + Q K^T      the accumulators start at what smoothing Q took from the scores
//   softmax -> P           2^x scaled so that blocks of 16 tokens get e4m3 scales, codes of e2m1: the A operand without a
//                          shuffle, for K's tokens are permuted
//   O += P V               in place; the row's sum by one more product, with a column of ones
//
// one after the other: the two warps of each scheduler run one's softmax under the other's products.
//
// O and the sums are kept relative to a reference m of the row, a whole number that follows the tile's maximum lazily: P may
// exceed it by 2^kUp and lies at most 2^kDown below. The reference is whole, so moving it scales O exactly and changes no
// code; without kDown a tile far below the row's maximum would have only subnormal scales left (one token that everybody
// attends to, and a hundred thousand others). A block's scale is rounded first and then divided by, in the exponent:
// code = e2m1(2^(x - m + kLog2Reach - log2(scale))).
//
// After SageAttention3 (arXiv 2505.11594): two levels of scales for P, smoothing. What differs: rows' sums from the quantised
// P, the reference above in place of the tile's maximum, operands in fragment order.
//
// The two instructions that other GPUs lack are emulated there (nvfp4.cuh), slowly and exactly; all else is the same code.

#include <algorithm>
#include <climits>
#include <type_traits>
#include <utility>

#include "sage3/launch_fp4.h"
#include "sage3/mask_tiles.cuh"
#include "sage3/nvfp4.cuh"
#include "sage3/output.cuh"
#include "sage3/ptx_sm90.cuh"
#include "sage3/rounds.cuh"
#include "sage3/visible.cuh"

namespace sage3 {
namespace {

using nvfp4::kTile;

constexpr int kWarps = kTile / nvfp4::kWarpRows;  // of 255 registers: a ninth, for copies alone, would leave them 168
constexpr int kThreads = 32 * kWarps;

constexpr float kUp = 2.0f, kDown = 3.0f;  // powers of two
constexpr float kFloor = 40.0f;            // m stays within this of the row's largest: O must not overflow
// P at m is 448 * 6 / 2^kUp: then NVFP4 holds 2^kUp of it.
constexpr float kLog2Reach = 9.392317422778761f;  // log2(672)
constexpr float kLog2Sixth = 6.807354922057604f;  // log2(672 / 6)

constexpr int kScores = kTile / 2;   // a thread's
constexpr int kGroups = kTile / 32;  // of tokens, of which a thread has eight of two rows
constexpr int kProducts = 2;         // over 64 tokens each

// Channels of the output that a job has: head dim 256 is taken in two halves, with Q K^T twice, for want of registers.
template <int D>
constexpr int kWidth = D < 128 ? D : 128;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// run(Int<0>{}) .. run(Int<kCount - 1>{})
template <class Run, int... kIndex>
__device__ __forceinline__ void unrolled(Run&& run, std::integer_sequence<int, kIndex...>) {
  (run(Int<kIndex>{}), ...);
}
template <int kCount, class Run>
__device__ __forceinline__ void unrolled(Run&& run) {
  unrolled(run, std::make_integer_sequence<int, kCount>{});
}

template <int D>
struct Stage {
  alignas(128) unsigned char keys[nvfp4::key_record(D)];
  alignas(16) unsigned char values[nvfp4::value_record(kWidth<D>)];
  alignas(16) float delta[nvfp4::kDeltaFloats];
};

template <int D>
struct Shared {
  static constexpr int kStages = D == 64 ? 8 : D == 128 ? 5 : 2;
  static constexpr int kAhead = kStages > 2 ? kStages - 2 : 1;  // tiles copied ahead: where it can be, two after a slot's last use
  Stage<D> stage[kStages];
  float highest[kThreads][2];  // a thread's own, used when its references move
  uint64_t keys_full[kStages], values_full[kStages], empty[kStages];
};
static_assert(sizeof(Shared<64>) <= 101376 && sizeof(Shared<128>) <= 101376 && sizeof(Shared<256>) <= 101376,
              "99 KB: what a block of sm_120 may have");

struct Params {
  Fp4Attend call;
  nvfp4::Workspace at;
  int first_job, jobs;  // of this launch
  int query_tiles, key_tiles;
  unsigned heads_per_kv;
  int half_tiles;            // of 64 queries, of a head
  MaskTileIndex mask_tiles;  // where there is a mask
};

// One tile of queries of one head.
template <int D>
struct Job {
  int batch, head, kv, tile;  // kv counts with the batch
  int local;                  // counts from the launch's first
  int half;                   // of the output's channels

  __device__ __forceinline__ Job(const Params& p, int job) {
    const nvfp4::Shape& shape = p.call.shape;
    local = D == 256 ? job / 2 : job, half = D == 256 ? job % 2 : 0;
    const nvfp4::Job it(p.first_job + local, p.query_tiles, shape.batch * shape.heads, p.call.causal);
    const unsigned bh = it.head;
    tile = it.tile;
    batch = bh / unsigned(shape.heads), head = bh - batch * shape.heads;
    kv = batch * shape.kv_heads + unsigned(head) / p.heads_per_kv;
  }
};

// Walks over the key tiles of a job; with a mask, over those that somebody attends. A mask's classes are those of 64 queries:
// `mine` is that of half `half` of the job's.
template <bool kMask>
struct KeyTiles {
  int n = 0, end = 0;
  const unsigned char* at = nullptr;  // my class of tile n
  int other = 0;                      // to the other half's
  MaskTile mine = kMaskAll;

  KeyTiles() = default;
  template <int D>
  __device__ __forceinline__ KeyTiles(const Params& p, const Job<D>& job, int half) {
    const nvfp4::Shape& shape = p.call.shape;
    const int keys = p.call.causal ? min(shape.keys, (job.tile + 1) * kTile) : shape.keys;
    end = (keys + kTile - 1) / kTile;
    if constexpr (kMask) {
      const int stride = static_cast<int>(p.mask_tiles.row_stride);
      other = job.tile * 2 + 1 == p.half_tiles ? 0 : half == 0 ? stride : -stride;  // the last tile may have one half only
      at = p.call.mask_tiles + p.mask_tiles(job.batch, job.head, job.tile * 2) + (other < 0 ? stride : 0);
      find();
    }
  }

  __device__ __forceinline__ bool done() const { return n >= end; }

  __device__ __forceinline__ void advance() {
    ++n;
    if constexpr (kMask) ++at, find();
  }

 private:
  // On to the first tile from n on that somebody attends.
  __device__ __forceinline__ void find() {
#pragma unroll 1
    for (; n < end; ++n, ++at) {
      mine = static_cast<MaskTile>(*at);
      if ((mine | at[other]) != kMaskNone) break;
    }
  }
};

// Walks over the key tiles of all of a block's jobs, and stays at the end.
template <int D, bool kMask>
struct Cursor {
  int round = -1;
  KeyTiles<kMask> tiles;

  __device__ __forceinline__ bool done(const Params& p) const { return job_of_round(round) >= p.jobs; }

  __device__ __forceinline__ void advance(const Params& p) {
    tiles.advance();
    if (!tiles.done()) return;
#pragma unroll 1
    while (!done(p)) {  // on to the next job that attends something
      ++round;
      if (done(p)) break;
      tiles = KeyTiles<kMask>(p, Job<D>(p, job_of_round(round)), 0);
      if (!tiles.done()) break;
    }
  }
};

// What a thread holds of its warp's 16 queries.
template <int D>
struct Queries {
  static constexpr int kPairs = D == 256 ? 2 : 1;  // of steps, that share a word of scales
  uint32_t code[D / 64][4], scale[kPairs];

  __device__ __forceinline__ Queries(const unsigned char* record, int warp, int lane) {
#pragma unroll
    for (int step = 0; step < D / 64; ++step) {
      const uint4 word = reinterpret_cast<const uint4*>(record)[(warp * (D / 64) + step) * 32 + lane];
      code[step][0] = word.x, code[step][1] = word.y, code[step][2] = word.z, code[step][3] = word.w;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      scale[i] = reinterpret_cast<const uint32_t*>(record + nvfp4::code_bytes(D))[(warp * kPairs + i) * 32 + lane];
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// The largest score of every block of 16 tokens, of the thread's two rows, in a group of 32: both threads of a pair know it.
__device__ __forceinline__ void block_maxima(float (&most)[2][kGroups], const float (&s)[kScores], int group) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float* const x = s + 16 * group + 2 * r;
    float m = max_nan(max_nan(x[0], x[1]), max_nan(x[4], x[5]));
    m = max_nan(m, max_nan(max_nan(x[8], x[9]), max_nan(x[12], x[13])));
    most[r][group] = max_nan(m, __shfl_xor_sync(0xffffffffu, m, 1));
  }
}

// S = delta + Q K^T: value 4j + 2r + e is row g + 8r, column 2t + e of n8 tile j. And the maxima of its blocks, each group's
// under the products of the next.
template <int D>
__device__ __forceinline__ void multiply_qk(float (&s)[kScores], float (&most)[2][kGroups], const Queries<D>& q,
                                            const Stage<D>& stage, int lane) {
  constexpr int kTiles = kScores / 4 / kGroups;  // of a group
  constexpr int kSteps = D / 64, kPairs = D == 64 ? 1 : D / 128;
  const auto* const delta = reinterpret_cast<const float4*>(stage.delta) + lane % 4;
  const auto* const codes = reinterpret_cast<const uint4*>(stage.keys) + lane;
  const auto* const scales = reinterpret_cast<const uint4*>(stage.keys + nvfp4::code_bytes(D)) + lane;
  uint4 scale[D == 256 ? 1 : kSteps];  // for all groups; head dim 256 reads them group by group, for want of registers
  if constexpr (D != 256) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) scale[step] = scales[step * 32];
  }
  unrolled<kGroups>([&](auto group) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int j = group * kTiles + i;
      const float4 d = delta[4 * j];
      s[4 * j] = d.x, s[4 * j + 1] = d.y, s[4 * j + 2] = d.z, s[4 * j + 3] = d.w;
    }
    unrolled<kPairs>([&](auto pair) {
      unrolled<D == 64 ? kTiles / 2 : kTiles>([&](auto unit) {  // an n8 tile and two steps, or two tiles and one step
        const uint4 word = codes[(D == 64 ? group * (kTiles / 2) + unit : (group * kTiles + unit) * kPairs + pair) * 32];
        unrolled<2>([&](auto half) {
          constexpr int i = D == 64 ? 2 * unit + half : unit, step = D == 64 ? 0 : 2 * pair + half;
          const uint32_t b[2] = {half == 0 ? word.x : word.z, half == 0 ? word.y : word.w};
          float(&d)[4] = *reinterpret_cast<float(*)[4]>(&s[4 * (group * kTiles + i)]);
          uint32_t of_b;
          if constexpr (D == 256) of_b = reinterpret_cast<const uint32_t*>(scales + step * 32)[group];
          else of_b = word_of(scale[step], group);
          nvfp4::mma<step % 2, i>(d, q.code[step], b, d, q.scale[step / 2], of_b);
        });
      });
    });
    if constexpr (group > 0) block_maxima(most, s, group - 1);
  });
  block_maxima(most, s, kGroups - 1);
}

// P of 16 queries: codes as A operands of products over 64 tokens each, and the word of scales that this lane holds.
struct Weights {
  uint32_t code[kProducts][4];
  uint32_t scale;
};

// O += P V, and the rows' sums, by a column of ones: its products are all the same sum.
template <int D>
__device__ __forceinline__ void multiply_pv(float (&o)[kWidth<D> / 2], float (&sum)[4], const Weights& p,
                                            const Stage<D>& stage, int lane) {
  constexpr int kQuads = kWidth<D> / 32;  // of n8 tiles: 32 channels
  constexpr uint32_t kOnes[2] = {0x22222222, 0x22222222};
  constexpr uint32_t kOne = 0x38383838;  // e4m3
  const auto* const codes = reinterpret_cast<const uint4*>(stage.values) + lane;
  const auto* const scales = reinterpret_cast<const uint4*>(stage.values + nvfp4::code_bytes(kWidth<D>)) + lane;
  unrolled<kProducts>([&](auto i) { nvfp4::mma<i, 0>(sum, p.code[i], kOnes, sum, p.scale, kOne); });
  unrolled<kQuads>([&](auto quad) {
    uint4 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = codes[(4 * quad + i) * 32];
    unrolled<kProducts>([&](auto product) {
      constexpr int kWord = product * kQuads + quad;
      const uint32_t scale = word_of(scales[kWord / 4 * 32], kWord % 4);
      unrolled<4>([&](auto i) {
        const uint32_t b[2] = {product == 0 ? word[i].x : word[i].z, product == 0 ? word[i].y : word[i].w};
        float(&d)[4] = *reinterpret_cast<float(*)[4]>(&o[16 * quad + 4 * i]);
        nvfp4::mma<product, i>(d, p.code[product], b, d, p.scale, scale);
      });
    });
  });
}

// Two floats -> their e4m3 codes, a in the lower byte; at most 448; NaN is 0x7F. F2FP.E4M3
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
  return pair;
}

// And back. F2FP.F16.E4M3.UNPACK_B, 2 HADD2.F32
__device__ __forceinline__ float2 unpack_e4m3(uint32_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  return __half22float2(reinterpret_cast<const __half2&>(halves));
}

// What a thread knows of the reference m of its two rows, ready for use.
struct Reference {
  static constexpr float kMiddle = (kUp - kDown) / 2;
  float middle[2] = {kMiddle, kMiddle};  // of where the maximum may lie: m + kMiddle
  float sixth[2] = {kLog2Sixth, kLog2Sixth}, reach[2] = {kLog2Reach, kLog2Reach};  // less m

  __device__ __forceinline__ float m(int r) const { return middle[r] - kMiddle; }
  // By how much the maximum, raw * c, is off the middle: too much beyond kReach.
  static constexpr float kReach = (kUp + kDown) / 2;
  __device__ __forceinline__ float off(int r, float raw, float c) const { return fabsf(fmaf(raw, c, -middle[r])); }

  // Moves m to the maximum; returns what O and the sum are to be multiplied by. highest: that m ever was; `used`: O and the
  // sum hold something relative to the old one.
  __device__ __forceinline__ float move(int r, float maximum, float& highest, bool used) {
    const float whole = ceilf(maximum), old = m(r);
    highest = fmaxf(fmaxf(highest, whole), used ? old : whole);
    const float moved = fmaxf(whole, highest - kFloor);
    middle[r] = moved + kMiddle, sixth[r] = kLog2Sixth - moved, reach[r] = kLog2Reach - moved;
    return exp2_approx(fminf(old - moved, 126.0f));  // before the first tile O is 0
  }
};

// Scores times c, less m, -> P. `most` as block_maxima has it.
__device__ __forceinline__ void quantize_weights(Weights& p, const float (&s)[kScores], const float (&most)[2][kGroups],
                                                 float c, const Reference& reference, int t) {
  uint32_t row_scales[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float scale[kGroups];
    row_scales[r] = 0;
#pragma unroll
    for (int group = 0; group < kGroups; group += 2) {
      const auto sixth = [&](int i) { return exp2_approx(fmaf(most[r][i], c, reference.sixth[r])); };
      const uint32_t pair = pack_e4m3(sixth(group), sixth(group + 1));
      const float2 rounded = unpack_e4m3(pair);
      scale[group] = rounded.x, scale[group + 1] = rounded.y;
      row_scales[r] |= pair << (8 * group);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float bias = reference.reach[r] - log2_approx(scale[group]);  // scale 0: infinite, and whatever code counts 0
      float code[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) code[i] = exp2_approx(fmaf(s[16 * group + 4 * (i / 2) + 2 * r + i % 2], c, bias));
      p.code[group / 2][2 * (group % 2) + r] = nvfp4::pack_e2m1(code);
    }
  }
  // Lane 4g + 2 step + r must hold row g + 8r's four scales of that step: both pairs', two groups'. Thread t wants step t / 2
  // and row t % 2, of which it has its own pair's, blocks t / 2 of each group; the others are in thread t ^ 2.
  const uint32_t mine = t % 2 == 0 ? row_scales[0] : row_scales[1];
  const uint32_t theirs = __shfl_xor_sync(0xffffffffu, mine, 2);
  p.scale = __byte_perm(mine, theirs, t < 2 ? 0x5140 : 0x3726);
}

// Hides what a query may not see: raw scores become -inf. visible[r]: how many tokens from the thread's first on row r sees.
// A thread's tokens of each 32 are 8t .. 8t + 7.
__device__ __forceinline__ void hide(float (&s)[kScores], const int (&visible)[2]) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    if (i / 16 * 32 + i % 16 / 4 * 2 + i % 2 >= visible[i / 2 % 2]) s[i] = kNegativeInfinity;
  }
}

template <class T>
__device__ __forceinline__ void load_mask(float (&bias)[8], Dtype mine, Dtype dtype, const char* at, int64_t stride, int columns) {
  if (dtype != mine) return;  // and not a switch: its jump table would hide the loop from sass
#pragma unroll
  for (int i = 0; i < 8; ++i) bias[i] = i < columns ? mask_bias<T>(at + i * stride) : kNegativeInfinity;
}

// Adds a mask, whose elements count `unit` each, to rows `row` and row + 8, tokens from `token` on. 32 tokens after the other
// in a loop that turns the scores' registers on: addresses and elements of all of them at once are too many.
__device__ __forceinline__ void add_mask(float (&s)[kScores], const Fp4Attend& call, int batch, int head, int row, int token,
                                         float unit) {
  const Tensor4& mask = call.mask;
  const int size = opaque(mask.dtype == Dtype::kBool ? 1 : mask.dtype == Dtype::kFloat32 ? 4 : 2);
  const int64_t stride = size * mask.stride[3];
#pragma unroll 1
  for (int part = 0; part < kScores / 16; ++part, token += 32) {
    const int columns = call.shape.keys - token;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t query = min(row + 8 * r, call.shape.queries - 1);
      const int64_t element = batch * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2];
      const char* const at = static_cast<const char*>(mask.data) + size * element + token * stride;
      float bias[8];
      const auto dtype = [&] { return static_cast<Dtype>(opaque(static_cast<int>(mask.dtype))); };
      load_mask<unsigned char>(bias, Dtype::kBool, dtype(), at, stride, columns);
      load_mask<__half>(bias, Dtype::kFloat16, dtype(), at, stride, columns);
      load_mask<__nv_bfloat16>(bias, Dtype::kBFloat16, dtype(), at, stride, columns);
      load_mask<float>(bias, Dtype::kFloat32, dtype(), at, stride, columns);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& value = s[4 * (i / 2) + 2 * r + i % 2];
        value = bias[i] == kNegativeInfinity ? bias[i] : fmaf(bias[i], unit, value);
      }
    }
    float done[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) done[i] = s[i];
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = i < kScores - 16 ? s[i + 16] : done[i + 16 - kScores];
  }
}

// Starts the copies of one tile: one thread's work.
template <int D, bool kMask>
__device__ __forceinline__ void copy_tile(const Params& p, Shared<D>& shared, int i, uint32_t parity,
                                          const Cursor<D, kMask>& from) {
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const Job<D> job(p, job_of_round(from.round));
  const int64_t tile = job.kv * p.key_tiles + from.tiles.n, delta = job.local * p.key_tiles + from.tiles.n;
  Stage<D>& stage = shared.stage[i];
  uint64_t* const keys = &shared.keys_full[i];
  uint64_t* const values = &shared.values_full[i];
  sm90::barrier_wait(&shared.empty[i], parity ^ 1);
  sm90::barrier_expect(keys, sizeof(stage.keys) + sizeof(stage.delta));
  sm90::bulk_copy(stage.delta, base + p.at.delta + delta * sizeof(stage.delta), sizeof(stage.delta), keys);
  sm90::bulk_copy(stage.keys, base + p.at.keys + tile * sizeof(stage.keys), sizeof(stage.keys), keys);
  sm90::barrier_expect(values, sizeof(stage.values));
  const unsigned char* const record = base + p.at.values + tile * nvfp4::value_record(D);
  if constexpr (kWidth<D> == D) {
    sm90::bulk_copy(stage.values, record, sizeof(stage.values), values);
  } else {
    constexpr int kCodes = nvfp4::code_bytes(kWidth<D>), kScales = sizeof(stage.values) - kCodes;
    sm90::bulk_copy(stage.values, record + job.half * kCodes, kCodes, values);
    sm90::bulk_copy(stage.values + kCodes, record + nvfp4::code_bytes(D) + job.half * kScales, kScales, values);
  }
}

// A warp: 16 queries of every job.
template <int D, bool kMask>
__device__ __forceinline__ void attend(const Params& p, Shared<D>& shared, int warp) {
  constexpr int kStages = Shared<D>::kStages, kChannels = kWidth<D>;
  const nvfp4::Shape& shape = p.call.shape;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const int lane = threadIdx.x % 32, t = lane % 4;
  Place<kStages> place;
  Cursor<D, kMask> ahead;  // what is copied next, kAhead tiles before it is used
  int turn = warp;         // how many copies others start before this warp does
  auto fetch = [&](int tiles) {
    if (turn-- == 0) {
      turn = kWarps - 1;
      if (ahead.done(p)) return;
      const bool over = place.stage + tiles >= kStages;
      if (lane == 0) copy_tile(p, shared, place.stage + tiles - over * kStages, place.parity ^ over, ahead);
    }
    ahead.advance(p);
  };
  ahead.advance(p);
#pragma unroll 1
  for (int i = 0; i < Shared<D>::kAhead; ++i) fetch(i);
  auto release = [&](uint64_t* barrier) {
    __syncwarp();  // all lanes have read
    if (lane == 0) sm90::barrier_arrive(barrier);
  };

  for (int round = 0; job_of_round(round) < p.jobs; ++round) {
    const Job<D> job(p, job_of_round(round));
    const int query_tile = (job.batch * shape.heads + job.head) * p.query_tiles + job.tile;
    const unsigned char* const record = base + p.at.queries + int64_t(query_tile) * nvfp4::query_record(D);
    const Queries<D> q(record, warp, opaque(lane));
    const float level = *reinterpret_cast<const float*>(record + nvfp4::query_record(D) - nvfp4::kLevelBytes);
    const float q_factor = level * (fabsf(p.call.scale) * kLog2e);
    const int first_row = job.tile * kTile + nvfp4::kWarpRows * warp;
    const int whole_tiles = (p.call.causal ? min(shape.keys, first_row + 1) : shape.keys) / kTile;  // that all rows see

    float o[kChannels / 2], sum[4] = {};
    Reference reference;
    float* const highest = shared.highest[threadIdx.x];
    highest[0] = highest[1] = kNegativeInfinity;
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) o[i] = 0.0f;
    // Moves m where the step's maximum has left it, and O and the sums with it.
    auto follow = [&](const float(&most)[2][kGroups], float c) {
      float top[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = max_nan(max_nan(most[r][0], most[r][1]), max_nan(most[r][2], most[r][3]));
        top[r] = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
      }
      const auto astray = [&](int r) { return reference.off(r, top[r], c) > Reference::kReach; };
      if (!__any_sync(0xffffffffu, astray(0) || astray(1))) return;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!astray(r) || top[r] == kNegativeInfinity) continue;  // or the row sees nothing here
        const float factor = reference.move(r, c * top[r], highest[r], sum[2 * r] != 0.0f);
        sum[2 * r] *= factor, sum[2 * r + 1] *= factor;
#pragma unroll
        for (int i = 0; i < kChannels / 4; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
      }
    };

    for (KeyTiles<kMask> tiles(p, job, warp / (kWarps / 2)); !tiles.done(); tiles.advance(), place.advance()) {
      fetch(Shared<D>::kAhead);
      const Stage<D>& stage = shared.stage[place.stage];
      sm90::barrier_wait(&shared.keys_full[place.stage], place.parity);
      const float k_level = *reinterpret_cast<const float*>(stage.keys + nvfp4::key_record(D) - nvfp4::kLevelBytes);
      float c = q_factor * k_level;
      float s[kScores], most[2][kGroups];
      multiply_qk<D>(s, most, q, stage, lane);
      if (tiles.mine != kMaskAll || tiles.n >= whole_tiles) {
        c = fmaxf(c, 1e-30f);  // of 0, hidden is not a number
        const Job<D> here(p, job_of_round(opaque(round)));
        const int me = opaque(lane), token = tiles.n * kTile + me % 4 * 8;
        const int row = here.tile * kTile + nvfp4::kWarpRows * warp + me / 4;
        const int visible[2] = {(p.call.causal ? min(shape.keys, row + 1) : shape.keys) - token,
                                (p.call.causal ? min(shape.keys, row + 9) : shape.keys) - token};
        hide(s, visible);
        if constexpr (kMask) {
          if (tiles.mine != kMaskAll) add_mask(s, p.call, here.batch, here.head, row, token, 1.0f / c);
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) block_maxima(most, s, group);
      }
      follow(most, c);
      Weights weights;
      quantize_weights(weights, s, most, c, reference, t);
      sm90::barrier_wait(&shared.values_full[place.stage], place.parity);
      multiply_pv<D>(o, sum, weights, stage, lane);
      release(&shared.empty[place.stage]);
    }

    const Job<D> done(p, job_of_round(opaque(round)));
    const int row0 = done.tile * kTile + nvfp4::kWarpRows * warp;
    const float v_level = reinterpret_cast<const float*>(base + p.at.v_level)[done.kv];
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = sum[2 * r];
      inverse[r] = total == 0.0f ? 0.0f : v_level / total;
      const int row = row0 + lane / 4 + 8 * r;
      if (p.call.lse != nullptr && t == 0 && done.half == 0 && row < shape.queries) {
        float& lse = p.call.lse[(int64_t(done.batch) * shape.heads + done.head) * shape.queries + row];
        lse = total == 0.0f ? kNegativeInfinity : lse + kLn2 * (reference.m(r) + log2_approx(total) - kLog2Reach);
      }
    }
    const float* const v_mean = reinterpret_cast<const float*>(base + p.at.v_mean) + int64_t(done.kv) * D;
    store_output<kChannels>(o, inverse, v_mean, nullptr, p.call, done.batch, done.head, row0, opaque(lane),
                            done.half * kChannels);  // else the numbers of channels stay in registers all the time
  }
}

template <int D, bool kMask>
__global__ void __launch_bounds__(kThreads, 1) fp4_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared<D>& shared = *reinterpret_cast<Shared<D>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared<D>::kStages; ++i) {
      sm90::barrier_init(&shared.keys_full[i], 1), sm90::barrier_init(&shared.values_full[i], 1);
      sm90::barrier_init(&shared.empty[i], kWarps);
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();
  attend<D, kMask>(p, shared, __shfl_sync(0xffffffffu, threadIdx.x / 32, 0));
}

template <int D, bool kMask>
cudaError_t launch(const Fp4Attend& call, cudaStream_t stream) {
  const auto kernel = fp4_attention<D, kMask>;
  const int bytes = sizeof(Shared<D>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const nvfp4::Workspace at(call.shape);
  if (2 * at.jobs * at.key_tiles > INT_MAX) return cudaErrorInvalidValue;
  const Params params{call, at, static_cast<int>(call.first_job), static_cast<int>(call.jobs) * (D / kWidth<D>),
                      static_cast<int>(at.query_tiles), static_cast<int>(at.key_tiles),
                      static_cast<unsigned>(call.shape.heads / call.shape.kv_heads),
                      static_cast<int>(call.shape.query_tiles()), MaskTileIndex(call.shape, call.mask)};
  kernel<<<std::min(params.jobs, call.multiprocessors), kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <int D>
cudaError_t launch(const Fp4Attend& call, cudaStream_t stream) {
  return call.mask.data == nullptr ? launch<D, false>(call, stream) : launch<D, true>(call, stream);
}

}  // namespace

cudaError_t fp4_attend_sm120(const Fp4Attend& call, cudaStream_t stream) {
  return with_fp4_head_dim(call.shape.head_dim, [&](auto d) { return launch<decltype(d)::value>(call, stream); });
}

}  // namespace sage3
