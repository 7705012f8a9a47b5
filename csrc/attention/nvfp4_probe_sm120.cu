// One warp, one product: the block-scaled instruction beside its emulation, on the same registers, for every pair of
// selectors; and the conversion to e2m1 beside its own. What "doctor --verify" asks a GPU that has them.

#include "sage3/launch_fp4.h"
#include "sage3/nvfp4.cuh"

namespace sage3 {
namespace {

template <int kSelectorA, int kSelectorB>
__device__ void both(const Fp4Probe& p, int lane) {
  const uint4 a = reinterpret_cast<const uint4*>(p.a)[lane];
  const uint2 b = reinterpret_cast<const uint2*>(p.b)[lane];
  const float4 c = reinterpret_cast<const float4*>(p.c)[lane];
  const uint32_t of_a[4] = {a.x, a.y, a.z, a.w}, of_b[2] = {b.x, b.y};
  const float from[4] = {c.x, c.y, c.z, c.w};
  float real[4], emulated[4];
  nvfp4::mma<kSelectorA, kSelectorB>(real, of_a, of_b, from, p.scale_a[lane], p.scale_b[lane]);
  nvfp4::mma_emulated(emulated, of_a, of_b, from, p.scale_a[lane], kSelectorA, p.scale_b[lane], kSelectorB, lane,
                      [](uint32_t word, int from_lane) { return __shfl_sync(0xffffffffu, word, from_lane); });
  float4* const to = reinterpret_cast<float4*>(p.products) + 2 * 32 * (4 * kSelectorA + kSelectorB) + lane;
  to[0] = make_float4(real[0], real[1], real[2], real[3]);
  to[32] = make_float4(emulated[0], emulated[1], emulated[2], emulated[3]);
}

__global__ void probe(const __grid_constant__ Fp4Probe p) {
  const int lane = threadIdx.x;
  both<0, 0>(p, lane), both<0, 1>(p, lane), both<0, 2>(p, lane), both<0, 3>(p, lane);
  both<1, 0>(p, lane), both<1, 1>(p, lane), both<1, 2>(p, lane), both<1, 3>(p, lane);
  for (int i = lane; i < p.words; i += 32) {
    float x[8];
    for (int j = 0; j < 8; ++j) x[j] = p.x[8 * i + j];
    p.codes[2 * i] = nvfp4::pack_e2m1(x);
    uint32_t word = 0;
    for (int j = 0; j < 8; ++j) word |= nvfp4::encode_e2m1(x[j]) << 4 * j;
    p.codes[2 * i + 1] = word;
  }
}

}  // namespace

cudaError_t fp4_probe(const Fp4Probe& call, cudaStream_t stream) {
  probe<<<1, 32, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace sage3
