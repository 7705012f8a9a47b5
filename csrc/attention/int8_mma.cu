// 8-bit attention with mma.sync, for every GPU from Turing to Blackwell: INT8 Q K^T and INT8 P V.
//
// A warp works on 16 queries and keeps their Q in registers; 8 or 12 warps share a ring of K and V tiles of 128 tokens
// in shared memory. Per tile n of its own, and in its own time, a warp does
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
// Integers become floats without a conversion: the accumulators of both products start at the bits of 1.5 * 2^23, where
// one more integer is one more in the float, so their bits are the float 12582912 + sum (kMagic below).
//
// Tiles lie in memory as shared memory wants them (int8_format.cuh). Quantisation after SageAttention2 (arXiv
// 2411.10958), softmax after FlashAttention-2 and -4 (softmax.cuh).

#include <algorithm>
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

// How many tokens of a tile have their softmax at once. A thread holds half as many scores beside D / 2 sums of O: all 128
// tokens' would save a promotion per tile, and cost the registers that let 12 or 16 warps run. P's codes belong to a step's
// own maximum.
constexpr int kStep = 64;
constexpr int kScores = kStep / 2;
constexpr int kWords = kScores / 4;

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
};

struct Params {
  Int8Attend call;
  const unsigned char *q8, *k8, *v8;  // the workspace's parts
  const float *q_scale, *k_scale, *v_scale, *v_mean, *v_norm;
  int query_rows;  // of a head in q8: whole tiles
  int key_tiles;   // of a head
  float kv_per_head;
  int first_batch;
  int slots;         // of the ring
};

// What a warp works on: 16 rows of a head. Blocks that run at the same time share K and V: the grid's x counts a head's
// query blocks (causal: the longest first), y heads, z the batch. All of this is cheap, and computed where it is needed:
// registers are what the main loop is short of.
template <int D>
struct Job {
  const Params& p;

  __device__ int block() const { return p.call.causal ? gridDim.x - 1 - mma::block_index<0>() : mma::block_index<0>(); }
  __device__ int head() const { return mma::block_index<1>(); }
  __device__ int batch() const { return p.first_batch + mma::block_index<2>(); }
  __device__ int kv() const {  // counts with the batch; exact for fewer than 2^16 heads
    return batch() * p.call.shape.kv_heads + static_cast<int>((head() + 0.5f) * p.kv_per_head);
  }
  __device__ int64_t key_tile(int n) const { return kv() * p.key_tiles + n; }  // in k8 and v8
  __device__ int first_row() const { return block() * Config<D>::kQueries + threadIdx.x / 32 * kWarpRows; }
  __device__ int64_t first_row_of_all() const {  // in q8
    return (batch() * p.call.shape.heads + head()) * p.query_rows + first_row();
  }
  __device__ int key_tiles() const {  // that the block attends
    return p.call.causal ? min(p.key_tiles, ((block() + 1) * Config<D>::kQueries + kKeyTile - 1) / kKeyTile) : p.key_tiles;
  }
};

// The key tiles of a job, in order; with a mask, those that somebody in the block attends.
template <int D, bool kMask>
struct KeyTiles {
  static constexpr int kRows = Config<D>::kQueries / kQueryTile;
  const Job<D>& job;
  int classes = 0;  // of the mask: where those of the block's first query tile begin

  __device__ explicit KeyTiles(const Job<D>& job) : job(job) {
    if constexpr (kMask) {
      const MaskTileIndex index(job.p.call.shape, job.p.call.mask);
      classes = static_cast<int>(index(job.batch(), job.head(), job.block() * kRows));
    }
  }

  // The class of tile n for the query tile that holds row `row` of the block.
  __device__ __forceinline__ MaskTile mask(int n, int row) const {
    if constexpr (!kMask) return kMaskAll;
    const int last = job.p.query_rows / kQueryTile - 1 - job.block() * kRows;  // the block may be cut short
    const int stride = job.p.call.mask.stride[2] == 0 ? 0 : job.p.key_tiles;
    return static_cast<MaskTile>(job.p.call.mask_tiles[classes + min(row / kQueryTile, last) * stride + n]);
  }

  // The first tile from n on that is needed; the number of tiles when there is none.
  __device__ __forceinline__ int from(int n) const {
    if constexpr (kMask) {
      for (const int end = job.key_tiles(); n < end; ++n) {
        unsigned any = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) any |= mask(n, i * kQueryTile);
        if (any != kMaskNone) break;
      }
    }
    return n;
  }
};

// The ring of tiles in shared memory: K and V in turn, counted from the K of the tile at hand (`ahead` 0; its V is 1).
// A tile is a linear copy that one warp starts, each warp when its turn comes. Turing has no mbarriers: there the block's
// own barrier stands for both, and all threads copy.
template <int D>
class Ring {
  using C = Config<D>;
  struct Place {
    int slot;
    uint32_t parity;
  };

  uint32_t memory_;
  int slots_;
  int here_ = 0;  // the slot, and slots_ more in every second round

  __device__ uint32_t tile(int slot) const { return memory_ + slot * C::kTileBytes; }
  __device__ uint32_t full(int slot) const { return tile(slots_) + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return tile(slots_) + 16 * slot + 8; }
  __device__ int wrap(int at) const { return at < 2 * slots_ ? at : at - 2 * slots_; }
  __device__ Place place(int ahead) const {
    const int at = wrap(opaque(here_) + ahead);
    return at < slots_ ? Place{at, 0} : Place{at - slots_, 1};
  }

  template <int kCopiers>
  __device__ __forceinline__ void copy(uint32_t to, const unsigned char* from) const {
    const int me = 16 * (threadIdx.x % kCopiers);
    to += me;
    from = opaque(from + me);
#pragma unroll
    for (int at = 0; at < C::kTileBytes; at += 16 * kCopiers) {
      if (C::kTileBytes % (16 * kCopiers) == 0 || at + me < C::kTileBytes) mma::copy_16(to + at, from + at);
    }
  }

 public:
  static constexpr int kBarrierBytes = 16 * kMaxSlots;

  __device__ Ring(unsigned char* memory, int slots) : memory_(mma::shared_address(memory)), slots_(slots) {
    if constexpr (mma::kAsynchronous) {
      if (threadIdx.x < slots) {
        mma::barrier_init(full(threadIdx.x), 32);
        mma::barrier_init(empty(threadIdx.x), C::kWarps);
      }
      __syncthreads();
    }
  }

  // Starts a copy from where `source()` says. All warps call it for every tile, in order.
  template <class Source>
  __device__ __forceinline__ void fill(int ahead, Source source) {
    const Place to = place(ahead);
    if constexpr (mma::kAsynchronous) {
      if (threadIdx.x / 32 == wrap(here_ + ahead) % C::kWarps) {  // this warp's turn
        mma::barrier_wait(empty(to.slot), to.parity ^ 1);
        copy<32>(tile(to.slot), source());
        mma::arrive_after_copies(full(to.slot));
      }
    } else {
      __syncthreads();
      copy<C::kThreads>(tile(to.slot), source());
    }
  }

  // Returns when the tile is in. (On Turing the K's barrier comes after the V's copy, too.)
  __device__ __forceinline__ void use(int ahead) const {
    const Place of = place(ahead);
    if constexpr (mma::kAsynchronous) {
      mma::barrier_wait(full(of.slot), of.parity);
    } else if (ahead == 0) {
      __syncthreads();
    }
  }

  __device__ __forceinline__ uint32_t address(int ahead) const { return tile(place(ahead).slot); }

  // This warp has read the tile.
  __device__ __forceinline__ void release(int ahead) const {
    if constexpr (mma::kAsynchronous) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) mma::barrier_arrive(empty(place(ahead).slot));
    }
  }

  // On to the next K and V.
  __device__ __forceinline__ void advance() { here_ = wrap(here_ + 2); }
};

// S = kMagic + Q K^T for the kStep tokens from `first` on. Q comes from L1 every time, one 16-byte word per k-step; a load
// of K brings 16 tokens x 32 channels: two n8 tiles of one k-step.
template <int D>
__device__ __forceinline__ void multiply_qk(int (&s)[kScores], const unsigned char* q, uint32_t tile, int first) {
  constexpr int kRow = int8::key_block(D), kStepsOfRow = kRow / 32;
  constexpr int kStart[4] = {kMagic, kMagic, kMagic, kMagic};
  const int lane = mma::lane();
  const uint32_t mine = tile + first * kRow + int8::key_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 16, D);
#pragma unroll
  for (int step = 0; step < Config<D>::kSteps; ++step) {
    const uint4 word = mma::load_again(reinterpret_cast<const uint4*>(q) + 32 * step + lane);
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

// O += (P V) * weight * v_scale for the step's tokens, which begin with `first`; 32 channels at a time.
template <int D>
__device__ __forceinline__ void multiply_pv(float (&o)[D / 2], const uint32_t (&p)[kWords], uint32_t tile, int first,
                                            const float (&weight)[2], const float* v_scale) {
  constexpr int kZero[4] = {0, 0, 0, 0};
  const int lane = mma::lane(), row = lane / 16 * 8 + lane % 8;
  const uint32_t mine = tile + int8::swizzle(row * kKeyTile + lane / 8 % 2 * 16 + first, kKeyTile);
  const float scales = mma::load_again(v_scale + lane % (D / 32));  // lane g has group g's
#pragma unroll
  for (int group = 0; group < D / 32; ++group) {
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
    const float scale = __shfl_sync(0xffffffffu, scales, group);
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
__device__ __forceinline__ void hide(int (&s)[kScores], const float (&c)[2], const int (&end)[2]) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const float y = c[i / 2 % 2] * (__int_as_float(s[i]) - kMagicFloat);
    s[i] = __float_as_int(8 * (i / 4) + i % 2 < end[i / 2 % 2] ? y : kNegativeInfinity);
  }
}

// The general case ends: scores that are floats.
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
__device__ __forceinline__ void quantize(uint32_t (&p)[kWords], uint32_t (&sum)[2], const int (&s)[kScores],
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
    const int64_t bh = int64_t(job.batch()) * call.shape.heads + job.head();
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
  const int8::Shape& shape = p.call.shape;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const Job<D> job{p};
  const KeyTiles<D, kMask> tiles(job);
  Ring<D> ring(memory, p.slots);

  const int ahead = (p.slots - 1) / 2;  // copies that run ahead of their use: 0, 1 or 2
  int n = tiles.from(0), next = n;      // the tile at hand and the one after it
  auto fill = [&](int of) {             // the K (0) or V (1) of n, or of next (2, 3)
    const int tile = of < 2 ? n : next;
    if (tile < job.key_tiles()) {
      ring.fill(of, [&] { return (of % 2 ? p.v8 : p.k8) + job.key_tile(tile) * C::kTileBytes; });
    }
  };
  for (int i = 0; i < ahead; ++i) fill(i);

  RowState state;
  float o[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
  auto rescale = [&](int r, float factor) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
  };

  for (; n < job.key_tiles(); n = next, ring.advance()) {
    next = tiles.from(n + 1);
    const MaskTile mask = tiles.mask(n, threadIdx.x / 32 * kWarpRows);
    fill(ahead), fill(ahead + 1);
    ring.use(0);
    // Rows past the end do not exist: such a warp copies, and computes nothing.
    if (job.first_row() >= shape.queries || mask == kMaskNone ||
        (p.call.causal && n * kKeyTile >= job.first_row() + kWarpRows)) {
      ring.use(1);
      ring.release(0), ring.release(1);
      continue;
    }
#pragma unroll 1
    for (int first = 0; first < kKeyTile; first += kStep) {
      const int64_t row_of_all = job.first_row_of_all();
      const float* const q_scale = p.q_scale + row_of_all + lane / 4;
      const float scale = mma::load_again(p.k_scale + job.key_tile(n) * int8::kKeyGroups + t);
      const float c[2] = {mma::load_again(q_scale) * scale, mma::load_again(q_scale + 8) * scale};
      int s[kScores];
      multiply_qk<D>(s, p.q8 + row_of_all * D, ring.address(0), first);
      if (first + kStep == kKeyTile) ring.release(0);

      const int begin = n * kKeyTile + first, after = begin + kStep;
      float top[2], weight[2];
      Exponent exponent;
      if (mask == kMaskAll && after <= shape.keys && (!p.call.causal || after <= job.first_row() + 1)) {
        exponent = exponents(s, c, top);
      } else {
        const int row = job.first_row() + lane / 4, column = begin + 2 * t;  // the thread's first; and row + 8
        const int end[2] = {(p.call.causal ? min(shape.keys, row + 1) : shape.keys) - column,
                            (p.call.causal ? min(shape.keys, row + 9) : shape.keys) - column};
        hide(s, c, end);
        if constexpr (kMask) {
          if (mask != kMaskAll) add_mask(s, p.call, job.batch(), job.head(), row, column);
        }
        exponent = exponents_of_floats(s, top);
      }
      uint32_t p8[kWords], sum[2] = {0, 0};
      quantize(p8, sum, s, exponent);
      update_rows(state, top, sum, weight, rescale);

      ring.use(1);
      multiply_pv<D>(o, p8, ring.address(1), first, weight, p.v_scale + job.key_tile(n) * int8::value_scales(D));
    }
    ring.release(1);
  }
  if (job.first_row() < shape.queries) finish(job, state, o);
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
  const int barriers = major >= 8 ? Ring<D>::kBarrierBytes : 0;
  const int limit = std::min(per_block, per_sm / Config<D>::kBlocksPerSm - reserved);
  slots = std::min(kMaxSlots, (limit - barriers) / Config<D>::kTileBytes);
  bytes = slots * Config<D>::kTileBytes + barriers;
  return slots >= 2 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <int D, bool kMask>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  using C = Config<D>;
  constexpr int kMostBatches = 65535;  // of a grid's third dimension
  const int8::Shape& shape = call.shape;
  const int8::Workspace at(shape);
  const auto* const base = static_cast<const unsigned char*>(call.workspace);
  const auto floats = [base](int64_t offset) { return reinterpret_cast<const float*>(base + offset); };
  Params params{call, base + at.q8, base + at.k8, base + at.v8, floats(at.q_scale), floats(at.k_scale),
                floats(at.v_scale), floats(at.v_mean), floats(at.v_norm)};
  params.query_rows = static_cast<int>(shape.query_tiles()) * kQueryTile;
  params.key_tiles = static_cast<int>(shape.key_tiles());
  params.kv_per_head = static_cast<float>(shape.kv_heads) / shape.heads;
  int bytes;
  cudaError_t error = ring_size<D>(params.slots, bytes);
  if (error != cudaSuccess) return error;
  const auto kernel = int8_attention_mma<D, kMask>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  for (int& first = params.first_batch; first < shape.batch; first += kMostBatches) {
    const dim3 grid(static_cast<unsigned>(int8::ceil_div(shape.queries, C::kQueries)), shape.heads,
                    std::min(kMostBatches, shape.batch - first));
    kernel<<<grid, C::kThreads, bytes, stream>>>(params);
  }
  return cudaGetLastError();
}

template <int D>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  if (call.mask.data == nullptr) return launch<D, false>(call, stream);
  const cudaError_t error = classify_mask_tiles(call, stream);
  return error != cudaSuccess ? error : launch<D, true>(call, stream);
}

}  // namespace

cudaError_t int8_attend_mma(const Int8Attend& call, cudaStream_t stream) {
  return with_head_dim(call.shape.d(), [&](auto d) { return launch<decltype(d)::value>(call, stream); });
}

}  // namespace sage3
