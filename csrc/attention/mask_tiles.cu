// Classification of a mask's tiles: (B, H, Lq, Lk) of bool, fp16, bf16 or fp32 -> one byte for every 64 queries x 128
// keys (mask_tiles.cuh). FlexAttention's block mask, found by looking instead of by tracing.
//
// One block per distinct tile; its eight warps take eight rows each, which are all under way at once. A lane looks at
// four keys of a row: one load where the mask allows it, so that a warp reads 128 to 512 bytes side by side.

#include <climits>

#include "sage3/launch.h"
#include "sage3/mask_tiles.cuh"

namespace sage3 {
namespace {

using int8::kKeyTile;
using int8::kQueryTile;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = kQueryTile / kWarps;  // of a warp
constexpr int kKeys = kKeyTile / 32;        // of a lane and row

// What a floating mask looks like on its bits, in every element of a word: what is +-0 without its sign is open, and the
// infinity below zero is closed. A bool is open where it is not 0, and closed where it is.
struct Pattern {
  uint32_t magnitude, closed;
};

inline Pattern pattern_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16: return {0x7fff7fffu, 0xfc00fc00u};
    case Dtype::kBFloat16: return {0x7fff7fffu, 0xff80ff80u};
    case Dtype::kFloat32: return {0x7fffffffu, 0xff800000u};
    default: return {0, 0};
  }
}

struct Params {
  int8::Shape shape;
  Tensor4 mask;
  Pattern pattern;
  unsigned char* tiles;
};

// Not zero if an element of the word is not open.
template <class Bits>
__device__ __forceinline__ uint32_t not_open(uint32_t word, const Pattern& pattern) {
  if constexpr (sizeof(Bits) == 1) {
    return (word - 0x01010101u) & ~word & 0x80808080u;  // is there a zero byte?
  } else {
    return word & pattern.magnitude;
  }
}

// Four elements of a row, packed.
template <class Bits>
struct alignas(4 * sizeof(Bits)) Four {
  static constexpr int kWords = sizeof(Bits);
  uint32_t word[kWords];

  __device__ __forceinline__ void set(int i, Bits x) {
    constexpr int kBits = 8 * sizeof(Bits);
    word[i * kBits / 32] |= uint32_t(x) << (i * kBits % 32);
  }
};

template <class Bits, bool kDense>
__global__ void __launch_bounds__(kThreads) classify_tiles(const __grid_constant__ Params p) {
  const unsigned columns = p.shape.key_tiles();
  const unsigned rows = p.mask.stride[2] == 0 ? 1 : p.shape.query_tiles();
  const unsigned heads = p.mask.stride[1] == 0 ? 1 : p.shape.heads;
  const unsigned row_of_tiles = blockIdx.x / columns, column = blockIdx.x - row_of_tiles * columns;
  const unsigned bh = row_of_tiles / rows, row = row_of_tiles - bh * rows;
  const unsigned batch = bh / heads, head = bh - batch * heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int queries = p.mask.stride[2] == 0 ? 1 : min(kQueryTile, p.shape.queries - int(row) * kQueryTile);
  const int keys = min(kKeyTile, p.shape.keys - int(column) * kKeyTile);
  const Bits* const tile = static_cast<const Bits*>(p.mask.data) + batch * p.mask.stride[0] + head * p.mask.stride[1] +
                           int64_t(row) * kQueryTile * p.mask.stride[2] + int64_t(column) * kKeyTile * p.mask.stride[3];

  // A lane without an element repeats one that the tile has: the first key or the last query.
  Four<Bits> x[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Bits* const from = tile + min(warp + i * kWarps, queries - 1) * p.mask.stride[2];
    if (kDense && keys == kKeyTile) {
      x[i] = reinterpret_cast<const Four<Bits>*>(from)[lane];
    } else {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int key = lane + 32 * j;
        x[i].set(j, from[(key < keys ? key : 0) * p.mask.stride[3]]);
      }
    }
  }
  uint32_t some_not_open = 0, some_not_closed = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Four<Bits>::kWords; ++j) {
      some_not_open |= not_open<Bits>(x[i].word[j], p.pattern);
      some_not_closed |= x[i].word[j] ^ p.pattern.closed;
    }
  }
  const bool all = __syncthreads_and(some_not_open == 0), none = __syncthreads_and(some_not_closed == 0);
  if (threadIdx.x == 0) p.tiles[blockIdx.x] = all ? kMaskAll : none ? kMaskNone : kMaskMixed;
}

template <class Bits>
cudaError_t launch(const int8::Shape& shape, const Tensor4& mask, unsigned char* to, cudaStream_t stream) {
  const int64_t tiles = MaskTileIndex(shape, mask).bytes;
  if (tiles > INT_MAX) return cudaErrorInvalidValue;  // blocks of a grid
  bool dense = mask.stride[3] == 1 && reinterpret_cast<uintptr_t>(mask.data) % sizeof(Four<Bits>) == 0;
  for (int i = 0; i < 3; ++i) dense = dense && mask.stride[i] % kKeys == 0;
  const auto kernel = dense ? classify_tiles<Bits, true> : classify_tiles<Bits, false>;
  const Params params{shape, mask, pattern_of(mask.dtype), to};
  kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t classify_mask(const int8::Shape& shape, const Tensor4& mask, unsigned char* tiles, cudaStream_t stream) {
  switch (mask.dtype) {
    case Dtype::kBool: return launch<uint8_t>(shape, mask, tiles, stream);
    case Dtype::kFloat16:
    case Dtype::kBFloat16: return launch<uint16_t>(shape, mask, tiles, stream);
    case Dtype::kFloat32: return launch<uint32_t>(shape, mask, tiles, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sage3
