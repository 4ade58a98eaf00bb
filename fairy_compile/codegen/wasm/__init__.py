"""Model libraries for browsers: WebAssembly that TVM's JavaScript runtime (WebLLM) loads.

A browser has no TVM runtime to load a library into, so the library brings it along: `runtime`
compiles the sources that come with the TVM wheels, once, and `link` joins them with a model.
"""

from fairy_compile.codegen.wasm.link import link
from fairy_compile.codegen.wasm.runtime import build_runtime, find_zig, runtime_is_built

__all__ = ["build_runtime", "find_zig", "link", "runtime_is_built"]
