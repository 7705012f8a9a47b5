// A header of the fixture: what the two kernels share.
#pragma once
#include <cuda_runtime.h>
__device__ __forceinline__ float doubled(float x) { return 2.0f * x; }
