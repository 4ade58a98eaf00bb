"""MLC's engine as `make mlc-tools` built it: found, and loaded with tokenizers."""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import CFUNCTYPE, POINTER, c_int, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fairy_compile.user_cache import cache_directory

VARIABLE = "FAIRY_COMPILE_MLC_TOOLS"
"""Environment variable: where `make mlc-tools` built the engine, if not in the cache."""

_kept: list[Any] = []  # the engine calls its functions as long as the process lives
_OUT, _COUNT = POINTER(c_void_p), POINTER(c_size_t)


def tools() -> Path:
    """Return the folder of MLC's sources, of what it imports, and of its library."""
    return Path(os.environ.get(VARIABLE) or cache_directory() / "mlc")


def missing_engine() -> str | None:
    """Return what to do to run these tests, or None."""
    if not _library().is_file():
        return f"needs MLC's engine in {tools()}: make mlc-tools"
    return None


def _library() -> Path:
    return tools() / "build" / "libmlc_llm_module.so"


@cache
def load_engine() -> None:
    """Make ``import mlc_llm`` import the engine that was built, whose tokenizers work."""
    import tvm  # noqa: F401  the engine's library needs TVM's runtime

    sys.path += [str(tools() / "mlc-llm" / "python"), str(tools() / "packages")]
    os.environ["MLC_LIBRARY_PATH"] = str(_library().parent)
    _kept.append(_PythonTokenizers(ctypes.CDLL(str(_library()))))
    _kept[-1].install()


class _Functions(ctypes.Structure):
    """``Functions`` of tokenizers.cc."""

    _fields_ = [
        ("create", CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("encode", CFUNCTYPE(None, c_int, c_void_p, c_size_t, c_int, _OUT, _COUNT)),
        ("decode", CFUNCTYPE(None, c_int, POINTER(c_uint32), c_size_t, c_int, _OUT, _COUNT)),
        ("vocabulary", CFUNCTYPE(c_size_t, c_int)),
        ("text_of", CFUNCTYPE(None, c_int, c_uint32, _OUT, _COUNT)),
        ("token_of", CFUNCTYPE(c_int32, c_int, c_void_p, c_size_t)),
    ]


class _PythonTokenizers:
    """The functions that tokenizers.cc calls."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fc_allocate.restype = c_void_p
        library.fc_allocate.argtypes = [c_size_t]
        self._made: list[Tokenizer] = []

    def install(self) -> None:
        """Give the library these functions."""
        functions = _Functions()
        for name, kind in _Functions._fields_:
            setattr(functions, name, kind(getattr(self, name)))
        self._functions = functions
        self._library.fc_set_functions(ctypes.byref(functions))

    def create(self, json: int, length: int) -> int:
        self._made.append(Tokenizer.from_str(_text(json, length)))
        return len(self._made) - 1

    def encode(
        self, which: int, text: int, length: int, special: int, tokens: Any, count: Any
    ) -> None:
        encoding = self._made[which].encode(_text(text, length), add_special_tokens=bool(special))
        ids = (c_int * len(encoding.ids))(*encoding.ids)
        self._put(bytes(ids), tokens, count)
        count[0] = len(ids)

    def decode(self, which: int, tokens: Any, count: int, skip: int, text: Any, size: Any) -> None:
        ids = tokens[:count]
        decoded = self._made[which].decode(ids, skip_special_tokens=bool(skip))
        self._put(decoded.encode(), text, size)

    def vocabulary(self, which: int) -> int:
        return self._made[which].get_vocab_size()

    def text_of(self, which: int, token: int, text: Any, size: Any) -> None:
        self._put((self._made[which].id_to_token(token) or "").encode(), text, size)

    def token_of(self, which: int, text: int, length: int) -> int:
        token = self._made[which].token_to_id(_text(text, length))
        return -1 if token is None else token

    def _put(self, data: bytes, pointer: Any, size: Any) -> None:
        memory = self._library.fc_allocate(len(data))
        ctypes.memmove(memory, data, len(data))
        pointer[0], size[0] = memory, len(data)


def _text(address: int, length: int) -> str:
    return ctypes.string_at(address, length).decode("utf-8", "replace")
