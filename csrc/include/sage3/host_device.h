// Functions that are the same on the host, where tests call them, and on the GPU.
#pragma once

#ifdef __CUDACC__
#define SAGE3_HD __host__ __device__ __forceinline__
#else
#define SAGE3_HD inline
#endif
