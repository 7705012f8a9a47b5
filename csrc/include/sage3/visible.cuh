// Who may attend whom, judged by token: the end of the sequence, causality, and the mask's own elements.
//
// Only tiles that need it come here. Scores become floats (base 2 exponents), hidden ones -inf, in place: the array
// stays int and holds the floats' bits. Fragment as in softmax.cuh.
#pragma once

#include "sage3/softmax.cuh"

namespace sage3 {

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

// Adds the elements of a mask to the first kPart scores; `at` moves on.
template <class T, int kPart, int kCount>
__device__ __forceinline__ void add_mask_part(int (&y)[kCount], const char* (&at)[2], int64_t stride, int columns) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const bool there = 8 * (i / 4) + i % 2 < columns;
    const float bias = there ? mask_bias<T>(at[i / 2 % 2] + i % 2 * stride) : kNegativeInfinity;
    float& value = reinterpret_cast<float&>(y[i]);
    value = bias == kNegativeInfinity ? bias : value + bias;
    if (i % 4 == 3) at[0] += 8 * stride, at[1] += 8 * stride;
  }
}

// Adds a mask to scores that are floats already, -inf hides whatever the score is: rows `row` and row + 8 (past the end:
// the last one, whose result is not stored), columns from `column` on. Part after part in a loop that turns the scores'
// registers on: addresses and elements of all of them at once are more than fit.
template <int kCount>
__device__ __forceinline__ void add_mask(int (&y)[kCount], const Int8Attend& call, int batch, int head, int row, int column) {
  constexpr int kPart = 4;
  const Tensor4& mask = call.mask;
  const int size = opaque(mask.dtype == Dtype::kBool ? 1 : mask.dtype == Dtype::kFloat32 ? 4 : 2);
  const int64_t stride = size * mask.stride[3];
  const char* at[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t query = min(row + 8 * r, call.shape.queries - 1);
    const int64_t element = batch * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2];
    at[r] = static_cast<const char*>(mask.data) + size * element + column * stride;
  }
  int columns = call.shape.keys - column;
#pragma unroll 1
  for (int part = 0; part < kCount / kPart; ++part, columns -= 2 * kPart) {
    switch (mask.dtype) {
      case Dtype::kBool: add_mask_part<unsigned char, kPart>(y, at, stride, columns); break;
      case Dtype::kFloat16: add_mask_part<__half, kPart>(y, at, stride, columns); break;
      case Dtype::kBFloat16: add_mask_part<__nv_bfloat16, kPart>(y, at, stride, columns); break;
      case Dtype::kFloat32: add_mask_part<float, kPart>(y, at, stride, columns); break;
    }
    int done[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) done[i] = y[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = i < kCount - kPart ? y[i + kPart] : done[i + kPart - kCount];
  }
}

// Integer scores -> floats in place; hidden from the column `visible[r]` after the thread's first on.
__device__ __forceinline__ void scores_as_floats(int (&s)[kTileScores], const float (&c)[2], const int (&visible)[2]) {
#pragma unroll
  for (int i = 0; i < kTileScores; ++i) {
    const float y = c[i / 2 % 2] * __int2float_rn(s[i]);
    s[i] = __float_as_int(8 * (i / 4) + i % 2 < visible[i / 2 % 2] ? y : kNegativeInfinity);
  }
}

}  // namespace sage3
