// The host's side of csrc/include/sage3/nvfp4.cuh, for ctypes.
#include "sage3/nvfp4.cuh"

using namespace sage3::nvfp4;

// What a lane holds. Lanes lie side by side: another lane's word is as many structs away as the lanes are apart.
struct Lane {
  uint32_t a[4], b[2], scale_a, scale_b;
};

extern "C" {

void encode(const float* x, int n, unsigned char* codes) {
  for (int i = 0; i < n; ++i) codes[i] = static_cast<unsigned char>(encode_e2m1(x[i]));
}

void decode_scales(const unsigned char* codes, int n, float* values) {
  for (int i = 0; i < n; ++i) values[i] = decode_ue4m3(codes[i]);
}

void mma(const Lane* lanes, int selector_a, int selector_b, const float (*c)[4], float (*d)[4]) {
  for (int lane = 0; lane < 32; ++lane) {
    const Lane& mine = lanes[lane];
    mma_emulated(d[lane], mine.a, mine.b, c[lane], mine.scale_a, selector_a, mine.scale_b, selector_b, lane,
                 [lane](const uint32_t& word, int from) {
                   return (&word)[(from - lane) * static_cast<int>(sizeof(Lane) / sizeof(uint32_t))];
                 });
  }
}
}
