// Hopper's own instructions, one per function (PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier",
// "cp.async.bulk", "setmaxnreg"). sm_90a; barriers and bulk copies are Blackwell's as well.
#pragma once

#include <cstdint>

namespace sage3::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarrier: a phase ends when `count` arrivals and all announced bytes are in ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The same for a thread with nothing else to do: a loop of tries takes issue slots from the warps that compute.
__device__ __forceinline__ void barrier_await(uint64_t* barrier, uint32_t parity) {
  for (;;) {
    uint32_t done;
    asm volatile(
        "{.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done) return;
    __nanosleep(40);
  }
}

// `bytes` (a multiple of 16) from global to shared memory; the barrier learns of them. UBLKCP
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// ---- warpgroups ----

template <int kRegisters>
__device__ __forceinline__ void register_budget_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void register_budget_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma ----

// Orders register accesses before with wgmma after. WARPGROUP.ARRIVE
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are in flight. WARPGROUP.DEPBAR
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across this point.
template <int kCount>
__device__ __forceinline__ void pin(int (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)); }

// Descriptor of a K-major operand in shared memory whose rows of 32, 64 or 128 bytes are swizzled: eight rows make a
// group, groups follow each other. Steps along the contraction are added to the address field (16-byte units).
__device__ __forceinline__ uint64_t operand(const void* tile, int row_bytes) {
  const uint64_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  const uint64_t group = 8 * row_bytes / 16;
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(1) << 16 | group << 32 | mode << 62;
}

// The same of a tile at this address in units of 16 bytes. A number in a uniform register stays in one.
__device__ __forceinline__ uint64_t operand_at(uint32_t sixteens, int row_bytes) {
  const uint32_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return uint64_t(mode << 30 | 8 * row_bytes / 16) << 32 | (sixteens + (1u << 16));
}

// D[64][N] (+)= A[64][32] B[N][32]^T: A signed or unsigned bytes in registers, B signed bytes in shared memory, D exact
// integers. A thread holds row g, columns 8j + 2t, +1 in d[4j], d[4j + 1] and row g + 8 in the next two. N / 2 clocks.
// Without kAdd the old D is an output only: ptxas would otherwise initialise it and then serialise the products.

#define SAGE3_WRITE(d, i) \
  "=r"(d[i]), "=r"(d[i + 1]), "=r"(d[i + 2]), "=r"(d[i + 3]), "=r"(d[i + 4]), "=r"(d[i + 5]), "=r"(d[i + 6]), "=r"(d[i + 7])
#define SAGE3_ADD_TO(d, i) \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])

// IGMMA.64x32x32.U8.S8
template <bool kAdd>
__device__ __forceinline__ void wgmma_u8(int (&d)[16], const uint32_t* a, uint64_t b) {
  if constexpr (kAdd) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                 "}, {%16, %17, %18, %19}, %20, 1;"
                 : SAGE3_ADD_TO(d, 0), SAGE3_ADD_TO(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                 "}, {%16, %17, %18, %19}, %20, 0;"
                 : SAGE3_WRITE(d, 0), SAGE3_WRITE(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// IGMMA.64x64x32.U8.S8
template <bool kAdd>
__device__ __forceinline__ void wgmma_u8(int (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (kAdd) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1;"
                 : SAGE3_ADD_TO(d, 0), SAGE3_ADD_TO(d, 8), SAGE3_ADD_TO(d, 16), SAGE3_ADD_TO(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 0;"
                 : SAGE3_WRITE(d, 0), SAGE3_WRITE(d, 8), SAGE3_WRITE(d, 16), SAGE3_WRITE(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// IGMMA.64x128x32.U8.S8
template <bool kAdd>
__device__ __forceinline__ void wgmma_u8(int (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (kAdd) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1;"
                 : SAGE3_ADD_TO(d, 0), SAGE3_ADD_TO(d, 8), SAGE3_ADD_TO(d, 16), SAGE3_ADD_TO(d, 24), SAGE3_ADD_TO(d, 32), SAGE3_ADD_TO(d, 40), SAGE3_ADD_TO(d, 48), SAGE3_ADD_TO(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 0;"
                 : SAGE3_WRITE(d, 0), SAGE3_WRITE(d, 8), SAGE3_WRITE(d, 16), SAGE3_WRITE(d, 24), SAGE3_WRITE(d, 32), SAGE3_WRITE(d, 40), SAGE3_WRITE(d, 48), SAGE3_WRITE(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// IGMMA.64x128x32.S8.S8
template <bool kAdd>
__device__ __forceinline__ void wgmma_s8(int (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (kAdd) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1;"
                 : SAGE3_ADD_TO(d, 0), SAGE3_ADD_TO(d, 8), SAGE3_ADD_TO(d, 16), SAGE3_ADD_TO(d, 24), SAGE3_ADD_TO(d, 32), SAGE3_ADD_TO(d, 40), SAGE3_ADD_TO(d, 48), SAGE3_ADD_TO(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 0;"
                 : SAGE3_WRITE(d, 0), SAGE3_WRITE(d, 8), SAGE3_WRITE(d, 16), SAGE3_WRITE(d, 24), SAGE3_WRITE(d, 32), SAGE3_WRITE(d, 40), SAGE3_WRITE(d, 48), SAGE3_WRITE(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#undef SAGE3_WRITE
#undef SAGE3_ADD_TO

}  // namespace sage3::sm90
