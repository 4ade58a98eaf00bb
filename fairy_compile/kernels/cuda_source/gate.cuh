// y = activation(gate) up of rows (gate, up), in float; with `kLevels`, y is written as an image, see
// quantize.cuh. `Call` holds the constants of one call, see kernels/cuda_gate.py. A thread computes
// 128 bits of y, blockIdx.y is the row.
#ifndef FAIRY_GATE
#define FAIRY_GATE

namespace fairy {

template <class Call>
struct GateProduct {
  typedef typename Call::X X;
  static constexpr int kLanes = 16 / sizeof(X);
  static constexpr int kUnits = Call::kSize / kLanes;
  struct alignas(16) Unit {
    X x[kLanes];
  };

  static __device__ void run(const X* x, void* y) {
    const int unit = blockIdx.x * Call::kThreads + threadIdx.x;
    const Unit* row = (const Unit*)(x + (size_t)blockIdx.y * 2 * Call::kSize);
    launch_dependents();
    wait_for_inputs();
    if (unit >= kUnits) return;  // whole warps, where an image is written
    const Unit gate = row[unit], up = row[kUnits + unit];
    Unit product;
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      store(&product.x[i], Call::activate(to_float(gate.x[i])) * to_float(up.x[i]));
    if constexpr (Call::kLevels > 0)
      write_record<Call::kLevels, Call::kSize>(y, blockIdx.y, unit, product.x);
    else
      ((Unit*)((X*)y + (size_t)blockIdx.y * Call::kSize))[unit] = product;
  }
};

}  // namespace fairy
#endif  // FAIRY_GATE
