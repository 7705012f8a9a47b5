// csrc/include/sage3/ptx_sm90_backward.cuh by machine.h.
#pragma once

#include "machine.h"
#include "sage3/ptx_sm90.cuh"

namespace sage3::sm90 {

inline void fence_shared() {}
template <int kNumber, int kThreads>
void sync_threads() { emulator::pass(emulator::block->named[kNumber], kThreads); }
template <int kNumber, int kThreads>
void sync_threads_count(bool that, int& count) {
  emulator::Gate& gate = emulator::block->named[kNumber];
  gate.count += that;
  emulator::pass(gate, kThreads, [&] { gate.counted = gate.count, gate.count = 0; });
  count = gate.counted;
}

// Thread 4 g + t of a warp holds element g of rows 2 t and 2 t + 1 of each matrix (as they are stored).
inline void store_turned(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  struct Lane {
    void* row;
    uint32_t word[4];
  };
  Lane all[32];
  emulator::exchange(Lane{row, {a, b, c, d}}, all);
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < 32; ++i) {
      if (reinterpret_cast<uintptr_t>(all[i].row) % 16) emulator::fail("a row of stmatrix that is not aligned");
    }
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) {
          const uint16_t number = all[lane].word[matrix] >> (16 * i);
          std::memcpy(static_cast<unsigned char*>(all[8 * matrix + lane % 4 * 2 + i].row) + lane / 4 * 2, &number, 2);
        }
      }
    }
  }
  __syncwarp();
}

inline void add_to_global(__half* to, const __half* from, uint32_t bytes) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    emulator::fail("an addition in the background that is not aligned");
  }
  emulator::block->additions[threadIdx.x].push_back({reinterpret_cast<_Float16*>(to), reinterpret_cast<const _Float16*>(from), {}, bytes / 2});
}
inline void await_additions_read() { emulator::read(emulator::block->additions[threadIdx.x]); }
inline void await_additions() {
  await_additions_read();
  emulator::add(emulator::block->additions[threadIdx.x]);
}
inline void await_count(const int* counter, int count) {
  while (*counter < count) emulator::wait_while(reinterpret_cast<const unsigned&>(*counter), *counter);
}
inline void count_one(int* counter) {
  if (!emulator::block->additions[threadIdx.x].empty()) emulator::fail("additions are counted before they are there");
  ++*counter;
}

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  using emulator::to_e4m3;
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | uint32_t(to_e4m3(d)) << 24;
}

inline uint32_t scale_e4m3(uint32_t four, float by) {
  const auto x = [=](int i) { return emulator::from_e4m3(four >> 8 * i & 0xff) * by; };
  return pack_e4m3(x(0), x(1), x(2), x(3));
}

enum Old { kAdded, kReplaced };

template <Old kOld, int kCount>
void multiply_s8(int (&d)[kCount], uint64_t a, uint64_t b) {
  emulator::issue(emulator::kS8, nullptr, a, b, kOld == kAdded, d, 2 * kCount);
}
template <int kCount>
void multiply_e4m3(int (&d)[kCount], const uint32_t* a, uint64_t b) {
  emulator::issue(emulator::kE4m3, a, 0, b, true, d, 2 * kCount);
}
template <Old kOld, int kCount>
void multiply_e4m3(int (&d)[kCount], uint64_t a, uint64_t b) {
  emulator::issue(emulator::kE4m3, nullptr, a, b, kOld == kAdded, d, 2 * kCount);
}
template <Old kOld, int kCount>
void multiply_bf16(int (&d)[kCount], uint64_t a, uint64_t b) {
  emulator::issue(emulator::kBf16, nullptr, a, b, kOld == kAdded, d, 2 * kCount);
}

}  // namespace sage3::sm90
