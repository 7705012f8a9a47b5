// The backward kernels' own sources on a CPU, for ctypes. SAGE3_PREPARE and SAGE3_GRAD name them, after two replacements that
// test_backward_kernels.py makes: kernel<<<...>>>(...) becomes emulator::run, dynamic shared memory the emulator's.
#include SAGE3_PREPARE
#include SAGE3_GRAD

using namespace sage3;

extern "C" {

int64_t saved_bytes(const int8::Shape* shape) { return int8::Workspace(*shape).bytes; }
int64_t workspace_bytes(const int8::Shape* shape) { return int8::GradWorkspace(*shape).bytes; }

// Where int8::Workspace's parts begin: q8, q_scale, k8, k_scale, v8, v_scale, v_mean, v_norm.
void saved_parts(const int8::Shape* shape, int64_t* at) {
  const int8::Workspace w(*shape);
  const int64_t parts[] = {w.q8, w.q_scale, w.k8, w.k_scale, w.v8, w.v_scale, w.v_mean, w.v_norm};
  for (int i = 0; i < 8; ++i) at[i] = parts[i];
}

// The byte of a tile that holds (token, channel): of q8 (64 x d), k8 and v8 (128 x d).
void saved_offsets(int d, int32_t* q, int32_t* k, int32_t* v) {
  for (int token = 0; token < 128; ++token) {
    for (int channel = 0; channel < d; ++channel) {
      if (token < 64) q[token * d + channel] = int8::query_offset(token, channel, d);
      k[token * d + channel] = int8::key_offset(token, channel, d);
      v[token * d + channel] = int8::value_offset(token, channel);
    }
  }
}

int save_output(const Int8SaveOutput* call) { return int8_save_output(*call, nullptr); }

int backward(const Int8Backward* call) {
  if (int8_backward_prepare(*call, nullptr) != cudaSuccess) return 1;
  if (int8_backward_multiply_sm90(*call, nullptr) != cudaSuccess) return 2;
  return int8_backward_finish(*call, nullptr) == cudaSuccess ? 0 : 3;
}
}
