// What TVM's headers use of Emscripten's, for compilers that have no such header.
#pragma once

#define EMSCRIPTEN_KEEPALIVE __attribute__((used, visibility("default")))
