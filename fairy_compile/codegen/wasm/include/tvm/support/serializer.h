// How values are laid out in a stream: little endian; a string, vector, array or map is a 64-bit
// count and its elements. It is the layout in which TVM's compiler saves executables and kernels.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "io.h"

namespace tvm {
namespace support {

namespace serial {

// Counts come from a file: containers grow as elements arrive, not by what a count promises.
constexpr uint64_t kMostReserved = 1 << 16;

inline void WriteCount(Stream* stream, size_t count) {
  const uint64_t wide = count;
  stream->Write(&wide, sizeof(wide));
}

inline bool ReadCount(Stream* stream, uint64_t* count) {
  return stream->Read(count, sizeof(*count)) == sizeof(*count);
}

inline void WriteText(Stream* stream, const char* data, size_t size) {
  WriteCount(stream, size);
  stream->Write(data, size);
}

inline bool ReadText(Stream* stream, std::string* text) {
  uint64_t left;
  if (!ReadCount(stream, &left)) return false;
  text->clear();
  while (left) {
    const size_t part = left < kMostReserved ? left : kMostReserved;
    const size_t start = text->size();
    text->resize(start + part);
    if (stream->Read(&(*text)[start], part) != part) return false;
    left -= part;
  }
  return true;
}

template <typename T, typename = void>
struct HasSave : std::false_type {};
template <typename T>
struct HasSave<T, std::void_t<decltype(std::declval<const T&>().Save(std::declval<Stream*>()))>>
    : std::true_type {};

}  // namespace serial

// Numbers, enumerations and plain structs as their bytes; classes by their own Save and Load.
template <typename T>
struct Serializer {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const T& value) {
    if constexpr (serial::HasSave<T>::value) {
      value.Save(stream);
    } else {
      static_assert(std::is_trivially_copyable_v<T>, "this type has no encoding");
      stream->Write(static_cast<const void*>(&value), sizeof(T));
    }
  }

  static bool Read(Stream* stream, T* value) {
    if constexpr (serial::HasSave<T>::value) {
      return value->Load(stream);
    } else {
      static_assert(std::is_trivially_copyable_v<T>, "this type has no encoding");
      return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T);
    }
  }
};

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::string& text) {
    serial::WriteText(stream, text.data(), text.size());
  }

  static bool Read(Stream* stream, std::string* text) { return serial::ReadText(stream, text); }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const ffi::String& text) {
    serial::WriteText(stream, text.data(), text.size());
  }

  static bool Read(Stream* stream, ffi::String* text) {
    std::string value;
    if (!serial::ReadText(stream, &value)) return false;
    *text = ffi::String(std::move(value));
    return true;
  }
};

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::vector<T>& values) {
    serial::WriteCount(stream, values.size());
    stream->WriteArray(values.data(), values.size());
  }

  static bool Read(Stream* stream, std::vector<T>* values) {
    uint64_t left;
    if (!serial::ReadCount(stream, &left)) return false;
    values->clear();
    while (left) {
      const size_t part = left < serial::kMostReserved ? left : serial::kMostReserved;
      const size_t start = values->size();
      values->resize(start + part);
      if (!stream->ReadArray(values->data() + start, part)) return false;
      left -= part;
    }
    return true;
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const ffi::Array<T>& values) {
    serial::WriteCount(stream, values.size());
    for (const T& value : values) Serializer<T>::Write(stream, value);
  }

  static bool Read(Stream* stream, ffi::Array<T>* values) {
    uint64_t count;
    if (!serial::ReadCount(stream, &count)) return false;
    ffi::Array<T> result;
    for (uint64_t i = 0; i < count; ++i) {
      T value;
      if (!Serializer<T>::Read(stream, &value)) return false;
      result.push_back(std::move(value));
    }
    *values = std::move(result);
    return true;
  }
};

namespace serial {

template <typename M>
void WriteMap(Stream* stream, const M& map) {
  WriteCount(stream, map.size());
  for (const auto& entry : map) {
    stream->Write(entry.first);
    stream->Write(entry.second);
  }
}

template <typename K, typename V, typename F>
bool ReadMap(Stream* stream, F set) {
  uint64_t count;
  if (!ReadCount(stream, &count)) return false;
  for (uint64_t i = 0; i < count; ++i) {
    K key;
    V value;
    if (!Serializer<K>::Read(stream, &key) || !Serializer<V>::Read(stream, &value)) return false;
    set(std::move(key), std::move(value));
  }
  return true;
}

}  // namespace serial

template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::unordered_map<K, V>& map) {
    serial::WriteMap(stream, map);
  }

  static bool Read(Stream* stream, std::unordered_map<K, V>* map) {
    map->clear();
    return serial::ReadMap<K, V>(
        stream, [map](K key, V value) { map->insert_or_assign(std::move(key), std::move(value)); });
  }
};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const ffi::Map<K, V>& map) { serial::WriteMap(stream, map); }

  static bool Read(Stream* stream, ffi::Map<K, V>* map) {
    *map = ffi::Map<K, V>();
    return serial::ReadMap<K, V>(stream, [map](K key, V value) { map->Set(key, value); });
  }
};

template <typename T>
void Stream::Write(const T& value) {
  Serializer<T>::Write(this, value);
}

template <typename T>
bool Stream::Read(T* value) {
  return Serializer<T>::Read(this, value);
}

template <typename T>
void Stream::WriteArray(const T* values, size_t count) {
  for (size_t i = 0; i < count; ++i) Serializer<T>::Write(this, values[i]);
}

template <typename T>
bool Stream::ReadArray(T* values, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (!Serializer<T>::Read(this, &values[i])) return false;
  }
  return true;
}

}  // namespace support
}  // namespace tvm
