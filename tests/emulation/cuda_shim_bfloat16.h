// The type __nv_bfloat16 on the CPU: the upper half of a float, rounded to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t whole;
    memcpy(&whole, &x, 4);
    // Rounding could carry a NaN's fraction into its sign.
    bits = x == x ? (whole + 0x7fff + (whole >> 16 & 1)) >> 16 : whole >> 16 | 0x40;
  }
  operator float() const {
    const uint32_t whole = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &whole, 4);
    return x;
  }
};
typedef __nv_bfloat16 nv_bfloat16;
