// Runs a model with TVM's runtime for Windows, without Python: prefill, then decode, token by token.
//
// Only functions of the C ABI are called across libraries: the runtime's C++ is of another compiler.
//
// windows_host.exe MODEL.DLL WEIGHTS NAMES CONTEXT PROMPT TOKEN...
//   WEIGHTS  directory with tensor-cache.json
//   NAMES    file with the names of the weights, one a line, in the order the model takes them
//   CONTEXT  tokens of the cache, and of a prompt at most
//   PROMPT   how many of the tokens are the prompt; the others are decoded
// stdout: float32 logits after the prompt and after every other token.

#include <fcntl.h>
#include <io.h>
#include <windows.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

// tvm-ffi takes every compiler but Microsoft's for one of POSIX. Its objects need no more than malloc
// aligns to.
static int posix_memalign(void** memory, size_t align, size_t size) {
  *memory = align <= 16 ? malloc(size) : nullptr;
  return *memory ? 0 : 1;
}

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace ffi = tvm::ffi;

namespace {

constexpr int kCpu = 1, kPooled = 2;

struct HostMemory {
  void AllocData(DLTensor* tensor) {
    tensor->data = _aligned_malloc(ffi::GetDataSize(*tensor), 64);
  }
  void FreeData(DLTensor* tensor) { _aligned_free(tensor->data); }
};

ffi::Function global(const char* name) { return ffi::Function::GetGlobalRequired(name); }

class Model {
 public:
  Model(const char* library, const char* weights, const char* names, int64_t context) {
    executable_ = global("ffi.ModuleLoadFromFile")(ffi::String(library));
    vm_ = find(executable_, "vm_load_executable")();
    find(vm_, "vm_initialization")(kCpu, 0, kPooled);
    global("vm.builtin.tensor_cache.load")(ffi::String(weights), kCpu, 0);
    ffi::Array<ffi::String> wanted;
    std::ifstream list(names);
    for (std::string name; std::getline(list, name);) wanted.push_back(ffi::String(name));
    params_ = global("vm.builtin.param_array_from_cache_by_name")(wanted);
    cache_ = find(vm_, "create_tir_paged_kv_cache")(ffi::Shape{1}, ffi::Shape{context},
                                                    ffi::Shape{context}, ffi::Shape{16},
                                                    ffi::Shape{0});
    global("vm.builtin.kv_state_add_sequence")(cache_, 0);
  }

  // Appends tokens and writes the logits after the last.
  void run(const char* function, const std::vector<int32_t>& tokens) {
    const int64_t count = (int64_t)tokens.size();
    ffi::Tensor ids = ffi::Tensor::FromNDAlloc(HostMemory(), ffi::Shape{count},
                                               DLDataType{kDLInt, 32, 1}, DLDevice{kDLCPU, 0});
    memcpy(ids.data_ptr(), tokens.data(), count * sizeof(int32_t));
    ffi::Tensor x = find(vm_, "embed")(ids, params_).cast<ffi::Tensor>();
    x = global("runtime.TVMTensorCreateView")(x, ffi::Shape{1, count, x.shape()[1]}, x.dtype(), 0)
            .cast<ffi::Tensor>();
    global("vm.builtin.kv_state_begin_forward")(cache_, ffi::Shape{0}, ffi::Shape{count}, nullptr);
    ffi::Any results = find(vm_, function)(x, cache_, params_);
    global("vm.builtin.kv_state_end_forward")(cache_);
    ffi::Tensor logits = results.cast<ffi::Array<ffi::Any>>()[0].cast<ffi::Tensor>();
    fwrite(logits.data_ptr(), 1, ffi::GetDataSize(*logits.GetDLTensorPtr()), stdout);
  }

 private:
  static ffi::Function find(const ffi::Any& module, const char* name) {
    ffi::Any found = global("ffi.ModuleGetFunction")(module, ffi::String(name), true);
    return found.cast<ffi::Function>();
  }

  ffi::Any executable_, vm_, params_, cache_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) return fprintf(stderr, "too few arguments\n"), 2;
  _setmode(_fileno(stdout), _O_BINARY);
  for (const char* library : {"tvm_ffi.dll", "tvm_runtime.dll", "tvm_runtime_extra.dll"})
    if (!LoadLibraryA(library)) return fprintf(stderr, "cannot load %s\n", library), 1;
  std::vector<int32_t> tokens;
  for (int i = 6; i < argc; ++i) tokens.push_back(atoi(argv[i]));
  const size_t prompt = (size_t)atoi(argv[5]);
  if (prompt > tokens.size()) return fprintf(stderr, "the prompt has too few tokens\n"), 2;
  try {
    Model model(argv[1], argv[2], argv[3], atoi(argv[4]));
    model.run("prefill", {tokens.begin(), tokens.begin() + prompt});
    for (size_t i = prompt; i < tokens.size(); ++i) model.run("decode", {tokens[i]});
  } catch (const ffi::Error& error) {
    return fprintf(stderr, "%s\n", error.what()), 1;
  }
  fflush(stdout);
  _exit(0);  // without the destructors of libraries, which wait for each other
}
