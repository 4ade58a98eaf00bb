"""Reader of PyTorch ``.bin`` checkpoints through weights-only loading.

A ``.bin`` file is a pickle; only ``torch.load(weights_only=True)`` ever opens it, which builds
tensors and plain containers and refuses everything else. The file is mapped for the duration of
one tensor's copy, so memory stays bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends.safetensors_file import TensorInfo, numpy_dtype


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise FairyError(
            'reading .bin checkpoints needs PyTorch; run `pip install "fairy-compile[qat]"`, or '
            "give a model with safetensors files"
        ) from error
    return torch


class TorchFile:
    """One weights-only ``.bin`` file.

    Attributes:
        path: the file.
        tensors: name -> `TensorInfo`.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in self._load().items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            nbytes = tensor.numel() * tensor.element_size()
            # Strides of zero can make a small storage claim any size.
            if nbytes > size:
                raise ModelFileError(
                    f"{path}: tensor {name!r} claims {nbytes} bytes of a file of {size}; the file "
                    "is damaged, download it again"
                )
            self.tensors[name] = TensorInfo(dtype, tuple(tensor.shape), nbytes)

    def _load(self) -> dict[str, Any]:
        torch = _torch()
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        # What a damaged archive or pickle raises is not documented: RuntimeError, OSError,
        # UnpicklingError, EOFError, KeyError and others have been seen.
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelFileError(
                f"{self.path} cannot be read by weights-only loading: {reason}; convert the model "
                "to safetensors or download it again"
            ) from error
        if not isinstance(state, dict):
            raise ModelFileError(
                f"{self.path} holds a {type(state).__name__}; expected a state dict of tensors"
            )
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ModelFileError(
                    f"{self.path}: entry {name!r} is a {type(tensor).__name__}; expected a state "
                    "dict of tensors"
                )
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise ModelFileError(
                    f"{self.path}: tensor {name!r} is not a plain dense tensor; save the model "
                    "as safetensors"
                )
        return state

    def read(self, name: str) -> np.ndarray:
        """Return a copy of the tensor ``name`` in its stored dtype."""
        torch = _torch()
        # Loading again is milliseconds, and dropping the mapping afterwards gives its pages back.
        tensor = self._load()[name].detach().contiguous()
        dtype = numpy_dtype(self.tensors[name].dtype)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
        return tensor.numpy().view(dtype).copy()
