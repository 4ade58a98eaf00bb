// Runs a graph that fairy_compile built, from C++, with nothing but TVM's runtime: the headers of
// apache-tvm-ffi and the shared libraries of apache-tvm.
//
//   run_graph DIR ROWS < input.f32 > output.f32
//
// DIR is the artifact of a graph with one float32 input and one float32 output, both of two
// dimensions, the first of which may change: [ROWS, columns]. Values are raw little-endian floats.
// `fairy_compile verify DIR` checks an artifact; this program trusts it.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

namespace {

constexpr int kPooledAllocator = 2;
const DLDevice kCPU{kDLCPU, 0};
const DLDataType kFloat32{kDLFloat, 32, 1};

/// Memory for tensors, aligned as TVM's kernels expect it.
struct AlignedMemory {
  static constexpr size_t kAlignment = 64;

  void AllocData(DLTensor* tensor) {
    const size_t bytes = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, bytes);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

/// A graph on the CPU: TVM's virtual machine over the library, and the weights beside it.
class Graph {
 public:
  explicit Graph(const std::string& directory)
      : machine_(Get(ffi::Module::LoadFromFile(directory + "/model.so"), "vm_load_executable")()
                     .cast<ffi::Module>()) {
    Get(machine_, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    metadata_ = json::Parse(Get(machine_, "_metadata")().cast<ffi::String>()).cast<json::Object>();

    ffi::Array<ffi::String> names;
    for (const ffi::Any& param : metadata_["params"].cast<json::Array>()) {
      names.push_back(param.cast<json::Object>()["name"].cast<ffi::String>());
    }
    // The cache is global in the process: take our weights out of it and leave it empty.
    Global("vm.builtin.tensor_cache.load")(directory, static_cast<int>(kDLCPU), 0);
    params_ = Global("vm.builtin.param_array_from_cache_by_name")(names);
    Global("vm.builtin.tensor_cache.clear")();
  }

  /// Size of dimension `axis` of the first input (`"inputs"`) or output (`"outputs"`).
  int64_t Size(const char* which, int axis) const {
    json::Object tensor = metadata_[which].cast<json::Array>()[0].cast<json::Object>();
    return tensor["shape"].cast<json::Array>()[axis].cast<int64_t>();
  }

  ffi::Tensor Run(const ffi::Tensor& input) const {
    return Get(machine_, "main")(input, params_).cast<ffi::Tensor>();
  }

 private:
  static ffi::Function Get(const ffi::Module& module, const std::string& name) {
    ffi::Optional<ffi::Function> found = module->GetFunction(name);
    if (!found.has_value()) throw std::runtime_error("the library has no function " + name);
    return found.value();
  }

  static ffi::Function Global(const std::string& name) {
    return ffi::Function::GetGlobalRequired(name);
  }

  ffi::Module machine_;
  json::Object metadata_;
  ffi::Any params_;
};

int Run(const std::string& directory, int64_t rows) {
  Graph graph(directory);
  ffi::Tensor input = ffi::Tensor::FromNDAlloc(
      AlignedMemory(), {rows, graph.Size("inputs", 1)}, kFloat32, kCPU);
  const size_t wanted = rows * graph.Size("inputs", 1);
  if (std::fread(input.data_ptr(), sizeof(float), wanted, stdin) != wanted) {
    throw std::runtime_error("expected " + std::to_string(wanted) + " floats on stdin");
  }
  ffi::Tensor output = graph.Run(input);
  std::fwrite(output.data_ptr(), sizeof(float), rows * graph.Size("outputs", 1), stdout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const long rows = argc == 3 ? std::strtol(argv[2], nullptr, 10) : 0;
  if (rows < 1) {
    std::fprintf(stderr, "usage: run_graph DIR ROWS < input.f32 > output.f32\n");
    return 2;
  }
  try {
    return Run(argv[1], rows);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
