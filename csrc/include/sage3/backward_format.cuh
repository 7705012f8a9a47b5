// The operands of the 8-bit backward pass as they lie in memory between its three kernels, and in shared memory.
//
// What the forward pass saves: int8_format.cuh's workspace (q8, k8, v8 and scales; v_mean and v_norm), the LSE of the
// scores that these codes stand for (K smoothed, so without the mean's part), each row's largest weight, and the output in 8
// bits a channel, one scale a token. From them, and from the output's gradient dO, the preparation makes one block for 64
// queries and one for 128 keys, each copied into shared memory as it is.
//
// wgmma's 8-bit operands must have the contraction along the bytes of a row, so what is multiplied twice, over channels and
// over tokens, is here twice:
//
//   S^T  = K Q^T     k8 (int8_format.cuh), q8          over channels: the forward pass's codes, so its scores, bit by bit
//   dP^T = V dO^T    v16, dout16                       over channels, in bf16
//   dV   = P^T dO    P^T from registers, dout8         over queries, in e4m3
//   dK   = dS^T Q    dS^T from registers, q8t          over queries, in e4m3
//   dQ   = dS K      dS through shared memory, k8t     over keys, in e4m3
//
// P and dS span many octaves, and they are multiplied and summed over the queries, so that a scale can only be a query's own,
// on both sides. Every query has one, its unit: the power of two `a` at the largest magnitude of its dO, times the one that has
// its largest weight at most 128, and not far below, nor far from that of other queries of the tile. The largest unit of a tile
// of queries is the tile's; from that follows its gain, which keeps that of the tile before where it can, for where it changes
// the sums have to be multiplied. The rest is powers of two for a kv head (value, query, key). All of it is found before the
// products begin:
//
//   p   = P a / unit * tile / gain   at most 128; where small, the kernel lifts it (int8_grad_sm90.cu)
//   do  = dO / a                     in dout16; 128 unit / tile times that, below 256, in dout8
//   v   = V value                    so that p (dP - delta) is below 448 for p of 256 and all but few V; about 30 of normal ones
//   q   = Q scale / query            at most 256; unit / tile times that in q8t
//   k   = K / key                    at most 256, in k8t
//
// All of this is exact in floating point. Then p^T dout8 is 128 dV / gain, and with ds = p (v do - delta value / a), ds^T q8t is
// dK value / gain and ds k8t is dQ value tile / (unit gain).
#pragma once

#include "sage3/int8_format.cuh"

namespace sage3::int8 {

struct GradLevel {  // of a kv head; see above
  float query, value, key;
};
constexpr float kGradTop = 128.0f;  // dout8 = kGradTop * do

// Byte of a tile of `rows` rows that holds (row, byte of the row): blocks of `width` bytes of each row, swizzled.
SAGE3_HD constexpr int block_offset(int row, int byte, int rows, int width) {
  return byte / width * rows * width + swizzle(row * width + byte % width, width);
}

// Bytes of a row of 16-bit channels inside one swizzled block.
SAGE3_HD constexpr int wide_block(int d) { return d == 96 ? 64 : 128; }

// (query < 64, channel) of q8, a byte; of dout16, two bytes.
SAGE3_HD constexpr int grad_query_offset(int query, int channel, int d) {
  return block_offset(query, channel, kQueryTile, key_block(d));
}
SAGE3_HD constexpr int grad_dout_offset(int query, int channel, int d) {
  return block_offset(query, 2 * channel, kQueryTile, wide_block(d));
}

// (query < 64, channel) of q8t and dout8, a byte: a row of 64 queries per channel, in the order in which a thread's packed columns
// of P^T and dS^T follow each other (value_position).
SAGE3_HD constexpr int grad_turned_offset(int query, int channel) {
  return swizzle(channel * kQueryTile + value_position(query), kQueryTile);
}

// (key < 128, channel) of v16; of k8t, whose rows are the keys of a channel. Keys g and g + 8 of 16 lie side by side, for a
// thread has both, of a query, in one store of dS.
SAGE3_HD constexpr int grad_value_offset(int key, int channel, int d) {
  return block_offset(key, 2 * channel, kKeyTile, wide_block(d));
}
SAGE3_HD constexpr int grad_key_position(int key) { return key / 16 * 16 + key % 8 * 2 + key % 16 / 8; }
SAGE3_HD constexpr int grad_key_offset(int key, int channel) {
  return swizzle(channel * kKeyTile + grad_key_position(key), kKeyTile);
}

template <int D>
struct alignas(1024) QueryBlock {
  unsigned char q8[kQueryTile * D];
  unsigned char dout16[kQueryTile * D * 2];
  unsigned char q8t[kQueryTile * D];
  unsigned char dout8[kQueryTile * D];
  float q_scale[kQueryTile];  // q8 * q_scale = q * scale * log2(e)
  float shift[kQueryTile];    // p = 2^(s - shift); +inf for rows that attend nothing and those past the end, so that p is 0
  float delta[kQueryTile];    // (rowsum(dO O) - dlse) value / a
  int gain, most_lift;          // exponents: of the gain, and of what p may be lifted by
  int rises, nothing;           // 1 where the tile's unit is far above that of the tile before, or it is the first
  short row[kQueryTile];        // an exponent: of what the sums of dQ are in
  signed char sum[kQueryTile];  // another: of what they are multiplied by before, so that fp16 holds them
};

template <int D>
struct alignas(1024) KeyBlock {
  unsigned char v16[kKeyTile * D * 2];  // v * value
  unsigned char k8t[kKeyTile * D];      // (k - k_mean) / key
};

// dQ is summed in fp16 by the copy engine, in the order of the accumulators of dS K: warpgroup h has the channels from
// h D / 2 on, and what a warp has lies together. Element of a tile that holds accumulator i of a thread.
SAGE3_HD constexpr int grad_sum_offset(int half, int i, int thread, int d) {
  return (((half * 4 + thread / 32) * (d / 32) + i / 8) * 32 + thread % 32) * 8 + i % 8;
}
constexpr int kGradWriters = 8;  // warps that add to a tile of dQ

// The workspace of one backward call: one allocation, every part 1024-byte aligned.
struct GradWorkspace {
  int64_t query_blocks, key_blocks, levels, units, sums, turns, bytes;
  int64_t query_block_bytes, key_block_bytes;

  SAGE3_HD explicit GradWorkspace(const Shape& s) {
    const int64_t d = s.d(), tiles = int64_t(s.batch) * s.heads * s.query_tiles();
    const auto whole = [](int64_t size) { return ceil_div(size, 1024) * 1024; };
    query_block_bytes = whole(kQueryTile * d * 5 + 3 * kQueryTile * 4 + 16 + kQueryTile * 3);
    key_block_bytes = kKeyTile * d * 3;
    int64_t at = 0;
    auto take = [&](int64_t size) {
      const int64_t begin = at;
      at += whole(size);
      return begin;
    };
    query_blocks = take(tiles * query_block_bytes);
    key_blocks = take(int64_t(s.batch) * s.kv_heads * s.key_tiles() * key_block_bytes);
    levels = take(int64_t(s.batch) * s.kv_heads * sizeof(GradLevel));
    units = take(tiles * 4);  // exponents: a tile's largest unit
    sums = take(tiles * kQueryTile * d * 2);
    turns = take(tiles * kGradWriters * 4);  // deterministic: how many key tiles have added to each part of a tile of dQ
    bytes = at;
  }

  SAGE3_HD int64_t zeroed() const { return bytes - sums; }  // from `sums` on
};

static_assert(sizeof(QueryBlock<64>) == 21504 && sizeof(QueryBlock<96>) == 31744 && sizeof(QueryBlock<128>) == 41984);

}  // namespace sage3::int8
