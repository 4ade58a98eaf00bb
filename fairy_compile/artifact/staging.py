"""Writing a directory so that it appears whole or not at all.

Work happens in a sibling, ``.NAME.partial-XXXX``, which takes the name ``NAME`` when it is
complete. ``.NAME.lock`` is held meanwhile, so that two builds of one output exclude each other and
every other partial directory of ``NAME`` is known to be a dead one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fairy_compile.artifact.files import human_bytes
from fairy_compile.artifact.schema import load_object
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.paths import as_path

PACKAGE = "fairy-package.json"
"""What marks a package for phones, see `artifact.package`."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)

# EBUSY: the output is a mount that shares its file system with what is around it.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EBUSY)


def check_output(output: Path | str, *, force: bool, needed_bytes: int = 0) -> None:
    """Check that ``output`` may be written, without writing anything.

    A missing or empty directory may always be written. With ``force`` a directory that looks like
    ours may be replaced: one with a ``fairy.json`` or ``fairy-package.json``, or with a
    ``config.json`` whose ``quantization_config.quant_method`` is ``fairy``.

    Args:
        output: directory to be created or replaced.
        force: the user's ``--force``.
        needed_bytes: disk space the finished directory will take.

    Raises:
        FairyError: the output may not be replaced, or the disk has too little room.
    """
    path = _real(output)
    _check_replaceable(path, force)
    _check_space(path, needed_bytes)


def check_apart(output: Path | str, source: Path | str) -> None:
    """Check that writing ``output`` does not replace the ``source`` that it is made from.

    Raises:
        FairyError: it is the source, or holds it.
    """
    path, source = _real(output), Path(os.path.realpath(source))
    if path in (source, *source.parents):
        raise FairyError(
            f"the output {path} {'is' if path == source else 'holds'} what it is made from, "
            f"{source}, and would replace it; choose another --output"
        )


@contextmanager
def staged_directory(
    output: Path | str,
    *,
    force: bool,
    needed_bytes: int = 0,
    resume_key: str | None = None,
) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``output`` when the block ends without error.

    An interrupted block leaves no trace, except with a ``resume_key``: then a directory that a
    kill, Ctrl-C or a full disk left behind is kept, and a later call with the same output and key
    goes on in it. A `FairyError` or a bug always removes it.

    Args:
        output: directory to create; see `check_output` for what may be replaced.
        force: replace an existing output of ours.
        needed_bytes: disk space the finished directory will take.
        resume_key: anything that identifies the inputs, such as a hash of source and options.

    Raises:
        FairyError: see `check_output`; also if another process writes the same output, if the
            parent cannot be written, or if the disk fills up meanwhile.
    """
    target = _real(output)
    _check_replaceable(target, force)
    created = _make_parents(target.parent)
    try:
        with _lock(target):
            _recover(target)
            partial = _partial_path(target, resume_key)
            _remove_others(target, keep=partial)
            _check_space(target, needed_bytes - _directory_bytes(partial))
            partial.mkdir(exist_ok=resume_key is not None)
            try:
                yield partial
                _check_replaceable(target, force)
                _publish(partial, target)
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt | SystemExit | OSError)
                if resume_key is None or not interrupted or not any(partial.iterdir()):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            again = "; the same command goes on from there" if resume_key else ""
            raise FairyError(
                f"the disk filled up while writing {target}: free some space or choose another "
                f"--output{again}"
            ) from error
        if error.errno in _UNWRITABLE:
            if not _belongs_to(error.filename, target):
                raise FairyError(
                    f"cannot open {error.filename}: {error.strerror}; give files that this user "
                    "may read"
                ) from error
            raise _unwritable(error, target) from error
        raise
    finally:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()  # only succeeds where nothing was written


def _belongs_to(file: object, target: Path) -> bool:
    """Tell whether a file is of those that are written for ``target``; yes where none is named."""
    if not isinstance(file, str | os.PathLike):
        return True
    path, parent = Path(os.path.realpath(file)), target.parent
    if path == parent or not path.is_relative_to(parent):
        return path == parent
    first = path.relative_to(parent).parts[0]
    return first == target.name or first.startswith(f".{target.name}.")


def _unwritable(error: OSError, path: Path) -> FairyError:
    return FairyError(
        f"cannot write {error.filename or path}: {error.strerror}; choose another --output"
    )


def _real(output: Path | str) -> Path:
    path = Path(os.path.realpath(as_path("the output", output)))
    if not path.name:
        raise FairyError(f"the output is {path}, a whole file system; name a directory in it")
    try:
        os.lstat(_partial_path(path, ""))  # the longest of the names beside it
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FairyError(
                f"the output's name has {len(os.fsencode(path.name))} bytes, too many for its "
                "file system; choose a shorter --output"
            ) from error
    return path


def _check_replaceable(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FairyError(f"the output {path} is a file; name a directory that does not exist yet")
    if os.path.ismount(path):  # as a container's volume: no other directory can take its name
        raise FairyError(
            f"the output {path} is a mounted file system, which cannot be replaced; name a "
            f"directory in it, such as {path / 'model'}"
        )
    try:
        if not any(path.iterdir()):
            return
    except OSError as error:
        raise FairyError(f"cannot look into the output {path}: {error.strerror}") from error
    if not force:
        raise FairyError(
            f"the output {path} exists and is not empty; add --force to replace it, or choose "
            "another --output"
        )
    here, home = Path.cwd().resolve(), Path(os.path.expanduser("~")).resolve()
    if path in (home, *home.parents, here, *here.parents) or not _looks_like_ours(path):
        raise FairyError(
            f"the output {path} holds files that fairy_compile did not write, so --force does not "
            "replace it; remove it yourself or choose another --output"
        )


def _looks_like_ours(path: Path) -> bool:
    if (path / "fairy.json").is_file() or (path / PACKAGE).is_file():
        return True
    try:
        quantization = load_object(path / "config.json").get("quantization_config")
    except ModelFileError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fairy"


def _check_space(path: Path, needed_bytes: int) -> None:
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise FairyError(
            f"writing {path} needs {human_bytes(needed_bytes)}, but its disk has only "
            f"{human_bytes(free)} free; free some space or choose another --output"
        )


def _make_parents(parent: Path) -> list[Path]:
    """Create ``parent`` and return the directories that are new, innermost first."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FairyError(
            f"cannot create the directory {parent}: {error.strerror}; choose another --output"
        ) from error
    return missing


def _partial_path(target: Path, resume_key: str | None) -> Path:
    if resume_key is None:
        tag = secrets.token_hex(6)
    else:
        tag = hashlib.sha256(resume_key.encode()).hexdigest()[:12]
    return target.parent / f".{target.name}.partial-{tag}"


def _siblings(target: Path, word: str) -> list[Path]:
    prefix = f".{target.name}.{word}-"
    return [p for p in target.parent.iterdir() if p.name.startswith(prefix) and p.is_dir()]


def _recover(target: Path) -> None:
    """Finish or undo a publication that was cut off between its two renames."""
    for old in _siblings(target, "old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _remove_others(target: Path, keep: Path) -> None:
    for partial in _siblings(target, "partial"):
        if partial != keep and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)


def _directory_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else 0


def _publish(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``, the old directory stepping aside first."""
    if not target.exists():
        partial.rename(target)
        return
    old = target.parent / f".{target.name}.old-{secrets.token_hex(6)}"
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold ``.NAME.lock``; the system lets go of it when the process dies."""
    path = target.parent / f".{target.name}.lock"
    while True:
        try:
            stream = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise _unwritable(error, path) from error
        try:
            if not _try_lock(stream):
                raise FairyError(
                    f"another process is writing {target} (it holds {path}); wait for it to end, "
                    "or choose another --output"
                )
            # The former holder may have removed the file between our opening and locking it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream), path.stat()):
                    break
        except BaseException:
            os.close(stream)
            raise
        os.close(stream)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; it stays, unlocked
            path.unlink()
        os.close(stream)


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
