// What TVM's JavaScript runtime expects of a module besides TVM's own C interface, and what the C
// library expects of the system, as far as a browser has it.
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/error.h>
#include <wasi/api.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#define FAIRY_IMPORT(name) __attribute__((import_module("env"), import_name(name)))
#define FAIRY_EXPORT(name) __attribute__((export_name(name)))

extern "C" {

// Given by JavaScript: calls a function that was registered from there, forgets one, and makes new
// views of the memory after it has grown.
FAIRY_IMPORT("TVMFFIWasmSafeCall")
int TVMFFIWasmSafeCall(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);
FAIRY_IMPORT("TVMFFIWasmFunctionDeleter")
void TVMFFIWasmFunctionDeleter(void* self);
FAIRY_IMPORT("emscripten_notify_memory_growth")
void emscripten_notify_memory_growth(size_t memory_index);

// Scratch memory for arguments, aligned for any of them.
FAIRY_EXPORT("TVMWasmAllocSpace")
void* TVMWasmAllocSpace(int size) {
  void* space = std::malloc(size);
  if (!space) std::abort();
  return space;
}

FAIRY_EXPORT("TVMWasmFreeSpace")
void TVMWasmFreeSpace(void* space) { std::free(space); }

// Makes a function object of JavaScript's number of a function.
FAIRY_EXPORT("TVMFFIWasmFunctionCreate")
int TVMFFIWasmFunctionCreate(void* self, TVMFFIObjectHandle* out) {
  return TVMFFIFunctionCreate(self, TVMFFIWasmSafeCall, TVMFFIWasmFunctionDeleter, out);
}

// The message of the error that the last call left; valid until the next one.
FAIRY_EXPORT("TVMFFIWasmGetLastError")
const char* TVMFFIWasmGetLastError() {
  static std::string message;
  message = tvm::ffi::details::MoveFromSafeCallRaised().what();
  return message.c_str();
}

// Takes the place of the C library's, which has no way to tell JavaScript that memory grew.
void* sbrk(intptr_t increment) {
  constexpr size_t kPage = 65536;
  if (increment == 0) return reinterpret_cast<void*>(__builtin_wasm_memory_size(0) * kPage);
  if (increment < 0 || increment % kPage) std::abort();
  const size_t before = __builtin_wasm_memory_grow(0, increment / kPage);
  if (before == SIZE_MAX) {
    errno = ENOMEM;
    return reinterpret_cast<void*>(-1);
  }
  emscripten_notify_memory_growth(0);
  return reinterpret_cast<void*>(before * kPage);
}

// System calls that TVM's JavaScript runtime does not offer: there is no file but the console.
int32_t __imported_wasi_snapshot_preview1_fd_fdstat_get(int32_t, int32_t) {
  return __WASI_ERRNO_NOSYS;
}
int32_t __imported_wasi_snapshot_preview1_environ_get(int32_t, int32_t) { return 0; }
int32_t __imported_wasi_snapshot_preview1_environ_sizes_get(int32_t count, int32_t bytes) {
  *reinterpret_cast<size_t*>(count) = 0;
  *reinterpret_cast<size_t*>(bytes) = 0;
  return 0;
}

// Exceptions: code is compiled so that a throw ends the program, and catches are never reached.
// Their entry points remain referenced.
void* __cxa_allocate_exception(size_t) { std::abort(); }
void __cxa_throw(void*, void*, void (*)(void*)) { std::abort(); }

// The one thread never ends, so nothing of it is destroyed.
int __cxa_thread_atexit(void (*)(void*), void*, void*) { return 0; }

}  // extern "C"
