// Eight channels of a token: what a thread reads of Q, K or V at once. Any dtype, any strides, 64-bit offsets.
//
// They stay as they came (four registers for 16-bit numbers) until they are computed with, so a whole tile can wait in
// registers between the pass that finds its scale and the pass that quantises it, and memory is read once.
#pragma once

#include <type_traits>

#include "sage3/launch.h"
#include "sage3/numeric.cuh"

namespace sage3 {

constexpr int kChunk = 8;  // channels

template <class T>
struct Chunk {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "fp16, bf16 or fp32");
  static constexpr int kWords = kChunk * sizeof(T) / 4;
  uint32_t word[kWords];

  // Bit shifts for bf16: they are exact, and sm_75 has nothing else.
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(word[i / 2] >> (16 * (i % 2)))));
    }
  }

  // Stands before each pass. The compiler would unpack everything as it arrives and keep the floats for the next pass,
  // for twice the registers; it cannot know that these are still the same words. No instruction.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(word[i]));
  }
};

// The largest magnitude of some chunks, found on their bits: those of magnitudes are ordered as the magnitudes are, with
// infinity and then NaN above all numbers.
template <class T>
struct LargestMagnitude {
  uint32_t high = 0, low = 0;  // odd and even channels of 16 bits; fp32 has only "high"

  __device__ __forceinline__ void add(const Chunk<T>& x) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kWords; ++i) {
      high = max(high, x.word[i] & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff0000u));
      if constexpr (sizeof(T) == 2) low = max(low, x.word[i] & 0x7fffu);
    }
  }

  __device__ __forceinline__ float value() const {
    const uint32_t bits = sizeof(T) == 4 ? high : max(high >> 16, low);
    return Chunk<T>{{bits}}[0];
  }
};

// 16 bytes, or zeros and no access: a load under a predicate, where an "if" becomes a branch around each. Read once and
// never again, so evicted first: L2 keeps what the attention will read.
__device__ __forceinline__ uint4 load_or_zero(const void* from, bool there) {
  uint4 x;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n"
      " mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      " @p ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(int(there)));
  return x;
}

// The tokens of one head. kDense: channels lie side by side and every chunk can be read by 16-byte loads.
template <class T, bool kDense>
struct HeadRows {
  const T* data;
  int64_t token_stride, channel_stride;
  int tokens, head_dim;

  __device__ HeadRows(const Tensor4& x, int batch, int head, int tokens_, int head_dim_)
      : data(static_cast<const T*>(x.data) + batch * x.stride[0] + head * x.stride[1]),
        token_stride(x.stride[2]),
        channel_stride(x.stride[3]),
        tokens(tokens_),
        head_dim(head_dim_) {}

  // Tokens and channels past the end are zeros; nothing is read there.
  __device__ __forceinline__ Chunk<T> load(int token, int channel) const {
    Chunk<T> chunk = {};
    const T* const row = data + token * token_stride;
    if constexpr (kDense) {
#pragma unroll
      for (int i = 0; i < Chunk<T>::kWords; i += 4) {
        const int first = channel + i * 4 / static_cast<int>(sizeof(T));
        const uint4 four = load_or_zero(row + first, token < tokens && first < head_dim);
        chunk.word[i] = four.x, chunk.word[i + 1] = four.y, chunk.word[i + 2] = four.z, chunk.word[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (token >= tokens || channel + i >= head_dim) continue;
        const T* const at = row + (channel + i) * channel_stride;
        if constexpr (sizeof(T) == 4) {
          chunk.word[i] = *reinterpret_cast<const uint32_t*>(at);
        } else {
          chunk.word[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(at)) << (16 * (i % 2));
        }
      }
    }
    return chunk;
  }
};

// Whether HeadRows<T, true> may read x.
inline bool is_dense(const Tensor4& x, int head_dim) {
  const int64_t size = x.dtype == Dtype::kFloat32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && head_dim * size % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && x.stride[i] * size % 16 == 0;
  return aligned && x.stride[3] == 1;
}

}  // namespace sage3
