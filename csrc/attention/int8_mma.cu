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
constexpr int kMaxSlots = 6;      // K and V of three tiles
constexpr int kLineBytes = 128;   // of shared memory: the swizzle's period

// Bits of the float 1.5 * 2^23. For |s| <= 2^22, kMagic + s are the bits of the float kMagicFloat + s, exactly.
constexpr int kMagic = 0x4B400000;
constexpr float kMagicFloat = 12582912.0f;
static_assert(127 * 127 * 256 < (1 << 22), "the largest score of head dim 256");
static_assert(255 * 128 * kKeyTile < (1 << 22), "the largest sum of P V in one tile");

// Largest factor c for which "x = bits * c + (bias - kMagicFloat * c)" may be one FFMA. The constant, near 1.26e7 * c,
// is rounded by up to 0.75 c and moves all of a thread's exponents with it: here by less than 0.001. (Always less than
// one step of an integer score; but a code near 255 must not pass 255.5.) Larger factors pay an exact subtraction.
constexpr float kSmallFactor = 0.00125f;

// What depends on the head dim: 12 warps of at most 168 registers, or 16 of 128, or, where O alone takes 128, 8 of 255.
template <int D>
struct Config {
  static constexpr int kWarps = D == 64 || D == 256 ? 8 : 12;
  static constexpr int kBlocksPerSm = D == 64 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = kWarpRows * kWarps;
  static constexpr int kTileBytes = kKeyTile * D;
  static constexpr int kSlotBytes = kTileBytes + kLineBytes;  // a tile and its scales
  static constexpr int kSteps = D / 32;                       // of the contraction of Q K^T
  static constexpr int kValueScales = int8::value_scales(D);
};

struct Params {
  Int8Attend call;
  int8::Workspace at;
  int blocks;      // query blocks of a head
  int head_group;  // causal: heads whose K and V fit the L2 cache together
  int slots;       // of the ring
};

// One block of queries of one head.
struct Job {
  int batch, head, kv, block;  // kv counts with the batch

  __device__ Job(const Params& p, int index) {
    const int8::Shape& shape = p.call.shape;
    int bh;
    if (p.call.causal) {  // longest blocks first; heads in groups, so that their K and V stay in L2
      const int group = index / (p.head_group * p.blocks), within = index % (p.head_group * p.blocks);
      const int first = group * p.head_group;
      const int heads = min(p.head_group, shape.batch * shape.heads - first);
      block = p.blocks - 1 - within / heads;
      bh = first + within % heads;
    } else {
      bh = index / p.blocks;
      block = index % p.blocks;
    }
    batch = bh / shape.heads;
    head = bh % shape.heads;
    kv = batch * shape.kv_heads + head / (shape.heads / shape.kv_heads);
  }
};

// The key tiles of a job, in order; with a mask, those that somebody in the block attends.
template <int D, bool kMask>
struct KeyTiles {
  static constexpr int kRows = Config<D>::kQueries / kQueryTile;
  const unsigned char* classes;  // of the mask: those of the block's first query tile
  int64_t row_stride;            // and to those of the next one
  int rows, end;

  __device__ KeyTiles(const Params& p, const Job& job) {
    const int8::Shape& shape = p.call.shape;
    const int last_query = (job.block + 1) * Config<D>::kQueries;
    const int keys = p.call.causal ? min(shape.keys, last_query) : shape.keys;
    end = (keys + kKeyTile - 1) / kKeyTile;
    if constexpr (kMask) {
      const MaskTileIndex index(shape, p.call.mask);
      const int first = job.block * kRows;
      classes = p.call.mask_tiles + index(job.batch, job.head, first);
      row_stride = index.row_stride;
      rows = min(kRows, static_cast<int>(shape.query_tiles()) - first);
    }
  }

  // The class of tile n for the query tile that holds row `row` of the block.
  __device__ __forceinline__ MaskTile mask(int n, int row) const {
    return kMask ? static_cast<MaskTile>(classes[min(row / kQueryTile, rows - 1) * row_stride + n]) : kMaskAll;
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

// The ring of tiles in shared memory. All warps call fill, for K and V in turn, and use and release in the same order.
// A tile is a linear copy that one warp starts, each warp when its turn comes. Turing has no mbarriers: there the block's
// own barrier stands for both, and all threads copy.
template <int D>
class Ring {
  using C = Config<D>;
  struct Place {
    int slot = 0;
    uint32_t parity = 0;
  };

  uint32_t memory_;
  int slots_, wait_turn_;
  Place fill_, use_;

  __device__ uint32_t full(int slot) const { return memory_ + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return memory_ + 16 * slot + 8; }
  __device__ uint32_t tile(int slot) const { return memory_ + kLineBytes + slot * C::kSlotBytes; }
  __device__ void advance(Place& place) const {
    if (++place.slot == slots_) place.slot = 0, place.parity ^= 1;
  }

  template <int kCopiers>
  __device__ __forceinline__ void copy(const unsigned char* from, const unsigned char* scales, int scale_words) const {
    const int me = 16 * (threadIdx.x % kCopiers);
    const uint32_t to = tile(fill_.slot) + me;
    from = mma::opaque(from + me);
#pragma unroll
    for (int at = 0; at < C::kTileBytes; at += 16 * kCopiers) {
      if (C::kTileBytes % (16 * kCopiers) == 0 || at + me < C::kTileBytes) mma::copy_16(to + at, from + at);
    }
    if (me < 16 * scale_words) mma::copy_16(to + C::kTileBytes, scales + me);
  }

 public:
  static_assert(16 * kMaxSlots <= kLineBytes, "the barriers fill one line");
  static constexpr int bytes(int slots) { return kLineBytes + slots * C::kSlotBytes; }

  __device__ Ring(unsigned char* memory, int slots, int warp)
      : memory_(mma::shared_address(memory)), slots_(slots), wait_turn_(warp) {
    if constexpr (mma::kAsynchronous) {
      if (threadIdx.x < slots) {
        mma::barrier_init(full(threadIdx.x), 32);
        mma::barrier_init(empty(threadIdx.x), C::kWarps);
      }
      __syncthreads();
    }
  }

  // Starts the copy of the next tile and of its scales, which are `scale_words` of 16 bytes.
  __device__ __forceinline__ void fill(const unsigned char* from, const unsigned char* scales, int scale_words) {
    if constexpr (mma::kAsynchronous) {
      if (--wait_turn_ < 0) {
        wait_turn_ = C::kWarps - 1;
        mma::barrier_wait(empty(fill_.slot), fill_.parity ^ 1);
        copy<32>(from, scales, scale_words);
        mma::arrive_after_copies(full(fill_.slot));
      }
    } else {
      __syncthreads();
      copy<C::kThreads>(from, scales, scale_words);
    }
    advance(fill_);
  }

  // The address of the next tile, once it is in.
  __device__ __forceinline__ uint32_t use() {
    if constexpr (mma::kAsynchronous) {
      mma::barrier_wait(full(use_.slot), use_.parity);
    } else {
      __syncthreads();
    }
    return tile(use_.slot);
  }

  // This warp has read the tile.
  __device__ __forceinline__ void release() {
    if constexpr (mma::kAsynchronous) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) mma::barrier_arrive(empty(use_.slot));
    }
    advance(use_);
  }
};

// S = kMagic + Q K^T of one tile. Q comes from L1 for every tile, one 16-byte word per k-step; a load of K brings 16 tokens
// x 32 channels: two n8 tiles of one k-step.
template <int D>
__device__ __forceinline__ void multiply_qk(int (&s)[kTileScores], const unsigned char* q, uint32_t tile) {
  constexpr int kRow = int8::key_block(D), kStepsOfRow = kRow / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t mine = tile + int8::key_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 16, D);
  constexpr int kStart[4] = {kMagic, kMagic, kMagic, kMagic};
#pragma unroll
  for (int step = 0; step < Config<D>::kSteps; ++step) {
    const uint4 word = mma::load_again(reinterpret_cast<const uint4*>(q) + 32 * step + lane);
    const uint32_t a[4] = {word.x, word.y, word.z, word.w};
    const uint32_t at = (mine ^ (step % kStepsOfRow * 32)) + step / kStepsOfRow * kKeyTile * kRow;
#pragma unroll
    for (int pair = 0; pair < kKeyTile / 16; ++pair) {
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

// O += (P V) * weight * v_scale of one tile.
template <int D>
__device__ __forceinline__ void multiply_pv(float (&o)[D / 2], const uint32_t (&p)[kTileWords], uint32_t tile,
                                            const float (&weight)[2]) {
  const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
  const uint32_t mine = tile + int8::swizzle(row * kKeyTile + lane / 8 % 2 * 16, kKeyTile);
  constexpr int kZero[4] = {0, 0, 0, 0};
#pragma unroll
  for (int group = 0; group < D / 32; ++group) {
    int acc[16];
#pragma unroll
    for (int step = 0; step < kKeyTile / 32; ++step) {
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
    const float scale = mma::load_shared(tile + Config<D>::kTileBytes + 4 * group);
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

// The plain case. Finds the tile's maximum of both rows; scores carry kMagic: floats of one binade order like integers.
__device__ __forceinline__ Exponent exponents(int (&s)[kTileScores], const float (&c)[2], float (&top)[2]) {
  Exponent e;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int most = max(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < kTileScores / 4; ++j) most = max3(most, s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
    top[r] = quad_max(c[r] * (__int_as_float(most) - kMagicFloat));
    e.factor[r] = c[r];
    e.bias[r] = kLog2TopCode - top[r];
  }
  if (__all_sync(0xffffffffu, fmaxf(c[0], c[1]) <= kSmallFactor)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) e.bias[r] = fmaf(-kMagicFloat, c[r], e.bias[r]);
  } else {
#pragma unroll
    for (int i = 0; i < kTileScores; ++i) s[i] = __float_as_int(__int_as_float(s[i]) - kMagicFloat);
  }
  return e;
}

// Scores that are floats already (see scores_as_floats).
__device__ __forceinline__ Exponent exponents_of_floats(const int (&y)[kTileScores], float (&top)[2]) {
  tile_max_of_floats(y, top);
  return {{1.0f, 1.0f}, {kLog2TopCode - top[0], kLog2TopCode - top[1]}};
}

__device__ __forceinline__ void remove_magic(int (&s)[kTileScores]) {
#pragma unroll
  for (int i = 0; i < kTileScores; ++i) s[i] -= kMagic;
}

// Adds the mask's elements to the scores of `kPart` of a thread's columns, those from first_column on.
template <class T, int kPart>
__device__ __forceinline__ void add_mask_part(int (&y)[kTileScores], const char* (&at)[2], int64_t stride, int columns) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const bool there = 8 * (i / 4) + (i & 1) < columns;
    const float bias = there ? mask_bias<T>(at[i / 2 % 2] + (i & 1) * stride) : kNegativeInfinity;
    float& value = reinterpret_cast<float&>(y[i]);
    value = bias == kNegativeInfinity ? bias : value + bias;
    if (i % 4 == 3) at[0] += 8 * stride, at[1] += 8 * stride;
  }
}

// visible.cuh's add_mask for few registers: part after part in a loop that turns the scores' registers on, where the
// compiler would otherwise keep the addresses and elements of all 64 at once.
__device__ __forceinline__ void add_mask_slowly(int (&y)[kTileScores], const MaskRows& mask, int first_column, int keys) {
  constexpr int kPart = 8, kColumns = 2 * kPart;
  const char* at[2] = {mask.row[0] + first_column * mask.column_stride, mask.row[1] + first_column * mask.column_stride};
#pragma unroll 1
  for (int column = first_column; column < first_column + kKeyTile; column += kColumns) {
    switch (mask.dtype) {
      case Dtype::kBool: add_mask_part<unsigned char, kPart>(y, at, mask.column_stride, keys - column); break;
      case Dtype::kFloat16: add_mask_part<__half, kPart>(y, at, mask.column_stride, keys - column); break;
      case Dtype::kBFloat16: add_mask_part<__nv_bfloat16, kPart>(y, at, mask.column_stride, keys - column); break;
      case Dtype::kFloat32: add_mask_part<float, kPart>(y, at, mask.column_stride, keys - column); break;
    }
    int done[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) done[i] = y[i];
#pragma unroll
    for (int i = 0; i < kTileScores; ++i) y[i] = i < kTileScores - kPart ? y[i + kPart] : done[i + kPart - kTileScores];
  }
}

// A warp's result. Where it belongs is worked out anew, so that no register holds it during the main loop.
template <int D>
__device__ __forceinline__ void finish(const Params& p, const RowState& state, const float (&o)[D / 2]) {
  const int8::Shape& shape = p.call.shape;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const Job job(p, mma::block_index());
  const int first_row = job.block * Config<D>::kQueries + kWarpRows * (threadIdx.x / 32);
  float inverse[2], lse[2];
  finish_rows(state, inverse, lse);
  const float* const v_mean = reinterpret_cast<const float*>(base + p.at.v_mean) + int64_t(job.kv) * D;
  const float* const v_norm = reinterpret_cast<const float*>(base + p.at.v_norm) + int64_t(job.kv) * D;
  store_output<D>(o, inverse, v_mean, v_norm, p.call, job.batch, job.head, first_row);
  if (p.call.lse != nullptr && threadIdx.x % 4 == 0) {
    const int64_t bh = int64_t(job.batch) * shape.heads + job.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + threadIdx.x % 32 / 4 + 8 * r;
      if (row < shape.queries) p.call.lse[bh * shape.queries + row] += lse[r];
    }
  }
}

// One warp's 16 queries over all their tiles.
template <int D, bool kMask>
__global__ void __launch_bounds__(Config<D>::kThreads, Config<D>::kBlocksPerSm)
    int8_attention_mma(const __grid_constant__ Params p) {
  using C = Config<D>;
  extern __shared__ __align__(kLineBytes) unsigned char memory[];
  const int8::Shape& shape = p.call.shape;
  const auto* const base = static_cast<const unsigned char*>(p.call.workspace);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // the same in all lanes, and known to be
  const int lane = threadIdx.x % 32, t = lane % 4;

  const Job job(p, mma::block_index());
  const KeyTiles<D, kMask> tiles(p, job);
  Ring<D> ring(memory, p.slots, warp);

  // K and V, in turn: item 2n is K of tile n, item 2n + 1 its V.
  const int first_tile = job.kv * static_cast<int>(shape.key_tiles());
  int item = 2 * tiles.from(0);
  auto fill = [&] {
    if (item >= 2 * tiles.end) return;
    const bool value = item % 2;
    const int64_t tile = first_tile + item / 2;
    const int words = value ? C::kValueScales / 4 : 1;
    ring.fill(base + (value ? p.at.v8 : p.at.k8) + tile * C::kTileBytes,
              base + (value ? p.at.v_scale : p.at.k_scale) + tile * (16 * words), words);
    item = value ? 2 * tiles.from(item / 2 + 1) : item + 1;
  };
  for (int i = 0; i < p.slots / 2; ++i) fill();

  // Rows past the last tile of Q do not exist: such a warp copies, and computes nothing.
  const int first_row = job.block * C::kQueries + kWarpRows * warp;
  const bool exists = first_row < shape.queries;
  const int at = (job.batch * shape.heads + job.head) * static_cast<int>(shape.query_tiles() * kQueryTile) +
                 (exists ? first_row : 0);
  const auto q_rows = [&] { return base + p.at.q8 + int64_t(mma::opaque(at)) * D; };
  const auto q_scales = [&] {
    return reinterpret_cast<const float*>(base + p.at.q_scale) + mma::opaque(at) + threadIdx.x % 32 / 4;
  };

  RowState state;
  float o[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
  auto rescale = [&](int r, float factor) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
  };

  for (int n = tiles.from(0); n < tiles.end; n = tiles.from(n + 1)) {
    const MaskTile mask = tiles.mask(n, kWarpRows * warp);
    const bool needed =
        exists && mask != kMaskNone && !(p.call.causal && n * kKeyTile >= first_row + kWarpRows);

    fill();
    const uint32_t k_tile = ring.use();
    if (!needed) {
      ring.release();
      fill();
      ring.use();
      ring.release();
      continue;
    }
    int s[kTileScores];
    multiply_qk<D>(s, q_rows(), k_tile);
    const float k_scale = mma::load_shared(k_tile + C::kTileBytes + 4 * t);
    ring.release();

    const float c[2] = {mma::load_again(q_scales()) * k_scale, mma::load_again(q_scales() + 8) * k_scale};
    const int after = (n + 1) * kKeyTile;
    const bool plain = mask == kMaskAll && after <= shape.keys && (!p.call.causal || after <= first_row + 1);
    float top[2], weight[2];
    Exponent exponent;
    if (plain) {
      exponent = exponents(s, c, top);
    } else {
      const int row = mma::opaque(first_row) + lane / 4;  // the thread's first; the other is row + 8
      const int first_column = n * kKeyTile + 2 * t;
      const int end[2] = {p.call.causal ? min(shape.keys, row + 1) : shape.keys,
                          p.call.causal ? min(shape.keys, row + 9) : shape.keys};
      remove_magic(s);
      scores_as_floats(s, c, first_column, end);
      if constexpr (kMask) {
        if (mask != kMaskAll) {
          const MaskRows rows(p.call.mask, shape, mma::opaque(job.batch), mma::opaque(job.head), row);
          add_mask_slowly(s, rows, first_column, shape.keys);
        }
      }
      exponent = exponents_of_floats(s, top);
    }
    uint32_t p8[kTileWords], sum[2] = {0, 0};
    quantize_p(p8, sum, [&](int i) {
      return fmaf(__int_as_float(s[i]), exponent.factor[i / 2 % 2], exponent.bias[i / 2 % 2]);
    });
    update_rows(state, top, sum, weight, rescale);

    fill();
    multiply_pv<D>(o, p8, ring.use(), weight);
    ring.release();
  }
  if (exists) finish<D>(p, state, o);
}

// How many slots of the ring fit, of the current device's shared memory.
template <int D>
cudaError_t ring_slots(int& slots) {
  int device, per_block, per_sm, reserved;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  }
  if (error != cudaSuccess) return error;
  const int available = std::min(per_block, per_sm / Config<D>::kBlocksPerSm - reserved);
  slots = std::min(kMaxSlots, (available - Ring<D>::bytes(0)) / Config<D>::kSlotBytes);
  return slots > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <int D, bool kMask>
cudaError_t launch(const Int8Attend& call, cudaStream_t stream) {
  using C = Config<D>;
  constexpr int64_t kCacheBytes = 16 << 20;  // of the L2: what K and V of a group of heads may take
  const int8::Shape& shape = call.shape;
  const int64_t heads = int64_t(shape.batch) * shape.heads;
  const int per_kv = shape.heads / shape.kv_heads;
  const int blocks = static_cast<int>(int8::ceil_div(shape.queries, C::kQueries));
  const int64_t fitting = std::max<int64_t>(1, kCacheBytes / (2 * shape.key_tiles() * C::kTileBytes)) * per_kv;
  Params params{call, int8::Workspace(shape), blocks, static_cast<int>(std::min(fitting, heads)), 0};
  cudaError_t error = ring_slots<D>(params.slots);
  if (error != cudaSuccess) return error;
  const auto kernel = int8_attention_mma<D, kMask>;
  const int bytes = Ring<D>::bytes(params.slots);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(heads * blocks), C::kThreads, bytes, stream>>>(params);
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
  switch (call.shape.d()) {
    case 64: return launch<64>(call, stream);
    case 96: return launch<96>(call, stream);
    case 128: return launch<128>(call, stream);
    case 256: return launch<256>(call, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sage3
