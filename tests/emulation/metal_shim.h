// The part of the Metal shading language that TVM emits, as C++ for clang.
//
// Kernels are compiled as they are but for what `metal_rig.py` rewrites: threadgroup arrays, half
// literals and filled simdgroup matrices. Arithmetic is float32 and _Float16 without excess
// precision and without contraction.
#pragma once
#include <cmath>
#include <type_traits>

#include "metal_threads.h"

typedef _Float16 half;
typedef uint8_t uchar;
typedef uint16_t ushort;
typedef uint32_t uint;
#define ulong uint64_t

namespace metal {

template <class T, int N>
struct alignas(sizeof(T) * N) elements {
  T v[N];
};
// Indices of threads are named by their letters.
template <class T>
struct alignas(sizeof(T) * 2) elements<T, 2> {
  union {
    T v[2];
    struct {
      T x, y;
    };
  };
};
template <class T>
struct alignas(sizeof(T) * 4) elements<T, 3> {
  union {
    T v[3];
    struct {
      T x, y, z;
    };
  };
};

template <class T, int N>
struct vec : elements<T, N> {
  using elements<T, N>::v;
  vec() = default;
  template <class S, class = std::enable_if_t<std::is_arithmetic_v<S> || std::is_same_v<S, half>>>
  vec(S value) {
    for (T& element : v) element = (T)value;
  }
  template <class A, class B, class... R>
  vec(A a, B b, R... rest) {
    static_assert(sizeof...(R) + 2 == N, "elements of a vector");
    T elements[] = {(T)a, (T)b, (T)rest...};
    for (int i = 0; i < N; i++) v[i] = elements[i];
  }
  template <class S>
  explicit vec(const vec<S, N>& other) {
    for (int i = 0; i < N; i++) v[i] = (T)other.v[i];
  }
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
#define BINARY(op)                                         \
  friend vec operator op(vec a, vec b) {                   \
    for (int i = 0; i < N; i++) a.v[i] = a.v[i] op b.v[i]; \
    return a;                                              \
  }
  BINARY(+) BINARY(-) BINARY(*) BINARY(/)
#undef BINARY
#define BITS(op)                                                \
  friend vec operator op(vec a, vec b) {                        \
    for (int i = 0; i < N; i++) a.v[i] = (T)(a.v[i] op b.v[i]); \
    return a;                                                   \
  }
  BITS(%) BITS(&) BITS(|) BITS(^) BITS(<<) BITS(>>)
#undef BITS
#define COMPARE(op)                                             \
  friend vec<bool, N> operator op(vec a, vec b) {               \
    vec<bool, N> result;                                        \
    for (int i = 0; i < N; i++) result.v[i] = a.v[i] op b.v[i]; \
    return result;                                              \
  }
  COMPARE(==) COMPARE(!=) COMPARE(<) COMPARE(>) COMPARE(<=) COMPARE(>=)
#undef COMPARE
};

#define VECTORS(T, name)     \
  typedef vec<T, 2> name##2; \
  typedef vec<T, 3> name##3; \
  typedef vec<T, 4> name##4;
VECTORS(half, half)
VECTORS(float, float)
VECTORS(int, int)
VECTORS(uint, uint)
VECTORS(short, short)
VECTORS(ushort, ushort)
VECTORS(uchar, uchar)
VECTORS(long, long)
VECTORS(bool, bool)
#undef VECTORS

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

template <class T, class S>
T as_type(S value) {
  static_assert(sizeof(T) == sizeof(S), "as_type of another size");
  T result;
  std::memcpy((void*)&result, &value, sizeof result);
  return result;
}

template <class T>
T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}

template <class T, int N>
vec<T, N> select(vec<T, N> if_false, vec<T, N> if_true, vec<bool, N> condition) {
  for (int i = 0; i < N; i++)
    if (condition.v[i]) if_false.v[i] = if_true.v[i];
  return if_false;
}

#define FUNCTION(name, expression)                        \
  inline float name(float x) { return expression; }       \
  inline half name(half x) { return (half)name((float)x); } \
  template <class T, int N>                               \
  vec<T, N> name(vec<T, N> a) {                           \
    for (int i = 0; i < N; i++) a.v[i] = name(a.v[i]);    \
    return a;                                             \
  }
FUNCTION(exp, ::expf(x))
FUNCTION(exp2, ::exp2f(x))
FUNCTION(log, ::logf(x))
FUNCTION(log2, ::log2f(x))
FUNCTION(sqrt, ::sqrtf(x))
FUNCTION(rsqrt, 1.0f / ::sqrtf(x))
FUNCTION(sin, ::sinf(x))
FUNCTION(cos, ::cosf(x))
FUNCTION(floor, ::floorf(x))
FUNCTION(rint, ::rintf(x))
#undef FUNCTION
inline float pow(float a, float b) { return ::powf(a, b); }
template <class T, int N>
vec<T, N> pow(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a.v[i] = pow(a.v[i], b.v[i]);
  return a;
}
inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}

template <class T, int C, int R>
struct simdgroup_matrix {
  T m[R][C];
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

}  // namespace metal

// A simdgroup's matrix is kept by its first thread; the others' copies are not looked at.
template <class T, int C, int R>
metal::simdgroup_matrix<T, C, R> matrix_fill(T value, int place) {
  threads::simd_barrier(place);
  metal::simdgroup_matrix<T, C, R> result;
  for (auto& row : result.m)
    for (T& element : row) element = value;
  return result;
}
template <class T, class P>
void matrix_load(metal::simdgroup_matrix<T, 8, 8>& into, P* from, size_t stride, bool transpose,
                 int place) {
  static_assert(std::is_same_v<std::remove_cv_t<P>, T>, "matrix and memory of different types");
  if (threads::leads_with((const void*)from, place))
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) (transpose ? into.m[j][i] : into.m[i][j]) = from[i * stride + j];
  threads::simd_barrier(place);
}
template <class T, class P>
void matrix_store(metal::simdgroup_matrix<T, 8, 8>& from, P* to, size_t stride, bool transpose,
                  int place) {
  static_assert(std::is_same_v<std::remove_cv_t<P>, T>, "matrix and memory of different types");
  if (threads::leads_with((const void*)to, place))
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) to[i * stride + j] = transpose ? from.m[j][i] : from.m[i][j];
  threads::simd_barrier(place);
}
template <class D, class A, class B, class C>
void matrix_multiply(D& d, A& a, B& b, C& c, int place) {
  threads::simd_barrier(place);
  if (threads::current % threads::kSimd) return;
  D result;
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) {
      float sum = (float)c.m[i][j];
      for (int k = 0; k < 8; k++) sum += (float)a.m[i][k] * (float)b.m[k][j];
      result.m[i][j] = (std::remove_reference_t<decltype(result.m[0][0])>)sum;
    }
  d = result;
}

#define threadgroup_barrier(flags) threads::barrier(__LINE__)
#define simdgroup_barrier(flags) threads::simd_barrier(__LINE__)
#define simd_shuffle(value, lane) threads::shuffle(value, (int)(lane), __LINE__)
#define simd_shuffle_down(value, by) threads::shuffle_down(value, (int)(by), __LINE__)
#define simd_sum(value) threads::sum(value, __LINE__)
#define simdgroup_load(d, p, stride, origin, transpose) \
  matrix_load(d, p, stride, transpose, __LINE__)
#define simdgroup_store(d, p, stride, origin, transpose) \
  matrix_store(d, p, stride, transpose, __LINE__)
#define simdgroup_multiply_accumulate(d, a, b, c) matrix_multiply(d, a, b, c, __LINE__)
#define device
#define thread
#define constant const
#define kernel static
#define threadgroup

// ---- launching, from TVM's packed calls --------------------------------------------------------

struct FfiAny {  // TVMFFIAny
  int32_t type_index;
  uint32_t zero_padding;
  union {
    int64_t integer;
    double real;
    void* pointer;
  };
};
extern "C" void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
extern "C" char __start_tgmem[] __attribute__((weak));
extern "C" char __stop_tgmem[] __attribute__((weak));

namespace launching {

using metal::uint2;
using metal::uint3;

inline void** buffers;
inline uint3 group, group_size;
inline char error[256];

template <class T>
T index(uint3 at);
template <>
inline uint index<uint>(uint3 at) {
  return at.x;
}
template <>
inline uint2 index<uint2>(uint3 at) {
  return {at.x, at.y};
}
template <>
inline uint3 index<uint3>(uint3 at) {
  return at;
}
inline uint3 thread_at(uint number) {
  return {number % group_size.x, number / group_size.x % group_size.y,
          number / group_size.x / group_size.y};
}

// Runs all groups one after the other; threadgroup memory begins as NaNs in each.
inline int run(void (*body)(uint), const uint* sizes, const char* name, unsigned order) {
  group_size = {sizes[3], sizes[4], sizes[5]};
  error[0] = 0;
  threads::error = error;
  threads::body = body;
  const uint number = sizes[3] * sizes[4] * sizes[5];
  if (number > 1024 || sizes[0] * sizes[1] * sizes[2] == 0) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a launch of no groups or of too many threads");
    return -1;
  }
  for (group.z = 0; group.z < sizes[2]; group.z++)
    for (group.y = 0; group.y < sizes[1]; group.y++)
      for (group.x = 0; group.x < sizes[0]; group.x++) {
        if (__start_tgmem) std::memset(__start_tgmem, 0xFF, __stop_tgmem - __start_tgmem);
        threads::run_group(number, order);
        if (!error[0]) continue;
        char message[512];
        std::snprintf(message, sizeof message, "simulated Metal, kernel %s: %s", name, error);
        TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
        return -1;
      }
  return 0;
}

}  // namespace launching
