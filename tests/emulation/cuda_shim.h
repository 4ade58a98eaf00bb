// Runs CUDA C++ of kernels/cuda_source on the CPU: a context for every thread of a block, real
// barriers, and the functions of primitives.cuh as what a warp does together.
//
// Threads run one after the other, in an order of choice, each until it needs others: at a barrier
// of the block or of its warp, or at an instruction that all lanes of a warp execute together. Those
// are executed once all 32 lanes have arrived at the same one. Threads that wait for others that will
// never come are an error. Shared memory starts as 0xff, i.e. NaN, for every
// block, and asynchronous copies arrive as late as they may, or bulk copies at any time where warps do
// not keep pace, so that a missing wait or barrier shows in some order.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_shim_bfloat16.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__ __restrict
#define __shared__ static

typedef _Float16 __half, half;
typedef unsigned char uchar;
typedef unsigned int uint;
typedef long long longlong;
#define VECTORS(T)                                                          \
  struct alignas(2 * sizeof(T)) T##2 {                                      \
    T x, y;                                                                 \
  };                                                                        \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) T##4 {            \
    T x, y, z, w;                                                           \
  };                                                                        \
  static inline T##2 make_##T##2(T x, T y) { return {x, y}; }               \
  static inline T##4 make_##T##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float)
VECTORS(half)
VECTORS(nv_bfloat16)
VECTORS(int)
VECTORS(uint)
VECTORS(longlong)
#undef VECTORS
struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx;

namespace emulated {

constexpr int kWarp = 32;
enum class Wait { nothing, block, warp, condition, over };
typedef void (*Together)(void* const (&operands)[kWarp]);
typedef bool (*Condition)(void* operands);

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  Wait wait;
  int line;  // of the instruction it waits at
  Together together;
  Condition condition;
  void* operands;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static int current;
static void (*body)();

static std::string error;
static bool in_thread;

// Ends the grid. A thread that calls this does not go on.
static void fail(const char* what) {
  if (error.empty())
    error = std::string(what) + " (block " + std::to_string(blockIdx.x) + " " +
            std::to_string(blockIdx.y) + ", thread " + std::to_string(current) + ")";
  if (in_thread) swapcontext(&threads[current].context, &scheduler);
}

static void wait(Wait what, int line, Together together = nullptr, void* operands = nullptr) {
  Thread& self = threads[current];
  self.wait = what, self.line = line, self.together = together, self.operands = operands;
  swapcontext(&self.context, &scheduler);
}

static void wait_until(Condition condition, void* operands) {
  threads[current].condition = condition;
  wait(Wait::condition, 0, nullptr, operands);
}

// Makes something happen that threads may wait for, if anything is left; set by cuda_shim_hopper.h.
static bool (*deliver)();

static void start() {
  body();
  threads[current].wait = Wait::over, threads[current].line = 0;
}

static bool all(int first, int count, Wait what) {
  return std::all_of(threads.begin() + first, threads.begin() + first + count,
                     [&](Thread& t) { return t.wait == what && t.line == threads[first].line; });
}

static void release(int first, int count) {
  for (int i = first; i < first + count; ++i) threads[i].wait = Wait::nothing;
}

// Whether warps that could go on are held back now and then, so that they do not keep pace.
static bool uneven;
static std::mt19937 chance;

// Lets waiting threads go on whose companions have all arrived; false if there are none.
static bool advance() {
  const int count = threads.size();
  bool any = false;
  for (int first = 0; first < count; first += kWarp) {
    const int lanes = std::min(kWarp, count - first);
    if (all(first, lanes, Wait::warp)) {
      if (uneven && any && chance() % 4) continue;
      void* operands[kWarp] = {};
      for (int lane = 0; lane < lanes; ++lane) operands[lane] = threads[first + lane].operands;
      if (threads[first].together) threads[first].together(operands);
      release(first, lanes);
      any = true;
    }
  }
  if (!any && std::all_of(threads.begin(), threads.end(),
                          [](Thread& t) { return t.wait == Wait::block; })) {
    release(0, count);
    any = true;
  }
  for (Thread& t : threads)
    if (t.wait == Wait::condition && t.condition(t.operands)) t.wait = Wait::nothing, any = true;
  if (uneven && deliver && chance() % 4 == 0) any |= deliver();
  return any || (deliver && deliver());
}

// Shared memory of a block: what the rig puts in place of `__shared__`, or dynamic, which begins
// behind what Hopper takes for itself.
alignas(128) static char shared_bytes[228 << 10];
static unsigned char* const dynamic_bytes = (unsigned char*)shared_bytes + 1024;

template <class Shared>
Shared& shared_memory() {
  static_assert(sizeof(Shared) <= 48 << 10, "a block has 48 KB");
  return *(Shared*)shared_bytes;
}

static void run_block(const std::vector<int>& order, Index block) {
  memset(shared_bytes, 0xff, sizeof shared_bytes);
  for (Thread& t : threads) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = &scheduler;
    t.wait = Wait::nothing;
    t.line = 0;
    t.committed.clear(), t.open.clear();
    makecontext(&t.context, start, 0);
  }
  do {
    for (int i : order) {
      if (threads[i].wait != Wait::nothing) continue;
      current = i;
      threadIdx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      in_thread = true;
      swapcontext(&scheduler, &threads[i].context);
      in_thread = false;
    }
  } while (error.empty() && advance());
  if (error.empty() && !all(0, threads.size(), Wait::over)) fail("threads wait for others that will not come");
}

// Runs a grid and returns what went wrong, if anything did. Order 0 of threads is by rising index, 1
// by falling, others are random, with warps that do not keep pace.
static const char* run_grid(Index grid, Index block, int order, void (*kernel)()) {
  const size_t count = block.x * block.y * block.z;
  body = kernel;
  error.clear();
  if (threads.size() != count) threads = std::vector<Thread>(count);
  std::vector<int> by(count);
  std::iota(by.begin(), by.end(), 0);
  if (order == 1) std::reverse(by.begin(), by.end());
  if (order > 1) std::shuffle(by.begin(), by.end(), std::mt19937(order));
  uneven = order > 1;
  chance.seed(order);
  for (unsigned i = 0; i < grid.x * grid.y * grid.z && error.empty(); ++i) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(by, block);
  }
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace emulated

static void __syncthreads() { emulated::wait(emulated::Wait::block, 0); }
static void __syncwarp(int line = __builtin_LINE()) { emulated::wait(emulated::Wait::warp, line); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static int __float2int_rn(float x) { return (int)nearbyintf(x); }
static float __int2float_rn(int x) { return (float)x; }

namespace fairy {

typedef unsigned Word;

inline float to_float(float x) { return x; }
inline float to_float(__half x) { return x; }
inline float to_float(__nv_bfloat16 x) { return x; }
inline void store(float* to, float x) { *to = x; }
inline void store(__half* to, float x) { *to = (__half)x; }
inline void store(__nv_bfloat16* to, float x) { *to = __nv_bfloat16(x); }
inline uint4 load_once(const uint4* from) { return *from; }
inline void prefetch(const void* from) { (void)*(volatile const char*)from; }  // inside of arrays
inline void launch_dependents() {}
inline void wait_for_inputs() {}

// Bytes (r, e) and halves of fragments, by the tables of the PTX ISA: lane 4 g + t, register r and
// element e of `per` in a register. A: row g + 8 (r % 2), column per t + 4 per (r / 2) + e.
template <class T>
T element(const Word& word, int e) {
  T value;
  memcpy(&value, (const char*)&word + e * sizeof(T), sizeof(T));
  return value;
}

template <class A, class B, class Sum>
struct Multiply {
  Sum* sums;
  const Word* a;
  Word b[2];
  const Sum* before;

  static void together(void* const (&operands)[32]) {
    constexpr int per = 4 / sizeof(A), columns = 8 * per;
    static double a[16][columns], b[columns][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Multiply& own = *(const Multiply*)operands[lane];
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int e = 0; e < per; ++e) {
          a[g + 8 * (r % 2)][per * t + 4 * per * (r / 2) + e] = (double)element<A>(own.a[r], e);
          if (r < 2) b[per * t + 4 * per * r + e][g] = (double)element<B>(own.b[r], e);
        }
        c[g + 8 * (r / 2)][2 * t + r % 2] = own.before[r];
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column)
        for (int k = 0; k < columns; ++k) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane) {
      const Multiply& own = *(const Multiply*)operands[lane];
      for (int r = 0; r < 4; ++r) {
        const double sum = c[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
        if (sizeof(A) == 1 && fabs(sum) > INT32_MAX) emulated::fail("an integer sum overflows");
        own.sums[r] = (Sum)sum;
      }
    }
  }
};

template <class A>
void multiply_bytes(int (&sums)[4], const Word (&a)[4], uint2 b, int line) {
  typedef Multiply<A, int8_t, int> M;
  M operands = {sums, a, {b.x, b.y}, sums};
  emulated::wait(emulated::Wait::warp, line, M::together, &operands);
}

inline void multiply_unsigned(int (&sums)[4], const Word (&a)[4], uint2 b,
                              int line = __builtin_LINE()) {
  multiply_bytes<uint8_t>(sums, a, b, line);
}

inline void multiply_signed(int (&sums)[4], const Word (&a)[4], uint2 b,
                            int line = __builtin_LINE()) {
  multiply_bytes<int8_t>(sums, a, b, line);
}

template <class T>
void multiply_pairs(float (&sums)[4], const Word (&a)[4], Word b0, Word b1,
                    int line = __builtin_LINE()) {
  typedef Multiply<T, T, float> M;
  M operands = {sums, a, {b0, b1}, sums};
  emulated::wait(emulated::Wait::warp, line, M::together, &operands);
}

inline void multiply_halves(float (&sums)[4], const Word (&a)[4], Word b0, Word b1,
                            int line = __builtin_LINE()) {
  multiply_pairs<__half>(sums, a, b0, b1, line);
}

inline Word pick_bytes(Word low, Word high, Word selector) {
  Word picked = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    picked |= ((from < 4 ? low >> (8 * from) : high >> (8 * (from - 4))) & 255) << (8 * i);
  }
  return picked;
}

inline Word mask_or(Word word, Word mask, Word or_with) { return (word & mask) | or_with; }

template <class T>
Word pack_pair(float low, float high) {
  const T pair[2] = {(T)low, (T)high};
  Word packed;
  memcpy(&packed, pair, 4);
  return packed;
}

template <class T>
Word add_pairs(Word a, Word b) {
  return pack_pair<T>((float)element<T>(a, 0) + (float)element<T>(b, 0),
                      (float)element<T>(a, 1) + (float)element<T>(b, 1));
}

inline Word pack_halves(float low, float high) { return pack_pair<__half>(low, high); }
inline Word add_halves(Word a, Word b) { return add_pairs<__half>(a, b); }

template <class T>
struct Exchange {
  T value, other;
  int lane;

  static void together(void* const (&operands)[32]) {
    for (void* own : operands)
      ((Exchange*)own)->other = ((Exchange*)operands[((Exchange*)own)->lane])->value;
  }
};

template <class T>
T shuffle(T value, int lane, int line = __builtin_LINE()) {
  Exchange<T> exchange = {value, value, lane};
  emulated::wait(emulated::Wait::warp, line, Exchange<T>::together, &exchange);
  return exchange.other;
}

template <class T>
T shuffle_xor(T value, int lanes, int line = __builtin_LINE()) {
  return shuffle(value, emulated::current % 32 ^ lanes, line);
}

inline Word float_bits(float x) {
  Word bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline int add_bytes(Word bytes, int before) {
  for (int i = 0; i < 4; ++i) before += element<int8_t>(bytes, i);
  return before;
}
inline Word shared_address(const void* at) { return (const char*)at - emulated::shared_bytes; }

inline uint2 load_shared(Word address, int offset) {
  return *(const uint2*)(emulated::shared_bytes + address + offset);
}

inline Word load_shared_word(Word address, int offset) {
  return *(const Word*)(emulated::shared_bytes + address + offset);
}

inline void copy_async(void* to, const void* from, bool inside) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulated::fail("a copy is not aligned");
  memset(to, 0xff, 16);
  emulated::threads[emulated::current].open.push_back({to, from, inside});
}

inline void commit_copies() {
  emulated::Thread& self = emulated::threads[emulated::current];
  self.committed.push_back(self.open);
  self.open.clear();
}

template <int kPending>
void wait_copies() {
  auto& committed = emulated::threads[emulated::current].committed;
  while ((int)committed.size() > kPending) {
    for (const emulated::Copy& copy : committed.front()) {
      if (copy.inside)
        memcpy(copy.to, copy.from, 16);
      else
        memset(copy.to, 0, 16);
    }
    committed.erase(committed.begin());
  }
}

}  // namespace fairy
