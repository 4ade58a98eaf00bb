"""Code generators that the TVM wheel lacks: SPIR-V for Vulkan, WebAssembly for browsers."""
