// Blocks that share the columns of a matrix, blockIdx.z: what prefill.cuh and hopper.cuh do where one
// block for all columns would leave multiprocessors without work. `Call` holds the constants of one
// call, see kernels/cuda_source/__init__.py.
//
// Each writes its sums as float to scratch memory; `AddSplits` runs after all of them. Scratch memory:
//
//     image of x, if there is one: kImageBytes for every kTokens rows of x
//     float sums[split][row of x][feature]
#ifndef FAIRY_SPLITS
#define FAIRY_SPLITS

namespace fairy {

template <bool kFirst, class A, class B>
struct Either {
  typedef A Type;
};
template <class A, class B>
struct Either<false, A, B> {
  typedef B Type;
};

template <class Call>
struct Splits {
  static constexpr int kSplits = Call::kSplits;
  static constexpr int kGroups = (Call::kColumns + 127) / 128;
  static constexpr int kBlocks = (Call::kColumns + 31) / 32;
  static constexpr int kShare = (kGroups + kSplits - 1) / kSplits;
  static constexpr bool kRagged = kBlocks % 4 != 0;  // the last group has fewer blocks than others
  typedef typename Either<kSplits == 1, typename Call::Y, float>::Type Out;

  static __device__ __forceinline__ int first_group() {
    return kSplits == 1 ? 0 : blockIdx.z * kShare;
  }
  static __device__ __forceinline__ int end_group() {
    const int end = first_group() + kShare;
    return kSplits == 1 || end > kGroups ? kGroups : end;
  }
  static __device__ __forceinline__ int end_block() {
    const int end = 4 * end_group();
    return end > kBlocks ? kBlocks : end;
  }

  // Returns where the sums of all blocks with an own share of the columns begin.
  static __device__ __forceinline__ float* sums(void* scratch, int batch) {
    const size_t images = (size_t)(batch + Call::kTokens - 1) / Call::kTokens * Call::kImageBytes;
    return (float*)((unsigned char*)scratch + images);
  }

  // Returns where a block's outputs go: y itself, or scratch memory in its place.
  static __device__ __forceinline__ Out* outputs(void* y, int batch) {
    if (kSplits == 1) return (Out*)y;
    return (Out*)(sums(y, batch) + (size_t)blockIdx.z * batch * Call::kFeatures);
  }
};

// Adds the sums of all splits, in their order. A thread adds two features of a row, blockIdx.y.
template <class Call>
struct AddSplits {
  typedef typename Call::Y Y;

  static __device__ void run(void* scratch, Y* y, int batch) {
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
    Y* to = y + (size_t)row * Call::kFeatures + feature;
    store(to, sum.x), store(to + 1, sum.y);
  }
};

}  // namespace fairy
#endif  // FAIRY_SPLITS
