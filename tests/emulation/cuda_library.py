"""A simulated CUDA device: the CUDA source of whole libraries run by `cuda_shim.h`.

Libraries built for target ``cuda`` as source run as they are, on `tvm.cuda()`: our kernels, and
those that TVM generates. This shows that results are right whatever order threads run in. It says
nothing about speed, nor about what nvcc makes of the source.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm_ffi

from tests.emulation.cuda_rig import FLAGS, HERE, for_shim
from tests.emulation.gpu_modules import Kernel, _Reader, install_device, on_load

_PREAMBLE_END = "#define ushort unsigned short\n#endif\n"
_SIGNATURE = re.compile(
    r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{', re.DOTALL
)
_DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) uchar (\w+)\[\];")
_ENTRY = """
// A value of TVM's calling convention.
struct FfiAny {
  int32_t type, small;
  union {
    int64_t integer;
    double real;
    void* pointer;
  };
};
"""


def read_cuda_module(data: bytes) -> list[Kernel]:
    """Return the kernels of a serialised CUDA module of source."""
    reader = _Reader(bytes(data))
    if reader.text() != "cuda":
        raise ValueError("the module is machine code, not source")
    kernels = []
    for _ in range(reader.count()):
        symbol, name = reader.text(), reader.text()
        arguments = tuple(reader.take("BBH")[:2] for _ in range(reader.count()))
        launch = tuple(reader.text() for _ in range(reader.count()))
        reader.take(f"{reader.count()}i")
        kernels.append(Kernel(name, symbol, arguments, launch, ""))
    source = reader.text()
    return [replace(kernel, source=source) for kernel in kernels]


class CudaRig:
    """The simulated device of a test session.

    Attributes:
        order: of threads; 0 rising, 1 falling, others random.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.order = directory, 0
        for kind in ("cuda", "cuda_host"):  # host memory that a GPU can copy from
            install_device(kind, directory)
        on_load("cuda", self.load)
        # What a build for CUDA may have loaded into this process: with it, libraries would hold
        # machine code, and no source to run here.
        create = "ffi.Module.create.cuda"
        if tvm_ffi.get_global_func(create, allow_missing=True) is not None:
            tvm_ffi.registry.remove_global_func(create)

    def load(self, data: bytes) -> Any:
        """Compile a device module and return what runs it."""
        kernels = read_cuda_module(data)
        source = for_shim(kernels[0].source.split(_PREAMBLE_END, 1)[1])
        source = _DYNAMIC.sub(r"uchar* \1 = (uchar*)emulated::dynamic_bytes;", source)
        signatures = dict(_SIGNATURE.findall(source))
        shims = ("cuda_shim_tvm.h", "cuda_shim_hopper.h")
        parts = [*(f'#include "{shim}"' for shim in shims), source, _ENTRY]
        parts += [self._entry(kernel, signatures[kernel.name]) for kernel in kernels]
        code = "\n".join(parts)
        name = hashlib.sha256(f"{self.order}{code}".encode()).hexdigest()[:16]
        library = self.directory / f"{name}.so"
        if not library.exists():
            written = library.with_suffix(".cpp")
            written.write_text(code, "utf-8")
            command = ["g++", *FLAGS, "-shared", "-fPIC", f"-DORDER={self.order}", f"-I{HERE}"]
            subprocess.run([*command, "-o", str(library), str(written)], check=True)
        return tvm_ffi.load_module(str(library))

    @staticmethod
    def _entry(kernel: Kernel, signature: str) -> str:
        """Return the function TVM calls to launch a kernel: arguments, then extents."""
        given = len(kernel.arguments)
        call = []
        for i, parameter in enumerate(signature.split(", ")):
            kind = parameter.replace("__restrict__", "").strip().rpartition(" ")[0].strip()
            if kind.endswith("*"):
                call.append(f"({kind})arguments[{i}].pointer")
            else:
                field = "real" if kernel.is_float(i) else "integer"
                call.append(f"({kind})arguments[{i}].{field}")
        # TVM's runtimes launch one where a size is zero.
        extents = "".join(
            f"size[{'bt'.index(tag[0]) * 3 + 'xyz'.index(tag[-1])}] = "
            f"std::max(1u, (unsigned)arguments[{given + i}].integer); "
            for i, tag in enumerate(kernel.launch)
            if "Idx" in tag
        )
        return f"""
namespace entry_{kernel.symbol} {{
static const FfiAny* arguments;
static void run() {{ {kernel.name}({", ".join(call)}); }}
}}
extern "C" int __tvm_ffi_{kernel.symbol}(void*, const FfiAny* arguments, int, FfiAny*) {{
  unsigned size[6] = {{1, 1, 1, 1, 1, 1}};
  {extents}
  entry_{kernel.symbol}::arguments = arguments;
  const Index grid = {{size[0], size[1], size[2]}}, block = {{size[3], size[4], size[5]}};
  const char* error = emulated::run_grid(grid, block, ORDER, entry_{kernel.symbol}::run);
  if (error) fprintf(stderr, "{kernel.name}: %s\\n", error);
  return error ? -1 : 0;
}}"""
