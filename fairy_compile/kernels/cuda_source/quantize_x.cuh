// Writes the image of x that decode.cuh may take in place of x: a warp takes a group of 128 columns,
// blockIdx.y is the row.
#ifndef FAIRY_QUANTIZE_X
#define FAIRY_QUANTIZE_X

namespace fairy {

template <class Call>
struct QuantizeX {
  typedef typename Call::X X;
  typedef Quantize<Call::kLevels, 4> Lanes;
  static constexpr int kGroups = (Call::kColumns + 127) / 128;

  static __device__ void run(const X* x, Record<Call::kLevels>* image, int batch) {
    const int lane = threadIdx.x % 32, row = blockIdx.y;
    const int group = (blockIdx.x * Call::kThreads + threadIdx.x) / 32;
    launch_dependents();
    wait_for_inputs();
    if (row >= batch || group >= kGroups) return;
    float value[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_four<Call::kColumns>(value[half], x + ((size_t)row * 2 + half) * Call::kColumns,
                                group * 128 + 4 * lane);
    typename Lanes::Quantized quantized[2];
    Lanes::run(quantized, value);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      Lanes::keep(image[(size_t)row * kGroups + group], half, quantized[half], lane);
  }
};

}  // namespace fairy
#endif  // FAIRY_QUANTIZE_X
