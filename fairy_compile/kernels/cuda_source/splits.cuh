// Blocks that share the columns of a matrix, blockIdx.z: what prefill.cuh and hopper.cuh do where one
// block for all columns would leave multiprocessors without work. `Call` holds the constants of one
// call, see kernels/cuda_source/__init__.py.
//
// Each writes its sums as float to scratch memory; add_splits.cuh runs after all of them. Scratch memory:
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
  static constexpr bool kAddsBias = Call::kBias && kSplits == 1;  // else what adds sums up does
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

}  // namespace fairy
#endif  // FAIRY_SPLITS
