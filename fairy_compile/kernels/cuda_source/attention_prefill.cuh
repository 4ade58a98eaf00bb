// Attention of many query rows of a sequence in float16 tensor cores, over new keys or the paged
// cache. `Call` holds the constants of one call, see kernels/cuda_attention_prefill.py; windows and caps
// are attention_scores.cuh's.
//
// A block has kRows query rows of one head, 16 a warp, and walks the keys they may see 32 at a time,
// with an online softmax as in attention.cuh: scores, weights and outputs stay in registers. Weights
// are rounded to float16 for the second product, as keys and values are; sums are float32.
//
// Scores: lane (g, t) reads columns 8 t .. 8 t + 7 of rows g of 32 columns of queries and of keys, its
// shares of the operands of two mma.m16n8k16 if both order the reduction alike. Outputs: the weights
// of lane (g, t) lie as its share of operand A already. Operand B wants two keys in a register for
// every column: words of two rows of values, whose halves are two columns, give two tiles of 8 columns,
// the even and the odd ones of 16.
#ifndef FAIRY_ATTENTION_PREFILL
#define FAIRY_ATTENTION_PREFILL

namespace fairy {

template <class Call>
struct PrefillAttention {
  typedef __half X;
  static constexpr int kDim = Call::kHeadDim;
  static constexpr int kUnits = kDim / 8;  // of 128 bits
  static constexpr int kSlabs = kDim / 32;
  static constexpr int kWarps = Call::kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = 32;
  static constexpr int kPageKeys = 16;
  static constexpr int kPitch = kDim / 2 + 4;  // words of a row of values: no bank conflicts
  static constexpr float kNone = -1e30f;       // log-sum-exp of no keys
  static constexpr float kMasked = -3e38f;

  struct Tile {
    uint4 key[kSlabs][kKeys][4];
    Word value[kKeys][kPitch];
  };
  struct Shared {
    alignas(16) Tile tiles[2];
  };
  struct Work {
    int sequence, first, count, keys, reach;  // row r sees keys below min(keys, reach + r)
    int begin;                                // of its keys, or of its page table
  };

  // `offsets`, of each sequence's key 0, and `positions`, of the rows of q, are read if there are
  // windows.
  static __device__ void run(const X* q, const int* q_indptr, const X* keys, const X* values,
                             const int* indptr, const int* page_values, const int* last_page,
                             const int* offsets, const int* positions, X* output, float* lse,
                             float scale, int causal, int batch, int tiles) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int head = blockIdx.y, kv_head = head / (Call::kHeads / Call::kKvHeads);
    Work work;
    if (!find(work, q_indptr, indptr, last_page, causal, batch, tiles - 1 - blockIdx.x)) return;
    const size_t first_row = (size_t)q_indptr[work.sequence] + work.first;
    int seen_from[2] = {}, skipped = 0;  // keys of a lane's rows; steps that no row of the block needs
    if constexpr (Call::kWindow > 0) {
      if (scale < 0)
        skipped = find_windows(seen_from, positions + first_row, offsets[work.sequence], work.count,
                               warp * 16 + g, lane) / kKeys;
      scale = fabsf(scale);
    }

    Word query[kSlabs][2][4];
#pragma unroll
    for (int c = 0; c < kSlabs; ++c) {
      uint4 rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + g + 8 * half;
        rows[half] = uint4{};
        if (row < work.count)
          rows[half] = ((const uint4*)(q + ((first_row + row) * Call::kHeads + head) * kDim))[4 * c + t];
      }
      const Word low[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
      const Word high[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
#pragma unroll
      for (int r = 0; r < 4; ++r) query[c][0][r] = low[r], query[c][1][r] = high[r];
    }
    float out[kDim / 8][4] = {};
    float peak[2] = {kNone, kNone}, total[2] = {};
    const int last = work.reach + work.count - 1;
    const int end = last < work.keys ? last : work.keys;
    const int steps = end > 0 ? (end + kKeys - 1) / kKeys : 0;
    if (skipped < steps)
      copy(shared.tiles[skipped % 2], keys, values, page_values, work, kv_head, skipped * kKeys);
    commit_copies();
    for (int step = skipped; step < steps; ++step) {
      wait_copies<0>();
      __syncthreads();
      if (step + 1 < steps)
        copy(shared.tiles[(step + 1) % 2], keys, values, page_values, work, kv_head,
             (step + 1) * kKeys);
      commit_copies();
      const Tile& tile = shared.tiles[step % 2];
      float scores[kKeys / 8][4] = {};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int c = 0; c < kSlabs; ++c) {
          const uint4 key = tile.key[c][8 * n + g][t];
          multiply_halves(scores[n], query[c][0], key.x, key.y);
          multiply_halves(scores[n], query[c][1], key.z, key.w);
        }
      soften(scores, out, peak, total, work, seen_from, warp * 16 + g, step * kKeys + 2 * t, scale);
      add_values(out, scores, tile, g, t);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += shuffle_xor(total[half], 1);
      total[half] += shuffle_xor(total[half], 2);
      const int row = warp * 16 + g + 8 * half;
      if (row >= work.count) continue;
      const float inverse = total[half] > 0 ? 1.0f / total[half] : 0.0f;
      const size_t place = (first_row + row) * Call::kHeads + head;
      uint2* to = (uint2*)(output + place * kDim);
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
        const float* even = out[2 * j] + 2 * half;
        const float* odd = out[2 * j + 1] + 2 * half;
        to[4 * j + t] = {pack_halves(even[0] * inverse, odd[0] * inverse),
                         pack_halves(even[1] * inverse, odd[1] * inverse)};
      }
      if (t == 0) lse[place] = total[half] > 0 ? peak[half] + log2f(total[half]) : kNone;
    }
  }

 private:
  // Finds the rows of this block; late rows, which see most keys, come first.
  static __device__ __forceinline__ bool find(Work& work, const int* q_indptr, const int* indptr,
                                              const int* last_page, int causal, int batch,
                                              int tile) {
    for (int b = 0; b < batch; ++b) {
      const int length = q_indptr[b + 1] - q_indptr[b], tiles = (length + kRows - 1) / kRows;
      if (tile < tiles) {
        work.sequence = b;
        work.first = tile * kRows;
        work.count = length - work.first < kRows ? length - work.first : kRows;
        work.begin = indptr[b];
        work.keys = indptr[b + 1] - work.begin;
        if (Call::kPaged && work.keys > 0)
          work.keys = (work.keys - 1) * kPageKeys + last_page[b];
        work.reach = causal ? work.keys - length + work.first + 1 : work.keys;
        return true;
      }
      tile -= tiles;
    }
    return false;
  }

  // Finds the first keys that rows `row` and `row` + 8 see, and returns the first that any row of the
  // block sees. Positions are read row by row: where sequences share pages, the rows of several come
  // as those of one. Rows that do not exist see what the last one sees.
  static __device__ __forceinline__ int find_windows(int (&seen_from)[2], const int* positions,
                                                     int offset, int count, int row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + 8 * half < count ? row + 8 * half : count - 1;
      seen_from[half] = first_key<Call>(positions[own], offset);
    }
    int lowest = positions[0];
    for (int other = lane; other < count; other += 32)
      lowest = positions[other] < lowest ? positions[other] : lowest;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const int other = shuffle_xor(lowest, lanes);
      lowest = other < lowest ? other : lowest;
    }
    return first_key<Call>(lowest, offset);
  }

  static __device__ __forceinline__ void copy(Tile& tile, const X* keys, const X* values,
                                              const int* page_values, const Work& work, int kv_head,
                                              int first) {
#pragma unroll
    for (int i = threadIdx.x; i < kKeys * kUnits; i += 32 * kWarps) {
      const int key = i / kUnits, unit = i % kUnits, at = first + key;
      const bool inside = at < work.keys;
      size_t row = 0, value_row = 0;
      if (inside && Call::kPaged) {
        const size_t page = page_values[work.begin + at / kPageKeys];
        row = ((page * 2) * Call::kKvHeads + kv_head) * kPageKeys + at % kPageKeys;
        value_row = row + Call::kKvHeads * kPageKeys;
      } else if (inside) {
        row = value_row = (size_t)(work.begin + at) * Call::kKvHeads + kv_head;
      }
      copy_async(&tile.key[unit / 4][key][unit % 4], (const uint4*)keys + row * kUnits + unit, inside);
      copy_async(&tile.value[key][4 * unit], (const uint4*)values + value_row * kUnits + unit, inside);
    }
  }

  // Turns scores into weights under a common peak, and brings what was summed before under it. Sums
  // of weights are those of a lane's own columns.
  static __device__ __forceinline__ void soften(float (&scores)[kKeys / 8][4],
                                                float (&out)[kDim / 8][4], float (&peak)[2],
                                                float (&total)[2], const Work& work,
                                                const int (&seen_from)[2], int row, int column,
                                                float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int reach = work.reach + row + 8 * half;
      const int end = reach < work.keys ? reach : work.keys;
      float highest = peak[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[n][2 * half + c];
          bool seen = column + 8 * n + c < end;
          if constexpr (Call::kWindow > 0) seen = seen && column + 8 * n + c >= seen_from[half];
          score = seen ? cap_score<Call>(score * scale) : kMasked;
          highest = fmaxf(highest, score);
        }
      highest = fmaxf(highest, shuffle_xor(highest, 1));
      highest = fmaxf(highest, shuffle_xor(highest, 2));
      const float shrink = exp2f(peak[half] - highest);
      peak[half] = highest;
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[n][2 * half + c];
          score = exp2f(score - highest);
          total[half] += score;
        }
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) out[j][2 * half + c] *= shrink;
    }
  }

  static __device__ __forceinline__ void add_values(float (&out)[kDim / 8][4],
                                                    const float (&weights)[kKeys / 8][4],
                                                    const Tile& tile, int g, int t) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const float* first = weights[2 * k];
      const float* second = weights[2 * k + 1];
      const Word a[4] = {pack_halves(first[0], first[1]), pack_halves(first[2], first[3]),
                         pack_halves(second[0], second[1]), pack_halves(second[2], second[3])};
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
        Word rows[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          rows[r] = tile.value[16 * k + 2 * t + r % 2 + 8 * (r / 2)][8 * j + g];
        multiply_halves(out[2 * j], a, pick_bytes(rows[0], rows[1], 0x5410),
                        pick_bytes(rows[2], rows[3], 0x5410));
        multiply_halves(out[2 * j + 1], a, pick_bytes(rows[0], rows[1], 0x7632),
                        pick_bytes(rows[2], rows[3], 0x7632));
      }
    }
  }
};

}  // namespace fairy
#endif  // FAIRY_ATTENTION_PREFILL
