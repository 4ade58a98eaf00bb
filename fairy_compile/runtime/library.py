"""`ModelLibrary`: a compiled model library opened on a device, and its weights.

The functions are those the MLC engine looks up; no others are needed to run a model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.contract import EXACT_DECODE, PAGE_FUNCTIONS
from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError
from fairy_compile.runtime.pinned import Downloads
from fairy_compile.runtime.sidecars import load_sidecars
from fairy_compile.runtime.weights import load_host_weights

RELAX_FUNCTIONS = (
    "_metadata",
    "embed",
    "prefill",
    "batch_prefill",
    "decode",
    "batch_decode",
    "create_tir_paged_kv_cache",
    "alloc_embedding_tensor",
    "softmax_with_temperature",
)
OPTIONAL_FUNCTIONS = (EXACT_DECODE, *PAGE_FUNCTIONS)
_RECORD = "vm.builtin.cuda_graph.run_or_capture"
INPLACE_FUNCTIONS = ("apply_logit_bias_inplace", "apply_penalty_inplace", "apply_bitmask_inplace")


@dataclass
class CallCount:
    """How often a library function ran.

    Attributes:
        calls: invocations.
        tokens: rows it processed, over all invocations.
        seconds: wall-clock time, including the copy of the result to the host.
    """

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0


@contextmanager
def _fresh_copy(path: Path) -> Iterator[Path]:
    """Yield a copy of the library under a path of its own, for the moment it is opened.

    The system's loader remembers libraries by path: after an artifact was replaced, opening its
    path again would give the library that was there before.

    Raises:
        FairyError: the directory of temporary files has no room, or holds no code that may run.
    """
    with tempfile.TemporaryDirectory(prefix="fairy-", ignore_cleanup_errors=True) as directory:
        try:
            copy = Path(shutil.copy(path, directory))
        except OSError as error:
            raise FairyError(
                f"cannot copy {path} to {tempfile.gettempdir()}, where it is opened: "
                f"{error.strerror or error}; free some space, or set TMPDIR to another directory"
            ) from error
        if _runs_nothing(directory):
            raise FairyError(
                f"{tempfile.gettempdir()}, where libraries are opened, is mounted so that no code "
                "in it may run (noexec); set TMPDIR to another directory"
            )
        yield copy


def _runs_nothing(directory: str) -> bool:
    flag = getattr(os, "ST_NOEXEC", 0)  # of Linux
    return bool(flag and os.statvfs(directory).f_flag & flag)


class LibraryFile:
    """An opened library and the weights of its artifact.

    Opening a library runs its code: only open files that come from a source you trust.

    Attributes:
        metadata: the JSON object `_metadata` returned.
    """

    def __init__(self, path: Path, device: Any):
        """Open ``path`` for the `tvm.runtime.Device` ``device``.

        Raises:
            ModelFileError: the file cannot be loaded, or does not describe itself.
            FairyError: see `_fresh_copy`.
        """
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.path = path
        self.device = device
        try:
            with _fresh_copy(path) as copy:
                self._executable = tvm.runtime.load_module(str(copy))
            self._vm = VirtualMachine(self._executable, device)
        except FairyError:
            raise
        except Exception as error:  # the loader raises whatever the system's linker said
            reason = str(error).strip().splitlines()
            raise ModelFileError(
                f"cannot load the model library {path}: {reason[-1] if reason else error!r}; "
                "build the model again for this machine"
            ) from error
        try:
            self.metadata = json.loads(str(self.find("_metadata")()))
        except ValueError as error:
            raise ModelFileError(f"{path}: its metadata is not valid JSON: {error}") from error

    def to_device(self, array: np.ndarray) -> Any:
        """Return a copy of ``array`` on the library's device."""
        import tvm

        return tvm.runtime.tensor(array, self.device)

    def find(self, name: str) -> Callable[..., Any]:
        """Return the function ``name``.

        Raises:
            ModelFileError: the library has no such function.
        """
        module = self._vm.module
        if module.implements_function(name):
            return module[name]
        if module.implements_function(name, True):  # PrimFuncs live in an imported module
            return module.get_function(name, True)
        raise ModelFileError(
            f"the model library {self.path} has no function {name!r}; build the model again"
        )

    def load_params(self, directory: Path) -> Any:
        """Return the weights of ``directory`` as the tuple the functions take.

        The directory must have been verified: TVM's loader trusts tensor-cache.json.

        Raises:
            ModelFileError: a tensor the library asks for is missing.
        """
        import tvm

        names = [str(param["name"]) for param in self.metadata["params"]]
        if self.device.type == "cpu":
            # TVM's loader copies every tensor twice on its way and knows no huge pages.
            return tvm.runtime.convert(load_host_weights(directory, names))
        clear = tvm.get_global_func("vm.builtin.tensor_cache.clear")
        try:
            tvm.get_global_func("vm.builtin.tensor_cache.load")(
                str(directory), self.device.dlpack_device_type(), self.device.index
            )
            return tvm.get_global_func("vm.builtin.param_array_from_cache_by_name")(names)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ModelFileError(
                f"cannot load the weights of {directory}: {reason[-1] if reason else error!r}"
            ) from error
        finally:
            clear()  # the cache is global: names of the next model must not meet ours


class ModelLibrary(LibraryFile):
    """The library of a chat model, with the functions an engine calls.

    Attributes:
        counts: function name -> `CallCount`.
    """

    def __init__(self, path: Path, device: Any):
        """Open ``path`` for the `tvm.runtime.Device` ``device``.

        Raises:
            ModelFileError: the file cannot be loaded, or lacks a function of the contract.
        """
        super().__init__(path, device)
        self.counts: dict[str, CallCount] = {}
        self._downloads = Downloads(device)
        self._functions = {name: self.find(name) for name in RELAX_FUNCTIONS + INPLACE_FUNCTIONS}
        for name in OPTIONAL_FUNCTIONS:
            if self._vm.module.implements_function(name):
                self._functions[name] = self._vm.module[name]

    def has(self, name: str) -> bool:
        """Tell whether the library has the function ``name``, which may be optional."""
        return name in self._functions

    def call(self, name: str, *args: Any, tokens: int = 0) -> Any:
        """Call the function ``name`` and count the call, its ``tokens`` and its time."""
        count = self.counts.setdefault(name, CallCount())
        start = time.perf_counter()
        result = self._functions[name](*args)
        count.calls += 1
        count.tokens += tokens
        count.seconds += time.perf_counter() - start
        return result

    def call_logits(self, name: str, *args: Any, tokens: int) -> Any:
        """Call a prefill or decode function and return its logits as a float32 NumPy array.

        The copy to the host is part of the counted time, because it waits for the device.
        """
        start = time.perf_counter()
        logits = self._downloads.get(self._functions[name](*args)[0])
        count = self.counts.setdefault(name, CallCount())
        count.calls += 1
        count.tokens += tokens
        count.seconds += time.perf_counter() - start
        return logits

    def traced(self, name: str, *args: Any) -> dict[str, int]:
        """Run the function ``name`` once and return how often each kernel was called.

        Measured, not derived: a second virtual machine over the same code runs under TVM's
        instrumentation, which reports every call instruction. Builtins of the VM (allocation,
        shapes, KV cache) are left out; kernels are named by their PrimFunc or library symbol.
        """
        calls: Counter[str] = Counter()

        def on_call(_function: Any, symbol: str, before: bool, _result: Any, *_: Any) -> int:
            if before and not symbol.startswith("vm."):
                calls[symbol] += 1
            return 0  # VMInstrumentReturnKind.NO_OP

        machine = machine_without_graphs(self._executable, self.device)
        machine.set_instrument(on_call)
        machine[name](*args)
        self.device.sync()
        return dict(calls)


def machine_without_graphs(executable: Any, device: Any) -> Any:
    """Return a virtual machine that runs what others record as CUDA graphs.

    Kernels of a graph are not seen when it is replayed, and cannot be waited for while it is
    recorded.
    """
    import tvm_ffi
    from tvm.runtime.vm import VirtualMachine

    record = tvm_ffi.get_global_func(_RECORD, allow_missing=True)
    if record is None:
        return VirtualMachine(executable, device)
    invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")

    def run(machine: Any, body: Any, inputs: Any, *_: Any) -> Any:
        return invoke(machine, body, *inputs)

    tvm_ffi.register_global_func(_RECORD, run, override=True)
    try:
        return VirtualMachine(executable, device)  # which looks functions up once
    finally:
        tvm_ffi.register_global_func(_RECORD, record, override=True)


def open_device(name: str) -> Any:
    """Return the `tvm.runtime.Device` called ``name``, e.g. ``cpu`` or ``cuda:1``.

    Raises:
        FairyError: no such kind of device.
        UnsupportedError: this installation of TVM or this machine does not have it.
    """
    import tvm

    load_sidecars()
    try:
        if not isinstance(name, str):  # numbers are taken for kinds of devices
            raise TypeError
        device = tvm.runtime.device(name)
    except (ValueError, TypeError, RuntimeError) as error:
        raise FairyError(
            f"unknown device {name!r}; allowed: cpu, cuda, metal, vulkan, opencl, each with an "
            "optional index as in cuda:1"
        ) from error
    if not device.exist:
        remedy = "; load with device='cpu', or build the model for --target cpu"
        if device.type == "vulkan":
            remedy = f": {_no_vulkan()}"
        elif device.type == "webgpu":
            remedy = "; browsers have it: run fairy_compile serve DIR --web"
        raise UnsupportedError(
            f"this machine has no device {name!r} that the installed TVM can use{remedy}"
        )
    return device


def _no_vulkan() -> str:
    """Return what is missing to run on Vulkan, and where the artifact runs instead."""
    from fairy_compile.codegen import spirv

    if spirv.runtime_present():
        return (
            "its Vulkan runtime finds no GPU; install the GPU's driver "
            "(`vulkaninfo --summary` lists the devices there are)"
        )
    return (
        "it has no Vulkan runtime, which the wheels of apache-tvm are built without; "
        "run the artifact in the MLC runtime, whose packages have it (directory as `model`, its "
        "library as `model_lib`), use a TVM built with USE_VULKAN=ON, or build the model for "
        "--target cpu"
    )
