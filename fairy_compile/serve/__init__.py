"""An OpenAI-compatible HTTP server over the runtime (extra ``serve``).

From the model up: `Scheduler` batches sequences over one engine, `EngineThread` owns model and
scheduler, `create_app` speaks HTTP, `serve` listens. Only `app`, `protocol` and `server` need
FastAPI; only JSON-schema mode needs xgrammar. `web` hands out files for browsers that run a model
themselves (extra ``web``).
"""

from __future__ import annotations

import importlib.util

from fairy_compile.errors import FairyError

_WANTED = {
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "web": ("starlette", "uvicorn"),
}


def require_packages(extra: str = "serve") -> None:
    """Raise `FairyError` with the pip command if a package of ``extra`` is missing."""
    wanted = _WANTED[extra]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise FairyError(
            f"serving needs {', '.join(missing)}; run pip install 'fairy-compile[{extra}]'"
        )
