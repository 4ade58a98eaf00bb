"""How many CPU threads TVM's kernels use, and on which CPUs."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection

from fairy_compile.config import is_whole
from fairy_compile.errors import FairyError
from fairy_compile.runtime.cpus import (
    allowed_cpus,
    check_cpus,
    physical_cores,
    quota,
    worthwhile_cpus,
)

# Ways of `runtime.config_threadpool`.
_BIG_CORES = 1
_ANY_OF_THESE_CPUS = -3

_before = threading.local()  # .cpus: what the thread was allowed before it was bound here


def default_threads(cpus: Collection[int] | None = None) -> int:
    """Return how many threads serve best: the physical cores behind ``cpus``.

    Fewer where a control group grants less time than that (containers).

    Args:
        cpus: None takes the `worthwhile_cpus` of those this process may run on.
    """
    if cpus is None:
        allowed = allowed_cpus()
        if allowed is None:
            return max(1, os.cpu_count() or 1)
        cpus = worthwhile_cpus(allowed)
    cores, granted = physical_cores(cpus), quota()
    return max(1, cores if granted is None else min(cores, int(granted)))


def set_threads(threads: int | None, cpus: Collection[int] | None = None) -> int:
    """Let TVM use ``threads`` threads on ``cpus`` and return how many it uses.

    The pool belongs to the calling thread and is created once; later it can use fewer threads, or
    all of them again, but not grow. It is made for `default_threads` at least, so that a model
    that was loaded for one thread does not decide how many the next one gets. The calling thread
    works too, so ``cpus`` bind it with the others.

    Args:
        threads: None for `default_threads`.
        cpus: numbers of CPUs; None for all this process may run on, so that limits set outside
            (``taskset``, containers) hold and the system balances the load.

    Raises:
        FairyError: ``threads`` or ``cpus`` is out of range, or there are to be more threads than
            the existing pool holds. More threads than CPUs are refused, because they wait for
            each other by spinning.
    """
    if not hasattr(_before, "cpus"):
        _before.cpus = allowed_cpus()
    allowed = _before.cpus
    chosen = check_cpus(cpus, allowed) if cpus is not None else None
    usable = chosen or allowed
    most = len(usable) if usable is not None else os.cpu_count() or 1
    if threads is not None and not (is_whole(threads) and 1 <= threads <= most):
        raise FairyError(
            f"threads is {threads!r}; allowed: 1 to {most}, the CPUs "
            f"{'in --cpus' if chosen else 'this process may run on'}"
        )
    import tvm

    # Of what was allowed at first: an earlier call bound this thread, perhaps to fewer CPUs.
    default = default_threads(worthwhile_cpus(allowed) if allowed is not None else None)
    wanted = threads or (default_threads(chosen) if chosen else default)
    # TVM reads its environment variable when it makes the pool and again at every parallel launch;
    # without it, it takes half of the CPUs, hyper-threads or not, and then runs launches of a
    # larger pool on one thread. So the variable stays. NumThreads creates the pool; threads of it
    # that are not used sleep.
    count = tvm.get_global_func("runtime.NumThreads")
    configure = tvm.get_global_func("runtime.config_threadpool")
    os.environ["TVM_NUM_THREADS"] = str(max(wanted, default))
    used = count()
    os.environ["TVM_NUM_THREADS"] = str(wanted)
    if usable is None:
        if used != wanted:
            configure(_BIG_CORES, wanted)
    else:
        # Making a pool ties its threads to CPUs of TVM's choice, whatever this process was allowed.
        if chosen is None and threads is None:
            usable = worthwhile_cpus(usable)
        configure(_ANY_OF_THESE_CPUS, wanted, [str(cpu) for cpu in sorted(usable)])
    used = int(count())
    if threads is not None and used != threads:
        raise FairyError(
            f"threads is {threads}, but TVM's pool of this thread was made with {used}; "
            "set threads where the first model is loaded"
        )
    return used
