// Attention of one query row a sequence and head over the paged cache (Flash-Decoding). `Call` holds
// the constants of one call, see kernels/cuda_attention.py; windows and caps are attention_scores.cuh's.
//
// A block works on a part of a context for `kGroup` query heads that share keys and values. kLanes
// lanes hold a key, 128 bits each, so that a warp has 32 / kLanes keys at a time, and asks for
// `kTogether` times as many before it multiplies. Every such team of lanes keeps an online softmax of
// the keys it saw (scores in units of log2):
//     peak' = max(peak, s)   total = total 2^(peak - peak') + 2^(s - peak')   out likewise with values
// Teams are merged at the end, parts of a context by `Combine`. What lies before a window is in no part
// and not read.
//
// Queries and keys come from where a source says: of `Stored`, all keys are in pages and queries have
// been rotated; `Rotating` takes what a layer has computed, rotates it, and appends the new key itself.
#ifndef FAIRY_ATTENTION
#define FAIRY_ATTENTION

namespace fairy {

constexpr float kEmpty = -1e30f;  // log-sum-exp of no keys; finite, so that merging two is no NaN
constexpr int kPage = 16;

// 128 bits of a head.
template <class X>
struct alignas(16) HeadUnit {
  static constexpr int kPer = 16 / sizeof(X);
  X x[kPer];

  static __device__ __forceinline__ HeadUnit load(const X* head, int own) {
    return ((const HeadUnit*)head)[own];
  }
};

// Where a key's row is in pages, and how far behind it that of its value.
template <class Call>
struct KeyPages {
  typedef typename Call::X X;
  static constexpr size_t kToValue = (size_t)Call::kKvHeads * kPage * Call::kHeadDim;

  static __device__ __forceinline__ size_t place(int page, int slot, int kv_head) {
    return (((size_t)page * 2 * Call::kKvHeads + kv_head) * kPage + slot) * Call::kHeadDim;
  }
};

template <class Call>
struct Stored {
  typedef typename Call::X X;
  typedef HeadUnit<X> Unit;
  const X* q;
  const X* pages;

  __device__ __forceinline__ void prepare(int, int) {}

  __device__ __forceinline__ Unit query(int sequence, int head, int own) const {
    return Unit::load(q + ((size_t)sequence * Call::kHeads + head) * Call::kHeadDim, own);
  }

  __device__ __forceinline__ void key_and_value(const int* table, int at, int, int kv_head, int own,
                                                Unit& key, Unit& value) const {
    const X* row = pages + KeyPages<Call>::place(table[at / kPage], at % kPage, kv_head);
    key = Unit::load(row, own);
    value = Unit::load(row + KeyPages<Call>::kToValue, own);
  }

  __device__ __forceinline__ void append(int, int, int) const {}
};

// `qkv` has the heads of queries, keys and values of one row a sequence. Elements i and i + kHalf of a
// head turn by positions[sequence] frequencies[i]; those from 2 kHalf on do not.
template <class Call>
struct Rotating {
  typedef typename Call::X X;
  typedef HeadUnit<X> Unit;
  static constexpr int kPer = Unit::kPer;
  static constexpr int kUnits = Call::kHalf / kPer;  // of elements whose partners come later
  static constexpr int kRow = (Call::kHeads + 2 * Call::kKvHeads) * Call::kHeadDim;
  const X* qkv;
  X* pages;
  const int* positions;
  const int* places;
  const float* frequencies;
  float cosine[kPer], sine[kPer];
  int partner;

  // Nothing that is read here comes from the kernel before.
  __device__ __forceinline__ void prepare(int sequence, int own) {
    const bool turns = own < 2 * kUnits, first = own < kUnits;
    partner = !turns ? own : first ? own + kUnits : own - kUnits;
    const float position = (float)positions[sequence];
    const float* mine = frequencies + (first ? own : own - kUnits) * kPer;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      cosine[i] = 1, sine[i] = 0;
      if (turns) {
        const float angle = position * mine[i];
        cosine[i] = cosf(angle) * Call::kAmplitude;
        sine[i] = (first ? -1.0f : 1.0f) * sinf(angle) * Call::kAmplitude;
      }
    }
  }

  __device__ __forceinline__ Unit query(int sequence, int head, int own) const {
    return rotated(qkv + (size_t)sequence * kRow + head * Call::kHeadDim, own);
  }

  __device__ __forceinline__ void key_and_value(const int* table, int at, int newest, int kv_head,
                                                int own, Unit& key, Unit& value) const {
    if (at == newest) {
      new_key_and_value(kv_head, own, key, value);
      return;
    }
    const X* row = pages + KeyPages<Call>::place(table[at / kPage], at % kPage, kv_head);
    key = Unit::load(row, own);
    value = Unit::load(row + KeyPages<Call>::kToValue, own);
  }

  // Blocks take the new key from `qkv`, so that it does not matter when it gets into its page.
  __device__ __forceinline__ void append(int sequence, int kv_head, int own) const {
    Unit key, value;
    new_key_and_value(kv_head, own, key, value);
    const int place = places[sequence];
    X* row = pages + KeyPages<Call>::place(place / kPage, place % kPage, kv_head);
    ((Unit*)row)[own] = key;
    ((Unit*)(row + KeyPages<Call>::kToValue))[own] = value;
  }

 private:
  __device__ __forceinline__ void new_key_and_value(int kv_head, int own, Unit& key,
                                                    Unit& value) const {
    const X* row = qkv + (size_t)blockIdx.z * kRow;
    key = rotated(row + (Call::kHeads + kv_head) * Call::kHeadDim, own);
    value = Unit::load(row + (Call::kHeads + Call::kKvHeads + kv_head) * Call::kHeadDim, own);
  }

  __device__ __forceinline__ Unit rotated(const X* head, int own) const {
    Unit unit = Unit::load(head, own);
    const Unit other = Unit::load(head, partner);
#pragma unroll
    for (int i = 0; i < kPer; ++i)
      store(unit.x + i, to_float(unit.x[i]) * cosine[i] + to_float(other.x[i]) * sine[i]);
    return unit;
  }
};

template <class Call>
struct DecodeAttention {
  typedef typename Call::X X;
  typedef HeadUnit<X> Unit;
  static constexpr int kPer = Unit::kPer;
  static constexpr int kLanes = Call::kHeadDim / kPer;
  static constexpr int kTeams = 32 / kLanes;  // of a warp
  static constexpr int kGroup = Call::kGroup;
  static constexpr int kTogether = Call::kTogether;
  static constexpr int kStep = Call::kWarps * kTeams;  // keys of a block at a time

  struct Shared {
    float out[Call::kWarps][Call::kHeadDim];
    float peak[Call::kWarps];
    float total[Call::kWarps];
  };
  struct State {
    float peak, total;
    float out[kPer];
  };

  // `parts` of each context; `partial` and `partial_lse` take results if there are several, else
  // `output` and `lse`. `offsets`, of each sequence's key 0, and `positions`, of its query, are read
  // if there are windows.
  template <class Source>
  static __device__ void run(Source source, const int* indptr, const int* page_values,
                             const int* last_page, const int* offsets, const int* positions,
                             X* output, float* lse, float* partial, float* partial_lse, float scale,
                             int parts) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int part = blockIdx.x, sequence = blockIdx.z;
    const int first_head = blockIdx.y * kGroup;
    const int kv_head = first_head / (Call::kHeads / Call::kKvHeads);
    const int first_page = indptr[sequence], count = indptr[sequence + 1] - first_page;
    const int keys = count > 0 ? (count - 1) * kPage + last_page[sequence] : 0;
    int seen_from = 0, unseen_pages = 0;
    if constexpr (Call::kWindow > 0) {
      if (scale < 0) seen_from = first_key<Call>(positions[sequence], offsets[sequence]);
      unseen_pages = seen_from / kPage;  // if beyond all keys, so is `start`
      scale = fabsf(scale);
    }
    const int own_pages = (count - unseen_pages + parts - 1) / parts;
    int start = (unseen_pages + part * own_pages) * kPage;
    const int end = start + own_pages * kPage < keys ? start + own_pages * kPage : keys;
    if constexpr (Call::kWindow > 0) start = start < seen_from ? seen_from : start;
    const int own = lane % kLanes;
    source.prepare(sequence, own);
    wait_for_inputs();

    float query[kGroup][kPer];
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      const Unit unit = source.query(sequence, first_head + h, own);
#pragma unroll
      for (int i = 0; i < kPer; ++i) query[h][i] = to_float(unit.x[i]) * scale;
    }
    State states[kGroup];
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      states[h].peak = kEmpty, states[h].total = 0;
#pragma unroll
      for (int i = 0; i < kPer; ++i) states[h].out[i] = 0;
    }
    if (part == 0 && warp == 0 && lane < kLanes && first_head % (Call::kHeads / Call::kKvHeads) == 0)
      source.append(sequence, kv_head, own);
    const int* table = page_values + first_page;
    for (int first = start + warp * kTeams + lane / kLanes; first - lane / kLanes < end;
         first += kStep * kTogether) {
      Unit key[kTogether], value[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int at = first + u * kStep;
        if (at < end) source.key_and_value(table, at, keys - 1, kv_head, own, key[u], value[u]);
      }
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        float score[kTogether];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < kPer; ++i) sum += query[h][i] * to_float(key[u].x[i]);
#pragma unroll
          for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
          score[u] = first + u * kStep < end ? cap_score<Call>(sum) : kEmpty;
        }
        take(states[h], score, value, first, end);
      }
    }
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      merge_teams(states[h]);
      if (h > 0) __syncthreads();
      if (lane < kLanes) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) shared.out[warp][own * kPer + i] = states[h].out[i];
      }
      if (lane == 0) shared.peak[warp] = states[h].peak, shared.total[warp] = states[h].total;
      __syncthreads();
      const size_t row = (size_t)sequence * Call::kHeads + first_head + h;
      finish(shared, output + row * Call::kHeadDim, lse + row,
             partial + (row * parts + part) * Call::kHeadDim, partial_lse + row * parts + part,
             parts);
    }
  }

 private:
  static __device__ __forceinline__ void take(State& state, const float (&score)[kTogether],
                                              const Unit (&value)[kTogether], int first, int end) {
    float peak = state.peak;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) peak = fmaxf(peak, score[u]);
    const float shrink = exp2f(state.peak - peak);
    state.peak = peak;
    state.total *= shrink;
#pragma unroll
    for (int i = 0; i < kPer; ++i) state.out[i] *= shrink;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (first + u * kStep >= end) continue;  // what was not loaded is no number
      const float weight = exp2f(score[u] - peak);
      state.total += weight;
#pragma unroll
      for (int i = 0; i < kPer; ++i) state.out[i] += weight * to_float(value[u].x[i]);
    }
  }

  static __device__ __forceinline__ void merge_teams(State& state) {
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2) {
      const float other = shuffle_xor(state.peak, lanes);
      const float peak = fmaxf(state.peak, other);
      const float own_weight = exp2f(state.peak - peak), other_weight = exp2f(other - peak);
      state.peak = peak;
      state.total = state.total * own_weight + shuffle_xor(state.total, lanes) * other_weight;
#pragma unroll
      for (int i = 0; i < kPer; ++i)
        state.out[i] = state.out[i] * own_weight + shuffle_xor(state.out[i], lanes) * other_weight;
    }
  }

  static __device__ __forceinline__ void finish(const Shared& shared, X* output, float* lse,
                                                float* partial, float* partial_lse, int parts) {
    float peak = kEmpty, total = 0;
#pragma unroll
    for (int warp = 0; warp < Call::kWarps; ++warp) peak = fmaxf(peak, shared.peak[warp]);
#pragma unroll
    for (int warp = 0; warp < Call::kWarps; ++warp)
      total += shared.total[warp] * exp2f(shared.peak[warp] - peak);
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
    for (int i = threadIdx.x; i < Call::kHeadDim; i += Call::kWarps * 32) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < Call::kWarps; ++warp)
        sum += shared.out[warp][i] * exp2f(shared.peak[warp] - peak);
      if (parts > 1)
        partial[i] = sum * inverse;
      else
        store(output + i, sum * inverse);
    }
    if (threadIdx.x == 0) *(parts > 1 ? partial_lse : lse) = total > 0 ? peak + log2f(total) : kEmpty;
  }
};

// Merges the parts of a context; a block has one head of one sequence.
template <class Call>
struct Combine {
  typedef typename Call::X X;

  static __device__ void run(const float* partial, const float* partial_lse, X* output, float* lse,
                             int parts) {
    const size_t row = (size_t)blockIdx.y * Call::kHeads + blockIdx.x;
    const float* own_lse = partial_lse + row * parts;
    float peak = kEmpty, total = 0;
    for (int part = 0; part < parts; ++part) peak = fmaxf(peak, own_lse[part]);
    for (int part = 0; part < parts; ++part) total += exp2f(own_lse[part] - peak);
    for (int i = threadIdx.x; i < Call::kHeadDim; i += Call::kWarps * 32) {
      float sum = 0;
      for (int part = 0; part < parts; ++part)
        sum += partial[(row * parts + part) * Call::kHeadDim + i] * exp2f(own_lse[part] - peak);
      store(output + row * Call::kHeadDim + i, sum / total);
    }
    if (threadIdx.x == 0) lse[row] = peak + log2f(total);
  }
};

}  // namespace fairy
#endif  // FAIRY_ATTENTION
