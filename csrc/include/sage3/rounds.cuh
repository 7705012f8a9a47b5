// What persistent kernels share: a place in a ring of stages, and which job a block takes next.
#pragma once

#include <cstdint>

namespace sage3 {

// A place in a ring of stages, and the parity of its current round.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ int slot() const { return stage + (parity != 0 ? kStages : 0); }  // of a ring twice as long
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The job a block takes in its n-th round: to and fro, so that with causal's falling lengths no block is always first.
__device__ __forceinline__ int job_of_round(int round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

}  // namespace sage3
