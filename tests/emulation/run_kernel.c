// Runs one compiled kernel outside of TVM: arguments in on stdin, its tensors out on stdout.
//
// A PrimFunc compiled by TVM is a C function over tvm-ffi's stable ABI. It needs four things of a
// runtime: an error sink, workspace, freeing it, and a parallel launch. They are below, written to
// catch mistakes rather than to be fast:
//   - tensors and workspaces end at an unmapped page, so that reading or writing past them faults;
//   - workspaces begin as 0xff bytes, which are NaN as floats;
//   - tasks of a parallel loop run one after another, the last one first.
//
// Build: gcc -static -DKERNEL=__tvm_ffi_NAME -I TVM_FFI_INCLUDE run_kernel.c kernel.o
// stdin: int64 arguments; for each tensor int64 dtype code, bits, ndim, shape[ndim], then its bytes;
// for each scalar int64 code, then an int64 or a double.
// stdout: the bytes of every tensor, as the kernel left them.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

enum { kMaxArgs = 16, kMaxDims = 5, kInt = 100, kFloat = 101, kTasks = 3, kAlign = 64 };

static void die(const char* what) {
  fprintf(stderr, "run_kernel: %s\n", what);
  exit(1);
}

// Memory whose last byte, rounded up to alignment, is followed by an unmapped page.
static void* guarded(size_t bytes, int fill) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t used = (bytes + kAlign - 1) / kAlign * kAlign;
  size_t pages = (used + page - 1) / page * page;
  char* base = mmap(NULL, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED || mprotect(base + pages, page, PROT_NONE) != 0) die("out of memory");
  memset(base, fill, pages);
  return base + pages - used;
}

// The runtime, as tvm/runtime/c_backend_api.h declares it.

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroupEnv;

typedef int (*ParallelLambda)(int task_id, ParallelGroupEnv* env, void* data);

static void* alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return guarded(bytes, 0xff);
}

static int free_workspace(int device_type, int device_id, void* data) {
  (void)device_type, (void)device_id, (void)data;
  return 0;
}

static int parallel_launch(ParallelLambda task, void* data, int num_task) {
  ParallelGroupEnv env = {NULL, num_task ? num_task : kTasks};
  for (int i = env.num_task - 1; i >= 0; --i) {
    int status = task(i, &env, data);
    if (status != 0) return status;
  }
  return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t num_parts) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < num_parts; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

// Compiled modules call the runtime through these variables of theirs, if they need it.
extern __typeof__(&alloc_workspace) __TVMBackendAllocWorkspace __attribute__((weak));
extern __typeof__(&free_workspace) __TVMBackendFreeWorkspace __attribute__((weak));
extern __typeof__(&parallel_launch) __TVMBackendParallelLaunch __attribute__((weak));

int KERNEL(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

static void read_all(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) die("input is too short");
}

static int64_t read_int(void) {
  int64_t value;
  read_all(&value, sizeof(value));
  return value;
}

static size_t read_tensor(DLTensor* tensor, int64_t* shape, int64_t code) {
  memset(tensor, 0, sizeof(*tensor));
  tensor->device = (DLDevice){kDLCPU, 0};
  tensor->dtype.code = (uint8_t)code;
  tensor->dtype.bits = (uint8_t)read_int();
  tensor->dtype.lanes = 1;
  tensor->ndim = (int32_t)read_int();
  if (tensor->ndim < 0 || tensor->ndim > kMaxDims) die("too many dimensions");
  tensor->shape = shape;
  tensor->strides = shape + kMaxDims;
  size_t bytes = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; ++i) shape[i] = read_int();
  for (int i = tensor->ndim - 1, stride = 1; i >= 0; --i) {
    tensor->strides[i] = stride;
    stride *= (int)shape[i];
    bytes *= (size_t)shape[i];
  }
  tensor->data = guarded(bytes, 0);
  read_all(tensor->data, bytes);
  return bytes;
}

int main(void) {
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = alloc_workspace;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = free_workspace;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = parallel_launch;
  int64_t count = read_int();
  if (count < 1 || count > kMaxArgs) die("too many arguments");
  DLTensor tensors[kMaxArgs];
  int64_t shapes[kMaxArgs][2 * kMaxDims];
  TVMFFIAny args[kMaxArgs], result;
  memset(args, 0, sizeof(args));
  memset(&result, 0, sizeof(result));
  size_t bytes[kMaxArgs] = {0};
  for (int64_t i = 0; i < count; ++i) {
    int64_t code = read_int();
    if (code == kInt || code == kFloat) {
      args[i].type_index = code == kInt ? kTVMFFIInt : kTVMFFIFloat;
      read_all(&args[i].v_int64, sizeof(args[i].v_int64));
      continue;
    }
    bytes[i] = read_tensor(&tensors[i], shapes[i], code);
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &tensors[i];
  }
  if (KERNEL(NULL, args, (int32_t)count, &result) != 0) die("the kernel raised an error");
  for (int64_t i = 0; i < count; ++i) {
    if (bytes[i]) fwrite(tensors[i].data, 1, bytes[i], stdout);
  }
  return fflush(stdout) == 0 ? 0 : 1;
}
