// The functions of hopper_primitives.cuh on the CPU, beside cuda_shim.h.
//
// Multiplications read their operands and write their sums at the wait for them, bulk copies poison
// what they will write and arrive when no thread can go on without them: both as late as they may.
#pragma once

namespace fairy {

struct alignas(8) Barrier {
  uint16_t arrivals, missing, copies, phases;

  void arrive() {
    if (missing == 0) emulated::fail("too many arrivals at a barrier");
    --missing;
    complete();
  }
  void complete() {
    if (missing == 0 && copies == 0) ++phases, missing = arrivals;
  }
};

struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  Barrier* barrier;
};
static std::vector<BulkCopy> bulk_copies;

static bool deliver_copy() {
  if (bulk_copies.empty()) return false;
  const BulkCopy copy = bulk_copies.front();
  bulk_copies.erase(bulk_copies.begin());
  memcpy(copy.to, copy.from, copy.bytes);
  --copy.barrier->copies;
  copy.barrier->complete();
  return true;
}

inline void init_barrier(Barrier* barrier, int arrivals) {
  emulated::deliver = deliver_copy;
  bulk_copies.clear();
  *barrier = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0};
}

inline void publish_barriers() {}

inline void arrive(Barrier* barrier) { barrier->arrive(); }

inline void wait_barrier(Barrier* barrier, int parity) {
  struct Phase {
    const Barrier* barrier;
    int parity;
    static bool over(void* phase) {
      const Phase& own = *(Phase*)phase;
      return own.barrier->phases % 2 != own.parity;
    }
  } phase = {barrier, parity};
  emulated::wait_until(Phase::over, &phase);
}

inline void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16)
    emulated::fail("a copy is not aligned");
  memset(to, 0xff, bytes);
  ++barrier->copies;
  barrier->arrive();
  bulk_copies.push_back({to, from, bytes, barrier});
}

struct StoreTransposed {
  void* to;
  const Word* matrices;

  static void together(void* const (&operands)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      const int matrix = lane / 8, column = lane % 8;
      uint16_t* to = (uint16_t*)((StoreTransposed*)operands[lane])->to;
      if ((uintptr_t)to % 16) emulated::fail("a column of a matrix is not aligned");
      for (int row = 0; row < 8; ++row) {
        const auto& from = *(StoreTransposed*)operands[4 * row + column / 2];
        to[row] = from.matrices[matrix] >> (column % 2 * 16);
      }
    }
  }
};

inline void store_transposed(void* to, const Word (&matrices)[4], int line = __builtin_LINE()) {
  StoreTransposed operands = {to, matrices};
  emulated::wait(emulated::Wait::warp, line, StoreTransposed::together, &operands);
}

struct GroupMultiply {
  float (*number)(const void* at);  // of an operand
  float (*sums)[4];
  const Word* a;
  const char* b;
  int line;  // bytes
  int cores;
};
static std::vector<std::vector<GroupMultiply>> multiplications[16 * 32];  // of a thread: commits
static std::vector<GroupMultiply> open_multiplications[16 * 32];

template <int kCores>
void clear_sums(float (&sums)[kCores][4]) {
  memset(sums, 0, sizeof sums);
}

inline void begin_multiplications() {}

inline Word operand_at(const void* b) {
  if (shared_address(b) % 16) emulated::fail("an operand is not aligned");
  return shared_address(b) / 16;
}

template <class T>
float number_at(const void* at) {
  T number;
  memcpy(&number, at, sizeof number);
  return number;
}

template <class T, int kCores>
void multiply_group(float (&sums)[kCores][4], const Word (&a)[4], Word b) {
  const char* at = emulated::shared_bytes + b * 16;
  open_multiplications[emulated::current].push_back(
      {number_at<T>, sums, a, at, kCores * 128, kCores});
}

inline void commit_multiplications() {
  auto& open = open_multiplications[emulated::current];
  multiplications[emulated::current].push_back(open);
  open.clear();
}

struct FinishMultiplications {
  int thread, pending;

  static void together(void* const (&operands)[32]) {
    const FinishMultiplications& first = *(FinishMultiplications*)operands[0];
    while ((int)multiplications[first.thread].size() > first.pending) {
      const size_t count = multiplications[first.thread].front().size();
      for (size_t i = 0; i < count; ++i) finish(first.thread, i);
      for (int lane = 0; lane < 32; ++lane)
        multiplications[first.thread + lane].erase(multiplications[first.thread + lane].begin());
    }
  }

  static void finish(int thread, size_t i) {
    static float a[16][16];
    for (int lane = 0; lane < 32; ++lane) {
      const GroupMultiply& own = multiplications[thread + lane].front()[i];
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + 8 * (r / 2) + e] =
              own.number((const char*)&own.a[r] + 2 * e);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const GroupMultiply& own = multiplications[thread + lane].front()[i];
      for (int core = 0; core < own.cores; ++core)
        for (int r = 0; r < 4; ++r) {
          const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
          double sum = own.sums[core][r];
          for (int k = 0; k < 16; ++k) {
            const char* line = own.b + (k / 8) * own.line + (core * 8 + column) * 16;
            sum += (double)a[row][k] * own.number(line + k % 8 * 2);
          }
          own.sums[core][r] = (float)sum;
        }
    }
  }
};

template <int kPending>
void wait_multiplications(int line = __builtin_LINE()) {
  FinishMultiplications finish = {emulated::current, kPending};
  emulated::wait(emulated::Wait::warp, line, FinishMultiplications::together, &finish);
}

}  // namespace fairy
