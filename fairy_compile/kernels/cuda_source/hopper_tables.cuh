// The tables in which warps of hopper.cuh look weights up, for one half of y each: entries are what
// (Re x, Im x) is multiplied by. `Call` holds the constants of one call.
//
// A warp has its own tables of digits, one for each stage, whose entries it adds up. Where all rows
// of a block have the same scales and the codes of a weight are a byte (`Call::kJoint`), warps
// share a joint table instead, of the sums of all stages, so that a weight takes one look-up. 32
// lanes would find its 256 entries in the same banks often; so each has a copy in its own bank.
#ifndef FAIRY_HOPPER_TABLES
#define FAIRY_HOPPER_TABLES

namespace fairy {

template <class Call>
struct HopperTables : Tables<Call> {
  typedef Tables<Call> Base;
  typedef typename Call::Operand Operand;

  using Base::kDigitBits, Base::kEntries, Base::kFragments, Base::kPlanes;
  using Base::kStages, Base::kTableRows;
  static constexpr int kWarps = 8;
  static constexpr int kCodes = 256;  // of a weight
  typedef Word OwnTables[kWarps][kTableRows][kStages][kEntries];
  typedef Word JointTables[kCodes][2][32];  // entries, halves of y, lanes
  typedef typename Either<Call::kJoint, JointTables, OwnTables>::Type Memory;

  // Computes tables of a row tile and a column tile, its own or, for all to wait for, a part of the
  // joint one.
  static __device__ __forceinline__ void fill(Memory& tables, const float* scales, int tile,
                                              int column_tile, int warp, int lane) {
    const float* own = Base::scales_of(scales, tile, column_tile);
    if constexpr (Call::kJoint) {
      fill_joint(tables, own, warp, lane);
    } else {
      const int half = half_of(warp);
      Base::fill_tables(tables[warp], own, lane, [half](const DigitWeights& weights) {
        return half == 0 ? weights.for_re<Operand>() : weights.for_im<Operand>();
      });
    }
  }

  // Returns where a lane's entries begin.
  static __device__ __forceinline__ Word address(const Memory& tables, int warp, int lane) {
    if constexpr (Call::kJoint)
      return shared_address(&tables[0][half_of(warp)][lane]);
    else
      return shared_address(&tables[warp]);
  }

  // Looks up a quarter of a lane's weights of a block: register r of the codes holds row
  // g + 8 (r % 2), columns 8 t + 4 (r / 2) + 0 .. 3.
  static __device__ __forceinline__ void look_up(Word (&entries)[4], Word tables,
                                                 const uint4 (&codes)[kFragments], int block, int r,
                                                 int lane) {
    if constexpr (Call::kJoint) {
      // An entry's copies take 256 bytes and tables begin at a multiple of 64 KB: bytes 0, 2 and 3
      // of an address are those of where the lane's entries begin, byte 1 is the code.
      const Word word = Base::code_word(codes, block, r);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        entries[e] = load_shared_word(pick_bytes(word, tables, 0x7604 + (e << 4)), 0);
    } else {
      const int row = kTableRows > 1 ? lane / 4 + 8 * (r % 2) : 0;
      const Word row_tables = tables + row * (kStages * kEntries * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) entries[e] = sum_of_digits(row_tables, codes, block, r, e);
    }
  }

 private:
  // Of a warpgroup's warps, the first two have the real half of y.
  static __device__ __forceinline__ int half_of(int warp) { return warp % 4 / 2; }

  static __device__ __forceinline__ Word sum_of_digits(Word row_tables,
                                                       const uint4 (&codes)[kFragments], int block,
                                                       int r, int e) {
    Word sum = 0;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const Word at = Base::template entry_address<2>(row_tables, codes, block, stage, r, e);
      const Word entry = load_shared_word(at, stage * (kEntries * 4));
      sum = stage == 0 ? entry : add_pairs<Operand>(sum, entry);
    }
    return sum;
  }

  // A lane computes the entries of one code, which eight lanes copy at a time, 16 bytes each.
  static __device__ __forceinline__ void fill_joint(JointTables& tables, const float* scales,
                                                    int warp, int lane) {
    static_assert(kPlanes == 8 && kTableRows == 1 && kWarps * 32 == kCodes);
    const int first = warp * 32;
    DigitWeights sum = {};
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int digit = (first + lane) >> (stage * kDigitBits) & (kEntries - 1);
      const DigitWeights own = Base::weights_of(scales, stage, digit, 0);
      sum.u_re += own.u_re, sum.u_im += own.u_im, sum.w_re += own.w_re, sum.w_im += own.w_im;
    }
    const Word entries[2] = {sum.template for_re<Operand>(), sum.template for_im<Operand>()};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        const int code = i + lane / 8;
        const Word entry = shuffle(entries[half], code);
        *(uint4*)&tables[first + code][half][lane % 8 * 4] = {entry, entry, entry, entry};
      }
  }
};

}  // namespace fairy
#endif  // FAIRY_HOPPER_TABLES
