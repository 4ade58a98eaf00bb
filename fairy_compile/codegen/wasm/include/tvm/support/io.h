// Byte streams, with the interface that TVM's runtime sources expect of <tvm/support/io.h>.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvm {
namespace support {

template <typename T>
struct Serializer;

class Stream {
 public:
  virtual ~Stream() = default;

  // Reads up to `size` bytes and returns how many.
  virtual size_t Read(void* data, size_t size) = 0;
  // Writes `size` bytes and returns how many were written.
  virtual size_t Write(const void* data, size_t size) = 0;

  // Values, in the encoding of `Serializer`. A read tells whether the stream held the whole value.
  template <typename T>
  void Write(const T& value);
  template <typename T>
  bool Read(T* value);

  // `count` values in a row, without their number.
  template <typename T>
  void WriteArray(const T* values, size_t count);
  template <typename T>
  bool ReadArray(T* values, size_t count);
};

}  // namespace support
}  // namespace tvm

#include "serializer.h"
