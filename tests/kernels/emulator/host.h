// What the hosts of the kernels have in common: settings of machine.h, and where 8-bit operands lie. For ctypes.
#pragma once

#include <cstdio>
#include <exception>

#include "machine.h"
#include "sage3/int8_format.cuh"

// `launch`'s error; 100 where the emulator has stopped, and why in `message`, of 200 bytes.
template <class Launch>
int launched(char* message, Launch launch) {
  try {
    return launch();
  } catch (const std::exception& error) {
    std::snprintf(message, 200, "%s", error.what());
    return 100;
  }
}

#pragma GCC visibility push(default)  // all else is a library's own, of which a process may have several
extern "C" {

using namespace sage3;

void set_up(unsigned at_once, uint32_t seed, int omitted) {
  emulator::at_once = at_once, emulator::seed = seed, emulator::omitted = omitted;
}

int64_t saved_bytes(const int8::Shape* shape) { return int8::Workspace(*shape).bytes; }

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
}
#pragma GCC visibility pop
