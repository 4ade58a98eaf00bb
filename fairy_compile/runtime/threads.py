"""How many CPU threads TVM's kernels use."""

from __future__ import annotations

import os
from pathlib import Path

from fairy_compile.errors import FairyError

_MODE_BIG_CORES = 1


def default_threads() -> int:
    """Return the physical cores this process may run on; hyper-threads only share their ports."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return max(1, os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            siblings.add((topology / "thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def set_threads(threads: int | None) -> int:
    """Let TVM use ``threads`` threads (default: `default_threads`) and return how many it uses.

    The pool belongs to the calling thread and is created once; it can shrink later but not grow.

    Raises:
        FairyError: ``threads`` is out of range, or more than the existing pool holds.
    """
    most = os.cpu_count() or 1
    if threads is not None and (isinstance(threads, bool) or not 1 <= threads <= most):
        raise FairyError(f"threads is {threads!r}; allowed: 1 to {most}, this machine's CPUs")
    import tvm

    wanted = threads or default_threads()
    # TVM reads its environment variable when it makes the pool and again at every parallel launch;
    # without it, it takes half of the CPUs, hyper-threads or not, and then runs launches of a
    # larger pool on one thread. So the variable stays. NumThreads creates the pool.
    os.environ["TVM_NUM_THREADS"] = str(wanted)
    count = tvm.get_global_func("runtime.NumThreads")
    if count() != wanted:
        tvm.get_global_func("runtime.config_threadpool")(_MODE_BIG_CORES, wanted)
    used = int(count())
    if threads is not None and used != threads:
        raise FairyError(
            f"threads is {threads}, but TVM's pool of this thread was made with {used}; "
            "set threads where the first model is loaded"
        )
    return used
