"""An OpenAI-compatible HTTP server over the runtime (extra ``serve``).

From the model up: `Scheduler` batches sequences over one engine, `EngineThread` owns model and
scheduler, `create_app` speaks HTTP, `serve` listens. Only `app`, `protocol` and `server` need
FastAPI; only JSON-schema mode needs xgrammar.
"""

from __future__ import annotations

import importlib.util

from fairy_compile.errors import FairyError


def require_packages() -> None:
    """Raise `FairyError` with the pip command if a package of the extra ``serve`` is missing."""
    wanted = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise FairyError(
            f"serving needs {', '.join(missing)}; run pip install 'fairy-compile[serve]'"
        )
