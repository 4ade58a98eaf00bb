// The C interface that MLC's engine has to Hugging Face's tokenizers, by functions of Python.
//
// The engine links the Rust library, which the Python package `tokenizers` has, too: with this
// nothing is compiled but C++. See installed.py for the other side.

#include <tokenizers_c.h>
#include <tokenizers_cpp.h>

#include <cstdlib>
#include <stdexcept>

extern "C" {

// Tokenizers are numbers. Texts and tokens that Python returns are memory of `fc_allocate`.
struct Functions {
  int (*create)(const char* json, size_t length);
  void (*encode)(int tokenizer, const char* text, size_t length, int special, int** tokens,
                 size_t* count);
  void (*decode)(int tokenizer, const uint32_t* tokens, size_t count, int skip_special, char** text,
                 size_t* length);
  size_t (*vocabulary)(int tokenizer);
  void (*text_of)(int tokenizer, uint32_t token, char** text, size_t* length);
  int32_t (*token_of)(int tokenizer, const char* text, size_t length);
};

static Functions python;

struct Handle {
  int tokenizer;
  char* text;  // what was decoded last
  size_t length;
};

__attribute__((visibility("default"))) void fc_set_functions(const Functions* functions) {
  python = *functions;
}

__attribute__((visibility("default"))) void* fc_allocate(size_t size) { return malloc(size + 1); }

TokenizerHandle tokenizers_new_from_str(const char* json, size_t length) {
  return new Handle{python.create(json, length), nullptr, 0};
}

TokenizerHandle byte_level_bpe_tokenizers_new_from_str(const char*, size_t, const char*, size_t,
                                                       const char*, size_t) {
  throw std::runtime_error("only tokenizer.json is read here");
}

void tokenizers_encode(TokenizerHandle handle, const char* text, size_t length, int special,
                       TokenizerEncodeResult* result) {
  const int tokenizer = static_cast<Handle*>(handle)->tokenizer;
  python.encode(tokenizer, text, length, special, &result->token_ids, &result->len);
}

void tokenizers_encode_batch(TokenizerHandle handle, const char** texts, size_t* lengths,
                             size_t count, int special, TokenizerEncodeResult* results) {
  for (size_t i = 0; i < count; i++)
    tokenizers_encode(handle, texts[i], lengths[i], special, results + i);
}

void tokenizers_free_encode_results(TokenizerEncodeResult* results, size_t count) {
  for (size_t i = 0; i < count; i++) free(results[i].token_ids);
}

void tokenizers_decode(TokenizerHandle handle, const uint32_t* tokens, size_t count, int skip) {
  Handle* own = static_cast<Handle*>(handle);
  free(own->text);
  python.decode(own->tokenizer, tokens, count, skip, &own->text, &own->length);
}

void tokenizers_get_decode_str(TokenizerHandle handle, const char** text, size_t* length) {
  *text = static_cast<Handle*>(handle)->text;
  *length = static_cast<Handle*>(handle)->length;
}

void tokenizers_get_vocab_size(TokenizerHandle handle, size_t* size) {
  *size = python.vocabulary(static_cast<Handle*>(handle)->tokenizer);
}

void tokenizers_id_to_token(TokenizerHandle handle, uint32_t token, const char** text,
                            size_t* length) {
  Handle* own = static_cast<Handle*>(handle);
  free(own->text);
  python.text_of(own->tokenizer, token, &own->text, &own->length);
  tokenizers_get_decode_str(handle, text, length);
}

void tokenizers_token_to_id(TokenizerHandle handle, const char* text, size_t length, int32_t* id) {
  *id = python.token_of(static_cast<Handle*>(handle)->tokenizer, text, length);
}

void tokenizers_free(TokenizerHandle handle) {
  free(static_cast<Handle*>(handle)->text);
  delete static_cast<Handle*>(handle);
}

}  // extern "C"

namespace tokenizers {

std::unique_ptr<Tokenizer> Tokenizer::FromBlobSentencePiece(const std::string&) {
  throw std::runtime_error("only tokenizer.json is read here");
}

std::unique_ptr<Tokenizer> Tokenizer::FromBlobRWKVWorld(const std::string&) {
  throw std::runtime_error("only tokenizer.json is read here");
}

}  // namespace tokenizers
