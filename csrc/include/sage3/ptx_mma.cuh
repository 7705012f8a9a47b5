// Instructions of the kernels that run on every GPU from Turing on, one per function; the comment gives the SASS.
//
// PTX ISA: "mma.m16n8k32", "ldmatrix", "cp.async", "mbarrier". Turing (sm_75) has the 8-bit product as m8n8k16 only and
// neither asynchronous copies nor mbarriers: there copies are loads and stores, and kAsynchronous is false.
#pragma once

#include <cstdint>

namespace sage3::mma {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAsynchronous = false;
#else
constexpr bool kAsynchronous = true;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Special registers, read where it says so: what follows from them need not stay in registers between two uses.

// threadIdx.x % 32. S2R
__device__ __forceinline__ int lane() {
  int x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return x;
}

// blockIdx.x, y or z. S2R, S2UR
template <int kDim>
__device__ __forceinline__ int block_index() {
  int x;
  if constexpr (kDim == 0) asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  if constexpr (kDim == 1) asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(x));
  if constexpr (kDim == 2) asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(x));
  return x;
}

// ---- copies ----

// 16 bytes from global to shared memory, past L1. LDGSTS.E.BYPASS.128; sm_75: LDG.128, STS.128
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  if constexpr (kAsynchronous) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    const uint4 w = *static_cast<const uint4*>(from);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
  }
}

// A load that the compiler may not move out of a loop and keep in registers. LDG.128.CONSTANT
__device__ __forceinline__ uint4 load_again(const uint4* from) {
  uint4 w;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from));
  return w;
}

__device__ __forceinline__ float load_again(const float* from) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

// LDS
__device__ __forceinline__ float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

// Arrives at a barrier once all earlier copies of this thread are in. ARRIVES.LDGSTSBAR
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- mbarrier: a phase ends when `count` arrivals are in ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

// Returns when the phase of this parity has ended. SYNCS.PHASECHK
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- operands and products ----

// An integer of at most 2^22 either way -> float. I2FP; sm_75 and sm_80, whose I2F is a slow one: IADD3, FADD
__device__ __forceinline__ float small_int_to_float(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
  return __int_as_float(x + 0x4B400000) - 12582912.0f;
#else
  return __int2float_rn(x);
#endif
}

// Four 8 x 16-byte matrices, lane 8m + r giving the address of row r of matrix m; word m of a lane is bytes
// 4 * (lane % 4).. of row lane / 4 of matrix m. LDSM.16.M88.4
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}

// d (16 x 8, s32) = a (16 x 32, s8 or u8) * b (32 x 8, s8) + c. IMMA.16832; sm_75: four IMMA.8816
template <bool kUnsignedA>
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const int (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const auto half = [](int& d0, int& d1, uint32_t a, uint32_t b, int c0, int c1) {  // m8n8k16: 8 rows, 16 of k
    if constexpr (kUnsignedA) {
      asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
          : "=r"(d0), "=r"(d1) : "r"(a), "r"(b), "r"(c0), "r"(c1));
    } else {
      asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
          : "=r"(d0), "=r"(d1) : "r"(a), "r"(b), "r"(c0), "r"(c1));
    }
  };
  half(d[0], d[1], a[0], b0, c[0], c[1]);
  half(d[2], d[3], a[1], b0, c[2], c[3]);
  half(d[0], d[1], a[2], b1, d[0], d[1]);
  half(d[2], d[3], a[3], b1, d[2], d[3]);
#else
  if constexpr (kUnsignedA) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  }
#endif
}

}  // namespace sage3::mma
