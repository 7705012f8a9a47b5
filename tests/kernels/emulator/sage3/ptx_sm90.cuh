// csrc/include/sage3/ptx_sm90.cuh by machine.h; the descriptor is the original's.
#pragma once

#include "machine.h"

namespace sage3::sm90 {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::block->shared) + 1024;
}
inline void barrier_init(uint64_t* b, uint32_t count) {
  emulator::block->barrier[b].count = emulator::block->barrier[b].pending = static_cast<int>(count);
}
inline void fence_barrier_init() {}
inline void barrier_arrive(uint64_t* b) {
  emulator::Barrier& barrier = emulator::barrier_at(b);
  if (--barrier.pending < 0) emulator::fail("too many arrivals at an mbarrier");
  barrier.check();
}
inline void barrier_expect(uint64_t* b, uint32_t bytes) {
  emulator::barrier_at(b).bytes += bytes;
  barrier_arrive(b);
}
inline void barrier_wait(uint64_t* b, uint32_t parity) {
  const unsigned& phase = emulator::barrier_at(b).phase;
  while ((phase & 1) == parity) emulator::wait_while(phase, phase);
}
inline void barrier_await(uint64_t* b, uint32_t parity) { barrier_wait(b, parity); }
inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* b) {
  emulator::copy(to, from, bytes, emulator::barrier_at(b));
}
template <int>
void register_budget_up() {}
template <int>
void register_budget_down() {}
inline void wgmma_begin() {}
inline void wgmma_commit() { emulator::commit(); }
template <int kPending>
void wgmma_wait() { emulator::wait(kPending); }
template <class T>
void pin(T&) {}

inline uint64_t operand(const void* tile, int row_bytes) {
  const uint64_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  const uint64_t group = 8 * row_bytes / 16;
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(1) << 16 | group << 32 | mode << 62;
}
inline uint64_t operand_at(uint32_t sixteens, int row_bytes) {
  const uint32_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return uint64_t(mode << 30 | 8 * row_bytes / 16) << 32 | (sixteens + (1u << 16));
}

template <bool kAdd, int kCount>
void wgmma_s8(int (&d)[kCount], const uint32_t* a, uint64_t b) {
  emulator::issue(emulator::kS8, a, 0, b, kAdd, d, 2 * kCount);
}
template <bool kAdd, int kCount>
void wgmma_u8(int (&d)[kCount], const uint32_t* a, uint64_t b) {
  emulator::issue(emulator::kU8, a, 0, b, kAdd, d, 2 * kCount);
}

}  // namespace sage3::sm90
