// A CUDA driver and runtime whose kernels do nothing: what TVM's CUDA runtime asks of them is counted.
//
// Built twice, as libcuda.so.1 and as libcudart.so.13; the second finds the counters in the first.
// Memory is the host's, zeros. Global capture is modelled: what CUDA forbids while a stream is being
// recorded is counted as a violation, and launches then become nodes of a graph.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Counts {
  long launches, graphs, nodes, instantiated, copies, syncs, allocations, violations;
};
extern struct Counts idle_counts;
extern void* idle_capturing;  // the stream that is being recorded
extern char idle_violation[256];

#ifdef DRIVER
struct Counts idle_counts;
void* idle_capturing;
char idle_violation[256];
#endif

static void forbid(const char* what) {
  if (!idle_capturing) return;
  if (!idle_counts.violations++) snprintf(idle_violation, sizeof idle_violation, "%s", what);
}

#ifdef DRIVER
typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
} Launch;

int cuDeviceGetName(char* name, int size, int device) {
  snprintf(name, size, "idle");
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuGetErrorName(int error, const char** text) { return *text = "none", 0; }
int cuGetErrorString(int error, const char** text) { return *text = "none", 0; }
int cuLaunchKernelEx(const Launch* launch, void* function, void** parameters, void** extra) {
  if (idle_capturing && launch->stream == idle_capturing) return idle_counts.nodes++, 0;
  forbid("a launch outside of the stream that is recorded");
  return idle_counts.launches++, 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = module, 0;
}
int cuModuleLoadData(void** module, const void* image) {
  forbid("cuModuleLoadData");
  return *module = (void*)image, 0;
}
int cuModuleUnload(void* module) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }

#else

int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 1: return *value = 1024, 0;    // threads of a block
    case 8: return *value = 49152, 0;   // bytes of shared memory
    case 10: return *value = 32, 0;     // threads of a warp
    case 16: return *value = 132, 0;    // multiprocessors
    case 75: return *value = 9, 0;      // compute capability
    case 76: return *value = 0, 0;
    default: return *value = 1 << 16, 0;
  }
}
int cudaGetDeviceProperties(char* properties, int device) {
  // A name of 256 bytes, 32 bytes of numbers, and how much memory there is.
  *(size_t*)(properties + 288) = (size_t)80 << 30;
  return strcpy(properties, "idle"), 0;
}
int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaSetDevice(int device) { return 0; }
const char* cudaGetErrorName(int error) { return "none"; }
const char* cudaGetErrorString(int error) { return "none"; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }

static int allocate(void** memory, size_t bytes, const char* what) {
  forbid(what);
  idle_counts.allocations++;
  bytes = (bytes + 511) / 256 * 256;
  *memory = aligned_alloc(256, bytes);
  memset(*memory, 0, bytes);
  return 0;
}
int cudaMalloc(void** memory, size_t bytes) { return allocate(memory, bytes, "cudaMalloc"); }
int cudaMallocHost(void** memory, size_t bytes) { return allocate(memory, bytes, "cudaMallocHost"); }
int cudaFree(void* memory) { return forbid("cudaFree"), free(memory), 0; }
int cudaFreeHost(void* memory) { return forbid("cudaFreeHost"), free(memory), 0; }
int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  return *free_bytes = *total = (size_t)80 << 30, 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  if (idle_capturing) forbid("cudaMemcpyAsync");
  return idle_counts.copies++, memcpy(to, from, bytes), 0;
}
int cudaMemcpyPeerAsync(void) { return 1; }

int cudaEventCreate(void** event) { return *event = malloc(1), 0; }
int cudaEventDestroy(void* event) { return free(event), 0; }
int cudaEventElapsedTime(float* ms, void* start, void* end) { return *ms = 0, 0; }
int cudaEventRecord(void* event, void* stream) { return 0; }
int cudaEventSynchronize(void* event) { return forbid("cudaEventSynchronize"), 0; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) { return 0; }
int cudaStreamCreate(void** stream) { return *stream = malloc(1), 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void* stream) { return free(stream), 0; }
int cudaStreamSynchronize(void* stream) {
  forbid("cudaStreamSynchronize");
  return idle_counts.syncs++, 0;
}

int cudaStreamBeginCapture(void* stream, int mode) { return idle_capturing = stream, 0; }
int cudaStreamEndCapture(void* stream, void** graph) {
  return idle_capturing = NULL, *graph = malloc(1), 0;
}
int cudaGraphInstantiate(void** exec, void* graph, unsigned long flags) {
  return idle_counts.instantiated++, *exec = malloc(1), 0;
}
int cudaGraphDestroy(void* graph) { return free(graph), 0; }
int cudaGraphExecDestroy(void* exec) { return free(exec), 0; }
int cudaGraphLaunch(void* exec, void* stream) { return idle_counts.graphs++, 0; }
#endif
