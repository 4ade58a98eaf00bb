// A GPU whose memory is the host's: a TVM device API for kinds this machine has no device of.
//
// Built against the headers of the apache-tvm wheel with -DDEVICE_API=\"device_api.metal\" or the
// like. Buffers are filled with NaN patterns and end just before a page that must not be touched,
// so that a kernel that reads what nobody wrote, or outside a buffer, is caught.
#include <sys/mman.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace tvm {
namespace runtime {

class HostMemoryGpu final : public DeviceAPI {
 public:
  void SetDevice(Device) final {}

  void GetAttr(Device device, DeviceAttrKind kind, ffi::Any* result) final {
    switch (kind) {
      case kExist:
        *result = static_cast<int>(device.device_id == 0);
        break;
      case kMaxThreadsPerBlock:
        *result = 1024;
        break;
      case kWarpSize:
        *result = 32;
        break;
      case kMaxSharedMemoryPerBlock:
        *result = 32768;
        break;
      case kDeviceName:
        *result = ffi::String("simulated");
        break;
      case kComputeVersion:  // of a CUDA device, one that every library for CUDA has code for
        *result = ffi::String("9.0");
        break;
      case kTotalGlobalMemory:
        *result = int64_t{8} << 30;
        break;
      default:
        break;
    }
  }

  void* AllocDataSpace(Device, size_t bytes, size_t, DLDataType) final {
    const size_t page = 4096;
    size_t length = (bytes + page - 1) / page * page;
    if (length == 0) length = page;
    void* mapped = mmap(nullptr, length + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* base = static_cast<char*>(mapped);
    mprotect(base + length, page, PROT_NONE);
    std::memset(base, 0xFF, length);
    char* data = base + ((length - bytes) & ~size_t{63});
    regions_[data] = {base, length + page};
    sizes_[data] = bytes;
    return data;
  }

  void FreeDataSpace(Device, void* data) final {
    auto found = regions_.find(data);
    munmap(found->second.first, found->second.second);
    regions_.erase(found);
    sizes_.erase(data);
  }

  // Bytes that were asked for at an address, 0 if it is not one of an allocation.
  int64_t Size(void* data) const {
    auto found = sizes_.find(data);
    return found == sizes_.end() ? 0 : static_cast<int64_t>(found->second);
  }

  void StreamSync(Device, TVMStreamHandle) final {}

  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, Device, Device, DLDataType, TVMStreamHandle) final {
    std::memcpy(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset,
                bytes);
  }

  bool SupportsDevicePointerArithmeticsOnHost() final { return false; }

 private:
  std::unordered_map<void*, std::pair<void*, size_t>> regions_;
  std::unordered_map<void*, size_t> sizes_;
};

static HostMemoryGpu* Gpu() {
  static HostMemoryGpu* api = new HostMemoryGpu();
  return api;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  ffi::reflection::GlobalDef()
      .def(DEVICE_API, []() -> void* { return static_cast<DeviceAPI*>(Gpu()); })
      .def(DEVICE_API ".bytes", [](void* data) { return Gpu()->Size(data); });
}

}  // namespace runtime
}  // namespace tvm
