// The operators of the fixture: one that needs no GPU, and which kernels are in the build.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

extern "C" int scale_launch(float*, int, struct CUstream_st*);
#ifdef SAGE3_HAS_ONLY_SM90
extern "C" int only_launch(float*, struct CUstream_st*);
#endif

static at::Tensor twice(const at::Tensor& x) { return x.add(x); }

static int64_t parts(bool launch) {
  if (launch) scale_launch(nullptr, 0, nullptr);
#ifdef SAGE3_HAS_ONLY_SM90
  if (launch) only_launch(nullptr, nullptr);
  return 2;
#else
  return 1;
#endif
}

#define SAGE3_LIBRARY(name, m) TORCH_LIBRARY(name, m)
SAGE3_LIBRARY(SAGE3_NAMESPACE, m) {
  m.def("twice(Tensor x) -> Tensor", &twice);
  m.def("parts(bool launch) -> int", &parts);
}
