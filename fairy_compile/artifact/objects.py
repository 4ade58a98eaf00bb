"""Symbols of relocatable object files: 64-bit little-endian ELF and Mach-O.

Formats: System V gABI chapter 4 and Apple's ``mach-o/loader.h``, ``mach-o/nlist.h``. Only what a
check of symbols needs is read, and every offset is checked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from fairy_compile.artifact.schema import show
from fairy_compile.errors import ModelFileError

_ELF_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little endian
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_ELF_RELOCATABLE, _ELF_SYMTAB, _ELF_UNDEFINED, _ELF_RESERVED = 1, 2, 0, 0xFF00
_MACHO_MAGIC = b"\xcf\xfa\xed\xfe"
_MACHO_CPUS = {0x01000007: "x86_64", 0x0100000C: "aarch64"}
_MACHO_PLATFORMS = {1: "macos", 2: "ios"}
_MACHO_OBJECT, _LC_SYMTAB, _LC_SEGMENT_64, _LC_BUILD_VERSION = 1, 0x2, 0x19, 0x32
_N_STAB, _N_PRIVATE, _N_TYPE, _N_EXTERNAL, _N_SECT, _N_WEAK = 0xE0, 0x10, 0x0E, 1, 0x0E, 0x80
_MAX_SYMBOLS = 1 << 20


@dataclass(frozen=True)
class Symbol:
    """A global symbol.

    Attributes:
        name: as C sees it, without the underscore Mach-O puts before it.
        defined: whether the object defines it or asks for it.
        weak: whether other definitions may stand beside it.
        start, end: where it begins and its section ends in the file; 0 where there are no bytes.
    """

    name: str
    defined: bool
    weak: bool
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class ObjectFile:
    """A relocatable object file.

    Attributes:
        name: file name.
        format: ``elf`` or ``macho``.
        machine: ``aarch64`` or ``x86_64``.
        platform: ``ios`` or ``macos`` where the object says so.
        symbols: global symbols by name.
        data: the whole file.
    """

    name: str
    format: str
    machine: str
    platform: str
    symbols: dict[str, Symbol]
    data: bytes = field(repr=False)

    def contents(self, symbol: Symbol) -> bytes:
        """Return the bytes from ``symbol`` to the end of its section."""
        return self.data[symbol.start : symbol.end]


def read_object(name: str, data: bytes) -> ObjectFile:
    """Read the symbols of an object file.

    Args:
        name: how messages call it.
        data: the whole file.

    Raises:
        ModelFileError: it is of another format, or malformed.
    """
    try:
        if data[:6] == _ELF_MAGIC:
            return _read_elf(name, data)
        if data[:4] == _MACHO_MAGIC:
            return _read_macho(name, data)
    except (struct.error, ValueError, OverflowError) as error:
        raise ModelFileError(f"the object {show(name)} is malformed: {error}") from error
    raise ModelFileError(
        f"{show(name)} begins with {data[:4].hex()}; expected an ELF or Mach-O object of 64 bits"
    )


def _read_elf(name: str, data: bytes) -> ObjectFile:
    kind, machine = struct.unpack_from("<HH", data, 16)
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    if kind != _ELF_RELOCATABLE or size != 64 or machine not in _ELF_MACHINES:
        raise ValueError(f"ELF type {kind}, machine {machine}")
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]
    symbols: dict[str, Symbol] = {}
    for section in sections:
        if section[1] != _ELF_SYMTAB:
            continue
        offset, total, link, entry = section[4], section[5], section[6], section[9]
        strings = sections[link] if link < len(sections) else None
        if entry != 24 or strings is None or total // 24 > _MAX_SYMBOLS:
            raise ValueError("the symbol table has an unknown form")
        names = _slice(data, strings[4], strings[5])
        for i in range(total // 24):
            at, info, _other, index, value, _size = struct.unpack_from(
                "<IBBHQQ", data, offset + 24 * i
            )
            if info >> 4 not in (1, 2):  # global and weak ones
                continue
            start = end = 0
            if index != _ELF_UNDEFINED and index < _ELF_RESERVED:
                if index >= len(sections):
                    raise ValueError("a symbol lies in a section there is not")
                start, end = _range(data, sections[index][4], sections[index][5], value)
            text = _string(names, at)
            symbols[text] = Symbol(text, index != _ELF_UNDEFINED, info >> 4 == 2, start, end)
    return ObjectFile(name, "elf", _ELF_MACHINES[machine], "", symbols, data)


def _read_macho(name: str, data: bytes) -> ObjectFile:
    cpu, _subtype, kind, commands = struct.unpack_from("<IIII", data, 4)
    if kind != _MACHO_OBJECT or cpu not in _MACHO_CPUS:
        raise ValueError(f"Mach-O type {kind}, CPU {cpu:#x}")
    sections: list[tuple[int, int, int]] = []  # address, size, offset
    table, platform, position = None, "", 32
    for _ in range(commands):
        command, size = struct.unpack_from("<II", data, position)
        if command == _LC_SEGMENT_64:
            (count,) = struct.unpack_from("<I", data, position + 64)
            for i in range(count):
                sections.append(struct.unpack_from("<QQI", data, position + 72 + 80 * i + 32))
        elif command == _LC_SYMTAB:
            table = struct.unpack_from("<IIII", data, position + 8)
        elif command == _LC_BUILD_VERSION:
            (number,) = struct.unpack_from("<I", data, position + 8)
            platform = _MACHO_PLATFORMS.get(number, str(number))
        if size < 8:
            raise ValueError("a load command has no length")
        position += size
    symbols: dict[str, Symbol] = {}
    offset, count, strings, length = table or (0, 0, 0, 0)
    if count > _MAX_SYMBOLS:
        raise ValueError("the symbol table has an unknown form")
    names = _slice(data, strings, length)
    for i in range(count):
        at, flags, section, description, value = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
        if flags & _N_STAB or not flags & _N_EXTERNAL or flags & _N_PRIVATE:
            continue
        start = end = 0
        if flags & _N_TYPE == _N_SECT:
            if not 1 <= section <= len(sections):
                raise ValueError("a symbol lies in a section there is not")
            address, size, place = sections[section - 1]
            start, end = _range(data, place, size, value - address)
        text = _string(names, at).removeprefix("_")
        defined = flags & _N_TYPE != 0
        symbols[text] = Symbol(text, defined, bool(description & _N_WEAK), start, end)
    return ObjectFile(name, "macho", _MACHO_CPUS[cpu], platform, symbols, data)


def _slice(data: bytes, offset: int, size: int) -> bytes:
    if offset + size > len(data):
        raise ValueError("a table ends behind the file")
    return data[offset : offset + size]


def _range(data: bytes, offset: int, size: int, within: int) -> tuple[int, int]:
    """Return the file range of a section from a symbol on; empty for sections without bytes."""
    if not 0 <= within <= size:
        raise ValueError("a symbol lies outside of its section")
    end = offset + size
    return (offset + within, end) if offset and end <= len(data) else (0, 0)


def _string(names: bytes, at: int) -> str:
    end = names.find(b"\0", at)
    if not 0 <= at < len(names) or end < 0:
        raise ValueError("a name lies outside of the string table")
    return names[at:end].decode("utf-8")
