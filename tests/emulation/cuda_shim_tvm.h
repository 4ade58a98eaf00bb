// What CUDA kernels that TVM generates use beside cuda_shim.h, on the CPU.
#pragma once
#include "cuda_shim.h"

static unsigned __activemask() { return 0xffffffffu; }
static __half __float2half_rn(float x) { return (__half)x; }

#define ROUNDED(op)                                                   \
  static nv_bfloat16 operator op(nv_bfloat16 a, nv_bfloat16 b) {      \
    return nv_bfloat16((float)a op(float) b);                         \
  }
ROUNDED(+)
ROUNDED(-)
ROUNDED(*)
ROUNDED(/)
#undef ROUNDED

template <class T>
struct Fetch {
  T value, other;
  int from;

  static void together(void* const (&operands)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      if (operands[lane]) {
        Fetch& own = *(Fetch*)operands[lane];
        if (const void* source = operands[own.from & 31]) own.other = ((Fetch*)source)->value;
      }
  }
};

template <class T>
T __shfl_sync(unsigned, T value, int from, int width, int line = __builtin_LINE()) {
  const int lane = emulated::current % 32;
  Fetch<T> fetch = {value, value, lane / width * width + from % width};
  emulated::wait(emulated::Wait::warp, line, Fetch<T>::together, &fetch);
  return fetch.other;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width, int line = __builtin_LINE()) {
  const int lane = emulated::current % 32;
  return __shfl_sync(mask, value, lane % width + by < width ? lane + by : lane, width, line);
}

template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
