// The backward kernels' own sources on a CPU, for ctypes. SAGE3_PREPARE and SAGE3_GRAD name them, as emulated.py has translated
// them.
#include SAGE3_PREPARE
#include SAGE3_GRAD

#include "host.h"

using namespace sage3;

#pragma GCC visibility push(default)
extern "C" {

int64_t workspace_bytes(const int8::Shape* shape) { return int8::GradWorkspace(*shape).bytes; }

int save_output(const Int8SaveOutput* call) { return int8_save_output(*call, nullptr); }

int backward(const Int8Backward* call, char* message) {
  return launched(message, [&] {
    if (int8_backward_prepare(*call, nullptr) != cudaSuccess) return 1;
    if (int8_backward_multiply_sm90(*call, nullptr) != cudaSuccess) return 2;
    return int8_backward_finish(*call, nullptr) == cudaSuccess ? 0 : 3;
  });
}
}
#pragma GCC visibility pop
