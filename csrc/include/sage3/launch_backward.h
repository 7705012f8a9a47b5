// The launchers of the backward pass; see launch.h.
#pragma once

#include "sage3/backward_format.cuh"
#include "sage3/launch.h"

namespace sage3 {

// The output in 8 bits, which is all of it that the backward pass needs: out8 * out_scale = out, a scale a token.
struct Int8SaveOutput {
  int8::Shape shape;
  Tensor4 out;       // (B, H, Lq, head_dim)
  signed char* out8; // contiguous (B, H, Lq, head_dim)
  float* out_scale;  // (B, H, Lq)
};

struct Int8Backward {
  int8::Shape shape;
  const void* saved;         // int8::Workspace(shape), as Int8Quantize left it
  const signed char* out8;   // Int8SaveOutput's
  const float* out_scale;
  const float* lse;          // (B, H, Lq): natural, of the smoothed scores
  const float* peak;         // (B, H, Lq): a row's largest weight, or down to a quarter of it
  Tensor4 dout;              // (B, H, Lq, head_dim), any strides
  Tensor4 dq, dk, dv;        // written; channels are dense (stride[3] == 1)
  float scale;               // of the scores
  void* workspace;           // int8::GradWorkspace(shape).bytes, 1024-byte aligned
  bool causal;
  bool deterministic;        // dQ added up in a fixed order
  Tensor4 mask;              // as Int8Attend's; it gets no gradient
  const unsigned char* mask_tiles;
  const float* dlse;         // null, or (B, H, Lq): the gradient of the LSE, of which dQ lacks the part that K's mean has
};

cudaError_t int8_save_output(const Int8SaveOutput&, cudaStream_t);
cudaError_t int8_backward_prepare(const Int8Backward&, cudaStream_t);    // -> the workspace's blocks, gains and levels; zeroes its sums
cudaError_t int8_backward_multiply_sm90(const Int8Backward&, cudaStream_t);  // -> dk, dv, the workspace's sums
cudaError_t int8_backward_finish(const Int8Backward&, cudaStream_t);     // -> dq

// Head dims that the backward kernels compute with.
template <class Run>
cudaError_t with_grad_head_dim(int d, Run run) {
  switch (d) {
    case 64: return run(std::integral_constant<int, 64>{});
    case 96: return run(std::integral_constant<int, 96>{});
    case 128: return run(std::integral_constant<int, 128>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sage3
