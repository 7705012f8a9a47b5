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

  // From here on the compiler does not know these words, and unpacks them anew: floats kept from an earlier use would
  // take twice the registers. No instruction.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(word[i]));
  }
};

// The larger, or smaller, numbers of two words, NaN winning: one of fp32, two of 16 bits. FMNMX.NAN, HMNMX2.NAN
template <class T, bool kLarger>
__device__ __forceinline__ uint32_t extreme(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // a number at a time
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4 / int(sizeof(T)); ++i) {
    const float x = Chunk<T>{{a}}[i], y = Chunk<T>{{b}}[i];
    const bool first = x != x || (kLarger ? x > y : x < y);
    word |= (first ? a : b) & (sizeof(T) == 4 ? 0xffffffffu : 0xffffu << (16 * i));
  }
#else
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kLarger) asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    else asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (kLarger) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    else asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  } else {
    if constexpr (kLarger) asm("max.NaN.f32 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    else asm("min.NaN.f32 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  }
#endif
  return word;
}

// The largest and smallest numbers of some chunks, channel by channel. They are found on packed words: half the
// instructions of unpacking, and nothing to keep in registers until the chunks are quantised.
template <class T>
struct Extremes {
  Chunk<T> most, least;

  __device__ __forceinline__ explicit Extremes(const Chunk<T>& first) : most(first), least(first) {}

  __device__ __forceinline__ void add(const Chunk<T>& x) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kWords; ++i) {
      most.word[i] = extreme<T, true>(most.word[i], x.word[i]);
      least.word[i] = extreme<T, false>(least.word[i], x.word[i]);
    }
  }

  // max |x - mean| of channel c.
  __device__ __forceinline__ float distance(int c, float mean) const {
    return max_nan(most[c] - mean, mean - least[c]);
  }
};

// The largest magnitude of all channels of some chunks.
template <class T>
struct LargestMagnitude {
  static constexpr uint32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu;
  uint32_t word = 0;

  __device__ __forceinline__ void add(const Chunk<T>& x) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kWords; ++i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860  // signs are free: the last one is of no number, and taken away
      if constexpr (std::is_same_v<T, __half>) {
        asm("max.NaN.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(word) : "r"(x.word[i]));
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm("max.NaN.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(x.word[i]));
      } else {
        asm("max.NaN.xorsign.abs.f32 %0, %0, %1;" : "+r"(word) : "r"(x.word[i]));
      }
#else
      word = extreme<T, true>(word, x.word[i] & kMagnitude);
#endif
    }
  }

  __device__ __forceinline__ float value() const {
    const Chunk<T> both{{word & kMagnitude}};
    return sizeof(T) == 4 ? both[0] : max_nan(both[0], both[1]);
  }
};

// The tokens of one head. kDense: channels lie side by side and every chunk can be read by 16-byte loads.
template <class T, bool kDense>
struct HeadRows {
  const char* data;
  std::conditional_t<kDense, int, int64_t> token_bytes;  // 32 bits, so that an address is one multiply-add
  int64_t channel_bytes;
  int head_dim;

  __device__ HeadRows(const Tensor4& x, int batch, int head, int head_dim_)
      : data(static_cast<const char*>(x.data) + (batch * x.stride[0] + head * x.stride[1]) * sizeof(T)),
        token_bytes(x.stride[2] * sizeof(T)),
        channel_bytes(x.stride[3] * sizeof(T)),
        head_dim(head_dim_) {}

  // Every kStep-th token from `token` on, all of which are there, and so are these channels.
  template <int kStep, int kCount>
  __device__ __forceinline__ void load_every(Chunk<T> (&x)[kCount], int token, int channel) const {
    static_assert(kDense && sizeof(T) == 2);
    const char* at = data + int64_t(token) * token_bytes + channel * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; ++i, at += int64_t(kStep) * token_bytes) {
      const uint4 four = __ldcs(reinterpret_cast<const uint4*>(at));
      x[i].word[0] = four.x, x[i].word[1] = four.y, x[i].word[2] = four.z, x[i].word[3] = four.w;
    }
  }

  // Channels past the end are zeros, and so is a token that is not there; nothing is read then.
  __device__ __forceinline__ Chunk<T> load(int token, int channel, bool there) const {
    Chunk<T> chunk = {};
    const char* const row = data + int64_t(token) * token_bytes;
    if constexpr (kDense) {
      constexpr int kHeld = 16 / sizeof(T);  // channels of one load
#pragma unroll
      for (int i = 0; i < kChunk / kHeld; ++i) {
        const int first = channel + i * kHeld;
        const uint4 four = load_or_zero(row + first * int(sizeof(T)), there && first < head_dim);
        chunk.word[4 * i] = four.x, chunk.word[4 * i + 1] = four.y;
        chunk.word[4 * i + 2] = four.z, chunk.word[4 * i + 3] = four.w;
      }
    } else {
      const char* at = row + channel * channel_bytes;
#pragma unroll
      for (int i = 0; i < kChunk; ++i, at += channel_bytes) {
        if (!there || channel + i >= head_dim) continue;
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

// `run` with a number of the inputs' dtype, whose type is T: an instance for each.
template <class Run>
cudaError_t with_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kFloat16: return run(__half{});
    case Dtype::kBFloat16: return run(__nv_bfloat16{});
    case Dtype::kFloat32: return run(float{});
    default: return cudaErrorInvalidValue;
  }
}

// Whether HeadRows<T, true> may read x.
inline bool is_dense(const Tensor4& x, int head_dim) {
  const int64_t size = x.dtype == Dtype::kFloat32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && head_dim * size % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && x.stride[i] * size % 16 == 0;
  return aligned && x.stride[3] == 1 && x.stride[2] >= 0 && x.stride[2] * size <= INT32_MAX;
}

}  // namespace sage3
