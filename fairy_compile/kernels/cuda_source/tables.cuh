// Codes in a lane's registers and the tables that a warp looks them up in: what prefill.cuh and
// hopper.cuh share. `Call` holds the constants of one call, see kernels/cuda_source/__init__.py.
//
// The bits of a stage are a digit, 4 for U and W, 2 for W alone; every value has a table entry.
#ifndef FAIRY_TABLES
#define FAIRY_TABLES

namespace fairy {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// The scaled U and W of a digit; U is 0 where there is none.
struct DigitWeights {
  float u_re, u_im, w_re, w_im;

  // What (Re x, Im x) is multiplied by for Re y, and for Im y, as numbers of operands.
  template <class Operand>
  __device__ __forceinline__ Word for_re() const {
    return pack_pair<Operand>(u_re + w_re, w_im - u_im);
  }
  template <class Operand>
  __device__ __forceinline__ Word for_im() const {
    return pack_pair<Operand>(u_im + w_im, u_re - w_re);
  }
};

template <class Call>
struct Tables {
  static constexpr int kTerms = Call::kTerms;
  static constexpr int kStages = Call::kStages;
  static constexpr int kPairs = kStages * kTerms;
  static constexpr int kPlanes = 2 * kPairs;
  static constexpr int kFragments = kPlanes / 2;
  static constexpr int kGroups = (Call::kColumns + 127) / 128;
  static constexpr int kBlocks = (Call::kColumns + 31) / 32;
  static constexpr bool kTileScales = Call::kColumnTiles > 1;
  static constexpr int kTableRows = Call::kScaleRows;  // 16 with a scale for every row, else 1
  static constexpr int kDigitBits = 2 * kTerms;
  static constexpr int kEntries = 1 << kDigitBits;

  // Loads those fragments of a group whose last block in the group before was `block`.
  static __device__ __forceinline__ void refill(uint4 (&fragments)[kFragments], const uint4* own,
                                                int group, int block) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      if ((8 * f + 7) / kPlanes == block)
        fragments[f] = load_once(own + (size_t)group * (kFragments * 32) + f * 32);
  }

  // Returns where the scales of a tile begin.
  static __device__ __forceinline__ const float* scales_of(const float* scales, int tile,
                                                           int column_tile) {
    return scales + (size_t)(tile * Call::kColumnTiles + column_tile) * kPairs * 2 * kTableRows;
  }

  // Returns the weights of a digit of a stage, from the scales of a tile.
  static __device__ __forceinline__ DigitWeights weights_of(const float* scales, int stage,
                                                            int digit, int row) {
    float re[2], im[2];
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const int q = 1 - 2 * (digit >> (2 * term) & 1), p = 1 - 2 * (digit >> (2 * term + 1) & 1);
      const float* scale = scales + (stage * kTerms + term) * 2 * kTableRows + row;
      re[term] = scale[0] * (float)((p + q) / 2);
      im[term] = scale[kTableRows] * (float)((p - q) / 2);
    }
    const float u_re = kTerms == 2 ? re[0] : 0, u_im = kTerms == 2 ? im[0] : 0;
    return {u_re, u_im, re[kTerms - 1], im[kTerms - 1]};
  }

  // Computes a warp's own tables, which only its lanes read, from the scales of a tile and what
  // entry_of makes of weights.
  template <class Entry, class EntryOf>
  static __device__ __forceinline__ void fill_tables(Entry (&table)[kTableRows][kStages][kEntries],
                                                     const float* scales, int lane,
                                                     const EntryOf& entry_of) {
    __syncwarp();
    for (int i = lane; i < kTableRows * kStages * kEntries; i += 32) {
      const int digit = i % kEntries, stage = i / kEntries % kStages;
      const int row = i / (kEntries * kStages);
      table[row][stage][digit] = entry_of(weights_of(scales, stage, digit, row));
    }
    __syncwarp();
  }

  // Returns register r of a fragment.
  static __device__ __forceinline__ Word code_word(const uint4 (&codes)[kFragments], int fragment,
                                                   int r) {
    const uint4 bytes = codes[fragment];
    return r == 0 ? bytes.x : r == 1 ? bytes.y : r == 2 ? bytes.z : bytes.w;
  }

  // Returns where the entry of a weight's digit of a stage would lie in the table of stage 0, which
  // those of other stages follow; entries have 1 << kLog bytes. Tables lie at multiples of their
  // size, so that an address is put together by bits. A weight's codes are in byte e of register r.
  template <int kLog>
  static __device__ __forceinline__ Word entry_address(Word row_tables,
                                                       const uint4 (&codes)[kFragments], int block,
                                                       int stage, int r, int e) {
    const int bit = block * kPlanes + stage * kDigitBits;
    const Word word = code_word(codes, bit / 8, r);
    const int shift = 8 * e + bit % 8 - kLog;
    const Word digit = shift < 0 ? word << -shift : word >> shift;
    return mask_or(digit, (kEntries - 1) << kLog, row_tables);
  }
};

}  // namespace fairy
#endif  // FAIRY_TABLES
