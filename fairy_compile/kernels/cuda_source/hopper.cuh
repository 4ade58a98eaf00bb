// Phase GEMM for many rows of x on Hopper: as prefill.cuh, with warpgroup matrix instructions.
// `Call` holds the constants of one call, see kernels/cuda_source/__init__.py.
//
// A block computes 4 row tiles (64 complex rows, 128 real outputs) for `kTokens` rows of x in two
// warpgroups. Warps 0 and 1 of a warpgroup decode the real outputs of its two row tiles, warps 2 and
// 3 the imaginary ones, so that a warp looks up 4 bytes of a table for a weight, not 8, and every
// decoded weight meets 256 rows of x. While one block of 32 columns is multiplied, the next is
// decoded. One thread asks for x, several blocks ahead.
//
// `ArrangeX` runs before: it writes x as float16, or as bfloat16 where x is, in the order that operand B
// has in shared memory, so that a block of columns is one bulk copy. A lane decodes columns
// 8 t .. 8 t + 7 (t = lane % 4) of a block, which as operand A are rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9
// of two steps of 16; rows of x follow. The image of x:
//
//     image[token block][block][half of x][step][line][token][2 t + c] = x[8 t + 4 step + 2 line + c]
#ifndef FAIRY_HOPPER
#define FAIRY_HOPPER

namespace fairy {

template <class Call>
struct HopperImage {
  static constexpr int kTokens = Call::kTokens;
  static constexpr int kBlocks = (Call::kColumns + 31) / 32;
  static constexpr int kLines = 8;                           // of core matrices: half, step, line
  static constexpr int kLine = kTokens;                      // vectors of 16 bytes
  static constexpr int kVectors = kLines * kLine;            // of a block of columns
};

template <class Call>
struct ArrangeX {
  typedef typename Call::X X;
  typedef typename Call::Operand Operand;
  typedef HopperImage<Call> Image;

  // A thread writes 32 columns of one half of one row; blockIdx.x counts (block, half).
  static __device__ void run(const X* x, uint4* image, int batch) {
    const int half = blockIdx.x % 2, block = blockIdx.x / 2;
    const int own = blockIdx.y * Call::kThreads + threadIdx.x, token = own % Image::kTokens;
    uint4* to = image + ((size_t)(own / Image::kTokens) * Image::kBlocks + block) * Image::kVectors +
                half * 4 * Image::kLine + token;
    Word pairs[16];
    launch_dependents();
    wait_for_inputs();
    read(pairs, x + ((size_t)own * 2 + half) * Call::kColumns, own < batch, block * 32);
#pragma unroll
    for (int line = 0; line < 4; ++line)
      to[line * Image::kLine] = {pairs[line], pairs[4 + line], pairs[8 + line], pairs[12 + line]};
  }

 private:
  static __device__ __forceinline__ void read(Word (&pairs)[16], const X* row, bool inside,
                                              int column) {
    if constexpr (kSame<X, Operand> && Call::kColumns % 32 == 0) {
      const uint4* from = (const uint4*)(row + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 eight = inside ? from[i] : uint4{};
        pairs[4 * i] = eight.x, pairs[4 * i + 1] = eight.y;
        pairs[4 * i + 2] = eight.z, pairs[4 * i + 3] = eight.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float value[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = column + 2 * i + c;
          value[c] = inside && at < Call::kColumns ? to_float(row[at]) : 0.0f;
        }
        pairs[i] = pack_pair<Operand>(value[0], value[1]);
      }
    }
  }
};

template <class Call>
struct Hopper : private Tables<Call> {
  typedef Tables<Call> Base;
  typedef Splits<Call> Share;
  typedef typename Share::Out Out;
  typedef typename Call::Operand Operand;
  typedef HopperImage<Call> Image;

  using Base::kEntries, Base::kFragments, Base::kGroups;
  using Base::kStages, Base::kTableRows, Base::kTileScales;
  static constexpr int kTokens = Call::kTokens;
  static constexpr int kParts = kTokens / 128;  // multiplications of a step
  static constexpr int kBuffers = Call::kBuffers;
  static constexpr int kBehind = 2;  // blocks until a buffer is filled again: others' time to finish
  static constexpr int kGroupsOfWarps = 2;
  static constexpr int kWarps = 4 * kGroupsOfWarps;  // that multiply
  static constexpr int kTiles = 2 * kGroupsOfWarps;  // row tiles of a block
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kOutputs = 32 * kTiles;       // real ones
  // Outputs on their way to y: rows of x at a time, and what one takes. Neighbouring rows begin 16
  // bytes of banks apart.
  static constexpr int kStaged = sizeof(Out) == 2 ? kTokens : 128;
  static constexpr int kPitch = kOutputs + 16 / sizeof(Out);

  struct alignas(128) Stages {
    uint4 x[kBuffers][Image::kVectors];
  };
  struct Shared {
    union {
      Stages stages;
      alignas(128) Out y[kStaged][kPitch];
    };
    alignas(128) Word table[kWarps][kTableRows][kStages][kEntries];
    Barrier full[kBuffers], empty[kBuffers];
  };
  typedef Word Operands[4][4];  // step, register; steps 0 and 1 are of Re x
  typedef float Sums[kParts][16][4];

  static __device__ void run(const uint4* image, const unsigned char* codes, const float* scales,
                             const float* bias, void* y, int batch, unsigned char* bytes) {
    Shared& shared = *(Shared*)bytes;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = blockIdx.x * kTiles;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kBuffers; ++i) {
        init_barrier(&shared.full[i], 1);
        init_barrier(&shared.empty[i], kWarps);
      }
      publish_barriers();
    }
    __syncthreads();
    const int blocks = Share::end_block() - 4 * Share::first_group();
    image += ((size_t)blockIdx.y * Image::kBlocks + 4 * Share::first_group()) * Image::kVectors;
    launch_dependents();
    wait_for_inputs();
    if (threadIdx.x == 0)
      for (int block = 0; block < kBuffers && block < blocks; ++block) fill(shared, image, block, block);
    // Row tiles beyond the last are multiplied like the last and not stored.
    const int own = first_tile + warp / 4 * 2 + warp % 2;
    const int tile = own < Call::kRowTiles ? own : Call::kRowTiles - 1;
    Sums sums = {};
    multiply_all(sums, shared, image, codes, scales, tile, warp, lane);
    store_all(shared, sums, bias, Share::outputs(y, batch), batch, first_tile, warp, lane);
  }

 private:
  // A buffer and the parity of the phase in which its barrier is.
  struct Turn {
    int buffer, parity;

    __device__ __forceinline__ void advance() {
      if (++buffer == kBuffers) buffer = 0, parity ^= 1;
    }
    __device__ __forceinline__ int before() const { return buffer == 0 ? kBuffers - 1 : buffer - 1; }
  };

  // Asks for a block of x.
  static __device__ __forceinline__ void fill(Shared& shared, const uint4* image, int block,
                                              int buffer) {
    copy_bulk(shared.stages.x[buffer], image + (size_t)block * Image::kVectors,
              Image::kVectors * 16, &shared.full[buffer]);
  }

  static __device__ __forceinline__ void multiply_all(Sums& sums, Shared& shared,
                                                      const uint4* image,
                                                      const unsigned char* codes,
                                                      const float* scales, int tile, int warp,
                                                      int lane) {
    // Blocks and groups count from the first of this block's share of the columns.
    const int first_group = Share::first_group(), groups = Share::end_group() - first_group;
    const int blocks = Share::end_block() - 4 * first_group;
    const uint4* own =
        (const uint4*)codes + ((size_t)tile * kGroups + first_group) * kFragments * 32 + lane;
    const int half = warp % 4 / 2;  // of y
    Word(&table)[kTableRows][kStages][kEntries] = shared.table[warp];
    uint4 fragments[kFragments];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) fragments[f] = load_once(own + f * 32);
    if (!kTileScales) fill_table(table, scales, tile, 0, half, lane);

    // A quarter of the next block is decoded after each of the four steps, whose multiplications
    // run meanwhile. Steps are in the order in which quarters complete them.
    Operands operands[2];
    if (kTileScales) fill_table(table, scales, tile, 2 * first_group, half, lane);
#pragma unroll
    for (int r = 0; r < 4; ++r) decode(operands[0], shared_address(&table), fragments, 0, r, lane);
    if (groups > 1) Base::refill(fragments, own, 1, 0);
    const Word first_operand = operand_at(&shared.stages);
    Turn turn = {}, refilled = {};
    for (int group = 0; group < groups; ++group) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int block = group * 4 + b, next = (b + 1) % 4;
        if (Share::kRagged && block >= blocks) break;
        if (kTileScales && next % 2 == 0 && block + 1 < blocks)
          fill_table(table, scales, tile, 2 * first_group + (block + 1) / 2, half, lane);
        wait_barrier(&shared.full[turn.buffer], turn.parity);
        const Word at = first_operand + turn.buffer * Image::kVectors;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = i % 2 * 2 + i / 2;
          begin_multiplications();
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            multiply_group<Operand, kTokens / 8>(sums[part], operands[b % 2][step],
                                                 at + 2 * step * Image::kLine + part * 128);
          commit_multiplications();
          // The operands that are decoded now were those of three steps ago and before.
          wait_multiplications<3>();
          decode(operands[next % 2], shared_address(&table), fragments, next, i, lane);
          if (i != 2) continue;
          if (block > 0 && lane == 0) arrive(&shared.empty[turn.before()]);
          if (threadIdx.x == 0 && block >= kBehind && block - kBehind + kBuffers < blocks) {
            wait_barrier(&shared.empty[refilled.buffer], refilled.parity);
            fill(shared, image, block - kBehind + kBuffers, refilled.buffer);
            refilled.advance();
          }
        }
        if ((block + 1) / 4 + 1 < groups) Base::refill(fragments, own, (block + 1) / 4 + 1, next);
        turn.advance();
      }
    }
    wait_multiplications<0>();
  }

  // Computes a warp's own tables, (what Re x, what Im x is multiplied by) for one half of y.
  static __device__ __forceinline__ void fill_table(Word (&table)[kTableRows][kStages][kEntries],
                                                    const float* scales, int tile, int column_tile,
                                                    int half, int lane) {
    Base::fill_tables(table, scales, tile, column_tile, lane, [half](const DigitWeights& weights) {
      return half == 0 ? weights.for_re<Operand>() : weights.for_im<Operand>();
    });
  }

  // Looks up a quarter of a lane's weights of a block: register r of the codes holds row
  // g + 8 (r % 2), columns 8 t + 4 (r / 2) + 0 .. 3.
  static __device__ __forceinline__ void decode(Operands& operands, Word tables,
                                                const uint4 (&codes)[kFragments], int block, int r,
                                                int lane) {
    const int row = kTableRows > 1 ? lane / 4 + 8 * (r % 2) : 0;
    const Word row_tables = tables + row * (kStages * kEntries * 4);
    Word entries[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) entries[e] = look_up(row_tables, codes, block, r, e);
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      operands[r / 2][r % 2 + e] = pick_bytes(entries[e], entries[e + 1], 0x5410);
      operands[2 + r / 2][r % 2 + e] = pick_bytes(entries[e], entries[e + 1], 0x7632);
    }
  }

  // Sums the entries of a weight's digits.
  static __device__ __forceinline__ Word look_up(Word row_tables, const uint4 (&codes)[kFragments],
                                                 int block, int r, int e) {
    Word sum = 0;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const Word at = Base::template entry_address<2>(row_tables, codes, block, stage, r, e);
      const Word entry = load_shared_word(at, stage * (kEntries * 4));
      sum = stage == 0 ? entry : add_pairs<Operand>(sum, entry);
    }
    return sum;
  }

  // Stores outputs through shared memory, so that a thread stores 16 bytes of neighbouring features.
  static __device__ __forceinline__ void store_all(Shared& shared, Sums& sums, const float* bias,
                                                   Out* y, int batch, int first_tile, int warp,
                                                   int lane) {
    // Warp (half of y, tile of its warpgroup) -> column of outputs: half, tile, row.
    const int half = warp % 4 / 2, tile = warp / 4 * 2 + warp % 2;
    const int column = half * (kOutputs / 2) + tile * 16;
    if (Share::kAddsBias) add_bias(sums, bias, first_tile + tile, half, lane);
#pragma unroll
    for (int turn = 0; turn < kTokens / kStaged; ++turn) {
      __syncthreads();  // everybody is done with what outputs are written over
#pragma unroll
      for (int token = 0; token < kStaged; token += 16)
        stage(&shared.y[token][column], sums, (turn * kStaged + token) / 8, lane);
      __syncthreads();
      const int first = blockIdx.y * kTokens + turn * kStaged;
      store_staged(shared, y + (size_t)first * Call::kFeatures, batch - first, first_tile);
    }
  }

  static __device__ __forceinline__ void add_bias(Sums& sums, const float* bias, int tile, int half,
                                                  int lane) {
    float more[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int feature = Call::feature(tile, lane / 4 + 8 * r, half);
      more[r] = feature < 0 ? 0 : bias[feature];
    }
#pragma unroll
    for (int core = 0; core < kTokens / 8; ++core)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[core / 16][core % 16][i] += more[i / 2];
  }

  // Writes a warp's sums of 16 rows of x, which two cores hold, to where `to` begins. Lanes write to
  // different banks.
  static __device__ __forceinline__ void stage(Out* to, const Sums& sums, int core, int lane) {
    if constexpr (sizeof(Out) == 2) {
      Word pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&own)[4] = sums[core / 16][core % 16 + i / 2];
        pairs[i] = pack_pair<Out>(own[i % 2 * 2], own[i % 2 * 2 + 1]);
      }
      store_transposed(to + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8, pairs);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kPitch + lane / 4 + i % 4 / 2 * 8] =
            sums[core / 16][core % 16 + i / 4][i % 4];
    }
  }

  // Stores `rows` rows of outputs, or those that are staged.
  static __device__ __forceinline__ void store_staged(const Shared& shared, Out* y, int rows,
                                                      int first_tile) {
    // Without 16 bytes of features that belong together and begin where 16 bytes may, one by one.
    constexpr int kUnit = Call::kAligned ? 16 / sizeof(Out) : 1, kUnits = kOutputs / kUnit;
    // Turns divide the threads, so that a thread's feature is the same in all of them.
    const int column = threadIdx.x % kUnits * kUnit;
    const int half = column / (kOutputs / 2), row = column % (kOutputs / 2);
    const int feature = Call::feature(first_tile + row / 16, row % 16, half);
    if (feature < 0) return;
    Out* to = y + feature;
#pragma unroll 16
    for (int i = 0; i < kStaged * kUnits / kThreads; ++i) {
      const int token = i * (kThreads / kUnits) + threadIdx.x / kUnits;
      Out* own = to + (size_t)token * Call::kFeatures;
      if constexpr (kUnit > 1) {
        const uint4 unit = *(const uint4*)&shared.y[token][column];
        if (token < rows) *(uint4*)own = unit;
      } else if (token < rows) {
        *own = shared.y[token][column];
      }
    }
  }
};

}  // namespace fairy
#endif  // FAIRY_HOPPER
