// Threads of one Metal threadgroup as fibers on one CPU thread.
//
// A fiber runs until it meets a barrier or exchanges registers with its simdgroup. The order in
// which fibers run is chosen, so that results that depend on it show. Checked are: barriers that
// not all threads reach, simdgroup operations that its threads reach at different places, and
// threads that wait for each other forever. x86-64 only.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

extern "C" void metal_switch(void** save, void* load);
asm(R"(
.text
.local metal_switch
.type metal_switch,@function
metal_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size metal_switch,.-metal_switch
)");

namespace threads {

constexpr int kSimd = 32;
constexpr size_t kStack = 65536;

enum State { kReady, kAtBarrier, kAtSimd, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack = nullptr;
  State state;
  int place;           // source line of the barrier or simdgroup operation it waits at
  unsigned phase;      // which slot was published last
  bool present[2];     // took part in the operation of a phase
  alignas(16) char slot[2][16];
};

inline std::vector<Fiber> fibers;
inline void* scheduler;
inline int current, count;
inline void (*body)(unsigned thread);
inline char* error;

inline void fail(const char* what, int first, int second) {
  if (!error[0]) std::snprintf(error, 200, "%s (line %d, line %d)", what, first, second);
}

inline void leave() { metal_switch(&fibers[current].stack_pointer, scheduler); }

inline void barrier(int place) {
  fibers[current].state = kAtBarrier;
  fibers[current].place = place;
  leave();
}

// Shows a value to the other threads of the simdgroup and waits until all have shown theirs.
template <class T>
void publish(T value, int place) {
  Fiber& fiber = fibers[current];
  fiber.phase ^= 1;
  std::memcpy(fiber.slot[fiber.phase], &value, sizeof value);
  fiber.state = kAtSimd;
  fiber.place = place;
  leave();
}

// Reads what a thread of the simdgroup has shown; NaN bits of one that took no part.
template <class T>
T fetch(int lane) {
  const int from = current / kSimd * kSimd + lane;
  const unsigned phase = fibers[current].phase;
  T value;
  if (lane < 0 || lane >= kSimd || from >= count || !fibers[from].present[phase]) {
    std::memset((void*)&value, 0xFF, sizeof value);
    return value;
  }
  std::memcpy((void*)&value, fibers[from].slot[phase], sizeof value);
  return value;
}

template <class T>
T shuffle(T value, int lane, int place) {
  publish(value, place);
  return fetch<T>(lane);
}

template <class T>
T shuffle_down(T value, int by, int place) {
  const int lane = current % kSimd;
  publish(value, place);
  return lane + by < kSimd ? fetch<T>(lane + by) : value;
}

template <class T>
T sum(T value, int place) {
  publish(value, place);
  const unsigned phase = fibers[current].phase;
  const int first = current / kSimd * kSimd;
  T total = 0;
  for (int i = 0; i < kSimd && first + i < count; i++)
    if (fibers[first + i].present[phase]) total = (T)(total + fetch<T>(i));
  return total;
}

inline void simd_barrier(int place) { publish(0, place); }

// Tells the first thread of a simdgroup that all gave the same pointer.
inline bool leads_with(const void* pointer, int place) {
  publish(pointer, place);
  if (current % kSimd) return false;
  for (int i = 0; i < kSimd && current + i < count; i++)
    if (fetch<const void*>(i) != pointer) fail("simdgroup matrix at different addresses", place, i);
  return true;
}

inline void start() {
  body(current);
  fibers[current].state = kDone;
  leave();
}

// order 0: by number, 1: backwards, others: shuffled by that seed.
inline std::vector<int> order_of(unsigned order) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  for (int i = count - 1; order > 1 && i > 0; i--) {
    order = order * 1664525u + 1013904223u;
    std::swap(numbers[i], numbers[order % (i + 1)]);
  }
  return numbers;
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = static_cast<char*>(std::malloc(kStack));
  fiber.state = kReady;
  fiber.phase = 0;
  fiber.present[0] = fiber.present[1] = false;
  void** top = (void**)(((uintptr_t)fiber.stack + kStack) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = (void*)start;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Lets a simdgroup go on whose threads all wait at one operation, or have ended or wait elsewhere.
inline bool release_simdgroup(int first) {
  const int end = std::min(first + kSimd, count);
  int place = -1;
  unsigned phase = 0;
  for (int i = first; i < end; i++) {
    if (fibers[i].state != kAtSimd) continue;
    if (place >= 0 && place != fibers[i].place) {
      fail("a simdgroup's threads at different operations", place, fibers[i].place);
      return false;
    }
    place = fibers[i].place;
    phase = fibers[i].phase;
  }
  if (place < 0) return false;
  for (int i = first; i < end; i++) {
    Fiber& fiber = fibers[i];
    fiber.present[phase] = fiber.state == kAtSimd;
    if (fiber.state != kAtSimd) continue;
    if (fiber.phase != phase) {  // it took part in fewer operations than the others
      std::memcpy(fiber.slot[phase], fiber.slot[phase ^ 1], sizeof fiber.slot[0]);
      fiber.phase = phase;
    }
    fiber.state = kReady;
  }
  return true;
}

// Runs a simdgroup as far as it gets without the others, which may lag behind or be ahead.
inline void run_simdgroup(int first, const std::vector<int>& turns) {
  do {
    for (int i : turns) {
      if (i / kSimd * kSimd != first || fibers[i].state != kReady) continue;
      current = i;
      metal_switch(&scheduler, fibers[i].stack_pointer);
    }
  } while (!error[0] && release_simdgroup(first));
}

// Lets all threads go on if all wait at one barrier; returns false when the group has ended.
inline bool release_barrier() {
  int done = 0, waiting = 0, place = -1;
  for (int i = 0; i < count; i++) {
    if (fibers[i].state == kDone) done++;
    if (fibers[i].state != kAtBarrier) continue;
    waiting++;
    if (place >= 0 && place != fibers[i].place) fail("different barriers", place, fibers[i].place);
    place = fibers[i].place;
  }
  if (done == count) return false;
  if (waiting != count) fail("a barrier that some threads never reach", place, done);
  for (int i = 0; i < count; i++) fibers[i].state = kReady;
  return true;
}

inline void run_group(int threads, unsigned order) {
  count = threads;
  if ((int)fibers.size() < count) fibers.resize(count);
  for (int i = 0; i < count; i++) prepare(fibers[i]);
  const std::vector<int> turns = order_of(order);
  do {
    for (int i : turns)
      if (fibers[i].state == kReady) run_simdgroup(i / kSimd * kSimd, turns);
  } while (!error[0] && release_barrier());
}

}  // namespace threads
