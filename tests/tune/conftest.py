"""Tuning measures with one thread here, and leaves the pool to the tests after it."""

from tests.tvm_threads import whole_pool  # noqa: F401
