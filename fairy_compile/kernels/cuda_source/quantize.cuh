// Activations as integers, by groups of 128 columns, as op.quantize_activations makes them: what
// decode.cuh multiplies by.
//
// A kernel that computes x may write it as integers at once, so that not every block that decodes
// has to quantise all of x again. Such an image of x is a `Record` for every (row, group of columns);
// the last group ends with zeros.
#ifndef FAIRY_QUANTIZE
#define FAIRY_QUANTIZE

namespace fairy {

// What the integers of 128 columns mean.
struct alignas(16) GroupScale {
  float scale[2];  // of Re x, Im x
  int sums[2][2];  // of 64 columns: (which, half of x)
  int unused[2];
};

// Both halves of 128 columns of a row. Digits are (re hi, re lo, im hi, im lo) of int16, (re, im) of
// int8; a word holds four columns.
template <int kLevels>
struct Record {
  static constexpr int kHalfDigits = kLevels > 127 ? 2 : 1;
  static constexpr int kDigits = 2 * kHalfDigits;
  Word values[4][kDigits][8];  // block of 32 columns, digit
  GroupScale scale;
};

// Neighbouring lanes of a warp hold `kColumns` columns each, 4 or 8, so that 128 / kColumns of them
// hold a group.
template <int kLevels, int kColumns>
struct Quantize {
  static constexpr bool kTwoDigits = kLevels > 127;
  static constexpr int kLanes = 128 / kColumns;
  static constexpr int kWords = kColumns / 4;

  // A lane's columns of one half: digits in bytes, their sum (of 64 columns in the end), the largest
  // absolute value of the group.
  struct Quantized {
    Word high[kWords], low[kWords];
    int sum;
    float peak;
  };

  // Quantises several groups at once, since each waits for what lanes tell each other.
  template <int kCount>
  static __device__ __forceinline__ void run(Quantized (&to)[kCount],
                                             const float (&value)[kCount][kColumns]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) to[n].peak = peak(value[n]);
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
#pragma unroll
      for (int n = 0; n < kCount; ++n)
        to[n].peak = fmaxf(to[n].peak, shuffle_xor(to[n].peak, lanes));
#pragma unroll
    for (int n = 0; n < kCount; ++n) round_all(to[n], value[n]);
#pragma unroll
    for (int lanes = kLanes / 4; lanes > 0; lanes /= 2)
#pragma unroll
      for (int n = 0; n < kCount; ++n) to[n].sum += shuffle_xor(to[n].sum, lanes);
  }

  static __device__ __forceinline__ float scale_of(const Quantized& quantized) {
    return __fmul_rn(quantized.peak, 1.0f / kLevels);
  }

  // Writes one half of a group to its record; `lane` counts from the group's first.
  static __device__ __forceinline__ void keep(Record<kLevels>& record, int half,
                                              const Quantized& quantized, int lane) {
    const int block = lane * kColumns / 32, word = lane * kColumns % 32 / 4;
    auto& values = record.values[block];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (kTwoDigits) values[2 * half][word + w] = quantized.high[w];
      values[kTwoDigits ? 2 * half + 1 : half][word + w] = quantized.low[w];
    }
    if (lane == 0) record.scale.scale[half] = scale_of(quantized);
    if (lane % (kLanes / 2) == 0) record.scale.sums[lane / (kLanes / 2)][half] = quantized.sum;
  }

 private:
  static __device__ __forceinline__ float peak(const float (&value)[kColumns]) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) largest = fmaxf(largest, fabsf(value[i]));
    return largest;
  }

  static __device__ __forceinline__ void round_all(Quantized& to, const float (&value)[kColumns]) {
    const float inverse = to.peak > 0 ? __fdiv_rn((float)kLevels, to.peak) : 0.0f;
    to.sum = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      // Adding 1.5 2^23 rounds to an integer, whose low 16 bits are the low bits of the float.
      Word q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        q[i] = float_bits(__fadd_rn(__fmul_rn(value[4 * w + i], inverse), 12582912.0f));
      to.low[w] = pick_bytes(pick_bytes(q[0], q[1], 0x0040), pick_bytes(q[2], q[3], 0x0040), 0x5410);
      to.high[w] = 0;
      to.sum = add_bytes(to.low[w], to.sum);
      if (kTwoDigits) {
        to.high[w] = pick_bytes(pick_bytes(q[0] + 128, q[1] + 128, 0x0051),
                                pick_bytes(q[2] + 128, q[3] + 128, 0x0051), 0x5410);
        to.sum += 256 * add_bytes(to.high[w], 0);
      }
    }
  }
};

// Reads four columns of a row that has `kSize`, zeros beyond.
template <int kSize, class X>
__device__ __forceinline__ void load_four(float (&value)[4], const X* row, int column) {
  if (kSize % 4 == 0) {
    if (column >= kSize) return;
    struct alignas(4 * sizeof(X)) Four {
      X x[4];
    };
    const Four four = *(const Four*)(row + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = to_float(four.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < kSize) value[i] = to_float(row[column + i]);
  }
}

// Writes a lane's kColumns neighbouring numbers of a row of `kSize`, the unit-th such, to the row's
// place in an image. All lanes of a warp do; both halves of a row are whole groups.
template <int kLevels, int kSize, class X, int kColumns>
__device__ __forceinline__ void write_record(void* image, int row, int unit,
                                             const X (&numbers)[kColumns]) {
  typedef Quantize<kLevels, kColumns> Lanes;
  constexpr int kHalf = kSize / 2 / kColumns, kGroups = kSize / 256;
  static_assert(kSize % 256 == 0, "a group would have columns of both halves");
  float value[1][kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) value[0][i] = to_float(numbers[i]);
  typename Lanes::Quantized quantized[1];
  Lanes::run(quantized, value);
  const int group = unit % kHalf / Lanes::kLanes;
  Record<kLevels>& record = ((Record<kLevels>*)image)[(size_t)row * kGroups + group];
  Lanes::keep(record, unit / kHalf, quantized[0], unit % Lanes::kLanes);
}

}  // namespace fairy
#endif  // FAIRY_QUANTIZE
