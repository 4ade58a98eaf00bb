"""Files inside an artifact: resolving names from untrusted JSON, sizes and hashes."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fairy_compile.artifact.schema import show
from fairy_compile.errors import ModelFileError

HASH_THREADS = 2
_CHUNK = 1 << 20


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Raise `ModelFileError` where the system refuses to read something of ``directory``."""
    try:
        yield
    except OSError as error:
        raise ModelFileError(
            f"cannot read {error.filename or directory}: {error.strerror or error}; give files and "
            "directories that this user may read"
        ) from error


def directory_name(directory: Path) -> str:
    """Return a directory's name as text that can be written; "?" for bytes that are no UTF-8."""
    return directory.resolve().name.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file.

    Attributes:
        bytes: exact size.
        sha256: 64 lower-case hexadecimal digits.
    """

    bytes: int
    sha256: str


def human_bytes(count: int) -> str:
    """Return e.g. ``3.2 GB`` (powers of 1000, as disks are sold)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def path_problem(name: str) -> str | None:
    """Return why ``name`` may not name a file of an artifact, or None if it may.

    Allowed are relative paths with ``/`` between plain parts, the same on every system.
    """
    if not name or len(name) > 512:
        return "it is empty or longer than 512 characters"
    if not name.isprintable() or "\\" in name or ":" in name:
        return "it holds a backslash, a colon or a control character"
    if name.startswith("/"):
        return "it is absolute"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "it has an empty, '.' or '..' part"
    return None


def resolve_inside(directory: Path, name: str, where: str) -> Path:
    """Return the path of the regular file ``name`` of ``directory``, symlinks resolved.

    Args:
        directory: the artifact.
        name: a relative path from one of its JSON files.
        where: the JSON file that names it, for messages.

    Raises:
        ModelFileError: the path is malformed, leaves the directory (also by a symlink), is
            missing, or is not a regular file.
    """
    problem = path_problem(name)
    if problem:
        raise ModelFileError(f"{where} names the file {show(name)}, which is refused: {problem}")
    try:
        root = directory.resolve(strict=True)
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            raise ModelFileError(
                f"{where} names the file {show(name)}, a link that leaves the directory"
            )
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelFileError(f"{where} names {show(name)}, which is not a regular file")
    except FileNotFoundError:
        raise ModelFileError(
            f"{where} names the file {show(name)}, which is missing from {directory}"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: symlink loop before Python 3.13
        raise ModelFileError(f"cannot open {show(name)} of {directory}: {error}") from error
    return path


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(paths: Mapping[str, Path]) -> dict[str, str]:
    """Return name -> SHA-256, reading on `HASH_THREADS` threads."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(paths, pool.map(sha256_file, paths.values()), strict=True))


def describe_files(
    directory: Path, names: Iterable[str], known: Mapping[str, FileEntry] | None = None
) -> dict[str, FileEntry]:
    """Return the `FileEntry` of each named file of ``directory``.

    Args:
        directory: where the files lie.
        names: relative paths.
        known: entries that need no second reading, such as the shards `ParamWriter` wrote.
    """
    known = known or {}
    names = sorted(names)
    hashes = hash_files({name: directory / name for name in names if name not in known})
    return {
        name: known.get(name) or FileEntry((directory / name).stat().st_size, hashes[name])
        for name in names
    }
