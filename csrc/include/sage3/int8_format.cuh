// The 8-bit operands of attention as they lie in memory between the quantisation and the attention kernels.
//
// One format serves wgmma (sm_90) and mma.sync (everything else), and a plain linear copy brings a tile into shared
// memory ready for use: no tensor maps, no transposition and no shuffle in the main loop.
//
//   q8       int8 [B*H][query tiles of 64 rows][64*D bytes]  in the order of the A operand (query_offset)
//   q_scale  f32  [B*H][query tiles * 64]                    q8 * q_scale = q * scale * log2(e), one per row
//   k8       int8 [B*Hkv][key tiles of 128 rows][128*D bytes]  rows of 32, 64 or 128 bytes, swizzled (key_offset)
//   k_scale  f32  [B*Hkv][key tiles][4]                      k8 * k_scale = k - k_mean, one per group of tokens
//   v8       int8 [B*Hkv][key tiles][D*128 bytes]            channel-major, tokens permuted, swizzled (value_offset)
//   v_scale  f32  [B*Hkv][key tiles][value_scales(D)]       v8 * v_scale * v_norm + v_mean = v, per 32 channels
//   k_mean, v_mean, v_norm  f32 [B*Hkv][D]
//
// D is the head dim padded to 64, 96, 128 or 256. Rows past the end of the sequence and channels past the head dim hold
// zeros. Token groups of K: (token % 8) / 2, which are the columns that one thread of a quad holds in the
// accumulator of Q K^T, so that a thread knows one scale for a whole tile and may take its row maximum on integers
// (the "per-thread" granularity of SageAttention2, arXiv 2411.10958, section 3.2).
#pragma once

#include <cstdint>

#include "sage3/host_device.h"

namespace sage3::int8 {

constexpr int kQueryTile = 64;     // rows of Q that one warpgroup, or four warps of mma.sync, work on
constexpr int kKeyTile = 128;      // tokens of K and V in a tile
constexpr int kKeyGroups = 4;      // scales of a K tile
constexpr int kChannelGroup = 32;  // channels of V that share a scale
constexpr float kTopCode = 255.0f; // P is quantised to 0..255, the largest of a row and tile being 255

// The head dim that the kernels compute with; 0 when it is not supported.
SAGE3_HD constexpr int padded_head_dim(int d) {
  return d <= 0 ? 0 : d <= 64 ? 64 : d <= 96 ? 96 : d <= 128 ? 128 : d <= 256 ? 256 : 0;
}

// Scales of a V tile: D / 32, padded to whole 16 bytes so that a bulk copy can bring them.
SAGE3_HD constexpr int value_scales(int d) { return d <= 128 ? 4 : 8; }

// Bytes of a row of K inside one swizzled block: a whole row of 64 or 128, a half of 256, a third of 96.
SAGE3_HD constexpr int key_block(int d) { return d == 64 ? 64 : d == 96 ? 32 : 128; }

// Swizzle of 16-byte units as TMA and wgmma define it (PTX ISA, "Shared memory matrix layout, swizzling modes"):
// address bits 4.. are XORed with bits 7... One, two or three bits for rows of 32, 64 and 128 bytes.
SAGE3_HD constexpr int swizzle(int offset, int row_bytes) { return offset ^ (((offset >> 7) & (row_bytes / 16 - 1)) << 4); }

// Byte of q8's tile that holds (row < 64, channel): warp, k-step of 32 channels, lane, register, byte of the A operand
// of m16n8k32 (and of each warp of wgmma's m64k32). A thread reads its operand as one 16-byte word per k-step.
SAGE3_HD constexpr int query_offset(int row, int channel, int d) {
  const int warp = row / 16, step = channel / 32;
  const int lane = (row % 8) * 4 + (channel % 16) / 4;
  const int reg = (row % 16) / 8 + 2 * ((channel % 32) / 16);
  return ((warp * (d / 32) + step) * 32 + lane) * 16 + reg * 4 + channel % 4;
}

// Byte of k8's tile that holds (token < 128, channel): the B operand, K-major.
SAGE3_HD constexpr int key_offset(int token, int channel, int d) {
  const int width = key_block(d);
  return (channel / width) * kKeyTile * width + swizzle(token * width + channel % width, width);
}

// Where token t of a group of 16 lies along the contraction of P V: the packed scores of a thread, columns
// {2i, 2i+1, 8+2i, 9+2i}, are then positions 4i..4i+3, which is the A operand that the thread must hold.
SAGE3_HD constexpr int value_position(int token) {
  const int t = token % 16;
  return (token - t) + ((t % 8) / 2) * 4 + (t / 8) * 2 + t % 2;
}

// Byte of v8's tile that holds (token < 128, channel): the B operand of P V, one row of 128 tokens per channel.
SAGE3_HD constexpr int value_offset(int token, int channel) {
  return swizzle(channel * kKeyTile + value_position(token), kKeyTile);
}

SAGE3_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of one call. "heads" are counted with the batch: batch * heads.
struct Shape {
  int batch, heads, kv_heads;
  int queries, keys;  // tokens: Lq, Lk
  int head_dim;       // as the caller has it

  SAGE3_HD int d() const { return padded_head_dim(head_dim); }
  SAGE3_HD int64_t query_tiles() const { return ceil_div(queries, kQueryTile); }
  SAGE3_HD int64_t key_tiles() const { return ceil_div(keys, kKeyTile); }
};

// The workspace of one call: one allocation, every part 256-byte aligned, and where each part begins.
struct Workspace {
  int64_t q8, q_scale, k8, k_scale, v8, v_scale, k_mean, v_mean, v_norm, bytes;

  SAGE3_HD explicit Workspace(const Shape& s) {
    const int64_t q_heads = int64_t(s.batch) * s.heads, kv_heads = int64_t(s.batch) * s.kv_heads, d = s.d();
    int64_t at = 0;
    auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at += ceil_div(size, 256) * 256;
      return begin;
    };
    q8 = take(q_heads * s.query_tiles() * kQueryTile * d);
    q_scale = take(q_heads * s.query_tiles() * kQueryTile * 4);
    k8 = take(kv_heads * s.key_tiles() * kKeyTile * d);
    k_scale = take(kv_heads * s.key_tiles() * kKeyGroups * 4);
    v8 = take(kv_heads * s.key_tiles() * kKeyTile * d);
    v_scale = take(kv_heads * s.key_tiles() * value_scales(s.d()) * 4);
    k_mean = take(kv_heads * d * 4);
    v_mean = take(kv_heads * d * 4);
    v_norm = take(kv_heads * d * 4);
    bytes = at;
  }
};

}  // namespace sage3::int8
