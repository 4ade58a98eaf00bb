// y = W x for few rows of x: 4-bit weights in groups of 32 with a float16 scale, or float16 ones.
// `Call` holds the constants of one call, see __init__.py.
//
// A warp computes `kOwn` output features. Its lanes read neighbouring 128 bits of their rows, which
// is one group of 4-bit weights (MLC's q4f16_1: code i of a word at bits 4 i, a weight is
// (code - 7) scale) or eight float16 ones. The first weights are asked for before x is copied to
// shared memory, before even the kernel that computes x is over, and always those of the next turn
// before those of this one are used.
#ifndef PEER_VECTORS
#define PEER_VECTORS

namespace peer {
using fairy::Word;

#ifdef __CUDACC__
__device__ __forceinline__ Word fma_halves(Word a, Word b, Word c) {
  Word sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
__device__ __forceinline__ float2 to_floats(Word pair) {
  return __half22float2(*(const __half2*)&pair);
}
#else
inline Word fma_halves(Word a, Word b, Word c) {
  float sum[2];
  for (int i = 0; i < 2; ++i)
    sum[i] = (float)fairy::element<__half>(a, i) * (float)fairy::element<__half>(b, i) +
             (float)fairy::element<__half>(c, i);
  return fairy::pack_halves(sum[0], sum[1]);
}
inline float2 to_floats(Word pair) {
  return {(float)fairy::element<__half>(pair, 0), (float)fairy::element<__half>(pair, 1)};
}
#endif

// Halves (code i - 7, code i + 4 - 7) of a word for i = 0 .. 3. The bits of 1024 + n as a half are
// 0x6400 | n; codes at bits 4 .. 7 count 16 times.
__device__ __forceinline__ void unpack_codes(Word (&pairs)[4], Word codes) {
  const Word kLow = 0x000f000fu, kHigh = 0x00f000f0u, k1024 = 0x64006400u;
  const Word kMinus1031 = 0xe407e407u, kMinus71 = 0xd470d470u, kSixteenth = 0x2c002c00u;
  pairs[0] = fairy::add_halves(fairy::mask_or(codes, kLow, k1024), kMinus1031);
  pairs[1] = fma_halves(fairy::mask_or(codes, kHigh, k1024), kSixteenth, kMinus71);
  codes >>= 8;
  pairs[2] = fairy::add_halves(fairy::mask_or(codes, kLow, k1024), kMinus1031);
  pairs[3] = fma_halves(fairy::mask_or(codes, kHigh, k1024), kSixteenth, kMinus71);
}

template <class Call>
struct Vectors {
  typedef typename Call::Y Y;
  static constexpr bool kFourBit = Call::kFourBit;
  static constexpr int kRows = Call::kRows;
  static constexpr int kOwn = Call::kOwn;
  static constexpr int kUnit = kFourBit ? 32 : 8;  // weights of 128 bits
  static constexpr int kUnits = Call::kIn / kUnit;
  static constexpr int kTurns = (kUnits + 31) / 32;
  // Units of x in shared memory at a time, a multiple of 32.
  static constexpr int kMost = (44 << 10) / (kRows * kUnit * 2) / 32 * 32;
  static constexpr int kChunk = kUnits < kMost ? kUnits : kMost;
  static constexpr int kParts = kFourBit ? 4 : 1;

  struct Shared {
    uint4 x[kRows][kParts][kChunk];
  };
  struct Weights {
    uint4 bits[kOwn];
    __half scale[kOwn];
  };

  static __device__ void run(const __half* x, const void* weights, const __half* scales, Y* y,
                             int batch) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int feature = (blockIdx.x * Call::kWarps + warp) * kOwn;
    const int first_row = blockIdx.y * kRows;
    const bool active = feature < Call::kOut;
    Weights next;
    if (active) {
      load(next, weights, scales, feature, lane);
      fetch(weights, feature, lane);
    }
    fairy::launch_dependents();
    fairy::wait_for_inputs();
    float sums[kRows][kOwn] = {};
    for (int first = 0; first < kUnits; first += kChunk) {
      if (first > 0) __syncthreads();
      copy_x(shared, x, batch, first_row, first);
      __syncthreads();
      if (!active) continue;
      const int end = first + kChunk < kUnits ? first + kChunk : kUnits;
#pragma unroll 2
      for (int unit = first + lane; unit < end; unit += 32) {
        const Weights now = next;
        if (unit + 32 < kUnits) load(next, weights, scales, feature, unit + 32);
        multiply(sums, now, shared, unit - first);
      }
    }
    if (!active) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        float sum = sums[r][i];
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) sum += fairy::shuffle_xor(sum, lanes);
        if (lane == 0 && first_row + r < batch && feature + i < Call::kOut)
          fairy::store(y + (size_t)(first_row + r) * Call::kOut + feature + i, sum);
      }
  }

 private:
  // Asks for the rows of a warp to be brought to the L2 cache, 128 bytes at a time.
  static __device__ __forceinline__ void fetch(const void* weights, int feature, int lane) {
    constexpr int kLines = kUnits / 8;
    const int rows = feature + kOwn <= Call::kOut ? kOwn : Call::kOut - feature;
    for (int line = lane; line < rows * kLines; line += 32)
      fairy::prefetch((const uint4*)weights + (size_t)feature * kUnits + line * 8);
  }

  static __device__ __forceinline__ void load(Weights& to, const void* weights,
                                              const __half* scales, int feature, int unit) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = feature + i < Call::kOut ? feature + i : Call::kOut - 1;
      if (unit < kUnits) {
        const size_t at = (size_t)row * kUnits + unit;
        to.bits[i] = fairy::load_once((const uint4*)weights + at);
        if (kFourBit) to.scale[i] = scales[at];
      }
    }
  }

  // Copies x; of a group of 4-bit weights in the order in which codes are unpacked, part by part, so
  // that neighbouring lanes read neighbouring 128 bits.
  static __device__ __forceinline__ void copy_x(Shared& shared, const __half* x, int batch,
                                                int first_row, int first) {
    constexpr int kEights = kChunk * kParts;
    for (int i = threadIdx.x; i < kRows * kEights; i += Call::kWarps * 32) {
      const int row = i / kEights, eight = i % kEights, unit = first + eight / kParts;
      uint4 value = {};
      if (unit < kUnits && first_row + row < batch)
        value = ((const uint4*)(x + (size_t)(first_row + row) * Call::kIn))[first * kParts + eight];
      if (kFourBit)
        value = {fairy::pick_bytes(value.x, value.z, 0x5410), fairy::pick_bytes(value.x, value.z, 0x7632),
                 fairy::pick_bytes(value.y, value.w, 0x5410), fairy::pick_bytes(value.y, value.w, 0x7632)};
      shared.x[row][eight % kParts][eight / kParts] = value;
    }
  }

  static __device__ __forceinline__ void multiply(float (&sums)[kRows][kOwn], const Weights& now,
                                                  const Shared& shared, int unit) {
    if (kFourBit) {
      Word partial[kRows][kOwn][2] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Word pairs[kOwn][4];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const uint4 bits = now.bits[i];
          unpack_codes(pairs[i], part == 0 ? bits.x : part == 1 ? bits.y : part == 2 ? bits.z : bits.w);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint4 value = shared.x[r][part][unit];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            Word(&sum)[2] = partial[r][i];
            sum[0] = fma_halves(pairs[i][0], value.x, sum[0]);
            sum[1] = fma_halves(pairs[i][1], value.y, sum[1]);
            sum[0] = fma_halves(pairs[i][2], value.z, sum[0]);
            sum[1] = fma_halves(pairs[i][3], value.w, sum[1]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const float2 a = to_floats(partial[r][i][0]), b = to_floats(partial[r][i][1]);
          sums[r][i] += fairy::to_float(now.scale[i]) * ((a.x + a.y) + (b.x + b.y));
        }
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint4 value = shared.x[r][0][unit];
      const Word words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Word own[4] = {now.bits[i].x, now.bits[i].y, now.bits[i].z, now.bits[i].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 a = to_floats(own[w]), b = to_floats(words[w]);
          sums[r][i] += a.x * b.x + a.y * b.y;
        }
      }
    }
  }
};

}  // namespace peer
#endif  // PEER_VECTORS
