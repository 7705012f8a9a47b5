// The wgmma forms that only the backward pass uses; see ptx_sm90.cuh. Accumulators are 32-bit words: integers of the 8-bit
// forms, the bits of floats of the bf16 forms, so that one array serves both in turn.
#pragma once

#include "sage3/ptx_sm90.cuh"

namespace sage3::sm90 {

// Orders this thread's ordinary stores to shared memory before later reads by wgmma (after a barrier). FENCE.VIEW.ASYNC
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `threads` threads, number 1 to 15. BAR.SYNC
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// Four 8x8 matrices of 16-bit numbers, transposed, to the rows that lanes 0-7, 8-15, 16-23 and 24-31 give. STSM.16.MT88.4
__device__ __forceinline__ void store_turned(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Adds four floats to global memory. RED.E.ADD.F32x4
__device__ __forceinline__ void add_to_global(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

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

// What becomes of the accumulator's old value. kReplaced: it counts for nothing, but is an input all the same, so that the
// compiler takes the registers that hold it; for a mere output, kIgnored, it may take others.
enum Old { kAdded, kReplaced, kIgnored };

#define SAGE3_IN_OUT(d, i) \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define SAGE3_OUT(d, i) \
  "=r"(d[i]), "=r"(d[i + 1]), "=r"(d[i + 2]), "=r"(d[i + 3]), "=r"(d[i + 4]), "=r"(d[i + 5]), "=r"(d[i + 6]), "=r"(d[i + 7])
#define SAGE3_D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define SAGE3_D24 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}"
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
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", %32, %33, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", %32, %33, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16), SAGE3_OUT(d, 24)
                 : "l"(a), "l"(b));
  }
}

// The same with A in registers, signed or unsigned bytes: 64 or 48 columns. IGMMA.64xNx32
template <Old kOld>
__device__ __forceinline__ void multiply_s8(int (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 1;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16), SAGE3_OUT(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_s8(int (&d)[24], const uint32_t* a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k32.s32.s8.s8 " SAGE3_D24 ", {%24, %25, %26, %27}, %28, 1;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k32.s32.s8.s8 " SAGE3_D24 ", {%24, %25, %26, %27}, %28, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k32.s32.s8.s8 " SAGE3_D24 ", {%24, %25, %26, %27}, %28, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_u8(int (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 1;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 " SAGE3_D32 ", {%32, %33, %34, %35}, %36, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16), SAGE3_OUT(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_u8(int (&d)[24], const uint32_t* a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k32.s32.u8.s8 " SAGE3_D24 ", {%24, %25, %26, %27}, %28, 1;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k32.s32.u8.s8 " SAGE3_D24 ", {%24, %25, %26, %27}, %28, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k32.s32.u8.s8 " SAGE3_D24 ", {%24, %25, %26, %27}, %28, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// D[64][N] (+)= A[64][16] B[N][16]^T, bf16 in shared memory, fp32 sums. HGMMA.64xNx16.F32.BF16
template <Old kOld>
__device__ __forceinline__ void multiply_bf16(int (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SAGE3_D32 ", %32, %33, 1, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SAGE3_D32 ", %32, %33, 0, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16), SAGE3_IN_OUT(d, 24)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SAGE3_D32 ", %32, %33, 0, 1, 1, 0, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16), SAGE3_OUT(d, 24)
                 : "l"(a), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_bf16(int (&d)[24], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 " SAGE3_D24 ", %24, %25, 1, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "l"(a), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 " SAGE3_D24 ", %24, %25, 0, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8), SAGE3_IN_OUT(d, 16)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 " SAGE3_D24 ", %24, %25, 0, 1, 1, 0, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8), SAGE3_OUT(d, 16)
                 : "l"(a), "l"(b));
  }
}

template <Old kOld>
__device__ __forceinline__ void multiply_bf16(int (&d)[16], uint64_t a, uint64_t b) {
  if constexpr (kOld == kAdded) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SAGE3_D16 ", %16, %17, 1, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8)
                 : "l"(a), "l"(b));
  } else if constexpr (kOld == kReplaced) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SAGE3_D16 ", %16, %17, 0, 1, 1, 0, 0;"
                 : SAGE3_IN_OUT(d, 0), SAGE3_IN_OUT(d, 8)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SAGE3_D16 ", %16, %17, 0, 1, 1, 0, 0;"
                 : SAGE3_OUT(d, 0), SAGE3_OUT(d, 8)
                 : "l"(a), "l"(b));
  }
}

#undef SAGE3_IN_OUT
#undef SAGE3_OUT
#undef SAGE3_D16
#undef SAGE3_D24
#undef SAGE3_D32

}  // namespace sage3::sm90
