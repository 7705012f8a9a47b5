// A kernel that the table of sources gives to sm_90a alone.
#include <sage3/double.cuh>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
#error "compiled for an architecture it is not for"
#endif
__global__ void only_kernel(float* x) { x[threadIdx.x] = doubled(x[threadIdx.x]); }
extern "C" int only_launch(float* x, cudaStream_t stream) {
  only_kernel<<<1, 32, 0, stream>>>(x);
  return static_cast<int>(cudaGetLastError());
}
