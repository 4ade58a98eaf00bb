// Activations as operand B of decode.cuh, in shared memory: quantised here, or copied from what
// another kernel quantised (`kImage`), or normalised first (`kNorm`), as norm.cuh does. Every block
// normalises all of the row: where rows are short, that takes less time than another kernel.
#ifndef FAIRY_OPERAND_X
#define FAIRY_OPERAND_X

namespace fairy {

// A row that is to be normalised. With `kAdd`, x + other is, and block 0 keeps it as `sum`.
template <class X>
struct NormedRow {
  const X* x;
  const X* other;
  const float* weight;
  X* sum;
};

// Of every warp, the sum of the squares of its numbers.
template <int kWarps>
struct Squares {
  float squares[kWarps];
};
template <>
struct Squares<0> {};

template <class Call>
struct OperandX {
  typedef typename Call::Given Given;  // pointer to numbers or to records, or a NormedRow
  typedef Quantize<Call::kLevels, 4> Lanes;

  static constexpr int kGroups = (Call::kColumns + 127) / 128;
  static constexpr bool kTwoDigits = Call::kLevels > 127;
  static constexpr int kDigits = Record<Call::kLevels>::kDigits;
  static constexpr int kSlots = Call::kSlots;  // rows of x in an operand B
  // One row's columns are read twice, for those of a second.
  static constexpr int kColumnsB = kSlots > 1 ? 8 : kDigits;
  static constexpr int kOperands = Call::kOperands;  // operands B of a pass
  static constexpr int kRows = kSlots * kOperands;   // rows of x of a pass
  static constexpr int kGroupBytes = kOperands * kColumnsB * 128 + kRows * 32;  // of shared memory
  static constexpr int kMost = Call::kSharedBytes / kGroupBytes;  // groups in it at a time
  static constexpr int kChunks = (kGroups + kMost - 1) / kMost;
  static constexpr int kChunk = (kGroups + kChunks - 1) / kChunks;
  static constexpr int kTogether =  // groups that a warp quantises at once
      kOperands > 1 || kChunk >= 2 * Call::kWarps ? 2 : 1;
  // Groups that a warp normalises, in registers.
  static constexpr int kOwn = Call::kNorm ? (kGroups + Call::kWarps - 1) / Call::kWarps : 0;

  // Activations of a chunk of groups, as operands B.
  struct Chunk {
    // Block, operand, column of B ^ block in its group (so that banks differ), 4 columns of x.
    alignas(16) Word values[kChunk * 4][kOperands][kColumnsB][8];
    GroupScale scales[kChunk][kRows];
  };

  // Returns which 8 columns of x a lane reads of a block's operand B.
  static __device__ __forceinline__ int operand_at(int lane, int block) {
    if (kSlots > 1) return lane ^ 4 * block;
    return (lane / 4 % 4 * kColumnsB / 4 ^ block % kColumnsB) * 4 + lane % 4;
  }

  // Puts groups [first, end) of the pass's rows into shared memory. What belongs to rows beyond the
  // last is not written, and reaches no output.
  static __device__ __forceinline__ void take(Chunk& chunk, Given x, int batch,
                                              int first_row, int first, int end, int warp,
                                              int lane) {
    const int rows = batch - first_row < kRows ? batch - first_row : kRows;
    if constexpr (Call::kImage)
      copy(chunk, x + (size_t)first_row * kGroups, rows, first, end);
    else
      quantize(chunk, x, rows, first_row, first, end, warp, lane);
  }

  // What is read before the kernel that computes x is over.
  struct Early {
    float weight[kOwn > 0 ? kOwn * 2 : 1][4];  // group and half
  };

  static __device__ __forceinline__ void read_early(Early& early, const Given& x, int warp,
                                                    int lane) {
    if constexpr (Call::kNorm) {
#pragma unroll
      for (int n = 0; n < kOwn * 2; ++n)
        if (const int at = column(n, warp, lane); at >= 0)
          load_four<2 * Call::kColumns>(early.weight[n], x.weight, at);
    }
  }

  // Normalises a row, which is one chunk, and quantises it.
  template <class Shared>
  static __device__ __forceinline__ void normalise(Shared& shared, const Given& row,
                                                   const Early& early, int warp, int lane) {
    typedef typename Call::X X;
    float value[kOwn * 2][4] = {};
    float squares = 0;
#pragma unroll
    for (int n = 0; n < kOwn * 2; ++n) {
      const int at = column(n, warp, lane);
      if (at < 0) continue;
      load_four<2 * Call::kColumns>(value[n], row.x, at);
      if constexpr (Call::kAdd) {
        struct alignas(4 * sizeof(X)) Four {
          X x[4];
        } sum;
        float other[4];
        load_four<2 * Call::kColumns>(other, row.other, at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          store(&sum.x[i], value[n][i] + other[i]);
          value[n][i] = to_float(sum.x[i]);
        }
        if (blockIdx.x == 0) *(Four*)(row.sum + at) = sum;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) squares += value[n][i] * value[n][i];
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += shuffle_xor(squares, lanes);
    if (lane == 0) shared.squares[warp] = squares;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int w = 0; w < Call::kWarps; ++w) total += shared.squares[w];
    const float factor = 1.0f / sqrtf(total / (2 * Call::kColumns) + Call::eps());
#pragma unroll
    for (int n = 0; n < kOwn * 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        X rounded;
        store(&rounded, value[n][i] * factor * early.weight[n][i]);
        value[n][i] = to_float(rounded);
      }
    typename Lanes::Quantized quantized[kOwn * 2];
    Lanes::run(quantized, value);
#pragma unroll
    for (int n = 0; n < kOwn * 2; ++n)
      if (const int group = warp + n / 2 * Call::kWarps; group < kGroups)
        keep(shared.chunk, group, 0, n % 2, quantized[n], lane);
  }

 private:
  // Returns the first of a lane's four numbers of a group and half of its warp, or -1.
  static __device__ __forceinline__ int column(int n, int warp, int lane) {
    const int group = warp + n / 2 * Call::kWarps;
    return group < kGroups ? n % 2 * Call::kColumns + group * 128 + 4 * lane : -1;
  }

  // Copies what another kernel quantised.
  static __device__ __forceinline__ void copy(Chunk& chunk, const Record<Call::kLevels>* records,
                                              int rows, int first, int end) {
    constexpr int kVectors = sizeof(*records) / 16;
    const int count = (end - first) * kVectors;
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * count; i += Call::kWarps * 32) {
      const int row = kRows == 1 ? 0 : i / count;
      const int group = (i - row * count) / kVectors, vector = (i - row * count) % kVectors;
      const int block = vector / (2 * kDigits), digit = vector / 2 % kDigits;
      const uint4* from = (const uint4*)(records + (size_t)row * kGroups + first + group) + vector;
      uint4* to = (uint4*)&chunk.scales[group][row] + vector % 2;
      if (block < 4)
        to = (uint4*)chunk.values[group * 4 + block][row / kSlots][place(row, digit, block)] +
             vector % 2;
      copy_async(to, from, true);
    }
    commit_copies();
    wait_copies<0>();
  }

  // Quantises as op.quantize_activations does: a warp takes a group, a lane four columns of it. It
  // takes both halves of several groups at once.
  static __device__ __forceinline__ void quantize(Chunk& chunk, Given x, int rows,
                                                  int first_row, int first, int end, int warp,
                                                  int lane) {
    for (int task = warp; task < rows * kChunk; task += Call::kWarps * kTogether) {
      float value[kTogether * 2][4] = {};
#pragma unroll
      for (int n = 0; n < kTogether * 2; ++n) {
        const int own = task + n / 2 * Call::kWarps, row = own / kChunk, group = own % kChunk;
        if (row < rows && group < end - first)
          load_four<Call::kColumns>(value[n],
                                    x + ((size_t)(first_row + row) * 2 + n % 2) * Call::kColumns,
                                    (first + group) * 128 + 4 * lane);
      }
      typename Lanes::Quantized quantized[kTogether * 2];
      Lanes::run(quantized, value);
#pragma unroll
      for (int n = 0; n < kTogether * 2; ++n) {
        const int own = task + n / 2 * Call::kWarps, row = own / kChunk, group = own % kChunk;
        if (row < rows && group < end - first) keep(chunk, group, row, n % 2, quantized[n], lane);
      }
    }
  }

  static __device__ __forceinline__ void keep(Chunk& chunk, int group, int row, int half,
                                              const typename Lanes::Quantized& quantized,
                                              int lane) {
    const int block = lane / 8, word = lane % 8;
    Word(&values)[kColumnsB][8] = chunk.values[group * 4 + block][row / kSlots];
    if (kTwoDigits) {
      values[place(row, 2 * half, block)][word] = quantized.high[0];
      values[place(row, 2 * half + 1, block)][word] = quantized.low[0];
    } else {
      values[place(row, half, block)][word] = quantized.low[0];
    }
    GroupScale& scale = chunk.scales[group][row];
    if (lane == 0) scale.scale[half] = Lanes::scale_of(quantized);
    if (lane % 16 == 0) scale.sums[lane / 16][half] = quantized.sum;
  }

  // Returns where a digit of a row lies among the columns of operand B.
  static __device__ __forceinline__ constexpr int place(int row, int digit, int block) {
    constexpr int kEach = kSlots == 1 ? kDigits : 8 / kSlots;
    return (row % kSlots * kEach + digit * (kEach / kDigits)) ^ (block % kColumnsB);
  }
};

}  // namespace fairy
#endif  // FAIRY_OPERAND_X
