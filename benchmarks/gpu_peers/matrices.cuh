// y = x W^T for many rows of x in float16 tensor cores, weights as in vectors.cuh.
//
// A block computes kTokens rows of x times kFeatures features in steps of 32 columns. Tiles lie in
// shared memory as rows of 4 x 128 bits; lane (g, t) reads columns 8 t .. 8 t + 7 of row g, its
// shares of the operands of two mma.m16n8k16: both operands order the reduction alike. x, and float16
// weights, are copied asynchronously kBuffers - 1 steps ahead; 4-bit weights come through registers.
#ifndef PEER_MATRICES
#define PEER_MATRICES

namespace peer {

template <class Call>
struct Matrices {
  typedef typename Call::Y Y;
  static constexpr bool kFourBit = Call::kFourBit;
  static constexpr int kIn = Call::kIn, kOut = Call::kOut;
  static constexpr int kTokenTiles = Call::kTokenTiles;      // of 16 rows of x, a warp
  static constexpr int kFeatureTiles = Call::kFeatureTiles;  // of 8 features, a warp
  static constexpr int kTokens = 16 * kTokenTiles * Call::kTokenWarps;
  static constexpr int kFeatures = 8 * kFeatureTiles * Call::kFeatureWarps;
  static constexpr int kThreads = 32 * Call::kTokenWarps * Call::kFeatureWarps;
  static constexpr int kBuffers = Call::kBuffers;
  static constexpr int kWeightBuffers = kFourBit ? 2 : kBuffers;
  static constexpr int kSteps = kIn / 32;
  static constexpr int kGroups = (kFeatures + kThreads - 1) / kThreads;  // of a thread and step

  struct Shared {
    uint4 x[kBuffers][kTokens][4];
    uint4 w[kWeightBuffers][kFeatures][4];
  };
  struct Codes {
    uint4 bits[kGroups];
    __half scale[kGroups];
  };

  static __device__ void run(const __half* x, const void* weights, const __half* scales, Y* y,
                             int batch) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_feature = blockIdx.x * kFeatures, first_row = blockIdx.y * kTokens;
    const int own_row = warp % Call::kTokenWarps * kTokenTiles * 16;
    const int own_feature = warp / Call::kTokenWarps * kFeatureTiles * 8;
    Codes codes;
    fairy::launch_dependents();
    if (kFourBit) {
      load(codes, weights, scales, first_feature, 0);
      unpack(shared.w[0], codes);
      if (kSteps > 1) load(codes, weights, scales, first_feature, 1);
    }
    fairy::wait_for_inputs();
#pragma unroll
    for (int step = 0; step < kBuffers - 1; ++step) {
      if (step < kSteps) copy(shared, x, weights, batch, first_row, first_feature, step);
      fairy::commit_copies();
    }
    float sums[kTokenTiles][kFeatureTiles][4] = {};
    for (int step = 0; step < kSteps; ++step) {
      fairy::wait_copies<kBuffers - 2>();
      __syncthreads();
      const int ahead = step + kBuffers - 1;
      if (ahead < kSteps) copy(shared, x, weights, batch, first_row, first_feature, ahead);
      fairy::commit_copies();
      if (kFourBit && step + 1 < kSteps) {
        unpack(shared.w[(step + 1) % 2], codes);
        if (step + 2 < kSteps) load(codes, weights, scales, first_feature, step + 2);
      }
      multiply(sums, shared.x[step % kBuffers], shared.w[step % kWeightBuffers], own_row,
               own_feature, lane);
    }
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m)
#pragma unroll
      for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = first_row + own_row + 16 * m + lane / 4 + 8 * (r / 2);
          const int feature = first_feature + own_feature + 8 * n + lane % 4 * 2 + r % 2;
          if (row < batch && feature < kOut)
            fairy::store(y + (size_t)row * kOut + feature, sums[m][n][r]);
        }
  }

 private:
  static __device__ __forceinline__ void copy(Shared& shared, const __half* x, const void* weights,
                                              int batch, int first_row, int first_feature,
                                              int step) {
    copy_rows<kTokens>(shared.x[step % kBuffers], (const uint4*)x, first_row, batch, step);
    if (!kFourBit)
      copy_rows<kFeatures>(shared.w[step % kWeightBuffers], (const uint4*)weights, first_feature,
                           kOut, step);
  }

  // Copies 32 columns of rows [first, first + kCount), zeros from row `rows` on.
  template <int kCount>
  static __device__ __forceinline__ void copy_rows(uint4 (&to)[kCount][4], const uint4* from,
                                                   int first, int rows, int step) {
#pragma unroll
    for (int i = threadIdx.x; i < kCount * 4; i += kThreads) {
      const int row = i / 4, part = i % 4;
      const bool inside = first + row < rows;
      const size_t source = (size_t)(inside ? first + row : 0) * (kIn / 8) + step * 4 + part;
      fairy::copy_async(&to[row][part], from + source, inside);
    }
  }

  static __device__ __forceinline__ void load(Codes& codes, const void* weights,
                                              const __half* scales, int first_feature, int step) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int own = threadIdx.x + i * kThreads;
      const int feature = first_feature + own < kOut ? first_feature + own : kOut - 1;
      if (own < kFeatures) {
        const size_t at = (size_t)feature * kSteps + step;
        codes.bits[i] = fairy::load_once((const uint4*)weights + at);
        codes.scale[i] = scales[at];
      }
    }
  }

  static __device__ __forceinline__ void unpack(uint4 (&to)[kFeatures][4], const Codes& codes) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int own = threadIdx.x + i * kThreads;
      if (own >= kFeatures) continue;
      const float one = fairy::to_float(codes.scale[i]);
      const Word scale = fairy::pack_halves(one, one);
      const uint4 bits = codes.bits[i];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        Word pairs[4];
        unpack_codes(pairs, part == 0 ? bits.x : part == 1 ? bits.y : part == 2 ? bits.z : bits.w);
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = fma_halves(pairs[j], scale, 0x80008000u);
        to[own][part] = {fairy::pick_bytes(pairs[0], pairs[1], 0x5410),
                         fairy::pick_bytes(pairs[2], pairs[3], 0x5410),
                         fairy::pick_bytes(pairs[0], pairs[1], 0x7632),
                         fairy::pick_bytes(pairs[2], pairs[3], 0x7632)};
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&sums)[kTokenTiles][kFeatureTiles][4],
                                                  const uint4 (&x)[kTokens][4],
                                                  const uint4 (&w)[kFeatures][4], int own_row,
                                                  int own_feature, int lane) {
    const int g = lane / 4, t = lane % 4;
    uint4 b[kFeatureTiles];
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n) b[n] = w[own_feature + 8 * n + g][t];
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const uint4 low = x[own_row + 16 * m + g][t], high = x[own_row + 16 * m + g + 8][t];
      const Word first[4] = {low.x, high.x, low.y, high.y};
      const Word second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (int n = 0; n < kFeatureTiles; ++n) {
        fairy::multiply_halves(sums[m][n], first, b[n].x, b[n].y);
        fairy::multiply_halves(sums[m][n], second, b[n].z, b[n].w);
      }
    }
  }
};

}  // namespace peer
#endif  // PEER_MATRICES
