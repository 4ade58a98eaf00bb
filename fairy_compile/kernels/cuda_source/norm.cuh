// y = x / sqrt(mean(x^2) + eps) * weight, row by row; with `kAdd`, of x + other, which is kept too. With
// `kLevels`, y is written as an image, see quantize.cuh.
// `Call` holds the constants of one call, see kernels/cuda_norm.py.
//
// A block works on one row, which its threads hold in registers between reading and writing it.
#ifndef FAIRY_NORM
#define FAIRY_NORM

namespace fairy {

template <class Call>
struct Norm {
  typedef typename Call::X X;
  static constexpr int kLanes = 16 / sizeof(X);  // numbers of 128 bits
  static constexpr int kUnits = Call::kSize / kLanes;
  static constexpr int kOwn = (kUnits + Call::kThreads - 1) / Call::kThreads;
  static constexpr int kWarps = Call::kThreads / 32;
  struct alignas(16) Unit {
    X x[kLanes];
  };
  struct Shared {
    float squares[kWarps];
  };

  static __device__ void run(const X* x, const X* other, const float* weight, X* sum, void* y) {
    __shared__ Shared shared;
    const Unit* from = (const Unit*)(x + (size_t)blockIdx.x * Call::kSize);
    const Unit* more = (const Unit*)(other + (size_t)blockIdx.x * Call::kSize);
    Unit own[kOwn];
    float weights[kOwn][kLanes];
    launch_dependents();
    // Weights are there before the kernel that computes x is over.
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int unit = threadIdx.x + i * Call::kThreads;
      if (unit >= kUnits) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) weights[i][j] = weight[unit * kLanes + j];
    }
    wait_for_inputs();
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int unit = threadIdx.x + i * Call::kThreads;
      if (unit >= kUnits) continue;
      own[i] = from[unit];
      if (Call::kAdd) {
        const Unit added = more[unit];
#pragma unroll
        for (int j = 0; j < kLanes; ++j)
          store(&own[i].x[j], to_float(own[i].x[j]) + to_float(added.x[j]));
        ((Unit*)(sum + (size_t)blockIdx.x * Call::kSize))[unit] = own[i];
      }
#pragma unroll
      for (int j = 0; j < kLanes; ++j) squares += to_float(own[i].x[j]) * to_float(own[i].x[j]);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += shuffle_xor(squares, lanes);
    if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared.squares[warp];
    const float factor = 1.0f / sqrtf(total / Call::kSize + Call::eps());
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int unit = threadIdx.x + i * Call::kThreads;
      if (unit >= kUnits) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j)
        store(&own[i].x[j], to_float(own[i].x[j]) * factor * weights[i][j]);
      if constexpr (Call::kLevels > 0)
        write_record<Call::kLevels, Call::kSize>(y, blockIdx.x, unit, own[i].x);
      else
        ((Unit*)((X*)y + (size_t)blockIdx.x * Call::kSize))[unit] = own[i];
    }
  }
};

}  // namespace fairy
#endif  // FAIRY_NORM
