// What the kernels ask of the hardware, one instruction each. tests/emulation/cuda_shim.h has the
// same functions for the CPU, so that everything below runs without a GPU.
//
// Fragment layouts are those of the PTX ISA, section "Matrix fragments for mma.m16n8k32" and
// "... mma.m16n8k16". With g = lane / 4 and t = lane % 4:
//   A (16 x 32 bytes)   register r, byte e: row g + 8 (r % 2), column 4 t + 16 (r / 2) + e
//   A (16 x 16 halves)  register r, half e: row g + 8 (r % 2), column 2 t +  8 (r / 2) + e
//                       and bfloat16 in the same places
//   B                   as A with columns for rows: register r is that of A's registers 2 r
//   C, D (16 x 8)       register r: row g + 8 (r / 2), column 2 t + r % 2
#ifndef FAIRY_PRIMITIVES
#define FAIRY_PRIMITIVES
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fairy {

typedef unsigned int Word;  // four bytes, two halves or two bfloat16

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// 128 bits that are read once: they should not displace what stays in the caches.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Asks for the 128 bytes at an address to be brought to the L2 cache.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// The next kernel may be launched, if it is one that waits for its inputs. What it reads before that
// must be constant. Kernels launched the usual way start when this one is over.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before are over, if this one was launched before that.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#define FAIRY_MULTIPLY_BYTES(type)                                                              \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." type ".s8.s32 "                                   \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y))

// sums += a b; bytes of b are signed, those of a are or are not.
__device__ __forceinline__ void multiply_unsigned(int (&sums)[4], const Word (&a)[4], uint2 b) {
  FAIRY_MULTIPLY_BYTES("u8");
}

__device__ __forceinline__ void multiply_signed(int (&sums)[4], const Word (&a)[4], uint2 b) {
  FAIRY_MULTIPLY_BYTES("s8");
}
#undef FAIRY_MULTIPLY_BYTES

// sums += a b in halves, summed in float.
__device__ __forceinline__ void multiply_halves(float (&sums)[4], const Word (&a)[4], Word b0,
                                                Word b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte i of the result is byte (selector >> 4 i) & 7 of (low, high).
__device__ __forceinline__ Word pick_bytes(Word low, Word high, Word selector) {
  return __byte_perm(low, high, selector);
}

// (word & mask) | or_with. Compilers prefer an `and` and an addition where bits cannot overlap.
__device__ __forceinline__ Word mask_or(Word word, Word mask, Word or_with) {
  Word result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(or_with));
  return result;
}

__device__ __forceinline__ Word pack_halves(float low, float high) {
  Word packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ Word add_halves(Word a, Word b) {
  Word sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// The three above for either 16-bit type that tensor cores multiply. bfloat16 has the range of float
// and 8 bits of precision, where a half has 11.
template <class T>
__device__ __forceinline__ void multiply_pairs(float (&sums)[4], const Word (&a)[4], Word b0,
                                               Word b1);
template <class T>
__device__ __forceinline__ Word pack_pair(float low, float high);
template <class T>
__device__ __forceinline__ Word add_pairs(Word a, Word b);

template <>
__device__ __forceinline__ void multiply_pairs<__half>(float (&sums)[4], const Word (&a)[4],
                                                       Word b0, Word b1) {
  multiply_halves(sums, a, b0, b1);
}

template <>
__device__ __forceinline__ Word pack_pair<__half>(float low, float high) {
  return pack_halves(low, high);
}

template <>
__device__ __forceinline__ Word add_pairs<__half>(Word a, Word b) {
  return add_halves(a, b);
}

template <>
__device__ __forceinline__ void multiply_pairs<__nv_bfloat16>(float (&sums)[4], const Word (&a)[4],
                                                              Word b0, Word b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ Word pack_pair<__nv_bfloat16>(float low, float high) {
  Word packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// a 1 + b, which rounds once as a sum does: before sm_90 there is no addition.
template <>
__device__ __forceinline__ Word add_pairs<__nv_bfloat16>(Word a, Word b) {
  Word sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
}

__device__ __forceinline__ Word float_bits(float x) { return __float_as_uint(x); }

// The sum of four signed bytes and another integer.
__device__ __forceinline__ int add_bytes(Word bytes, int before) {
  return __dp4a((int)bytes, 0x01010101, before);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// The value of another lane.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ Word shared_address(const void* at) {
  return (Word)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ uint2 load_shared(Word address, int offset) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address + offset)
               : "memory");
  return v;
}

__device__ __forceinline__ Word load_shared_word(Word address, int offset) {
  Word v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address + offset) : "memory");
  return v;
}

// 16 bytes from global to shared memory, without waiting; unless `inside`, zeros, and no access.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of the latest commits are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fairy
#endif  // FAIRY_PRIMITIVES
