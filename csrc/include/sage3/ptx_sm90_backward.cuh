// The wgmma forms that only the backward pass uses; see ptx_sm90.cuh. Accumulators are 32-bit words: integers of the s8 form,
// the bits of floats of the others, so that one array serves both in turn.
#pragma once

#include <cuda_fp16.h>

#include "sage3/ptx_sm90.cuh"

namespace sage3::sm90 {

// Orders this thread's ordinary stores to shared memory before later reads by wgmma (after a barrier). FENCE.VIEW.ASYNC
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `threads` threads, number 1 to 15. BAR.SYNC
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// The same; then `count` is that of the threads of which `that` is so. BAR.RED.POPC
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_threads_count(bool that, int& count) {
  asm volatile("{\n .reg .pred p;\n setp.ne.s32 p, %1, 0;\n barrier.cta.red.popc.u32 %0, %2, %3, p;\n}"
               : "=r"(count)
               : "r"(static_cast<int>(that)), "n"(kNumber), "n"(kThreads)
               : "memory");
}

// Four 8x8 matrices of 16-bit numbers, transposed, to the rows that lanes 0-7, 8-15, 16-23 and 24-31 give. STSM.16.MT88.4
__device__ __forceinline__ void store_turned(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Adds fp16 numbers in shared memory to as many in global memory, in the background. A thread waits for its own additions: until
// all have been read, or until all are there. UBLKRED.G.S.ADD
__device__ __forceinline__ void add_to_global(__half* to, const __half* from, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%0], [%1], %2;\n cp.async.bulk.commit_group;" ::"l"(to),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void await_additions_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void await_additions() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Waits until `count` threads of any blocks have counted, and sees what they wrote before; counts.
__device__ __forceinline__ void await_count(const int* counter, int count) {
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(counter) : "memory");
  } while (done < count);
}
__device__ __forceinline__ void count_one(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Four floats as e4m3, nearest, at most 448, the first in the lowest byte; NaN stays NaN. F2FP.SATFINITE.E4M3
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t word;
  asm("{\n .reg .b16 low, high;\n cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      " mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

// Four e4m3 times a power of two, of 2^15 at most. By way of fp16, where no more is lost: it has e4m3's numbers and those that
// round to them.
__device__ __forceinline__ uint32_t scale_e4m3(uint32_t four, float by) {
  const __half2 factor = __float2half2_rn(by);
  uint32_t scaled;
  asm("{\n .reg .b16 low, high;\n .reg .b32 a, b;\n mov.b32 {low, high}, %1;\n cvt.rn.f16x2.e4m3x2 a, low;\n"
      " cvt.rn.f16x2.e4m3x2 b, high;\n mul.rn.f16x2 a, a, %2;\n mul.rn.f16x2 b, b, %2;\n"
      " cvt.rn.satfinite.e4m3x2.f16x2 low, a;\n cvt.rn.satfinite.e4m3x2.f16x2 high, b;\n mov.b32 %0, {low, high};\n}"
      : "=r"(scaled)
      : "r"(four), "r"(reinterpret_cast<const uint32_t&>(factor)));
  return scaled;
}

// What becomes of the accumulator's old value. kReplaced: it counts for nothing, but is an input all the same, so that the
// compiler takes the registers that hold it.
enum Old { kAdded, kReplaced };

#define SAGE3_IN_OUT(d, i) \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define SAGE3_D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define SAGE3_D24 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}"
#define SAGE3_D48                                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47}"
#define SAGE3_D64                                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SAGE3_D32                                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"

// D[64][64] (+)= A[64][32] B[64][32]^T, signed bytes in shared memory. IGMMA.64x64x32.S8.S8
template <Old kOld>
__device__ __forceinline__ void multiply_s8(int (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", %32, %33, 1;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", %32, %33, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  }
}

// D[64][N] += A[64][32] B[N][32]^T, e4m3, A in registers, fp32 sums. QGMMA.64xNx32.F32.E4M3.E4M3
__device__ __forceinline__ void multiply_e4m3(int (&d)[32], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 1, 1, 1;"
               : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_e4m3(int (&d)[48], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 " SAGE3_D48 ", {%48, %49, %50, %51}, %52, 1, 1, 1;"
               : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24), SAGE3_IN_OUT(d, 32), SAGE3_IN_OUT(d, 40)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_e4m3(int (&d)[64], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " SAGE3_D64 ", {%64, %65, %66, %67}, %68, 1, 1, 1;"
               : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24), SAGE3_IN_OUT(d, 32), SAGE3_IN_OUT(d, 40), SAGE3_IN_OUT(d, 48), SAGE3_IN_OUT(d, 56)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// D[64][N] (+)= A[64][32] B[N][32]^T, e4m3 in shared memory, fp32 sums. QGMMA.64xNx32.F32.E4M3.E4M3
#define SAGE3_E4M3(n, words, a, b, ...)                                                                                  \
  template <Old kOld>                                                                                                    \
  __device__ __forceinline__ void multiply_e4m3(int (&d)[n / 2], uint64_t left, uint64_t right) {                        \
    if constexpr (kOld == kAdded) {                                                                                      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 " words ", %" #a ", %" #b ", 1, 1, 1;"      \
                   : __VA_ARGS__ : "l"(left), "l"(right));                                                               \
    } else {                                                                                                             \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 " words ", %" #a ", %" #b ", 0, 1, 1;"      \
                   : __VA_ARGS__ : "l"(left), "l"(right));                                                               \
    }                                                                                                                    \
  }
SAGE3_E4M3(64, SAGE3_D32, 32, 33, SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24))
SAGE3_E4M3(48, SAGE3_D24, 24, 25, SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16))
SAGE3_E4M3(32, SAGE3_D16, 16, 17, SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8))
#undef SAGE3_E4M3

// D[64][N] (+)= A[64][16] B[N][16]^T, bf16 in shared memory, fp32 sums. HGMMA.64xNx16.F32.BF16
template <Old kOld>
__device__ __forceinline__ void multiply_bf16(int (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SAGE3_D32 ", %32, %33, 1, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SAGE3_D32 ", %32, %33, 0, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_bf16(int (&d)[24], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 " SAGE3_D24 ", %24, %25, 1, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 " SAGE3_D24 ", %24, %25, 0, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "l"(a), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_bf16(int (&d)[16], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SAGE3_D16 ", %16, %17, 1, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SAGE3_D16 ", %16, %17, 0, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8)
                 : "l"(a), "l"(b));
  }
}

#undef SAGE3_IN_OUT
#undef SAGE3_D16
#undef SAGE3_D24
#undef SAGE3_D32
#undef SAGE3_D48
#undef SAGE3_D64

}  // namespace sage3::sm90
