"""System libraries: model libraries whose objects are linked into an app.

Phones load no libraries that come as files. An app therefore links the objects of all its models,
and the runtime finds one model's by the prefix of its symbols: an engine opens ``system://NAME`` as
the prefix ``NAME_``, with ``-`` turned into ``_``. TVM's runtime looks for

    NAME___tvm_ffi__library_bin       the VM's bytecode and the device code
    __tvm_ffi_NAME_FUNCTION           host functions
    NAME___tvm_ffi__library_ctx       where the runtime leaves the library's own handle

`check_system_lib` reads the objects, so it needs neither a linker nor the phone.
"""

from __future__ import annotations

import re
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

from fairy_compile.artifact.contract import REQUIRED_FUNCTIONS
from fairy_compile.artifact.objects import ObjectFile, read_object
from fairy_compile.artifact.schema import show
from fairy_compile.artifact.signature import Signature
from fairy_compile.errors import FairyError, ModelFileError

# TVM 0.27 cannot read a prefix of less than 8 bytes back from a module's attributes.
MIN_NAME, MAX_NAME = 7, 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")

_LIBRARY_BIN = "__tvm_ffi__library_bin"
_LIBRARY_CTX = "__tvm_ffi__library_ctx"
_FUNCTION = "__tvm_ffi_"
_MAX_OBJECTS, _MAX_OBJECT_BYTES = 64, 1 << 30

# What objects may ask the app for: TVM's runtime, and the C library with its mathematics.
_PRESENT = re.compile(
    r"TVM(Backend|FFI)\w+"
    r"|mem(cpy|move|set)|bzero|memset_pattern\d+|__stack_chk_(fail|guard)|__sincosf?_stret"
    r"|(exp|log|log2|pow|sin|cos|sincos|tan|tanh|erf|sqrt)f?"
    r"|(floor|ceil|round|nearbyint|trunc|fmax|fmin|fmod)f?"
)
_OF_LINUX = ("syscall",)  # of the C library; kernels ask by it for AMX's tiles


def system_lib_prefix(name: str) -> str:
    """Return the prefix of the symbols of the library that engines call ``system://name``."""
    return name.replace("-", "_") + "_"


def check_system_lib_name(name: str) -> None:
    """Raise `FairyError` unless ``name`` can name a system library."""
    if not (_NAME.fullmatch(name) and MIN_NAME <= len(name) <= MAX_NAME):
        raise FairyError(
            f"--model-lib is {name!r}; allowed: {MIN_NAME} to {MAX_NAME} letters, digits, _ and -, "
            "not first a digit or -"
        )


def default_system_lib_name(output: Path) -> str:
    """Return a name for the library of the artifact ``output``, made of its directory's name."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", output.name).strip("_")
    if not name[:1].isalpha() or len(name) < MIN_NAME:
        name = f"fairy_{name or 'model'}"
    return name[:MAX_NAME]


def read_system_lib(path: Path) -> list[ObjectFile]:
    """Read the objects of a model library in a tar file.

    Raises:
        ModelFileError: it is no tar file of objects.
    """
    objects = []
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if not member.isfile() or "/" in member.name or member.size > _MAX_OBJECT_BYTES:
                    raise ModelFileError(
                        f"{path.name} holds {show(member.name)}; expected object files of at most "
                        f"{_MAX_OBJECT_BYTES} bytes and no directories"
                    )
                if len(objects) == _MAX_OBJECTS:
                    raise ModelFileError(f"{path.name} holds more than {_MAX_OBJECTS} objects")
                stream = tar.extractfile(member)
                assert stream is not None  # it is a file
                objects.append(read_object(member.name, stream.read()))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ModelFileError(f"cannot read the model library {path}: {error}") from error
    return objects


def check_system_lib(
    objects: list[ObjectFile],
    name: str,
    *,
    device: str,
    triple: str,
    functions: Mapping[str, Signature | str],
) -> list[str]:
    """Return why an MLC app could not link or run these objects, in words.

    Args:
        objects: of the library.
        name: what engines call it, after ``system://``.
        device: device kind, a key of `contract.REQUIRED_FUNCTIONS`.
        triple: LLVM triple of the app's CPU, e.g. ``arm64-apple-ios15.0``.
        functions: name -> signature of the library's public functions.
    """
    prefix = system_lib_prefix(name)
    problems = [problem for obj in objects for problem in _kind_problems(obj, triple)]
    defined = {s.name: (obj, s) for obj in objects for s in obj.symbols.values() if s.defined}
    for symbol in (prefix + _LIBRARY_BIN, prefix + _LIBRARY_CTX):
        if symbol not in defined:
            problems.append(f"no object defines the symbol {symbol}")
    for symbol, (_, entry) in sorted(defined.items()):
        ours = symbol.startswith((prefix, _FUNCTION + prefix))
        if not ours and not entry.weak:
            problems.append(f"the symbol {show(symbol)} lacks the prefix {prefix}")
    asked = {s.name for obj in objects for s in obj.symbols.values() if not s.defined}
    for symbol in sorted(asked - defined.keys()):
        if not (_PRESENT.fullmatch(symbol) or (symbol in _OF_LINUX and "linux" in triple)):
            problems.append(f"the objects ask for {show(symbol)}, which no app has")
    table = b""
    if prefix + _LIBRARY_BIN in defined:
        obj, entry = defined[prefix + _LIBRARY_BIN]
        table = obj.contents(entry)
    for function in REQUIRED_FUNCTIONS[device]:
        result = functions.get(function)
        in_place = result is not None and str(result).endswith("-> none")
        if in_place and _FUNCTION + prefix + function not in defined:
            problems.append(f"no object defines the function {function}")
        if not in_place and _entry(function) not in table:
            problems.append(f"the bytecode has no function {function}")
    return problems


def _entry(name: str) -> bytes:
    """Return a name as the VM's function table stores it: its length, then its letters."""
    return struct.pack("<Q", len(name)) + name.encode()


def _kind_problems(obj: ObjectFile, triple: str) -> list[str]:
    machine = triple.split("-")[0].replace("arm64", "aarch64")
    platform = next((name for name in ("ios", "macos") if name in triple), "")
    expected = ("macho" if "apple" in triple else "elf", machine, platform)
    found = (obj.format, obj.machine, obj.platform)
    if found == expected:
        return []
    words = [" ".join(filter(None, kind)) for kind in (found, expected)]
    return [f"the object {show(obj.name)} is {words[0]}; {triple} links {words[1]}"]
