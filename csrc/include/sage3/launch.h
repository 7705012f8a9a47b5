// The launchers: plain functions that binding.cpp calls, each defined in the .cu of its name. No torch here.
// Each returns the launch's error; nothing is synchronised.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "sage3/int8_format.cuh"

namespace sage3 {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32, kBool };

// A tensor of four dims (batch, head, token, channel) anywhere in memory. Strides are in elements, 0 where expanded.
struct Tensor4 {
  const void* data;
  int64_t stride[4];
  Dtype dtype;
};

struct Int8Quantize {
  int8::Shape shape;
  Tensor4 q, k, v;   // q (B, H, Lq, head_dim); k, v (B, Hkv, Lk, head_dim); one dtype, any strides, any alignment
  float scale;       // of the scores, natural units: softmax(scale * q k^T)
  void* workspace;   // int8::Workspace(shape).bytes, 256-byte aligned
  float* lse;        // null, or (B, H, Lq): receives scale * q . k_mean, which subtracting the mean took away
};

struct Int8Attend {
  int8::Shape shape;
  const void* workspace;  // as Int8Quantize left it
  Tensor4 out;            // (B, H, Lq, head_dim); data is written; channels are dense (stride[3] == 1)
  float* lse;             // null, or (B, H, Lq): natural log-sum-exp; holds the mean's part already
  Tensor4 mask;           // (B, H, Lq, Lk), strides 0 where broadcast; bool (true = attend) or floating; data null: none
  const unsigned char* mask_tiles;  // with a mask: its tiles, classified (mask_tiles.cuh)
  bool causal;            // query i attends keys 0..i
  bool fast;              // exponentials within 6 % in place of exact ones; sm90 only
  int multiprocessors;
  int* next_job = nullptr;  // or 0, where jobs differ in length: counts those that multiprocessors have taken; sm90 only
  float* peak = nullptr;  // or (B, H, Lq): receives a row's largest weight, or down to 2^-kNearLazy of it; sm90, not fast
};

// `run` with a head dim that kernels have (Shape::d()) as a constant: an instance for each.
template <class Run>
cudaError_t with_head_dim(int d, Run run) {
  switch (d) {
    case 64: return run(std::integral_constant<int, 64>{});
    case 96: return run(std::integral_constant<int, 96>{});
    case 128: return run(std::integral_constant<int, 128>{});
    case 256: return run(std::integral_constant<int, 256>{});
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t int8_quantize(const Int8Quantize&, cudaStream_t);
cudaError_t int8_attend_sm90(const Int8Attend&, cudaStream_t);
cudaError_t int8_attend_mma(const Int8Attend&, cudaStream_t);

}  // namespace sage3
