// Which tokens stand for all of a head when its mean is taken.
#pragma once

#include <cstdint>

namespace sage3 {

// A sample is enough: softmax does not see a constant vector taken from every k, and P (V - c) + c is exact for any c,
// as rows of P add up to one. What the mean is off by only costs range of the codes; 512 tokens miss it by 1/22 of a
// standard deviation.
constexpr int kSamples = 512;

// Token i of the sample: every Lk/512, moved on by a fraction of the step that differs from one to the next (i times
// the golden ratio), for a plain stride that divides an image's width would see a few of its columns.
__device__ __forceinline__ int sample_token(unsigned i, int tokens) {
  if (tokens <= kSamples) return i;
  const uint64_t position = (uint64_t(i) << 16) | (i * 40503u & 0xffffu);  // 16 bits of fraction
  return static_cast<int>(position * tokens / (uint64_t(kSamples) << 16));
}

}  // namespace sage3
