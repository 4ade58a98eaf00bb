// Streams that encode and decode base 64 (RFC 4648), for tensors inside JSON text.
#pragma once

#include <tvm/support/io.h>

#include <cstdint>

namespace tvm {
namespace support {

constexpr char kBase64Digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

class Base64OutStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  explicit Base64OutStream(Stream* text) : text_(text) {}

  size_t Read(void*, size_t) final { return 0; }

  size_t Write(const void* data, size_t size) final {
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < size; ++i) {
      group_ = group_ << 8 | bytes[i];
      if (++count_ == 3) Flush();
    }
    return size;
  }

  // Writes the last, incomplete group with its padding.
  void Finish() {
    if (count_) Flush();
  }

 private:
  void Flush() {
    char digits[4];
    group_ <<= 8 * (3 - count_);
    for (int i = 0; i < 4; ++i) {
      digits[i] = i <= count_ ? kBase64Digits[group_ >> (18 - 6 * i) & 63] : '=';
    }
    text_->Write(digits, sizeof(digits));
    group_ = 0;
    count_ = 0;
  }

  Stream* text_;
  uint32_t group_ = 0;
  int count_ = 0;
};

class Base64InStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  explicit Base64InStream(Stream* text) : text_(text) {}

  // Nothing is read ahead, so there is no position to set up.
  void InitPosition() {}

  size_t Read(void* data, size_t size) final {
    uint8_t* bytes = static_cast<uint8_t*>(data);
    size_t done = 0;
    while (done < size && (left_ || Fill())) bytes[done++] = group_ >> 8 * --left_;
    return done;
  }

  size_t Write(const void*, size_t) final { return 0; }

 private:
  // Decodes four digits; other characters between them are passed over.
  bool Fill() {
    int digits = 0;
    group_ = 0;
    for (char c; digits < 4 && text_->Read(&c, 1) == 1 && c != '=';) {
      const int value = Value(c);
      if (value < 0) continue;
      group_ = group_ << 6 | value;
      ++digits;
    }
    if (digits < 2) return false;
    left_ = digits - 1;
    group_ >>= 6 * digits - 8 * left_;
    return true;
  }

  static int Value(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
  }

  Stream* text_;
  uint32_t group_ = 0;
  int left_ = 0;
};

}  // namespace support
}  // namespace tvm
