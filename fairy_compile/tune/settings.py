"""What a tuning run is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from fairy_compile.config import check_choice
from fairy_compile.errors import FairyError
from fairy_compile.tune.tasks import DEFAULT_ROWS

STRATEGIES = ("model", "random")


@dataclass(frozen=True)
class Settings:
    """Budgets and places of a run.

    Attributes:
        trials: candidates to measure, of all tasks together.
        minutes: time to spend, None for no limit.
        patience: trials of a task without an improvement of half a per cent before it ends;
            0 for never.
        timeout: seconds that a candidate may take to build, or to check and time.
        builders: build processes.
        threads: of the kernels; None for one a core.
        rows: rows of x that stand for batch ``many``.
        search: ``model`` or ``random``.
        seed: of what is random.
        rpc: (host, port) of a TVM RPC tracker; None measures on this machine.
        key: of the devices there.
        linker: command that links libraries for the device, where the target has none.

    Raises:
        FairyError: a value is out of range.
    """

    trials: int = 200
    minutes: float | None = None
    patience: int = 40
    timeout: float = 120.0
    builders: int = 2
    threads: int | None = None
    rows: tuple[int, ...] = DEFAULT_ROWS
    search: str = "model"
    seed: int = 0
    rpc: tuple[str, int] | None = None
    key: str = ""
    linker: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--trials", self.trials, 1),
            ("--patience", self.patience, 0),
            ("--builders", self.builders, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise FairyError(f"{flag} is {value}; allowed: {least} and more")
        for flag, seconds in (("--minutes", self.minutes), ("--timeout", self.timeout)):
            if seconds is not None and not seconds > 0:
                raise FairyError(f"{flag} is {seconds:g}; allowed: more than 0")
        if not self.rows or any(not 1 <= b <= 4096 for b in self.rows):
            raise FairyError(f"--rows is {self.rows}; allowed: one or more numbers from 1 to 4096")
        check_choice("--search", self.search, STRATEGIES)
        if (self.rpc is None) != (not self.key):
            raise FairyError("--rpc HOST:PORT and --key NAME go together; give both or neither")

    @property
    def identity(self) -> dict[str, object]:
        """What trials of an earlier run must agree on to be gone on with."""
        return {
            "rows": list(self.rows),
            "threads": self.threads,
            "search": self.search,
            "seed": self.seed,
            "key": self.key,
        }


def parse_rows(text: str) -> tuple[int, ...]:
    """Return the numbers of ``--rows``, e.g. ``4,128``, in rising order.

    Raises:
        FairyError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise FairyError(f"--rows is {text!r}; write numbers, such as 4,128")
    return tuple(sorted({int(part) for part in parts}))


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.

    Raises:
        FairyError: it is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FairyError(f"--rpc is {text!r}; write HOST:PORT, such as 192.168.1.5:9190")
    return host.strip("[]"), int(port)
