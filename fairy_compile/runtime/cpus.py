"""Which CPUs a process may use, and which of them are worth using."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from fairy_compile.errors import FairyError

SYS_CPU = Path("/sys/devices/system/cpu")
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def allowed_cpus() -> set[int] | None:
    """Return the CPUs the calling thread may run on, or None where the system does not tell."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return None


def parse_cpus(text: str) -> list[int]:
    """Read a list of CPUs as ``taskset`` writes it: ``"0-3,6"`` is 0, 1, 2, 3, 6.

    Raises:
        FairyError: the text has another form.
    """
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise FairyError(f"CPUs are {text!r}; allowed: numbers and ranges, such as 0-3,6")
        cpus += [cpu for cpu in range(low, high + 1) if cpu not in cpus]
    return cpus


def check_cpus(cpus: Collection[int], allowed: Collection[int] | None) -> list[int]:
    """Return ``cpus`` in order, if they are among ``allowed`` (see `allowed_cpus`).

    Raises:
        FairyError: none is given, one is not allowed, or the system has no affinity.
    """
    if allowed is None:
        raise FairyError("this system does not let a program choose CPUs; leave --cpus out")
    if not isinstance(cpus, Collection) or isinstance(cpus, str):
        raise FairyError(f"cpus is {cpus!r}; allowed: numbers of CPUs, such as [0, 1]")
    if not cpus or not set(cpus) <= set(allowed):
        raise FairyError(
            f"cpus is {sorted(cpus)}; allowed: some of {sorted(allowed)}, "
            "the CPUs this process may run on"
        )
    return sorted(set(cpus))


def worthwhile_cpus(allowed: Iterable[int]) -> list[int]:
    """Return the CPUs that finish a loop first that is split evenly between them.

    Parallel loops are cut into equal parts, one a thread, and end with the slowest. With cores of
    several speeds (big.LITTLE) the n fastest work as fast as n times the slowest of these; the best
    n drops cores of less than (n - 1) / n of the others' speed.
    """
    speeds = {cpu: _speed(cpu) for cpu in allowed}
    fastest = sorted(speeds, key=lambda cpu: (-speeds[cpu], cpu))
    count = max(range(1, len(fastest) + 1), key=lambda n: (n * speeds[fastest[n - 1]], n))
    return sorted(fastest[:count])


def physical_cores(cpus: Iterable[int]) -> int:
    """Count the cores behind some CPUs; hyper-threads of a core only share its ports."""
    return len({_read(cpu, "topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def quota() -> float | None:
    """Return how many CPUs' worth of time the control groups of this process grant, if limited.

    Containers are limited this way: they see all CPUs and are stopped when their time is used up.
    """
    limits = [_limit(directory) for directory in _groups()]
    return min((limit for limit in limits if limit is not None), default=None)


def _groups() -> list[Path]:
    """Return the directories of this process' CPU control group and of those around it."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUP / "cpu" if controllers else CGROUP
        group = root / path.lstrip("/")
        while group != root:
            found.append(group)
            group = group.parent
        found.append(root)
    return found


def _limit(group: Path) -> float | None:
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
        try:
            words = [word for name in names for word in (group / name).read_text().split()]
            amount, period = float(words[0]), float(words[1])  # "max" raises ValueError
        except (OSError, ValueError, IndexError):
            continue
        if amount > 0 and period > 0:
            return amount / period
    return None


def _speed(cpu: int) -> float:
    """Return a CPU's speed relative to the others; 1 where the system does not tell."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        text = _read(cpu, name)
        if text and text.isdecimal() and int(text):
            return float(text)
    return 1.0


def _read(cpu: int, name: str) -> str | None:
    try:
        return (SYS_CPU / f"cpu{cpu}" / name).read_text().strip()
    except OSError:
        return None
