// The launchers of the 4-bit attention; see launch.h.
#pragma once

#include "sage3/launch.h"
#include "sage3/nvfp4_format.cuh"

namespace sage3 {

struct Fp4Quantize {
  nvfp4::Shape shape;
  Tensor4 q, k, v;  // q (B, H, Lq, head_dim); k, v (B, Hkv, Lk, head_dim); one dtype, any strides, any alignment
  float scale;      // of the scores, natural units
  void* workspace;  // nvfp4::Workspace(shape).bytes, 256-byte aligned
  float* lse;       // null, or (B, H, Lq): receives scale * q . k_mean, which subtracting the mean took away
};

// Fills delta for the jobs first_job .. first_job + jobs.
struct Fp4Correct {
  nvfp4::Shape shape;
  Tensor4 k;  // as quantised
  float scale;
  void* workspace;  // as Fp4Quantize left it
  int64_t first_job, jobs;
  bool causal;  // the order of the jobs depends on it
};

struct Fp4Attend {
  nvfp4::Shape shape;
  const void* workspace;  // as Fp4Correct left it
  Tensor4 out;            // (B, H, Lq, head_dim); data is written; channels are dense (stride[3] == 1)
  float* lse;             // null, or (B, H, Lq): natural log-sum-exp; holds the mean's part already
  Tensor4 mask;           // (B, H, Lq, Lk), strides 0 where broadcast; bool (true = attend) or floating; data null: none
  const unsigned char* mask_tiles;  // with a mask: its tiles, classified (mask_tiles.cuh)
  bool causal;                      // query i attends keys 0..i
  float scale;
  int multiprocessors;
  int64_t first_job, jobs;  // delta holds these
};

// A warp's operands for one product, by lane, and floats to be converted; see nvfp4.cuh for their layouts.
struct Fp4Probe {
  const uint32_t *a, *b, *scale_a, *scale_b;  // 32 x 4, 2, 1, 1 words
  const float *c, *x;                         // 32 x 4; 8 words
  int words;
  float* products;  // [selector of A][of B][real, emulated][32][4]
  uint32_t* codes;  // [words][real, emulated]
};

// `run` with a head dim that the 4-bit kernels have as a constant: an instance for each.
template <class Run>
cudaError_t with_fp4_head_dim(int head_dim, Run run) {
  switch (nvfp4::padded_head_dim(head_dim)) {
    case 64: return run(std::integral_constant<int, 64>{});
    case 128: return run(std::integral_constant<int, 128>{});
    case 256: return run(std::integral_constant<int, 256>{});
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t fp4_probe(const Fp4Probe&, cudaStream_t);
cudaError_t fp4_quantize(const Fp4Quantize&, cudaStream_t);
cudaError_t fp4_correct(const Fp4Correct&, cudaStream_t);
cudaError_t fp4_attend_sm120(const Fp4Attend&, cudaStream_t);

}  // namespace sage3
