"""`GraphModel`: a compiled ONNX model or PyTorch module; arrays in, arrays out."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fairy_compile.artifact.graph_contract import METADATA
from fairy_compile.artifact.schema import require
from fairy_compile.errors import FairyError, nearest
from fairy_compile.runtime.library import LibraryFile, open_device
from fairy_compile.runtime.threads import set_threads


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph.

    Attributes:
        name: as in the graph.
        shape: dimensions; a text stands for one that may change between calls.
        dtype: NumPy's name.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class GraphModel:
    """A graph ready to run. Use it as a context manager, or `close` it, to free its memory.

    Threads may share it: their calls wait for each other. It cannot be copied or pickled.

    Attributes:
        directory: where it was loaded from.
        inputs, outputs: what `run` takes and returns, in order.
        threads: CPU threads the kernels use.
        metadata: what the library says of itself.
        warnings: oddities of the artifact that did not prevent loading.
    """

    def __init__(
        self,
        directory: Path,
        library: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        cpus: Collection[int] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Open the library and load the weights; ``directory`` must have been verified.

        Raises:
            FairyError: ``device``, ``threads`` or ``cpus`` is out of range.
            ModelFileError: library or weights cannot be loaded.
        """
        self._lock = threading.Lock()  # TVM's machine computes one call at a time
        self.directory = directory
        self.warnings = tuple(warnings)
        self.threads = set_threads(threads, cpus)
        self._device = open_device(device)
        self._library: LibraryFile | None = LibraryFile(library, self._device)
        self.metadata = self._library.metadata
        require(self.metadata, METADATA, f"{library}: its metadata")
        self.inputs = _infos(self.metadata["inputs"])
        self.outputs = _infos(self.metadata["outputs"])
        self._main = self._library.find("main")
        # A graph without parameters has no argument for them.
        self._params = [self._library.load_params(directory)] if self.metadata["params"] else []

    def __enter__(self) -> GraphModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and library."""
        self._library, self._main, self._params = None, None, []

    def __reduce__(self) -> NoReturn:
        """Refuse pickling and copying: another process loads the artifact itself."""
        raise FairyError(
            f"a loaded model cannot be pickled or copied; load {self.directory} again where it is "
            "wanted"
        )

    def run(self, inputs: Mapping[str, Any] | Sequence[Any] | Any) -> dict[str, np.ndarray]:
        """Compute the graph's outputs.

        Args:
            inputs: name -> array, or the arrays in order, or the array of the only input; NumPy or
                anything `numpy.asarray` takes, in the dtypes and shapes of ``inputs``.

        Returns:
            name -> array, in the order of ``outputs``.

        Raises:
            FairyError: an input is missing, unknown, of another dtype or shape, or fails a check
                that is part of the graph, as PyTorch's ``one_hot`` brings one.
        """
        import tvm

        if self._main is None:
            raise FairyError(f"the model {self.directory} is closed; load it again")
        arrays = self._check(self._by_name(inputs))
        tensors = [tvm.runtime.tensor(array, self._device) for array in arrays]
        with self._lock:
            try:
                result = self._main(*tensors, *self._params)
            except AssertionError as error:  # what TVM raises for `_assert_async` of PyTorch
                raise FairyError(
                    f"the graph {self.directory} checks what it computes, and these inputs fail: "
                    f"{str(error).rstrip('.')}; give others, or build a model without that check"
                ) from error
            alone = len(self.outputs) == 1 and hasattr(result, "numpy")
            arrays = [value.numpy() for value in ([result] if alone else result)]
        return {info.name: array for info, array in zip(self.outputs, arrays, strict=True)}

    def _by_name(self, inputs: Any) -> dict[str, Any]:
        names = [info.name for info in self.inputs]
        if not isinstance(inputs, Mapping):
            given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
            if len(given) != len(names):
                raise FairyError(
                    f"run got {len(given)} arrays; this graph takes {len(names)}: "
                    f"{', '.join(names)}"
                )
            return dict(zip(names, given, strict=True))
        unknown = [name for name in inputs if name not in names]
        if unknown:
            raise FairyError(
                f"the graph has no input {unknown[0]!r}; it takes {', '.join(names)}."
                f"{nearest(str(unknown[0]), names)}"
            )
        missing = [name for name in names if name not in inputs]
        if missing:
            raise FairyError(f"run lacks the input {missing[0]!r}; give {', '.join(names)}")
        return dict(inputs)

    def _check(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Return the inputs as arrays in order, checked: compiled code trusts what it is given."""
        sizes: dict[str, tuple[int, str]] = {}
        arrays = []
        for info in self.inputs:
            try:
                array = np.asarray(inputs[info.name])
            except (TypeError, ValueError, RuntimeError) as error:  # tensors with gradients, e.g.
                raise FairyError(f"input {info.name!r} is no array: {error}") from error
            if array.dtype.name != info.dtype:
                raise FairyError(
                    f"input {info.name!r} is {array.dtype}; expected {info.dtype}: convert it "
                    f"with .astype({info.dtype!r})"
                )
            fits = len(info.shape) == array.ndim and all(
                isinstance(dim, str) or dim == size
                for dim, size in zip(info.shape, array.shape, strict=True)
            )
            if not fits:
                raise FairyError(
                    f"input {info.name!r} has the shape {array.shape}; expected "
                    f"({', '.join(map(str, info.shape))})"
                )
            for dim, size in zip(info.shape, array.shape, strict=True):
                if size == 0:
                    raise FairyError(f"input {info.name!r} is empty: its shape is {array.shape}")
                if not isinstance(dim, str) or not dim.isidentifier():
                    continue
                first, where = sizes.setdefault(dim, (size, info.name))
                if first != size:
                    raise FairyError(
                        f"dimension {dim} is {size} in input {info.name!r} and {first} in "
                        f"{where!r}; they must be equal"
                    )
            # In this machine's order of bytes; `ascontiguousarray` adds a dimension to 0.
            arrays.append(np.asarray(array, array.dtype.newbyteorder("="), order="C"))
        return arrays


def _infos(tensors: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in tensors)
