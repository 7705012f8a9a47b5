// Which tiles of a mask need to be looked at: one byte for every 64 queries x 128 keys.
//
// Masks that video and image models pass are mostly "every token of this sample is valid": such tiles run at the speed
// of no mask at all, and tiles in which nobody may attend are skipped. Axes over which the mask is broadcast
// (stride 0) are not repeated here either.
#pragma once

#include "sage3/launch.h"

namespace sage3 {

enum MaskTile : unsigned char {
  kMaskNone = 0,   // nobody attends: skip the tile
  kMaskAll = 1,    // everybody attends and nothing is added: no mask needed
  kMaskMixed = 2,  // look at the mask's elements
};

// Where the byte of a tile lies. Rows past Lq and columns past Lk have no say in a tile's byte.
struct MaskTileIndex {
  int64_t batch_stride, head_stride, row_stride, bytes;

  SAGE3_HD MaskTileIndex(const int8::Shape& shape, const Tensor4& mask) {
    const int64_t columns = shape.key_tiles();
    const int64_t rows = mask.stride[2] == 0 ? 1 : shape.query_tiles();
    const int64_t heads = mask.stride[1] == 0 ? 1 : shape.heads;
    const int64_t batch = mask.stride[0] == 0 ? 1 : shape.batch;
    row_stride = mask.stride[2] == 0 ? 0 : columns;
    head_stride = mask.stride[1] == 0 ? 0 : rows * columns;
    batch_stride = mask.stride[0] == 0 ? 0 : heads * rows * columns;
    bytes = batch * heads * rows * columns;
  }

  SAGE3_HD int64_t operator()(int batch, int head, int64_t query_tile) const {
    return batch * batch_stride + head * head_stride + query_tile * row_stride;
  }
};

// Fills `tiles`, MaskTileIndex(shape, mask).bytes, which the attention kernels read.
cudaError_t classify_mask(const int8::Shape& shape, const Tensor4& mask, unsigned char* tiles, cudaStream_t stream);

}  // namespace sage3
