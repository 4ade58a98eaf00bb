// Exercises the headers of codegen/wasm on the host: prints base 64 of growing byte strings, and
// aborts where something read back differs from what was written.
#include <tvm/ffi/dtype.h>
#include <tvm/support/io.h>

#include <cstdio>
#include <cstdlib>

#include "src/support/base64.h"
#include "src/support/bytes_io.h"

using namespace tvm::support;
namespace ffi = tvm::ffi;

#define CHECK(condition) \
  if (!(condition)) (std::fprintf(stderr, "line %d\n", __LINE__), std::abort())

struct Pair {
  std::string text;
  int32_t number = 0;
  void Save(Stream* stream) const {
    stream->Write(text);
    stream->Write(number);
  }
  bool Load(Stream* stream) { return stream->Read(&text) && stream->Read(&number); }
};

void CheckBase64() {
  for (int size = 0; size < 8; ++size) {
    std::string bytes, text;
    for (int i = 0; i < size; ++i) bytes.push_back(static_cast<char>(251 - 40 * i));
    BytesOutStream out(&text);
    Base64OutStream encode(&out);
    for (char byte : bytes) encode.Stream::Write(byte);
    encode.Finish();
    std::printf("%s\n", text.c_str());
    BytesInStream in(text);
    Base64InStream decode(&in);
    decode.InitPosition();
    std::string back(size + 1, 'x');
    CHECK(decode.Read(&back[0], back.size()) == bytes.size());
    CHECK(back.substr(0, size) == bytes);
  }
}

void CheckValues() {
  std::string bytes;
  BytesOutStream out(&bytes);
  out.Stream::Write(std::vector<Pair>{{"one", 1}, {"two", -2}});
  out.Stream::Write(ffi::Map<ffi::String, ffi::Array<DLDataType>>{{"f", {{2, 16, 4}}}});
  out.Stream::Write(std::unordered_map<std::string, std::string>{{"k", "value"}});
  out.Stream::Write(int64_t{-7});
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    BytesInStream in(bytes.data(), cut);
    std::vector<Pair> pairs;
    ffi::Map<ffi::String, ffi::Array<DLDataType>> types;
    std::unordered_map<std::string, std::string> texts;
    int64_t number = 0;
    const bool whole = in.Stream::Read(&pairs) && in.Stream::Read(&types) &&
                       in.Stream::Read(&texts) && in.Stream::Read(&number);
    CHECK(whole == (cut == bytes.size()));
    if (!whole) continue;
    CHECK(pairs.size() == 2 && pairs[1].text == "two" && pairs[1].number == -2);
    const DLDataType type = types.at("f")[0];
    CHECK(types.at("f").size() == 1 && type.code == 2 && type.bits == 16 && type.lanes == 4);
    CHECK(texts["k"] == "value" && number == -7);
  }
  // A count that promises more than there is allocates no more than there is.
  std::string huge(8, '\x7f');
  BytesInStream in(huge);
  std::vector<int64_t> numbers;
  CHECK(!in.Stream::Read(&numbers));
}

int main() {
  CheckBase64();
  CheckValues();
}
