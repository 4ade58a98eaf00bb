import os
import threading

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.runtime.threads import default_threads, set_threads


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
def test_a_pool_shrinks_and_returns_but_does_not_grow():
    assert in_new_thread(lambda: [set_threads(2), set_threads(1), set_threads(2)]) == [2, 1, 2]
    error = in_new_thread(lambda: [set_threads(1), set_threads(2)])
    assert "threads is 2, but TVM's pool of this thread was made with 1" in str(error)


@pytest.mark.parametrize("threads", [0, -1, 100_000, True])
def test_out_of_range(threads):
    with pytest.raises(FairyError, match="this machine's CPUs"):
        set_threads(threads)
