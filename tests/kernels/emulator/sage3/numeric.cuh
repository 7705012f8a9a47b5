// csrc/include/sage3/numeric.cuh without instructions.
#pragma once

#include "machine.h"

namespace sage3 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // NaN is not below
}
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
inline int round_to_int(float x) { return x != x ? 0 : static_cast<int>(std::nearbyint(std::fmin(std::fmax(x, -2e9f), 2e9f))); }
inline uint32_t pack_u8(float a, float b, float c, float d) {
  const auto code = [](float x) { return static_cast<uint32_t>(std::min(std::max(round_to_int(x), 0), 255)); };
  return code(a) | code(b) << 8 | code(c) << 16 | code(d) << 24;
}
inline uint32_t pack_s8(float a, float b, float c, float d) {
  const auto code = [](float x) { return static_cast<uint32_t>(std::min(std::max(round_to_int(x), -128), 127)) & 0xff; };
  return code(a) | code(b) << 8 | code(c) << 16 | code(d) << 24;
}
inline uint32_t add_bytes(uint32_t word, uint32_t sum) { return __dp4a(word, 0x01010101u, sum); }
inline int square_bytes(uint32_t word, int sum) { return __dp4a(int(word), int(word), sum); }
inline int opaque(int x) { return x; }
inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }
inline int max3(int a, int b, int c) { return std::max(std::max(a, b), c); }
inline uint32_t max3_pair(uint32_t a, uint32_t b, uint32_t c) {
  const auto most = [&](uint32_t mask) { return std::max({a & mask, b & mask, c & mask}); };
  return most(0xffff0000u) | most(0xffffu);
}
inline uint4 load_or_zero(const void* from, bool there) { return there ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0}; }

}  // namespace sage3
