// Adds the sums that splits.cuh speaks of, of all splits in their order. A thread adds two features
// of a row, blockIdx.y.
#ifndef FAIRY_ADD_SPLITS
#define FAIRY_ADD_SPLITS

namespace fairy {

template <class Call>
struct AddSplits {
  typedef typename Call::Y Y;

  static __device__ void run(void* scratch, const float* bias, Y* y, int batch) {
    const int feature = 2 * (blockIdx.x * Call::kAddThreads + threadIdx.x), row = blockIdx.y;
    launch_dependents();
    wait_for_inputs();
    if (row >= batch || feature >= Call::kFeatures) return;
    const float* from = Splits<Call>::sums(scratch, batch) + (size_t)row * Call::kFeatures + feature;
    float2 sum = {0, 0};
#pragma unroll
    for (int split = 0; split < Call::kSplits; ++split) {
      const float2 own = *(const float2*)(from + (size_t)split * batch * Call::kFeatures);
      sum.x += own.x, sum.y += own.y;
    }
    if (Call::kBias) sum.x += bias[feature], sum.y += bias[feature + 1];
    Y* to = y + (size_t)row * Call::kFeatures + feature;
    store(to, sum.x), store(to + 1, sum.y);
  }
};

}  // namespace fairy
#endif  // FAIRY_ADD_SPLITS
