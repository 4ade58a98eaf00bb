// A device module that can be saved but not launched, for TVM builds without its runtime.
//
// TVM exports a library with the bytes of every imported module, filed under the module's kind. A
// TVM build that has the runtime of that kind turns the bytes back into a module that launches.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace ffi = tvm::ffi;

class SavedModule : public ffi::ModuleObj {
 public:
  SavedModule(std::string kind, ffi::Bytes bytes, std::vector<std::string> kernels)
      : kind_(std::move(kind)), bytes_(std::move(bytes)), kernels_(std::move(kernels)) {}

  const char* kind() const final { return kind_.c_str(); }

  int GetPropertyMask() const final { return ffi::Module::kBinarySerializable; }

  bool ImplementsFunction(const ffi::String& name) final { return Has(name); }

  // Kernels are found, so that a library loads and its other functions run; launching one tells
  // what is missing.
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    if (!Has(name)) return std::nullopt;
    std::string message = "kernel " + std::string(name) + " cannot be launched: this TVM build has no '" +
                          kind_ + "' runtime. Run the exported library where there is one, such as the MLC runtime";
    return ffi::Function::FromPacked([message](ffi::PackedArgs, ffi::Any*) {
      TVM_FFI_THROW(RuntimeError) << message;
    });
  }

  ffi::Bytes SaveToBytes() const final { return bytes_; }

 private:
  bool Has(const ffi::String& name) const {
    return std::find(kernels_.begin(), kernels_.end(), std::string(name)) != kernels_.end();
  }

  std::string kind_;
  ffi::Bytes bytes_;
  std::vector<std::string> kernels_;
};

ffi::Module make_saved_module(ffi::String kind, ffi::Bytes bytes, ffi::Array<ffi::String> kernels) {
  std::vector<std::string> names;
  for (const ffi::String& kernel : kernels) names.push_back(kernel);
  return ffi::Module(ffi::make_object<SavedModule>(std::string(kind), bytes, names));
}
