// Files, of which a browser has none: takes the place of TVM's source of this name. What a model
// library never calls is left out.
#include <tvm/ffi/error.h>
#include <tvm/ffi/reflection/registry.h>
#include "src/runtime/file_utils.h"

#include <string>

namespace tvm {
namespace runtime {

void LoadBinaryFromFile(const std::string& file_name, std::string*) {
  TVM_FFI_THROW(RuntimeError) << "cannot read " << file_name << ": there are no files in a browser";
}

void SaveBinaryToFile(const std::string& file_name, const std::string&) {
  TVM_FFI_THROW(RuntimeError) << "cannot write " << file_name << ": there are no files in a browser";
}

// The type's own registration stands in the source that is replaced.
TVM_FFI_STATIC_INIT_BLOCK() { tvm::ffi::reflection::ObjectDef<FunctionInfoObj>(); }

}  // namespace runtime
}  // namespace tvm
