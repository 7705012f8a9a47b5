// Who may attend whom, judged by token: the end of the sequence, causality, and the mask's own elements.
//
// Only tiles that need it come here. Scores become floats (base 2 exponents), hidden ones -inf, in place: the array
// stays int and holds the floats' bits. Fragment as in softmax.cuh.
#pragma once

#include "sage3/softmax.cuh"

namespace sage3 {

// A thread's two rows of a mask.
struct MaskRows {
  const char* row[2];
  int64_t column_stride;  // bytes
  Dtype dtype;

  // Rows past the end read the last one: their results are never stored.
  __device__ MaskRows(const Tensor4& mask, const int8::Shape& shape, int batch, int head, int first_row) {
    const int size = mask.dtype == Dtype::kBool ? 1 : mask.dtype == Dtype::kFloat32 ? 4 : 2;
    const char* base = static_cast<const char*>(mask.data);
    for (int r = 0; r < 2; ++r) {
      const int64_t query = min(first_row + 8 * r, shape.queries - 1);
      row[r] = base + size * (batch * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2]);
    }
    column_stride = size * mask.stride[3];
    dtype = mask.dtype;
  }
};

// What a mask's element adds to a score, base 2.
template <class T>
__device__ __forceinline__ float mask_bias(const char* at) {
  const T value = *reinterpret_cast<const T*>(at);
  if constexpr (sizeof(T) == 1) {
    return value ? 0.0f : kNegativeInfinity;
  } else {
    return static_cast<float>(value) * kLog2e;
  }
}

template <class T>
__device__ __forceinline__ void add_mask_of(int (&y)[kTileScores], const MaskRows& mask, int first_column, int keys) {
  const char* at[2];
  for (int r = 0; r < 2; ++r) at[r] = mask.row[r] + first_column * mask.column_stride;
#pragma unroll
  for (int j = 0; j < kTileScores / 4; ++j) {
    // Opaque to the compiler: it would compute all 64 addresses first, in the registers that the scores need.
    asm volatile("" : "+l"(at[0]), "+l"(at[1]));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + 8 * j + (i & 1);
      const float bias = column < keys ? mask_bias<T>(at[i / 2] + (i & 1) * mask.column_stride) : kNegativeInfinity;
      float& value = reinterpret_cast<float&>(y[4 * j + i]);
      value = bias == kNegativeInfinity ? bias : value + bias;
    }
    for (int r = 0; r < 2; ++r) at[r] += 8 * mask.column_stride;
  }
}

// Adds a mask to scores that are floats already; -inf hides, whatever the score is.
static __device__ __forceinline__ void add_mask(int (&y)[kTileScores], const MaskRows& mask, int first_column, int keys) {
  switch (mask.dtype) {
    case Dtype::kBool: return add_mask_of<unsigned char>(y, mask, first_column, keys);
    case Dtype::kFloat16: return add_mask_of<__half>(y, mask, first_column, keys);
    case Dtype::kBFloat16: return add_mask_of<__nv_bfloat16>(y, mask, first_column, keys);
    case Dtype::kFloat32: return add_mask_of<float>(y, mask, first_column, keys);
  }
}

// Integer scores -> floats in place. `end[r]` is the first column that row r may not attend; `first_column` is the
// thread's first: tile * 128 + 2t.
__device__ __forceinline__ void scores_as_floats(int (&s)[kTileScores], const float (&c)[2], int first_column,
                                                 const int (&end)[2]) {
#pragma unroll
  for (int j = 0; j < kTileScores / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + 8 * j + (i & 1);
      const float y = c[i / 2] * __int2float_rn(s[4 * j + i]);
      s[4 * j + i] = __float_as_int(column < end[i / 2] ? y : kNegativeInfinity);
    }
  }
}

}  // namespace sage3
