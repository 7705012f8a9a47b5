// csrc/include/sage3/nvfp4_format.cuh for ctypes: where everything lies, as tables.
#include "sage3/nvfp4_format.cuh"

using namespace sage3::nvfp4;

extern "C" {

// [128 tokens][d channels]
void codes(int d, int* query, int* key, int* value) {
  for (int i = 0; i < kTile * d; ++i) {
    const int token = i / d, channel = i % d;
    query[i] = query_code(token, channel, d), key[i] = key_code(token, channel, d), value[i] = value_code(token, channel);
  }
}

// query, key [128 tokens][d / 16], value [8][d channels]
void scales(int d, int* query, int* key, int* value) {
  for (int i = 0; i < kTile * d / kBlock; ++i) {
    const int blocks = d / kBlock;
    query[i] = query_scale(i / blocks, i % blocks, d), key[i] = key_scale(i / blocks, i % blocks);
    value[i] = value_scale(i % d, i / d, d);
  }
}

void tokens(int* column, int* token, int* delta) {
  for (int i = 0; i < kTile; ++i) column[i] = column_of_token(i), token[i] = token_of_column(i), delta[i] = delta_offset(i);
}

void sizes(int d, int* bytes) {
  const int all[] = {code_bytes(d), query_record(d), key_record(d), value_record(d), kDeltaFloats};
  for (int i = 0; i < 5; ++i) bytes[i] = all[i];
}

// Head and tile of every job.
void jobs(int query_tiles, int heads, bool causal, int* made) {
  for (int i = 0; i < query_tiles * heads; ++i) {
    const Job job(i, query_tiles, heads, causal);
    made[2 * i] = static_cast<int>(job.head), made[2 * i + 1] = job.tile;
  }
}

// Begins of the parts, the end, and the jobs of a chunk.
void workspace(const Shape& shape, int64_t* made) {
  const Workspace w(shape);
  const int64_t all[] = {w.queries, w.keys, w.values, w.q_mean, w.k_mean, w.v_mean, w.v_level, w.delta, w.bytes, w.chunk};
  for (int i = 0; i < 10; ++i) made[i] = all[i];
}
}
