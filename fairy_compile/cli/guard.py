"""How a verb ends: errors as one line on stderr, and exit statuses."""

from __future__ import annotations

import errno
import functools
import traceback
from collections.abc import Callable
from typing import Any

import typer

from fairy_compile.errors import FairyError

EXIT_BUG = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))

_settings = {"debug": False}


def set_debug(debug: bool) -> None:
    """Show tracebacks from now on, or not."""
    _settings["debug"] = debug


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Return ``verb`` with its exceptions turned into messages and exit statuses.

    `FairyError`, full disks and missing permissions end with status 2, Ctrl-C with 130, anything
    else is a bug and ends with 1.
    """

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except FairyError as error:
            _end(f"error: {_one_line(error)}", EXIT_ERROR)
        except KeyboardInterrupt:
            _end("interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output went away; typer ends quietly
            if isinstance(error, PermissionError):
                _end(
                    f"error: the system refuses: {_one_line(error)}; give files and directories "
                    "that this user may read, or write to",
                    EXIT_ERROR,
                )
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                _end(f"error: the disk is full: {_one_line(error)}; free some space", EXIT_ERROR)
            _end(
                f"error: fairy_compile failed in a way it should not: {type(error).__name__}: "
                f"{_one_line(error)}; please report this, with what `fairy_compile --debug "
                f"{verb.__name__} ...` shows",
                EXIT_BUG,
            )

    return call


def _end(message: str, status: int) -> None:
    if _settings["debug"] and status != EXIT_INTERRUPTED:
        typer.echo(traceback.format_exc(), err=True)
    typer.echo(message, err=True)
    raise typer.Exit(status)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line)
