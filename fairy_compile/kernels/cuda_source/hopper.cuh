// Phase GEMM for many rows of x on Hopper: as prefill.cuh, with warpgroup matrix instructions.
// `Call` holds the constants of one call, see kernels/cuda_source/__init__.py.
//
// A block computes 4 row tiles (64 complex rows, 128 real outputs) for `kTokens` rows of x in two
// warpgroups. Warps 0 and 1 of a warpgroup decode the real outputs of its two row tiles, warps 2
// and 3 the imaginary ones, so that a warp looks up 4 bytes of a table for a weight, not 8, and
// every decoded weight meets 256 rows of x. While one block of 32 columns is multiplied, the next
// is decoded. One thread asks for x, several blocks ahead.
//
// `ArrangeX` runs before: it writes x as float16, or as bfloat16 where x is, in the order that
// operand B has in shared memory, so that a block of columns is one bulk copy. A lane decodes
// columns 8 t .. 8 t + 7 (t = lane % 4) of a block, which as operand A are rows 2 t, 2 t + 1,
// 2 t + 8, 2 t + 9 of two steps of 16; rows of x follow. The image of x, for column
// 8 t + 4 step + 2 line + c of a block:
//
//     image[token block][block][half of x][step][line][token][2 t + c]
#ifndef FAIRY_HOPPER
#define FAIRY_HOPPER

namespace fairy {

template <class Call>
struct HopperImage {
  static constexpr int kTokens = Call::kTokens;
  static constexpr int kBlocks = (Call::kColumns + 31) / 32;
  static constexpr int kLines = 8;                 // of core matrices: half, step, line
  static constexpr int kLine = kTokens;            // vectors of 16 bytes
  static constexpr int kVectors = kLines * kLine;  // of a block of columns
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
    const size_t blocks = (size_t)(own / Image::kTokens) * Image::kBlocks + block;
    uint4* to = image + blocks * Image::kVectors + half * 4 * Image::kLine + token;
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
struct Hopper : private HopperTables<Call> {
  typedef HopperTables<Call> Base;
  typedef Splits<Call> Share;
  typedef typename Share::Out Out;
  typedef typename Call::Operand Operand;
  typedef HopperImage<Call> Image;

  using Base::kFragments, Base::kGroups, Base::kTileScales, Base::kWarps;
  static constexpr int kTokens = Call::kTokens;
  static constexpr int kBuffers = Call::kBuffers;
  static constexpr int kBehind = 2;  // blocks until a buffer is filled again: for others to finish
  static constexpr int kThreads = 32 * kWarps;  // two warpgroups
  static constexpr int kTiles = kWarps / 2;     // row tiles of a block
  static constexpr int kOutputs = 32 * kTiles;  // real ones
  // Outputs on their way to y: so many rows of x at a time, each so many outputs from the next that
  // neighbours begin 16 bytes of banks apart.
  static constexpr int kStaged = sizeof(Out) == 2 ? kTokens : 128;
  static constexpr int kPitch = kOutputs + 16 / sizeof(Out);

  // Buffers of x, with tables behind the first kBelow. Joint tables lie at address 64 KB, as they
  // have to begin at a multiple of that, and buffers from 32 KB on, before and behind them. Dynamic
  // shared memory begins at 1 KB, behind what Hopper takes for itself.
  static constexpr int kBufferBytes = Image::kVectors * 16;
  static constexpr int kStart = Call::kJoint ? 32 << 10 : 0;
  static constexpr int kBelow = Call::kJoint ? (32 << 10) / kBufferBytes : kBuffers;
  struct Shared {
    union {
      alignas(128) unsigned char inputs[kBuffers * kBufferBytes + sizeof(typename Base::Memory)];
      alignas(128) Out y[kStaged][kPitch];
    };
    Barrier full[kBuffers], empty[kBuffers];

    __device__ __forceinline__ typename Base::Memory& tables() {
      return *(typename Base::Memory*)(inputs + kBelow * kBufferBytes);
    }
  };
  static_assert(kStart + sizeof(Shared) <= Call::kSharedBytes && kBelow <= kBuffers);
  typedef Word Operands[4][4];  // step, register; steps 0 and 1 are of Re x
  typedef float Sums[kTokens / 8][4];

  static __device__ void run(const uint4* image, const unsigned char* codes, const float* scales,
                             const float* bias, void* y, int batch, unsigned char* bytes) {
    Shared& shared = *(Shared*)(Call::kJoint ? bytes + kStart - shared_address(bytes) : bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = blockIdx.x * kTiles;
    // Row tiles beyond the last are multiplied like the last and not stored.
    const int own = first_tile + warp / 4 * 2 + warp % 2;
    const int tile = own < Call::kRowTiles ? own : Call::kRowTiles - 1;
    const uint4* own_codes = (const uint4*)codes + lane +
                             ((size_t)tile * kGroups + Share::first_group()) * kFragments * 32;
    const int blocks = Share::end_block() - 4 * Share::first_group();
    image += ((size_t)blockIdx.y * Image::kBlocks + 4 * Share::first_group()) * Image::kVectors;
    uint4 fragments[kFragments];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) fragments[f] = load_once(own_codes + f * 32);
    launch_dependents();
    // One thread waits for the kernels before and asks for x. Others compute tables meanwhile, and
    // write to global memory, which those kernels may still read, after they have multiplied x.
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kBuffers; ++i) {
        init_barrier(&shared.full[i], 1);
        init_barrier(&shared.empty[i], kWarps);
      }
      publish_barriers();
      wait_for_inputs();
      for (int block = 0; block < kBuffers && block < blocks; ++block)
        fill(shared, image, block, block);
    }
    const int column_tile = kTileScales ? 2 * Share::first_group() : 0;
    Base::fill(shared.tables(), scales, tile, column_tile, warp, lane);
    __syncthreads();
    Sums sums;
    clear_sums(sums);
    multiply_all(sums, shared, image, fragments, own_codes, scales, tile, blocks, warp, lane);
    store_all(shared, sums, bias, Share::outputs(y, batch), batch, first_tile, warp, lane);
  }

 private:
  // A buffer and the parity of the phase in which its barrier is.
  struct Turn {
    int buffer, parity;

    __device__ __forceinline__ void advance() {
      if (++buffer == kBuffers) buffer = 0, parity ^= 1;
    }
    __device__ __forceinline__ int before() const {
      return buffer == 0 ? kBuffers - 1 : buffer - 1;
    }
  };

  // Returns where a buffer of x begins.
  static __device__ __forceinline__ int offset(int buffer) {
    const int tables = buffer < kBelow ? 0 : sizeof(typename Base::Memory);
    return buffer * kBufferBytes + tables;
  }

  // Asks for a block of x.
  static __device__ __forceinline__ void fill(Shared& shared, const uint4* image, int block,
                                              int buffer) {
    copy_bulk(shared.inputs + offset(buffer), image + (size_t)block * Image::kVectors, kBufferBytes,
              &shared.full[buffer]);
  }

  // Blocks and groups count from the first of this block's share of the columns.
  static __device__ __forceinline__ void multiply_all(Sums& sums, Shared& shared,
                                                      const uint4* image,
                                                      uint4 (&fragments)[kFragments],
                                                      const uint4* codes, const float* scales,
                                                      int tile, int blocks, int warp, int lane) {
    const int first_group = Share::first_group(), groups = Share::end_group() - first_group;
    const Word tables = Base::address(shared.tables(), warp, lane);

    // A quarter of the next block is decoded at each of the four steps. Steps are in the order in
    // which quarters complete them.
    Operands operands[2];
    Word entries[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Base::look_up(entries, tables, fragments, 0, r, lane);
      place(operands[0], entries, r);
    }
    if (groups > 1) Base::refill(fragments, codes, 1, 0);
    const Word first_operand = operand_at(&shared.inputs);
    Turn turn = {}, refilled = {};
    for (int group = 0; group < groups; ++group) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int block = group * 4 + b, next = (b + 1) % 4;
        if (Share::kRagged && block >= blocks) break;
        if (kTileScales && next % 2 == 0 && block + 1 < blocks)
          Base::fill(shared.tables(), scales, tile, 2 * first_group + (block + 1) / 2, warp,
                     lane);
        wait_barrier(&shared.full[turn.buffer], turn.parity);
        const Word at = first_operand + offset(turn.buffer) / 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = i % 2 * 2 + i / 2;
          // Entries are on their way while multiplications begin.
          if (Call::kAhead) Base::look_up(entries, tables, fragments, next, i, lane);
          begin_multiplications();
          multiply_group<Operand>(sums, operands[b % 2][step], at + 2 * step * Image::kLine);
          commit_multiplications();
          // The operands that are written now were those of three steps ago and before.
          wait_multiplications<3>();
          if (!Call::kAhead) Base::look_up(entries, tables, fragments, next, i, lane);
          place(operands[next % 2], entries, i);
          if (i != 2) continue;
          if (block > 0 && lane == 0) arrive(&shared.empty[turn.before()]);
          if (threadIdx.x == 0 && block >= kBehind && block - kBehind + kBuffers < blocks) {
            wait_barrier(&shared.empty[refilled.buffer], refilled.parity);
            fill(shared, image, block - kBehind + kBuffers, refilled.buffer);
            refilled.advance();
          }
        }
        if ((block + 1) / 4 + 1 < groups) Base::refill(fragments, codes, (block + 1) / 4 + 1, next);
        turn.advance();
      }
    }
    wait_multiplications<0>();
  }

  // Makes operands of the entries of a quarter.
  static __device__ __forceinline__ void place(Operands& operands, const Word (&entries)[4],
                                               int r) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      operands[r / 2][r % 2 + e] = pick_bytes(entries[e], entries[e + 1], 0x5410);
      operands[2 + r / 2][r % 2 + e] = pick_bytes(entries[e], entries[e + 1], 0x7632);
    }
  }

  // Stores outputs through shared memory, so that a thread has 16 bytes of neighbouring features.
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
      for (int i = 0; i < 4; ++i)
        sums[core][i] += more[i / 2];
  }

  // Writes a warp's sums of 16 rows of x, which two cores hold, to where `to` begins. Lanes write
  // to different banks.
  static __device__ __forceinline__ void stage(Out* to, const Sums& sums, int core, int lane) {
    if constexpr (sizeof(Out) == 2) {
      Word pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&own)[4] = sums[core + i / 2];
        pairs[i] = pack_pair<Out>(own[i % 2 * 2], own[i % 2 * 2 + 1]);
      }
      store_transposed(to + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8, pairs);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kPitch + lane / 4 + i % 4 / 2 * 8] =
            sums[core + i / 4][i % 4];
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
