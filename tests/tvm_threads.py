"""TVM's thread pool of the main thread, made as large as any test may need it.

The pool can shrink later but not grow: without this, a test that asks for one thread would decide
how many the tests after it get.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def whole_pool() -> None:
    """For every test of the module or directory that imports it."""
    from fairy_compile.runtime.threads import set_threads

    set_threads(None)
