import os
import threading

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.runtime.threads import default_threads, set_threads

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or not {0, 1} <= os.sched_getaffinity(0),
    reason="needs Linux and CPUs 0 and 1",
)


def in_new_thread(function):
    """Run where no TVM thread pool exists yet: pools belong to threads."""
    results = []

    def call():
        try:
            results.append(function())
        except FairyError as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results[0]


def test_default_is_at_most_the_cpus_and_is_used():
    assert 1 <= default_threads() <= os.cpu_count()
    assert in_new_thread(lambda: set_threads(None)) == default_threads()


def test_tvm_finds_the_number_at_every_launch(monkeypatch):
    """It reads the variable again each time; without it launches run on half of the CPUs."""
    monkeypatch.setenv("TVM_NUM_THREADS", "7")  # put back after the test
    assert in_new_thread(lambda: set_threads(1)) == 1
    assert os.environ["TVM_NUM_THREADS"] == "1"


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two CPUs")
def test_a_pool_shrinks_and_returns_but_does_not_grow(monkeypatch):
    assert in_new_thread(lambda: [set_threads(2), set_threads(1), set_threads(2)]) == [2, 1, 2]
    # Pools are made for the default number at least.
    monkeypatch.setattr("fairy_compile.runtime.threads.default_threads", lambda cpus=None: 1)
    error = in_new_thread(lambda: [set_threads(1), set_threads(2)])
    assert "threads is 2, but TVM's pool of this thread was made with 1" in str(error)


def test_the_default_follows_upon_fewer_threads():
    found = in_new_thread(lambda: [set_threads(1), set_threads(None)])
    assert found == [1, default_threads()]


@needs_affinity
def test_the_default_follows_upon_fewer_cpus():
    """A thread that was bound to a CPU is not taken for one that may use no other."""
    before = os.sched_getaffinity(0)

    def run():
        return [set_threads(None, [0]), set_threads(None), os.sched_getaffinity(0)]

    assert in_new_thread(run) == [1, default_threads(), before]


@pytest.mark.parametrize("threads", [0, -1, 100_000, True, "2", 1.0])
def test_out_of_range(threads):
    with pytest.raises(FairyError, match=r"allowed: 1 to \d+, the CPUs this process"):
        set_threads(threads)


@needs_affinity
@pytest.mark.parametrize("cpus", [0, "0-1"])
def test_cpus_are_a_collection_of_numbers(cpus):
    with pytest.raises(FairyError, match=rf"cpus is {cpus!r}; allowed: numbers of CPUs"):
        set_threads(1, cpus)


@needs_affinity
def test_threads_stay_where_the_process_may_run():
    """TVM ties threads to CPUs of its own choice, whatever ``taskset`` said."""

    def run():
        os.sched_setaffinity(0, {1})
        return set_threads(None), os.sched_getaffinity(0)

    assert in_new_thread(run) == (1, {1})


@needs_affinity
def test_cpus_bind_the_whole_pool():
    def run():
        before = set(os.listdir("/proc/self/task"))
        used = set_threads(2, [0, 1]), set_threads(1, [1])
        new = set(os.listdir("/proc/self/task")) - before
        return used, os.sched_getaffinity(0), [os.sched_getaffinity(int(task)) for task in new]

    used, caller, workers = in_new_thread(run)
    assert (used, caller) == ((2, 1), {1})
    assert workers == [{1}]


@needs_affinity
def test_more_threads_than_cpus_are_refused():
    error = in_new_thread(lambda: set_threads(2, [0]))
    assert "threads is 2; allowed: 1 to 1, the CPUs in --cpus" in str(error)
    error = in_new_thread(lambda: set_threads(None, [4096]))
    assert "cpus is [4096]; allowed: some of [0, 1" in str(error)
