// Phase GEMM for few rows of x: bit planes of the codes meet quantised activations in the integer
// tensor cores. `Call` holds the constants of one call, see kernels/cuda_source/__init__.py.
//
// Let bq, bp be the bits of a code that tell the signs of re - im and re + im (see
// kernels/cuda_layout.py). 128 bits of codes, shifted and masked so that the two are the highest bits
// of their byte, are operand A twice: as unsigned bytes, 64 bq + 128 bp, and as signed ones, 64 bq -
// 128 bp. Operand B holds, in its 8 columns, the digits of Re x and Im x of some rows of x:
//   int16  (re hi, re lo, im hi, im lo) of 2 rows     int8  (re, im) of 4 rows, or (re, -, im, -)
// of 2 rows, which halves what a lane has to scale. With x a real or imaginary part of activations
// and u, v its sums with unsigned and with signed bytes:
//   256 sum (bq + bp) x = 3 u + v                   256 sum (bq - bp) x = u + 3 v
//   sum re x = sum x - sum (bq + bp) x              sum im x = sum (bq - bp) x
// These are integers, exact for every group of 128 columns (64 with a scale for every 64x64 tile).
// A single row of x leaves half of the columns empty: there u is summed in the first four, v in the
// others, so that a lane has half as much to scale. Then sums are scaled and added up in float:
//   U x        re += R re - I im,  im += R im + I re
//   W conj x   re += R re + I im,  im += I re - R im      with R, I the scaled sums
#ifndef FAIRY_DECODE
#define FAIRY_DECODE

namespace fairy {

template <class Call>
struct Decode : private OperandX<Call> {
  typedef OperandX<Call> Base;
  typedef typename Call::Given Given;
  typedef typename Call::Y Y;
  typedef typename Base::Chunk Chunk;

  using Base::kChunk, Base::kGroups, Base::kOperands, Base::kRows, Base::kSlots, Base::kTwoDigits;

  static constexpr int kTerms = Call::kTerms;
  static constexpr int kPairs = Call::kStages * kTerms;  // pairs of planes: a stage of a term
  static constexpr int kPlanes = 2 * kPairs;
  static constexpr int kFragments = kPlanes / 2;  // 128-bit loads of a lane for a group
  static constexpr bool kTileScales = Call::kColumnTiles > 1;
  static constexpr int kScaleRows = Call::kScaleRows > 1 ? 2 : 1;  // of a lane
  static constexpr int kFlushBlocks = kTileScales ? 2 : 4;         // blocks between scalings

  // Pairs of planes whose sums are in registers at a time: fewer make room for more warps.
  static constexpr int kPasses = kPairs % Call::kPasses == 0 ? Call::kPasses : 1;
  static constexpr int kPassPairs = kPairs / kPasses;

  static constexpr bool kOneHalf = kSlots <= 2;                 // of x in a lane's sums
  static constexpr bool kOneSign = kSlots == 1;                 // a lane has sums u, or sums v
  static constexpr int kSigns = kOneSign ? 1 : 2;
  static constexpr int kHalves = kOneHalf ? 1 : 2;
  static constexpr int kSlices = Call::kWarps / Call::kTileWarps;  // warps that share a row tile
  // Groups of codes on their way to a warp, whose places in registers take turns.
  static constexpr int kAsked = kChunk < kGroups || kGroups <= kSlices ? 1 : Call::kAsked;
  static constexpr int kLines = kFragments * 4;  // of 128 bytes, of a group

  struct Shared : Squares<Call::kNorm ? Call::kWarps : 0> {
    union {
      Chunk chunk;
      float partial[Call::kWarps][kRows][2][16];  // of a warp: (row of x, half of y, complex row)
    };
  };

  // Scaled sums of one half of x (or both) with U and W.
  struct Sums {
    float re[2];
    float im[2];
  };
  typedef Sums Outputs[kOperands][2][kHalves];  // operand, row g or g + 8, half of x
  // What a lane's sums are multiplied by for the scaled sums R and I.
  struct Scales {
    float of[kPairs][2][kScaleRows];
    float of_x[kTerms][kScaleRows];  // the sum of x for R, where sums u and v are in two lanes
  };
  typedef int PassSums[kPassPairs][kSigns][kOperands][4];

  static __device__ void run(Given x, const unsigned char* codes, const float* scales,
                             const float* bias, Y* y, int batch) {
    __shared__ Shared shared;
    run(x, codes, scales, bias, y, batch, shared);
  }

  static __device__ void run(Given x, const unsigned char* codes, const float* scales,
                             const float* bias, Y* y, int batch, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x * Call::kTileWarps + warp % Call::kTileWarps;
    const int slice = warp / Call::kTileWarps, first_row = blockIdx.y * kRows;
    const bool active = tile < Call::kRowTiles;

    // Codes are asked for before the activations are quantised, and before the kernel that computes
    // them is over: that hides most of its time.
    const uint4* own = (const uint4*)codes + (size_t)tile * kGroups * kFragments * 32 + lane;
    int group = slice;
    uint4 fragments[kAsked][kFragments];
#pragma unroll
    for (int a = 0; a < kAsked; ++a)
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
        if (active && group + a * kSlices < kGroups)
          load(fragments[a][f], own, group + a * kSlices, f);
#pragma unroll
    for (int ahead = 0; ahead < Call::kPrefetch; ++ahead)
      if (active) fetch(own, group + (kAsked + ahead) * kSlices, lane);
    launch_dependents();

    // Scales are asked for here and used when x is there: one wait for both.
    typename Base::Early early = {};
    Base::read_early(early, x, warp, lane);
    Scales scale;
    if (active && !kTileScales) load_scales(scale, scales, tile, 0, lane);
    Outputs outputs = {};
    wait_for_inputs();
    for (int first = 0; first < kGroups; first += kChunk) {
      const int end = first + kChunk < kGroups ? first + kChunk : kGroups;
      if (first > 0) __syncthreads();
      if constexpr (Call::kNorm)
        Base::normalise(shared, x, early, warp, lane);
      else
        Base::take(shared.chunk, x, batch, first_row, first, end, warp, lane);
      __syncthreads();
      if (!active) continue;
      if (first == 0 && !kTileScales) adjust(scale, lane);
      for (; group < end; group += kAsked * kSlices) {
#pragma unroll
        for (int a = 0; a < kAsked; ++a) {
          const int current = group + a * kSlices, next = current + kAsked * kSlices;
          if (a > 0 && current >= end) break;
          if (Call::kPrefetch > 0) fetch(own, next + Call::kPrefetch * kSlices, lane);
#pragma unroll
          for (int flush = 0; flush < 4 / kFlushBlocks; ++flush) {
            if (kTileScales) {
              load_scales(scale, scales, tile, 2 * current + flush, lane);
              adjust(scale, lane);
            }
            multiply(outputs, fragments[a], own, next, shared.chunk, current - first, flush, scale,
                     lane);
          }
        }
      }
    }
    __syncthreads();
    if (active) keep_partial(shared.partial[warp], outputs, lane);
    __syncthreads();
    add_partials(shared, bias, y, batch, first_row);
  }

 private:
  static __device__ __forceinline__ void load(uint4& fragment, const uint4* own, int group, int f) {
    fragment = load_once(own + (size_t)group * (kFragments * 32) + f * 32);
  }

  // Asks for a group to be brought to the L2 cache, which has more room than registers.
  static __device__ __forceinline__ void fetch(const uint4* own, int group, int lane) {
    const uint4* line = own - lane + (size_t)group * (kFragments * 32) + lane * 8;
    if (group < kGroups && lane < kLines) prefetch(line);
  }

  static __device__ __forceinline__ void load_scales(Scales& scale, const float* scales, int tile,
                                                     int column_tile, int lane) {
    const float* own = scales + (size_t)(tile * Call::kColumnTiles + column_tile) * kPairs * 2 *
                                    Call::kScaleRows;
#pragma unroll
    for (int i = 0; i < kPairs * 2; ++i)
#pragma unroll
      for (int r = 0; r < kScaleRows; ++r)
        scale.of[i / 2][i % 2][r] =
            own[i * Call::kScaleRows + (kScaleRows > 1 ? lane / 4 + 8 * r : 0)];
  }

  // Turns scales into what a lane's sums are multiplied by.
  static __device__ __forceinline__ void adjust(Scales& scale, int lane) {
#pragma unroll
    for (int r = 0; r < kScaleRows; ++r) {
      if (kOneSign) {
        const bool is_signed = lane % 4 >= 2;
#pragma unroll
        for (int term = 0; term < kTerms; ++term) scale.of_x[term][r] = 0;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          if (!is_signed) scale.of_x[pair % kTerms][r] += scale.of[pair][0][r];
          scale.of[pair][0][r] *= is_signed ? -1.0f / 256 : -3.0f / 256;
          scale.of[pair][1][r] *= is_signed ? 3.0f / 256 : 1.0f / 256;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPairs * 2; ++i) scale.of[i / 2][i % 2][r] *= 1.0f / 256;
      }
    }
  }

  // Multiplies the blocks of one flush of a group and adds the scaled sums to `outputs`. Fragments
  // are replaced by those of group `next` as soon as their last block is done.
  static __device__ __forceinline__ void multiply(Outputs& outputs, uint4 (&codes)[kFragments],
                                                  const uint4* own, int next, const Chunk& chunk,
                                                  int group, int flush, const Scales& scale,
                                                  int lane) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      PassSums sums = {};
#pragma unroll
      for (int b = 0; b < kFlushBlocks; ++b) {
        const int block = flush * kFlushBlocks + b;
        uint2 operand[kOperands][2];  // for unsigned and for signed bytes
#pragma unroll
        for (int n = 0; n < kOperands; ++n) {
          const uint2* columns = (const uint2*)chunk.values[group * 4 + block][n];
          const uint2 digits = columns[Base::operand_at(lane, block)];
          operand[n][0] = kOneSign && lane >= 16 ? uint2{} : digits;
          operand[n][1] = kOneSign && lane < 16 ? uint2{} : digits;
        }
#pragma unroll
        for (int pair = 0; pair < kPassPairs; ++pair) {
          const int bit = block * kPlanes + 2 * (pass * kPassPairs + pair), shift = 6 - bit % 8;
          const uint4 bytes = codes[bit / 8];
          const Word a[4] = {highest(bytes.x, shift), highest(bytes.y, shift),
                             highest(bytes.z, shift), highest(bytes.w, shift)};
#pragma unroll
          for (int n = 0; n < kOperands; ++n) {
            multiply_unsigned(sums[pair][0][n], a, operand[n][0]);
            multiply_signed(sums[pair][kSigns - 1][n], a, operand[n][1]);
          }
        }
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
          if (pass + 1 == kPasses && (8 * f + 7) / kPlanes == block && next < kGroups)
            load(codes[f], own, next, f);
      }
#pragma unroll
      for (int n = 0; n < kOperands; ++n)
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          // Which (row, half) of x a lane's sums are of: columns 2 t, 2 t + 1 of operand B.
          const int row = kOneHalf ? kSlots * n + lane % 4 / 2 % kSlots : 4 * n + lane % 4;
          const int own = kOneHalf ? lane % 2 : half;
          const GroupScale& of_x = chunk.scales[group][row];
          const float x_scale = of_x.scale[own];
          int x_sum = of_x.sums[kTileScales ? flush : 0][own];
          if (!kTileScales) x_sum += of_x.sums[1][own];
#pragma unroll
          for (int r = 0; r < 2; ++r)
            flush_sums(outputs[n][r][half], sums, pass, n, r, half, x_sum, x_scale, scale);
        }
    }
  }

  static __device__ __forceinline__ void flush_sums(Sums& out, const PassSums& sums, int pass, int n,
                                                    int r, int half, int x_sum, float x_scale,
                                                    const Scales& scale) {
    const int s = kScaleRows > 1 ? r : 0;
    float re[2] = {}, im[2] = {};
    if (kOneSign && pass == 0)
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
        re[term] = scale.of_x[term][s] * __int2float_rn(x_sum);
#pragma unroll
    for (int own = 0; own < kPassPairs; ++own) {
      const int pair = pass * kPassPairs + own, term = pair % kTerms;
      const int u = join_digits(sums[own][0][n], r, half);
      if (kOneSign) {
        re[term] += scale.of[pair][0][s] * __int2float_rn(u);
        im[term] += scale.of[pair][1][s] * __int2float_rn(u);
      } else {
        const int v = join_digits(sums[own][kSigns - 1][n], r, half), once = u + v;
        re[term] += scale.of[pair][0][s] * __int2float_rn(x_sum * 256 - (once + 2 * u));
        im[term] += scale.of[pair][1][s] * __int2float_rn(once + 2 * v);
      }
    }
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      out.re[term] += x_scale * re[term];
      out.im[term] += x_scale * im[term];
    }
  }

  // Shifts bits of bytes to their highest two, and leaves out the others.
  static __device__ __forceinline__ Word highest(Word bytes, int shift) {
    return (bytes << shift) & 0xc0c0c0c0u;
  }

  static __device__ __forceinline__ int join_digits(const int (&sum)[4], int r, int half) {
    if (kTwoDigits) return sum[2 * r] * 256 + sum[2 * r + 1];
    return sum[2 * r + half];
  }

  // Adds what Re x and Im x of a row contribute; neighbouring lanes may hold them.
  static __device__ __forceinline__ void keep_partial(float (&partial)[kRows][2][16],
                                                      const Outputs& outputs, int lane) {
#pragma unroll
    for (int n = 0; n < kOperands; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + 8 * r;
        if (kOneHalf) {
          const bool imag = lane % 2;
          float re, im;
          contributions(re, im, outputs[n][r][0], imag);
#pragma unroll
          for (int lanes = 1; lanes <= (kOneSign ? 2 : 1); ++lanes) {
            re += shuffle_xor(re, lanes);
            im += shuffle_xor(im, lanes);
          }
          if (kSlots > 1 || lane % 4 < 2)
            partial[kSlots * n + lane % 4 / 2 % kSlots][imag][row] = imag ? im : re;
        } else {
          float re[2], im[2];
#pragma unroll
          for (int half = 0; half < 2; ++half)
            contributions(re[half], im[half], outputs[n][r][half % kHalves], half);
          partial[4 * n + lane % 4][0][row] = re[0] + re[1];
          partial[4 * n + lane % 4][1][row] = im[0] + im[1];
        }
      }
  }

  static __device__ __forceinline__ void contributions(float& re, float& im, const Sums& sums,
                                                       bool imag) {
    const float u_re = kTerms == 2 ? sums.re[0] : 0, u_im = kTerms == 2 ? sums.im[0] : 0;
    const float w_re = sums.re[kTerms - 1], w_im = sums.im[kTerms - 1];
    re = imag ? w_im - u_im : u_re + w_re;
    im = imag ? u_re - w_re : u_im + w_im;
  }

  static __device__ __forceinline__ void add_partials(const Shared& shared, const float* bias, Y* y,
                                                      int batch, int first_row) {
    for (int i = threadIdx.x; i < Call::kTileWarps * kRows * 2 * 16; i += Call::kWarps * 32) {
      const int row = i % 16, half = i / 16 % 2, slot = i / 32 % kRows, own = i / (32 * kRows);
      const int tile = blockIdx.x * Call::kTileWarps + own;
      if (tile >= Call::kRowTiles || first_row + slot >= batch) continue;
      const int feature = Call::feature(tile, row, half);
      if (feature < 0) continue;
      float sum = 0;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice)
        sum += shared.partial[slice * Call::kTileWarps + own][slot][half][row];
      if (Call::kBias) sum += bias[feature];
      store(y + (size_t)(first_row + slot) * Call::kFeatures + feature, sum);
    }
  }
};

}  // namespace fairy
#endif  // FAIRY_DECODE
