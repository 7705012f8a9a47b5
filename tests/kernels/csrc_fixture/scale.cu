// A kernel for every architecture, behind a plain C launcher.
#include <sage3/double.cuh>
__global__ void scale_kernel(float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = doubled(x[i]);
}
extern "C" int scale_launch(float* x, int n, cudaStream_t stream) {
  scale_kernel<<<(n + 127) / 128, 128, 0, stream>>>(x, n);
  return static_cast<int>(cudaGetLastError());
}
