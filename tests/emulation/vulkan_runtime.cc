// TVM's device "vulkan" for tests: memory and launches are handed to Python.
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <string>

namespace ffi = tvm::ffi;
using tvm::runtime::DeviceAPI;
using tvm::runtime::DeviceAttrKind;

// Memory is mapped, so addresses serve as handles and copies are plain.
class TestDevice final : public DeviceAPI {
 public:
  ffi::Function allocate, release;

  void SetDevice(tvm::Device) final {}

  void GetAttr(tvm::Device device, DeviceAttrKind kind, ffi::Any* result) final {
    switch (kind) {
      case DeviceAttrKind::kExist: *result = static_cast<int>(device.device_id == 0); break;
      case DeviceAttrKind::kMaxThreadsPerBlock: *result = 1024; break;
      case DeviceAttrKind::kWarpSize: *result = 1; break;
      case DeviceAttrKind::kMaxSharedMemoryPerBlock: *result = 32768; break;
      case DeviceAttrKind::kTotalGlobalMemory: *result = int64_t{8} << 30; break;
      case DeviceAttrKind::kDeviceName: *result = ffi::String("vulkan-test"); break;
      default: break;
    }
  }

  void* AllocDataSpace(tvm::Device, size_t nbytes, size_t, DLDataType) final {
    return reinterpret_cast<void*>(allocate(static_cast<int64_t>(nbytes)).cast<int64_t>());
  }

  void FreeDataSpace(tvm::Device, void* memory) final {
    release(reinterpret_cast<int64_t>(memory));
  }

  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t nbytes, tvm::Device, tvm::Device, DLDataType, TVMStreamHandle) final {
    std::memmove(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset,
                 nbytes);
  }

  void StreamSync(tvm::Device, TVMStreamHandle) final {}
  bool SupportsDevicePointerArithmeticsOnHost() final { return false; }

  static TestDevice* Global() {
    static TestDevice* device = new TestDevice();
    return device;
  }
};

class TestModule final : public ffi::ModuleObj {
 public:
  TestModule(ffi::Bytes bytes, ffi::Map<ffi::String, ffi::Function> kernels)
      : bytes_(bytes), kernels_(kernels) {}
  const char* kind() const final { return "vulkan"; }
  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    return kernels_.Get(name);
  }
  ffi::Bytes SaveToBytes() const final { return bytes_; }

 private:
  ffi::Bytes bytes_;
  ffi::Map<ffi::String, ffi::Function> kernels_;
};

void install(ffi::Function allocate, ffi::Function release) {
  TestDevice::Global()->allocate = allocate;
  TestDevice::Global()->release = release;
}

ffi::Module make_module(ffi::Bytes bytes, ffi::Map<ffi::String, ffi::Function> kernels) {
  return ffi::Module(ffi::make_object<TestModule>(bytes, kernels));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("device_api.vulkan", []() -> void* {
    return static_cast<DeviceAPI*>(TestDevice::Global());
  });
}
