"""The processes of a run: builders, and slots for the devices that measure."""

from __future__ import annotations

from pathlib import Path

from fairy_compile.errors import FairyError
from fairy_compile.targets import Target
from fairy_compile.tune.builder import Builder
from fairy_compile.tune.local import LocalCpu
from fairy_compile.tune.measure import CONFIRM, SEARCH, STREAM_BYTES, Effort, Measurer
from fairy_compile.tune.settings import Settings
from fairy_compile.tune.slots import Slot
from fairy_compile.tune.workers import Worker


class Crew:
    """Worker processes; close it, or use it in a ``with`` statement.

    Attributes:
        builders: that compile.
        slots: that measure.
        banned: devices that were dropped -> why.
        exclusive: candidates are timed on the machine that builds them.
        timeout: seconds of a build or a measurement.
        effort, confirm_effort: of a search trial, and of the final comparison.
        stream_bytes: see `MeasureRequest`.
    """

    def __init__(
        self,
        builders: list[Worker],
        slots: list[Slot],
        *,
        timeout: float,
        exclusive: bool,
        effort: Effort = SEARCH,
        confirm_effort: Effort = CONFIRM,
        stream_bytes: int = STREAM_BYTES,
        patience_of_slot: float = 0.0,
    ) -> None:
        self.builders, self.slots = builders, slots
        self.banned: dict[str, str] = {}
        self.exclusive, self.timeout = exclusive, timeout
        self.effort, self.confirm_effort = effort, confirm_effort
        self.stream_bytes = stream_bytes
        self._slot_seconds = patience_of_slot

    @property
    def workers(self) -> list[Worker]:
        """All processes."""
        return [*self.builders, *(slot.worker for slot in self.slots)]

    @property
    def depth(self) -> int:
        """Candidates to have under way."""
        if self.exclusive:
            return max(4, 3 * len(self.builders))
        return len(self.builders) + 2 * len(self.slots)

    def measure_timeout(self, slot: Slot) -> float:
        """Return the seconds of a measurement, with what a device elsewhere takes to get."""
        return self.timeout + (self._slot_seconds if slot.remote else 0.0)

    def drop(self, slot: Slot, reason: str) -> None:
        """End a slot for good.

        Raises:
            FairyError: it was the last one.
        """
        self.banned[slot.name] = reason
        slot.worker.close()
        self.slots.remove(slot)
        if not self.slots:
            why = "; ".join(f"{name}: {text}" for name, text in self.banned.items())
            raise FairyError(f"no device is left to measure on: {why}")

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_crew(settings: Settings, target: Target, log: Path, stream_bytes: int) -> Crew:
    """Return a crew that measures on this machine.

    Raises:
        FairyError: the target's libraries do not run here.
    """
    if target.is_gpu or not target.runs_here():
        raise FairyError(
            f"libraries for target {target.name} do not run on this machine's CPU; measure on a "
            "device that has one, with --rpc HOST:PORT --key NAME, see docs/tuning.md"
        )
    slots = [
        Slot(Worker("measure", Measurer, (LocalCpu, target, settings.threads), log), remote=False)
    ]
    return Crew(
        _builders(settings, target, log),
        slots,
        timeout=settings.timeout,
        exclusive=True,
        stream_bytes=stream_bytes,
    )


def rpc_crew(settings: Settings, target: Target, log: Path) -> Crew:
    """Return a crew that measures on all devices that a tracker has under a key now.

    Raises:
        FairyError: the tracker does not answer, or has none.
    """
    from fairy_compile.tune import rpc

    assert settings.rpc is not None
    count = rpc.count_devices(settings.rpc, settings.key)
    arguments = (rpc.RpcDevice, target, settings.rpc, settings.key, settings.threads,
                 settings.timeout)  # fmt: skip
    slots = [
        Slot(Worker(f"{settings.key}-{i + 1}", Measurer, arguments, log), remote=True)
        for i in range(count)
    ]
    return Crew(
        _builders(settings, target, log),
        slots,
        timeout=settings.timeout,
        exclusive=False,
        stream_bytes=rpc.FLUSH_BYTES,
        patience_of_slot=rpc.CONNECT_SECONDS,
    )


def _builders(settings: Settings, target: Target, log: Path) -> list[Worker]:
    arguments = (target, settings.linker)
    return [Worker(f"build-{i + 1}", Builder, arguments, log) for i in range(settings.builders)]
