// 8-bit attention with mma.sync, for every GPU from Turing to Blackwell: INT8 Q K^T and INT8 P V.
//
// A warp works on 16 queries; 8 or 12 warps share a ring of K and V tiles of 128 tokens in shared memory. Per tile n of its
// own, and in its own time, a warp does
//
//   S = Q K(n)       s8 x s8 -> s32
//   softmax -> P     row maximum on integers, 255 * 2^x packed to u8: the A operand without a shuffle
//   O += P V(n)      u8 x s8 -> s32, exact; 32 channels at a time, then times 2^(tile's maximum - reference) and V's scale
//
// and the copies run a tile ahead. There is no barrier among the warps: a slot of the ring has one mbarrier for "the copy
// is in" and one for "all warps have read it", so warps drift apart by up to a tile and the products of one run under the
// exponentials of another.
//
// Why integers in P V on every GPU: s8 products run at the full 8-bit rate from sm_75 to sm_121, in one instruction from
// sm_80 on. FP8 does not exist before sm_89; GeForce halves its rate with fp32 accumulators, and its 14-bit accumulators
// need the same promotion every tile. u8 codes that give each row and tile its own maximum are finer than e4m3's three
// bits of mantissa, too.
//
// Scores become floats without a conversion: their accumulators start at the bits of 1.5 * 2^23, where one more integer is
// one more in the float, so their bits are the float 12582912 + sum (kMagic below).
//
// Issue slots and registers are what is short. Tiles that a warp attends whole are taken at once, straight through, in a
// loop of their own; tiles at an edge, with their columns and addresses, in halves in another one. Nothing is kept in a
// register that the first loop does not need: what only the second one or the end needs is computed anew there.
//
// Tiles lie in memory as shared memory wants them (int8_format.cuh). Quantisation after SageAttention2 (arXiv
// 2411.10958), softmax after FlashAttention-2 and -4 (softmax.cuh).

#include <algorithm>
#include <type_traits>
#include <utility>

#include "sage3/launch.h"
#include "sage3/mask_tiles.cuh"
#include "sage3/output.cuh"
#include "sage3/ptx_mma.cuh"
#include "sage3/softmax.cuh"
#include "sage3/visible.cuh"

namespace sage3 {
namespace {

using int8::kKeyTile;
using int8::kQueryTile;

constexpr int kWarpRows = 16;
constexpr int kMaxSlots = 6;  // K and V of three tiles
constexpr int kHalfTile = kKeyTile / 2;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// Bits of the float 1.5 * 2^23. For |s| <= 2^22, kMagic + s are the bits of the float kMagicFloat + s, exactly.
constexpr int kMagic = 0x4B400000;
constexpr float kMagicFloat = 12582912.0f;
static_assert(127 * 127 * 256 < (1 << 22), "the largest score of head dim 256");
static_assert(255 * 128 * kKeyTile < (1 << 22), "the largest sum of P V in one tile");

// Largest factor c for which "x = bits * c + (bias - kMagicFloat * c)" may be one FFMA. The constant, near 1.26e7 * c,
// is rounded by up to 0.75 c and moves all of a thread's exponents with it: here by less than 0.001. (Always less than
// one step of an integer score; but a code near 255 must not pass 255.5.) Larger factors pay an exact subtraction.
constexpr float kSmallFactor = 0.00125f;

// What depends on the head dim. 65,536 registers are 16 warps of 128, 12 of 168 or 8 of 255.
template <int D>
struct Config {
  static constexpr int kWarps = D == 64 || D == 256 ? 8 : 12;
  static constexpr int kBlocksPerSm = D == 64 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = kWarpRows * kWarps;
  static constexpr int kTileBytes = kKeyTile * D;
  static constexpr int kSteps = D / 32;  // of the contraction of Q K^T
  // Tokens of a whole tile whose softmax is done at once. A thread holds half as many scores beside D / 2 sums of O: not
  // always are there registers for all 128 tokens', which save a second round of promotions, row maxima and waits, a fifth
  // of the time or more. P's codes belong to a step's own maximum.
  static constexpr int kStep = D == 256 || !mma::kAsynchronous ? kHalfTile : kKeyTile;
};

struct Params {
  Int8Attend call;
  const unsigned char *q8, *k8, *v8;  // the workspace's parts
  const float *q_scale, *k_scale, *v_scale, *v_mean, *v_norm;
  int query_rows;  // of a head in q8: whole tiles
  int key_tiles;   // of a head
  int group;       // query heads that share a K and V
  int first_kv;    // of this launch, counted with the batch
  int ring_bytes;
  int ahead;       // copies that run ahead of their use: 0, 1 or 2
};

// What a warp works on: 16 rows of a head. Blocks that run at the same time share K and V: the grid's x counts a head's
// query blocks (causal: the longest first), y the query heads of a K and V, z these.
template <int D>
struct Job {
  const Params& p;

  __device__ int block() const { return p.call.causal ? gridDim.x - 1 - mma::block_index<0>() : mma::block_index<0>(); }
  __device__ int kv() const { return p.first_kv + mma::block_index<2>(); }               // counted with the batch
  __device__ int head_of_all() const { return kv() * p.group + mma::block_index<1>(); }  // as well
  __device__ int batch() const { return kv() / p.call.shape.kv_heads; }
  __device__ int head() const { return head_of_all() - batch() * p.call.shape.heads; }
  __device__ int first_row() const { return block() * Config<D>::kQueries + threadIdx.x / 32 * kWarpRows; }
};

// The key tiles of a job's head, in order; with a mask, those that somebody in the block attends.
template <int D, bool kMask>
struct KeyTiles {
  static constexpr int kRows = Config<D>::kQueries / kQueryTile;
  const Job<D>& job;
  int first;        // in k8; this and the next are the same for the block, and so in uniform registers
  int end;          // of those that some row of the block attends
  int classes = 0;  // of the mask: where those of the block's first query tile begin

  __device__ explicit KeyTiles(const Job<D>& job) : job(job) {
    const Params& p = job.p;
    first = (p.first_kv + blockIdx.z) * p.key_tiles;
    end = p.key_tiles;
    if (p.call.causal) end = min(end, int(((gridDim.x - blockIdx.x) * Config<D>::kQueries + kKeyTile - 1) / kKeyTile));
    if constexpr (kMask) {
      const MaskTileIndex index(p.call.shape, p.call.mask);
      classes = static_cast<int>(index(job.batch(), job.head(), job.block() * kRows));
    }
  }

  // Whether all rows of the warp attend all of tile n, but for the mask.
  __device__ __forceinline__ bool whole(int n) const {
    const int after = (n + 1) * kKeyTile;
    return after <= job.p.call.shape.keys && (!job.p.call.causal || after <= job.first_row() + 1);
  }

  // Whether some row of the warp attends tile n, but for the mask.
  __device__ __forceinline__ bool some(int n) const {
    return !job.p.call.causal || n * kKeyTile < job.first_row() + kWarpRows;
  }

  // The class of tile n for the query tile that holds row `row` of the block.
  __device__ __forceinline__ MaskTile mask(int n, int row) const {
    if constexpr (!kMask) return kMaskAll;
    const int last = job.p.query_rows / kQueryTile - 1 - job.block() * kRows;  // the block may be cut short
    const int stride = job.p.call.mask.stride[2] == 0 ? 0 : job.p.key_tiles;
    return static_cast<MaskTile>(job.p.call.mask_tiles[classes + min(row / kQueryTile, last) * stride + n]);
  }

  // The first tile from n on that is needed; `end` when there is none.
  __device__ __forceinline__ int from(int n) const {
    if constexpr (kMask) {
      for (; n < end; ++n) {
        unsigned any = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) any |= mask(n, i * kQueryTile);
        if (any != kMaskNone) break;
      }
    }
    return n;
  }
};

// The ring of tiles in shared memory: K and V in turn. A slot is a tile and a line with its two mbarriers. A tile is a
// linear copy that one warp starts, each warp when its turn comes. Turing has no mbarriers: there the block's own barrier
// stands for both, and all threads copy.
template <int D>
class Ring {
  using C = Config<D>;

 public:
  static constexpr int line_bytes(bool asynchronous) { return asynchronous ? 128 : 0; }  // the swizzle's period
  static constexpr int slot_bytes(bool asynchronous) { return C::kTileBytes + line_bytes(asynchronous); }

  // Where a slot lies, and in bit 0 how often the ring has come round to it, modulo 2: one register for both.
  using Place = uint32_t;

 private:
  static constexpr uint32_t kSlotBytes = slot_bytes(mma::kAsynchronous);
  static constexpr int kCopiers = mma::kAsynchronous ? 32 : C::kThreads;

  uint32_t memory_, bytes_;

  __device__ uint32_t full(Place at) const { return tile(at) + C::kTileBytes; }
  __device__ uint32_t empty(Place at) const { return tile(at) + C::kTileBytes + 8; }

 public:
  __device__ Ring(const unsigned char* memory, uint32_t bytes) : memory_(mma::shared_address(memory)), bytes_(bytes) {
    if constexpr (mma::kAsynchronous) {
      const Place at = threadIdx.x * kSlotBytes;
      if (at < bytes) {
        mma::barrier_init(full(at), 32);
        mma::barrier_init(empty(at), C::kWarps);
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ uint32_t tile(Place at) const { return memory_ + (at & ~1u); }

  // The slot `count` further on.
  __device__ __forceinline__ Place after(Place at, int count) const {
    at += count * kSlotBytes;
    return at < bytes_ ? at : (at - bytes_) ^ 1;
  }

  // Whether this warp starts the copies that are due at tile n.
  __device__ __forceinline__ static bool my_turn(unsigned n) {
    return !mma::kAsynchronous || n % C::kWarps == threadIdx.x / 32;
  }

  // Starts a copy, once all warps have read what the slot holds.
  __device__ __forceinline__ void fill(Place at, const unsigned char* from) const {
    if constexpr (mma::kAsynchronous) {
      mma::barrier_wait(empty(at), ~at & 1);
    } else {
      __syncthreads();
    }
    const int me = 16 * (threadIdx.x % kCopiers);
    const uint32_t to = tile(at) + me;
    from = opaque(from + me);
#pragma unroll
    for (int i = 0; i < C::kTileBytes; i += 16 * kCopiers) {
      if (C::kTileBytes % (16 * kCopiers) == 0 || i + me < C::kTileBytes) mma::copy_16(to + i, from + i);
    }
    if constexpr (mma::kAsynchronous) mma::arrive_after_copies(full(at));
  }

  // Returns when the tile is in.
  __device__ __forceinline__ void use(Place at) const {
    if constexpr (mma::kAsynchronous) mma::barrier_wait(full(at), at & 1);
  }

  // This warp has read the tile.
  __device__ __forceinline__ void release(Place at) const {
    if constexpr (mma::kAsynchronous) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) mma::barrier_arrive(empty(at));
    }
  }
};

// S = kMagic + Q K^T for the 2 * kScores tokens from `first` on. Q comes from L1 every time, one 16-byte word per k-step; a
// load of K brings 16 tokens x 32 channels: two n8 tiles of one k-step. q and tile: this lane's.
template <int D, int kScores>
__device__ __forceinline__ void multiply_qk(int (&s)[kScores], const uint4* q, uint32_t tile, int first) {
  constexpr int kRow = int8::key_block(D), kStepsOfRow = kRow / 32;
  constexpr int kStart[4] = {kMagic, kMagic, kMagic, kMagic};
  const uint32_t mine = tile + first * kRow;
#pragma unroll
  for (int step = 0; step < Config<D>::kSteps; ++step) {
    const uint4 word = mma::load_again(q + 32 * step);
    const uint32_t a[4] = {word.x, word.y, word.z, word.w};
    const uint32_t at = (mine ^ (step % kStepsOfRow * 32)) + step / kStepsOfRow * kKeyTile * kRow;
#pragma unroll
    for (int pair = 0; pair < kScores / 8; ++pair) {
      uint32_t b[4];
      mma::load_matrices(b, at + pair * 16 * kRow);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int(&d)[4] = *reinterpret_cast<int(*)[4]>(&s[8 * pair + 4 * i]);
        if (step == 0) {
          mma::multiply<false>(d, a, b[2 * i], b[2 * i + 1], kStart);
        } else {
          mma::multiply<false>(d, a, b[2 * i], b[2 * i + 1], d);
        }
      }
    }
  }
}

// O += (P V) * weight * v_scale for the step's tokens, which begin with `first`; 32 channels at a time. tile: this lane's.
// `wait` waits for V, which is in already: ptxas would fetch V of all channels as early as it can, until no register is left,
// but not past a wait.
template <int D, int kWords, class Wait>
__device__ __forceinline__ void multiply_pv(float (&o)[D / 2], const uint32_t (&p)[kWords], uint32_t tile, int first,
                                            const float (&weight)[2], const float* v_scale, Wait wait) {
  constexpr int kZero[4] = {0, 0, 0, 0};
  const uint32_t mine = tile ^ first;
#pragma unroll
  for (int group = 0; group < D / 32; ++group) {
    if (group == D / 64) wait();
    if constexpr (!mma::kAsynchronous) __syncwarp(__activemask());  // sm_75: else V of all groups is loaded at once, and O spilt
    int acc[16];
#pragma unroll
    for (int step = 0; step < kWords / 4; ++step) {
      const uint32_t a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        mma::load_matrices(b, (mine ^ (step * 32)) + (2 * group + pair) * 16 * kKeyTile);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int(&d)[4] = *reinterpret_cast<int(*)[4]>(&acc[8 * pair + 4 * i]);
          if (step == 0) {
            mma::multiply<true>(d, a, b[2 * i], b[2 * i + 1], kZero);
          } else {
            mma::multiply<true>(d, a, b[2 * i], b[2 * i + 1], d);
          }
        }
      }
    }
    const float scale = mma::load_again(v_scale + group);
    const float factor[2] = {weight[0] * scale, weight[1] * scale};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& to = o[16 * group + i];
      to = fmaf(mma::small_int_to_float(acc[i]), factor[i / 2 % 2], to);
    }
  }
}

// log2 of 255 * P of a score, per row: its bits, read as a float, * factor + bias.
struct Exponent {
  float factor[2], bias[2];
};

// The plain case. Finds the maximum of both rows; scores carry kMagic: floats of one binade order like integers.
template <int kScores>
__device__ __forceinline__ Exponent exponents(int (&s)[kScores], const float (&c)[2], float (&top)[2]) {
  Exponent e;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int most = max(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < kScores / 4; ++j) most = max3(most, s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
    top[r] = quad_max(c[r] * (__int_as_float(most) - kMagicFloat));
    e.factor[r] = c[r];
    e.bias[r] = kLog2TopCode - top[r];
  }
  if (__all_sync(0xffffffffu, fmaxf(c[0], c[1]) <= kSmallFactor)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) e.bias[r] = fmaf(-kMagicFloat, c[r], e.bias[r]);
  } else {
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = __float_as_int(__int_as_float(s[i]) - kMagicFloat);
  }
  return e;
}

// The general case begins here: scores -> floats in place, -inf from `end[r]` columns after the thread's first on.
template <int kScores>
__device__ __forceinline__ void hide(int (&s)[kScores], const float (&c)[2], const int (&end)[2]) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const float y = c[i / 2 % 2] * (__int_as_float(s[i]) - kMagicFloat);
    s[i] = __float_as_int(8 * (i / 4) + i % 2 < end[i / 2 % 2] ? y : kNegativeInfinity);
  }
}

// The general case ends: scores that are floats.
template <int kScores>
__device__ __forceinline__ Exponent exponents_of_floats(const int (&y)[kScores], float (&top)[2]) {
  Exponent e;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = kNobody;
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      most = max_nan(most, __int_as_float(y[4 * j + 2 * r]));
      most = max_nan(most, __int_as_float(y[4 * j + 2 * r + 1]));
    }
    top[r] = quad_max(most);
    e.factor[r] = 1.0f;
    e.bias[r] = kLog2TopCode - top[r];
  }
  return e;
}

// Codes of P, in the order of softmax.cuh's quantize_codes. Adds each row's to sum.
template <int kWords>
__device__ __forceinline__ void quantize(uint32_t (&p)[kWords], uint32_t (&sum)[2], const int (&s)[4 * kWords],
                                         const Exponent& e) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int r = w % 2, first = 8 * (w / 2) + 2 * r;
    const auto code = [&](int i) { return exp2_approx(fmaf(__int_as_float(s[first + i]), e.factor[r], e.bias[r])); };
    p[w] = pack_u8(code(0), code(1), code(4), code(5));
    sum[r] = add_bytes(p[w], sum[r]);
  }
}

// A warp's result.
template <int D>
__device__ __forceinline__ void finish(const Job<D>& job, const RowState& state, const float (&o)[D / 2]) {
  const Int8Attend& call = job.p.call;
  const int first_row = job.first_row();
  float inverse[2], lse[2];
  finish_rows(state, inverse, lse);
  const int64_t channels = int64_t(job.kv()) * D;
  store_output<D>(o, inverse, job.p.v_mean + channels, job.p.v_norm + channels, call, job.batch(), job.head(), first_row);
  if (call.lse != nullptr && threadIdx.x % 4 == 0) {
    const int64_t bh = job.head_of_all();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + threadIdx.x % 32 / 4 + 8 * r;
      if (row < call.shape.queries) call.lse[bh * call.shape.queries + row] += lse[r];
    }
  }
}

// One warp's 16 queries over all their tiles.
template <int D, bool kMask>
__global__ void __launch_bounds__(Config<D>::kThreads, Config<D>::kBlocksPerSm)
    int8_attention_mma(const __grid_constant__ Params p) {
  using C = Config<D>;
  extern __shared__ __align__(128) unsigned char memory[];  // the swizzle's period
  const Job<D> job{p};
  const KeyTiles<D, kMask> tiles(job);
  Ring<D> ring(memory, p.ring_bytes);

  // Where this lane finds its words of Q (-1: rows past the end do not exist; such a warp copies, and computes nothing),
  // and its rows for load_matrices in a tile of K and, in the upper half, of V.
  const unsigned thread = threadIdx.x % 32;
  const int matrix_row = thread / 16 * 8 + thread % 8, matrix_byte = thread / 8 % 2 * 16;
  const bool exists = job.first_row() < p.call.shape.queries;
  const int q_at = exists ? (job.head_of_all() * p.query_rows + job.first_row()) * (D / 16) + thread : -1;
  const int rows = int8::key_offset(matrix_row, matrix_byte, D) |
                   int8::swizzle(matrix_row * kKeyTile + matrix_byte, kKeyTile) << 16;

  int n = tiles.from(0);            // the tile at hand
  typename Ring<D>::Place key = 0;  // where its K is
  auto fill = [&](int of) {         // the K (0) or V (1) of n, or of the one after it (2, 3)
    const int tile = of < 2 ? n : tiles.from(n + 1);
    if (tile < tiles.end) {
      ring.fill(ring.after(key, of), (of % 2 ? p.v8 : p.k8) + int64_t(tiles.first + tile) * C::kTileBytes);
    }
  };
  if (!mma::kAsynchronous || threadIdx.x < 32) {
    for (int i = 0; i < p.ahead; ++i) fill(i);
  }

  RowState state;
  float o[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
  auto rescale = [&](int r, float factor) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
  };

  auto mask = [&] { return tiles.mask(n, threadIdx.x / 32 * kWarpRows); };
  auto whole = [&] { return q_at >= 0 && tiles.whole(n) && mask() == kMaskAll; };
  auto begin = [&] {
    if (ring.my_turn(n)) fill(p.ahead), fill(p.ahead + 1);
    if constexpr (!mma::kAsynchronous) __syncthreads();
    ring.use(key);
  };
  // Softmax and products of kTokens tokens of the tile from `first` on; plain: all of them visible.
  auto attend = [&](auto tokens, auto plain, int first) {
    constexpr int kTokens = tokens, kScores = kTokens / 2;
    int s[kScores];
    const auto* const q = reinterpret_cast<const uint4*>(p.q8) + unsigned(q_at);
    multiply_qk<D>(s, q, ring.tile(key) + (opaque(rows) & 0xffff), first);
    const unsigned lane = mma::lane(), tile = tiles.first + n;
    const float* const q_scale = p.q_scale + (unsigned(opaque(q_at)) / (D / 16) / kWarpRows * kWarpRows + lane / 4);
    const float scale = mma::load_again(p.k_scale + (tile * int8::kKeyGroups + lane % 4));
    const float c[2] = {mma::load_again(q_scale) * scale, mma::load_again(q_scale + 8) * scale};
    if (first + kTokens == kKeyTile) ring.release(key);

    float top[2], weight[2];
    Exponent exponent;
    if (plain) {
      exponent = exponents(s, c, top);
    } else {
      const int keys = p.call.shape.keys;
      const int row = job.first_row() + lane / 4;  // the thread's first; and row + 8
      const int column = n * kKeyTile + first + 2 * (lane % 4);
      const int end[2] = {(p.call.causal ? min(keys, row + 1) : keys) - column,
                          (p.call.causal ? min(keys, row + 9) : keys) - column};
      hide(s, c, end);
      if constexpr (kMask) {
        if (mask() != kMaskAll) add_mask(s, p.call, job.batch(), job.head(), row, column);
      }
      exponent = exponents_of_floats(s, top);
    }
    uint32_t p8[kScores / 4], sum[2] = {0, 0};
    quantize(p8, sum, s, exponent);
    update_rows(state, top, sum, weight, rescale);

    const auto value = ring.after(key, 1);
    const auto wait = [&] { ring.use(value); };
    wait();
    multiply_pv<D>(o, p8, ring.tile(value) + (unsigned(opaque(rows)) >> 16), first, weight,
                   p.v_scale + tile * int8::value_scales(D), wait);
  };
  auto advance = [&] {
    const auto value = ring.after(key, 1);
    ring.release(value);
    key = ring.after(value, 1);
    n = tiles.from(opaque(n + 1));  // opaque: else what grows with n, such as addresses of scales, stays in registers
  };

  while (n < tiles.end) {
    bool plain = whole();
    if constexpr (C::kStep == kKeyTile) {
      for (; plain; plain = n < tiles.end && whole()) {
        begin();
        attend(Int<kKeyTile>{}, std::true_type{}, 0);
        advance();
      }
      if (n >= tiles.end) break;
    }
    begin();
    if (plain || (q_at >= 0 && mask() != kMaskNone && tiles.some(n))) {
#pragma unroll 1
      for (int first = 0; first < kKeyTile; first += kHalfTile) attend(Int<kHalfTile>{}, plain, first);
    } else {
      ring.release(key);
      ring.use(ring.after(key, 1));
    }
    advance();
  }
  if (q_at >= 0) finish(job, state, o);
}

// Shared memory of the current device: how many slots of the ring fit, and their bytes.
template <int D>
cudaError_t ring_size(int& slots, int& bytes) {
  int device, major, per_block, per_sm, reserved;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [value, attribute] : {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
                                         std::pair{&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                                         std::pair{&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                                         std::pair{&reserved, cudaDevAttrReservedSharedMemoryPerBlock}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  }
  if (error != cudaSuccess) return error;
  const int slot_bytes = Ring<D>::slot_bytes(major >= 8);
  slots = std::min(kMaxSlots, std::min(per_block, per_sm / Config<D>::kBlocksPerSm - reserved) / slot_bytes);
  bytes = slots * slot_bytes;
  return slots >= 2 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <int D, bool kMask>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  using C = Config<D>;
  constexpr int kMostKv = 65535;  // of a grid's third dimension
  const int8::Shape& shape = call.shape;
  const int8::Workspace at(shape);
  const auto* const base = static_cast<const unsigned char*>(call.workspace);
  const auto floats = [base](int64_t offset) { return reinterpret_cast<const float*>(base + offset); };
  Params params{call, base + at.q8, base + at.k8, base + at.v8, floats(at.q_scale), floats(at.k_scale),
                floats(at.v_scale), floats(at.v_mean), floats(at.v_norm)};
  params.query_rows = static_cast<int>(shape.query_tiles()) * kQueryTile;
  params.group = shape.heads / shape.kv_heads;
  params.key_tiles = static_cast<int>(shape.key_tiles());
  int slots;
  cudaError_t error = ring_size<D>(slots, params.ring_bytes);
  if (error != cudaSuccess) return error;
  params.ahead = (slots - 1) / 2;
  const auto kernel = int8_attention_mma<D, kMask>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, params.ring_bytes);
  if (error != cudaSuccess) return error;
  const int kv_heads = shape.batch * shape.kv_heads;
  for (int& first = params.first_kv; first < kv_heads; first += kMostKv) {
    const dim3 grid(static_cast<unsigned>(int8::ceil_div(shape.queries, C::kQueries)), params.group,
                    std::min(kMostKv, kv_heads - first));
    kernel<<<grid, C::kThreads, params.ring_bytes, stream>>>(params);
  }
  return cudaGetLastError();
}

template <int D>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  return call.mask.data == nullptr ? launch<D, false>(call, stream) : launch<D, true>(call, stream);
}

}  // namespace

cudaError_t int8_attend_mma(const Int8Attend& call, cudaStream_t stream) {
  return with_head_dim(call.shape.d(), [&](auto d) { return launch<decltype(d)::value>(call, stream); });
}

}  // namespace sage3
