// Sliding windows and soft-capped scores, as attention.cuh and attention_prefill.cuh have them. `Call`
// holds the constants of one call: kWindow, the keys of a window (0: no layer has one), and kCap, cap
// log2(e) (0: scores have no cap).
//
// All layers call the same function, which is told nothing of the layer but the scale of its scores. A
// negative one, whose magnitude is the scale, asks for the window.
#ifndef FAIRY_ATTENTION_SCORES
#define FAIRY_ATTENTION_SCORES

namespace fairy {

// The first key that the query at `position` sees, its own being the last of the window. `offset` is
// the position of key 0; the answer may be beyond the last key there is.
template <class Call>
__device__ __forceinline__ int first_key(int position, int offset) {
  const int lowest = position - (Call::kWindow - 1) - offset;
  return lowest > 0 ? lowest : 0;
}

// cap tanh(s / cap) in units of log2, of a score s that stands as 2 log2(e) s / cap.
//
// tanh x = 1 - 2 / (e^2x + 1), which is 1 to float long before the power overflows. It errs by less than
// 2^-20: the power and the quotient by 2^-22 of themselves with --use_fast_math, which makes of tanhf
// an instruction that errs by 2^-11 of tanh x.
template <class Call>
__device__ __forceinline__ float cap_score(float score) {
  if constexpr (Call::kCap > 0) {
    return Call::kCap * (1.0f - 2.0f / (exp2f(fminf(score, 64.0f)) + 1.0f));
  } else {
    return score;
  }
}

}  // namespace fairy
#endif  // FAIRY_ATTENTION_SCORES
