// What the kernels for Hopper (sm_90a) ask of the hardware beyond primitives.cuh.
// tests/emulation/cuda_shim_hopper.h has the same functions for the CPU.
//
// Warpgroup matrix instructions (PTX ISA, "wgmma.mma_async"): four warps multiply A (64 x 16
// halves, or bfloat16) by B (16 x 128 or 256). A comes from registers, rows 16 w .. 16 w + 15 from
// warp w as for mma.m16n8k16; sums are those of mma.m16n8k16 side by side. B lies in shared memory
// in core matrices, 8 columns of 16 bytes (8 of the 16 rows) in a row: `kCores` neighbours in a
// line for columns, lines for rows.
#ifndef FAIRY_HOPPER_PRIMITIVES
#define FAIRY_HOPPER_PRIMITIVES

namespace fairy {

typedef unsigned long long Barrier;  // of shared memory

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes barriers known to asynchronous copies.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits until the phase of a parity is over.
__device__ __forceinline__ void wait_barrier(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies bytes to shared memory without waiting and arrives at a barrier when they are there.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Stores four 8 x 8 matrices of 16-bit numbers to shared memory, columns for rows. Lane 4 i + j
// holds elements 2 j and 2 j + 1 of row i of each, lane 8 m + i says where column i of matrix m
// begins.
__device__ __forceinline__ void store_transposed(void* to, const Word (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(to)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Registers of operands that were written before are seen by multiplications after it.
__device__ __forceinline__ void begin_multiplications() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_multiplications() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` of the latest commits are under way.
template <int kPending>
__device__ __forceinline__ void wait_multiplications() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Where operand B begins: its address in shared memory, in units of 16 bytes. The part of it that
// varies is a word of its own, so that moving on is one addition.
__device__ __forceinline__ Word operand_at(const void* b) {
  return (shared_address(b) & 0x3ffff) >> 4;
}

#define FAIRY_64_REGISTERS                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "               \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "               \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "               \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FAIRY_128_REGISTERS                                                                        \
  FAIRY_64_REGISTERS ", "                                                                          \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "               \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "               \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "           \
  "%124, %125, %126, %127"
#define FAIRY_SUMS(i)                                                                              \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]),                   \
      "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), "+f"(d[i + 1][3])
#define FAIRY_SUMS_OF_128(i)                                                                       \
  FAIRY_SUMS(i), FAIRY_SUMS(i + 2), FAIRY_SUMS(i + 4), FAIRY_SUMS(i + 6), FAIRY_SUMS(i + 8),       \
      FAIRY_SUMS(i + 10), FAIRY_SUMS(i + 12), FAIRY_SUMS(i + 14)
#define FAIRY_TWO_SUMS FAIRY_SUMS_OF_128(0), FAIRY_SUMS_OF_128(16)
#define FAIRY_MULTIPLY_GROUP(shape, type, registers, a_registers, b_low, b_line, b_high, sums)     \
  asm volatile(                                                                                    \
      "{\n.reg .b64 at;\n.reg .b32 low;\n"                                                         \
      "add.u32 low, " b_low ", " b_line ";\nmov.b64 at, {low, " b_high "};\n"                      \
      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" registers "}, "             \
      "{" a_registers "}, at, 1, 1, 1, 0;\n}"                                                      \
      : sums                                                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(line << 16), "n"(core))
#define FAIRY_MULTIPLY_128(type)                                                                   \
  FAIRY_MULTIPLY_GROUP("m64n128k16", type, FAIRY_64_REGISTERS, "%64, %65, %66, %67", "%68", "%69", \
                       "%70", FAIRY_SUMS_OF_128(0))
#define FAIRY_MULTIPLY_256(type)                                                                   \
  FAIRY_MULTIPLY_GROUP("m64n256k16", type, FAIRY_128_REGISTERS, "%128, %129, %130, %131", "%132",  \
                       "%133", "%134", FAIRY_TWO_SUMS)

// Sets sums to 0, here: were it left to the compiler, it might do so between multiplications, which
// would then wait for each other.
template <int kCores>
__device__ __forceinline__ void clear_sums(float (&d)[kCores][4]) {
#pragma unroll
  for (int core = 0; core < kCores; ++core)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[core][i]));
}

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

// sums += a b for 8 kCores columns of B, numbers of type T. Neither `sums` nor `a` may be touched
// before the wait.
template <class T, int kCores>
__device__ __forceinline__ void multiply_group(float (&d)[kCores][4], const Word (&a)[4], Word b) {
  static_assert(kCores == 16 || kCores == 32);
  constexpr Word line = kCores * 128 >> 4, core = 128 >> 4;
  if constexpr (kCores == 16 && kIsHalf<T>)
    FAIRY_MULTIPLY_128("f16");
  else if constexpr (kCores == 16)
    FAIRY_MULTIPLY_128("bf16");
  else if constexpr (kIsHalf<T>)
    FAIRY_MULTIPLY_256("f16");
  else
    FAIRY_MULTIPLY_256("bf16");
}
#undef FAIRY_MULTIPLY_256
#undef FAIRY_MULTIPLY_128
#undef FAIRY_MULTIPLY_GROUP
#undef FAIRY_128_REGISTERS
#undef FAIRY_64_REGISTERS
#undef FAIRY_TWO_SUMS
#undef FAIRY_SUMS_OF_128
#undef FAIRY_SUMS

}  // namespace fairy
#endif  // FAIRY_HOPPER_PRIMITIVES
