// The 4-bit operands of attention as they lie in memory between the quantisation and the attention kernel.
//
// Everything lies in the order in which the threads of m16n8k64 (nvfp4.cuh) want it in their registers, so that a linear
// bulk copy brings a tile into shared memory and every operand is a plain 16-byte load: no ldmatrix, no bank conflict, no
// shuffle.
//
//   queries  [B*H][query tiles]     a record of 128 rows: codes, scales, level
//   keys     [B*Hkv][key tiles]     a record of 128 tokens: codes, scales, level
//   values   [B*Hkv][key tiles]     a record of 128 tokens: codes, scales
//   q_mean   f32 [B*H][query tiles][D]
//   k_mean, v_mean  f32 [B*Hkv][D]
//   v_level  f32 [B*Hkv]
//   delta    f32 [jobs of a chunk][key tiles][16][4][4]   (delta_offset); a job is a query tile of a head
//
//   code * scale * q_level = (q - q_mean) * sign(scale of the scores)     scale: e4m3, one for 16 channels of a row
//   code * scale * k_level = k - k_mean                                   likewise
//   code * scale * v_level = v - v_mean                                   one for 16 tokens of a channel
//   delta * q_level * k_level = q_mean . (k - k_mean) * sign              what subtracting q_mean takes from the scores
//
// Levels, the second level of the scales, are powers of two: dividing by them rounds nothing. Those of Q and K belong to a
// tile and follow its maximum; V's belongs to the head, for the output adds up over tiles.
//
// D is the head dim padded to 64, 128 or 256. Rows past the end of the sequence and channels past the head dim hold zeros.
// "Smoothing" Q and K and the order of K's tokens are SageAttention3's (arXiv 2505.11594, section 3.1); taking the mean out
// of V as well, and the levels, are ours (docs/numerics.md).
#pragma once

#include <cstdint>

#include "sage3/host_device.h"
#include "sage3/int8_format.cuh"

namespace sage3::nvfp4 {

using int8::ceil_div;
using Shape = int8::Shape;  // of a call; its d() and tiles are those of 8 bits and have no say here

constexpr int kTile = 128;      // rows of Q that share a mean, and tokens of K and V in a tile
constexpr int kWarpRows = 16;   // rows of Q that a warp works on
constexpr int kBlock = 16;      // numbers that share a scale
constexpr int kStep = 64;       // of the contraction of one product
constexpr int kLevelBytes = 16; // a level takes a whole unit of the copy engine

SAGE3_HD constexpr int padded_head_dim(int d) { return d <= 0 ? 0 : d <= 64 ? 64 : d <= 128 ? 128 : d <= 256 ? 256 : 0; }

// A record: codes, then one word of four scales for every thread of a warp and group of products, then the level.
SAGE3_HD constexpr int code_bytes(int d) { return kTile * d / 2; }
SAGE3_HD constexpr int query_scale_words(int d) { return kTile / kWarpRows * 32 * (d == 256 ? 2 : 1); }
SAGE3_HD constexpr int scale_words(int d) { return kTile * d / kBlock / 4; }  // of K and of V
SAGE3_HD constexpr int query_record(int d) { return code_bytes(d) + 4 * query_scale_words(d) + kLevelBytes; }
SAGE3_HD constexpr int key_record(int d) { return code_bytes(d) + 4 * scale_words(d) + kLevelBytes; }
SAGE3_HD constexpr int value_record(int d) { return code_bytes(d) + 4 * scale_words(d); }

// ---- where a code lies: the number of its half byte in the record; the even ones are the lower halves ----

// Query row (< 128) and channel. A operand: [warp][step of 64 channels][lane][word][8 channels]
SAGE3_HD constexpr int query_code(int row, int channel, int d) {
  const int warp = row / 16, step = channel / 64, g = row % 8, t = channel % 32 / 8;
  const int word = row % 16 / 8 + 2 * (channel % 64 / 32);
  return (((warp * (d / 64) + step) * 32 + 4 * g + t) * 4 + word) * 8 + channel % 8;
}

// Which column of which n8 tile of Q K^T a token is, and back: column 8 * tile + c. A thread's scores, columns 2t and 2t+1
// of four tiles, are then tokens 8t..8t+7 of 32, which is what it must hold of P, and V keeps its natural order.
SAGE3_HD constexpr int column_of_token(int token) {
  return token / 32 * 32 + token % 8 / 2 * 8 + token % 32 / 8 * 2 + token % 2;
}
SAGE3_HD constexpr int token_of_column(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Key token (< 128) and channel. B operand: [n8 tile][pair of steps][lane][step][word][8 channels]; head dim 64 has one step
// and takes two n8 tiles together: [pair of n8 tiles][lane][n8 tile][word][8 channels].
SAGE3_HD constexpr int key_code(int token, int channel, int d) {
  const int column = column_of_token(token), tile = column / 8, lane = column % 8 * 4 + channel % 32 / 8;
  const int step = channel / 64, word = channel % 64 / 32;
  const int unit = d == 64 ? tile / 2 : tile * (d / 128) + step / 2, half = d == 64 ? tile % 2 : step % 2;
  return ((unit * 32 + lane) * 4 + 2 * half + word) * 8 + channel % 8;
}

// Value token (< 128) and channel. B operand: [n8 tile of channels][lane][step of 64 tokens][word][8 tokens]
SAGE3_HD constexpr int value_code(int token, int channel) {
  const int lane = channel % 8 * 4 + token % 32 / 8, step = token / 64, word = token % 64 / 32;
  return ((channel / 8 * 32 + lane) * 4 + 2 * step + word) * 8 + token % 8;
}

// ---- where a scale lies: the number of its byte after the codes ----

// Of query row and channel / 16: [warp][pair of steps][lane], lane 4g + 2 (step % 2) + (row % 16) / 8.
SAGE3_HD constexpr int query_scale(int row, int block, int d) {
  const int warp = row / 16, step = block / 4, pairs = d == 256 ? 2 : 1;
  const int lane = 4 * (row % 8) + 2 * (step % 2) + row % 16 / 8;
  return ((warp * pairs + step / 2) * 32 + lane) * 4 + block % 4;
}

// Of key token and channel / 16: [step][lane][four n8 tiles that share a word a lane], lane 4 column + n8 tile % 4.
SAGE3_HD constexpr int key_scale(int token, int block) {
  const int column = column_of_token(token), tile = column / 8, lane = 4 * (column % 8) + tile % 4, step = block / 4;
  return ((step * 32 + lane) * 4 + tile / 4) * 4 + block % 4;
}

// Of channel and token / 16: [128 channels][step of 64 tokens * (width / 32) + 32 channels, in fours][lane][of the four], lane
// 4 (channel % 8) + n8 tile % 4. Head dim 256 is attended to in two halves of its output, each with words of its own.
SAGE3_HD constexpr int value_scale(int channel, int block, int d) {
  const int width = d < 128 ? d : 128, lane = 4 * (channel % 8) + channel / 8 % 4;
  const int word = channel / width * (2 * width / 32) + block / 4 * (width / 32) + channel % width / 32;
  return ((word / 4 * 32 + lane) * 4 + word % 4) * 4 + block % 4;
}

// ---- delta ----

// Floats of one tile of keys, for one tile of queries. Each is stored twice, (d0, d1, d0, d1) for columns 2t and 2t + 1: the
// accumulator of a thread's rows g and g + 8, which starts there.
constexpr int kDeltaFloats = 2 * kTile;
SAGE3_HD constexpr int delta_offset(int token) {  // the first; the second is two floats on
  const int column = column_of_token(token);
  return (column / 8 * 4 + column % 8 / 2) * 4 + column % 2;
}

// The workspace of one call: one allocation, every part 256-byte aligned, and where each part begins. Delta takes two floats
// for every query tile and key, so that it is made for a chunk of the jobs at a time.
struct Workspace {
  static constexpr int64_t kMostDelta = int64_t(256) << 20;  // bytes
  int64_t queries, keys, values, q_mean, k_mean, v_mean, v_level, delta, bytes;
  int64_t query_tiles, key_tiles;  // of a head
  int64_t jobs, chunk;             // query tiles of all heads, and how many of them delta has room for

  SAGE3_HD explicit Workspace(const Shape& s) {
    const int d = padded_head_dim(s.head_dim);
    const int64_t q_heads = int64_t(s.batch) * s.heads, kv_heads = int64_t(s.batch) * s.kv_heads;
    query_tiles = ceil_div(s.queries, kTile), key_tiles = ceil_div(s.keys, kTile);
    jobs = q_heads * query_tiles;
    int64_t at = 0;
    auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at += ceil_div(size, 256) * 256;
      return begin;
    };
    queries = take(jobs * query_record(d));
    keys = take(kv_heads * key_tiles * key_record(d));
    values = take(kv_heads * key_tiles * value_record(d));
    q_mean = take(jobs * d * 4);
    k_mean = take(kv_heads * d * 4);
    v_mean = take(kv_heads * d * 4);
    v_level = take(kv_heads * 4);
    const int64_t job = key_tiles * kDeltaFloats * 4;
    chunk = kMostDelta / job < 1 ? 1 : kMostDelta / job < jobs ? kMostDelta / job : jobs;
    delta = take(job * chunk);
    bytes = at;
  }
};

// Which query tile of which head a job is. Causal: the longest first.
struct Job {
  int head, tile;  // head counts with the batch

  SAGE3_HD Job(unsigned job, unsigned query_tiles, unsigned heads, bool causal) {
    const unsigned per = causal ? heads : query_tiles, outer = job / per, inner = job - outer * per;
    head = static_cast<int>(causal ? inner : outer);
    tile = static_cast<int>(causal ? query_tiles - 1 - outer : inner);
  }
};

}  // namespace sage3::nvfp4
