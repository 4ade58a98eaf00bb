// Phase GEMM for many rows of x: codes become operands of the tensor cores in registers, in float16,
// or in bfloat16 where x is.
// `Call` holds the constants of one call, see kernels/cuda_source/__init__.py.
//
// A complex weight of all stages is a real 2x2 block, rows (Re y, Im y) and columns (Re x, Im x):
//   [ Re(U + W)   Im(W - U) ]
//   [ Im(U + W)   Re(U - W) ]
// The bits of a stage are a digit (4 bits for U and W, 2 for W) that looks its block up in shared
// memory; blocks of stages are added. The 16 entries of 8 bytes of a table lie in different banks.
// A warp decodes 16 complex rows for all `kTokens` rows of x of its block, so that decoded weights
// never leave registers: lane (g, t) holds rows g, g + 8 and columns 8 t .. 8 t + 7 of a block of
// codes, which are its shares of operand A of two mma.m16n8k16, if the eight columns
// 8 t .. 8 t + 7 of x are those of operand B: one 128-bit load. Both operands order the reduction
// alike, which is all that it takes.
#ifndef FAIRY_PREFILL
#define FAIRY_PREFILL

namespace fairy {

template <class Call>
struct Prefill : private Tables<Call> {
  typedef Tables<Call> Base;
  typedef typename Call::X X;
  typedef Splits<Call> Share;
  typedef typename Share::Out Out;
  typedef typename Call::Operand Operand;

  using Base::kEntries, Base::kFragments, Base::kGroups;
  using Base::kStages, Base::kTableRows, Base::kTileScales;
  static constexpr int kTokens = Call::kTokens;
  static constexpr int kOperands = kTokens / 8;
  static constexpr int kBuffers = Call::kBuffers;
  static constexpr bool kAsync = kSame<X, Operand> && Call::kColumns % 8 == 0;

  struct Shared {
    alignas(128) uint2 table[Call::kWarps][kTableRows][kStages][kEntries];
    alignas(128) uint4 x[kBuffers][2][kTokens][4];  // half of x, row, 8 columns
  };
  typedef Word Operands[2][2][2][4];  // half of y, half of x, columns 0-3 or 4-7, register

  static __device__ void run(const X* x, const unsigned char* codes, const float* scales,
                             const float* bias, void* y, int batch) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x * Call::kWarps + warp, first_row = blockIdx.y * kTokens;
    const bool active = tile < Call::kRowTiles;
    uint2(&table)[kTableRows][kStages][kEntries] = shared.table[warp];

    const uint4* own = (const uint4*)codes + (size_t)tile * kGroups * kFragments * 32 + lane;
    uint4 fragments[kFragments];
    const int first_group = Share::first_group(), end_group = Share::end_group();
    const int end_block = Share::end_block();
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if (active) fragments[f] = load_once(own + (first_group * kFragments + f) * 32);
    if (active && !kTileScales) fill_table(table, scales, tile, 0, lane);
    launch_dependents();
    wait_for_inputs();
#pragma unroll
    for (int i = 0; i < kBuffers - 1; ++i) {
      const int block = 4 * first_group + i;
      if (block < end_block) copy_x(shared.x[block % kBuffers], x, batch, first_row, block);
      commit_copies();
    }
    float sums[2][kOperands][4] = {};  // half of y

    for (int group = first_group; group < end_group; ++group) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int block = group * 4 + b, ahead = block + kBuffers - 1;
        if (Share::kRagged && block >= end_block) break;
        wait_copies<kBuffers - 2>();
        __syncthreads();
        if (ahead < end_block) copy_x(shared.x[ahead % kBuffers], x, batch, first_row, ahead);
        commit_copies();
        if (!active) continue;
        if (kTileScales && b % 2 == 0) fill_table(table, scales, tile, block / 2, lane);
        Operands operands;
        decode(operands, shared_address(&table), fragments, b, lane);
        if (group + 1 < end_group) Base::refill(fragments, own, group + 1, b);
        multiply(sums, operands, shared.x[block % kBuffers], lane);
      }
    }
    if (active) store_sums(sums, bias, Share::outputs(y, batch), batch, first_row, tile, lane);
  }

 private:
  // Computes a warp's own tables, entries (of Re y, of Im y) of what Re x, Im x is multiplied by.
  static __device__ __forceinline__ void fill_table(uint2 (&table)[kTableRows][kStages][kEntries],
                                                    const float* scales, int tile, int column_tile,
                                                    int lane) {
    const float* own = Base::scales_of(scales, tile, column_tile);
    Base::fill_tables(table, own, lane, [](const DigitWeights& weights) {
      return uint2{weights.for_re<Operand>(), weights.for_im<Operand>()};
    });
  }

  // Copies block `block` of 32 columns of both halves of the rows, zeros beyond their ends. A thread
  // copies eight columns, of every so many rows.
  static __device__ __forceinline__ void copy_x(uint4 (&to)[2][kTokens][4], const X* x, int batch,
                                                int first_row, int block) {
    constexpr int step = Call::kWarps * 32 / 4;
    const int own = threadIdx.x / 4, part = threadIdx.x % 4, column = block * 32 + part * 8;
    const X* from = x + (size_t)(first_row + own) * 2 * Call::kColumns + column;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int first = 0; first < kTokens; first += step) {
        if (kTokens % step != 0 && first + own >= kTokens) continue;
        copy_columns(to[half][first + own][part], from + (first * 2 + half) * Call::kColumns,
                     first_row + first + own < batch, column);
      }
  }

  static __device__ __forceinline__ void copy_columns(uint4& to, const X* from, bool inside,
                                                      int column) {
    if (kAsync) {
      inside = inside && (Call::kColumns % 32 == 0 || column < Call::kColumns);
      copy_async(&to, from, inside);
      return;
    }
    float value[8];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      value[c] = inside && column + c < Call::kColumns ? to_float(from[c]) : 0.0f;
    to = {pack_pair<Operand>(value[0], value[1]), pack_pair<Operand>(value[2], value[3]),
          pack_pair<Operand>(value[4], value[5]), pack_pair<Operand>(value[6], value[7])};
  }

  // Looks up a lane's weights of a block. Register r holds row g + 8 (r % 2), columns 8 t +
  // 4 (r / 2) + 0 .. 3; two neighbouring columns are a register of an operand.
  static __device__ __forceinline__ void decode(Operands& operands, Word tables,
                                                const uint4 (&codes)[kFragments], int block,
                                                int lane) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = kTableRows > 1 ? lane / 4 + 8 * (r % 2) : 0;
      const Word row_tables = tables + row * (kStages * kEntries * 8);
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const uint2 first = look_up(row_tables, codes, block, r, e);
        const uint2 second = look_up(row_tables, codes, block, r, e + 1);
        const int to = r % 2 + e, columns = r / 2;
        operands[0][0][columns][to] = pick_bytes(first.x, second.x, 0x5410);
        operands[0][1][columns][to] = pick_bytes(first.x, second.x, 0x7632);
        operands[1][0][columns][to] = pick_bytes(first.y, second.y, 0x5410);
        operands[1][1][columns][to] = pick_bytes(first.y, second.y, 0x7632);
      }
    }
  }

  // Sums the entries of a weight's digits.
  static __device__ __forceinline__ uint2 look_up(Word row_tables, const uint4 (&codes)[kFragments],
                                                  int block, int r, int e) {
    uint2 sum = {};
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const Word at = Base::template entry_address<3>(row_tables, codes, block, stage, r, e);
      const uint2 entry = load_shared(at, stage * (kEntries * 8));
      sum = stage == 0 ? entry
                       : uint2{add_pairs<Operand>(sum.x, entry.x),
                               add_pairs<Operand>(sum.y, entry.y)};
    }
    return sum;
  }

  static __device__ __forceinline__ void multiply(float (&sums)[2][kOperands][4],
                                                  const Operands& operands,
                                                  const uint4 (&x)[2][kTokens][4], int lane) {
#pragma unroll
    for (int n = 0; n < kOperands; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 b = x[half][8 * n + lane / 4][lane % 4];
#pragma unroll
        for (int out = 0; out < 2; ++out) {
          multiply_pairs<Operand>(sums[out][n], operands[out][half][0], b.x, b.y);
          multiply_pairs<Operand>(sums[out][n], operands[out][half][1], b.z, b.w);
        }
      }
  }

  static __device__ __forceinline__ void store_sums(const float (&sums)[2][kOperands][4],
                                                    const float* bias, Out* y, int batch,
                                                    int first_row, int tile, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int feature = Call::feature(tile, lane / 4 + 8 * r, half);
        if (feature < 0) continue;
        const float more = Share::kAddsBias ? bias[feature] : 0;
#pragma unroll
        for (int n = 0; n < kOperands; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int row = first_row + 8 * n + lane % 4 * 2 + c;
            if (row < batch)
              store(y + (size_t)row * Call::kFeatures + feature, sums[half][n][2 * r + c] + more);
          }
      }
  }
};

}  // namespace fairy
#endif  // FAIRY_PREFILL
