"""Devices elsewhere, through TVM's RPC tracker.

A tracker knows devices by a key and lends each to one client at a time. A session is a process on
the device that runs whatever it is sent: TVM's RPC is remote code execution by design, without
passwords or encryption. Trackers and servers belong in a trusted network only.
"""

from __future__ import annotations

import socket
import statistics
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.targets import Target
from fairy_compile.tune.builder import SYMBOL
from fairy_compile.tune.measure import DeviceLost
from fairy_compile.tune.problem import Problem
from fairy_compile.tune.tasks import Task

CONNECT_SECONDS = 60.0
"""How long a device may take to be free again, as after a crash or a hang."""

FLUSH_BYTES = 32 << 20
"""Written before each timed call, so that weights come from memory; beyond phones' caches."""

_TRACKER_SECONDS = 20.0
_OLD = 0.5  # share of its time after which a session is given back


def _modules() -> tuple[Any, Any]:
    try:
        from tvm import rpc
        from tvm.rpc import base
    except ImportError as error:
        raise FairyError(
            f"tuning over RPC needs {error.name}; install it with: pip install "
            '"fairy-compile[tune]"'
        ) from error
    return rpc, base


class _Tracker:
    """A connection to a tracker that does not wait for ever, as `tvm.rpc.TrackerSession` does."""

    def __init__(self, address: tuple[str, int]) -> None:
        _, self._base = _modules()
        self._socket = socket.create_connection(address, _TRACKER_SECONDS)
        self._socket.sendall(struct.pack("<i", self._base.RPC_TRACKER_MAGIC))
        (magic,) = struct.unpack("<i", self._base.recvall(self._socket, 4))
        if magic != self._base.RPC_TRACKER_MAGIC:
            raise OSError(f"{address[0]}:{address[1]} is no TVM RPC tracker")

    def ask(self, *message: Any) -> Any:
        """Return the tracker's answer.

        Raises:
            OSError: it refuses, does not answer in time, or is gone.
        """
        self._base.sendjson(self._socket, list(message))
        code, *values = self._base.recvjson(self._socket)
        if code != self._base.TrackerCode.SUCCESS:
            raise OSError(f"the tracker answers {values or code}")
        return values[0] if values else None

    def close(self) -> None:
        """Close the connection; a request under way is withdrawn."""
        self._socket.close()


def count_devices(address: tuple[str, int], key: str) -> int:
    """Return how many servers a tracker has under ``key``.

    Raises:
        FairyError: the tracker does not answer, or has none.
    """
    _, base = _modules()
    where = f"{address[0]}:{address[1]}"
    try:
        tracker = _Tracker(address)
        try:
            servers = tracker.ask(base.TrackerCode.SUMMARY)["server_info"]
        finally:
            tracker.close()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FairyError(
            f"no TVM RPC tracker answers at {where}: {error}; start one there with: python -m "
            "tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190"
        ) from error
    keys = [str(server.get("key", "")).partition(":")[2] for server in servers]
    count = keys.count(key)
    if not count:
        known = ", ".join(sorted(set(keys))) or "none at all"
        raise FairyError(f"the tracker at {where} has no device {key!r}; it has: {known}")
    return count


class RpcDevice:
    """One of the devices that a tracker has under a key.

    Args:
        target: compiled for.
        address: of the tracker.
        key: of the devices.
        threads: None leaves TVM's choice on the device, one for each big core.
        timeout: seconds of a measurement; a session gets a few times that.
    """

    fastest_bytes = 1e13

    def __init__(
        self,
        target: Target,
        address: tuple[str, int],
        key: str,
        threads: int | None,
        timeout: float,
    ) -> None:
        self._rpc, self._base = _modules()
        self._target, self._address, self._key = target, address, key
        self._threads, self._timeout = threads, timeout
        self._session_seconds = 4 * timeout
        self._session: Any = None
        self._since = 0.0
        self.name = ""

    def connect(self, banned: frozenset[str]) -> bool:
        """See `Device.connect`; a session that is about to end is given back first."""
        age = time.monotonic() - self._since
        if self._session is not None and age < _OLD * self._session_seconds:
            return False
        self._forget()
        end = time.monotonic() + CONNECT_SECONDS
        while True:
            place, session = self._request()
            name = f"{self._key} {place}"
            if name not in banned:
                break
            del session  # back it goes, behind those that wait
            if time.monotonic() > end:
                raise DeviceLost("only devices that were dropped answer")
            time.sleep(0.5)
        self.name, self._session, self._since = name, session, time.monotonic()
        try:
            self._device = session.device(self._target.device)
            if self._threads is not None:
                session.get_function("runtime.config_threadpool")(1, self._threads)
        except Exception as error:
            raise self._lost(error) from error
        return True

    def _request(self) -> tuple[str, Any]:
        """Return address and session of a device that is free."""
        try:
            tracker = _Tracker(self._address)
            try:
                url, port, match = tracker.ask(self._base.TrackerCode.REQUEST, self._key, "", 1)
            finally:
                tracker.close()
            return f"{url}:{port}", self._rpc.connect(url, port, match, self._session_seconds)
        except (OSError, ValueError, RuntimeError) as error:  # tvm-ffi's errors are RuntimeErrors
            raise DeviceLost(f"no device {self._key!r} is free: {_first_line(error)}") from error

    def prepare(self, task: Task, problem: Problem, stream_bytes: int) -> None:
        """See `Device.prepare`."""
        self._flush = min(stream_bytes, FLUSH_BYTES) if self._target.device == "cpu" else 0
        try:
            self._weights = [self._send(array) for array in problem.arrays]
            self._x = {b: self._send(x) for b, x in problem.x.items()}
            out, dtype = task.spec.out_features, task.spec.out_dtype
            self._poison = {b: np.full((b, out), np.nan, dtype) for b in task.rows}
            self._y = {b: self._send(poison) for b, poison in self._poison.items()}
        except Exception as error:
            raise self._lost(error) from error

    def _send(self, array: np.ndarray) -> Any:
        import tvm

        there = tvm.runtime.empty(array.shape, str(array.dtype), self._device)
        there.copyfrom(array)
        return there

    def load(self, library: Path) -> Any:
        """See `Device.load`."""
        try:
            self._session.upload(str(library))
            module = self._session.load_module(library.name)
            self._session.remove(library.name)
            return module
        except Exception as error:
            raise self._lost(error) from error

    def output(self, function: Any, rows: int) -> np.ndarray:
        """See `Device.output`."""
        try:
            y = self._y[rows]
            y.copyfrom(self._poison[rows])
            function[SYMBOL](self._x[rows], *self._weights, y)
            return y.numpy()
        except Exception as error:
            raise self._lost(error) from error

    def seconds(self, function: Any, rows: int, calls: int) -> float:
        """See `Device.seconds`. Calls one after the other begin with weights out of caches."""
        try:
            repeat = max(1, min(calls, 10))
            timer = function.time_evaluator(
                SYMBOL, self._device, number=1, repeat=repeat, cache_flush_bytes=self._flush
            )
            taken = timer(self._x[rows], *self._weights, self._y[rows]).results
            return float(statistics.fmean(taken))
        except Exception as error:
            raise self._lost(error) from error

    def read_bytes_per_second(self) -> float:
        """See `Device.read_bytes_per_second`; not measured there."""
        return 0.0

    def _lost(self, error: Exception) -> DeviceLost:
        """Give the session up: what it fails with is often the end of the other side."""
        self._forget()
        return DeviceLost(_first_line(error))

    def _forget(self) -> None:
        for name in ("_session", "_device", "_weights", "_x", "_y"):
            setattr(self, name, None)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
