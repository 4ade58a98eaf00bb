"""Asking the system for AMX tiles."""

from __future__ import annotations

import errno

from fairy_compile.runtime import amx


class Libc:
    def __init__(self, result: int) -> None:
        self.result = result
        self.asked: tuple[int, ...] = ()

    def syscall(self, *arguments: int) -> int:
        self.asked = arguments
        return self.result


def answer(monkeypatch, result: int) -> Libc:
    libc = Libc(result)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(amx.ctypes, "get_errno", lambda: errno.EPERM)
    monkeypatch.setattr(amx.platform, "system", lambda: "Linux")
    monkeypatch.setattr(amx.platform, "machine", lambda: "x86_64")
    return libc


def test_tile_data_is_asked_for(monkeypatch) -> None:
    libc = answer(monkeypatch, 0)
    assert amx.request_amx() is None
    assert libc.asked == (158, 0x1023, 18)


def test_a_refusal_says_why(monkeypatch) -> None:
    answer(monkeypatch, -1)
    assert "not permitted" in amx.request_amx()


def test_other_systems_are_not_asked(monkeypatch) -> None:
    libc = answer(monkeypatch, 0)
    monkeypatch.setattr(amx.platform, "system", lambda: "Darwin")
    assert "no AMX here" in amx.request_amx()
    assert not libc.asked
