"""The bundled model behind a server in this process, with OpenAI's client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fairy_compile as fc

if TYPE_CHECKING:
    from fairy_compile.serve.worker import EngineThread

httpx = pytest.importorskip("httpx", reason="httpx is missing: pip install '.[test]'")
openai = pytest.importorskip("openai", reason="openai is missing: pip install '.[test]'")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is missing: pip install '.[serve]'")
pytest.importorskip("fastapi", reason="fastapi is missing: pip install '.[serve]'")
pytest.importorskip("prometheus_client", reason="it is missing: pip install '.[serve]'")

MODEL = Path(__file__).parents[2] / "examples" / "bundled" / "model"
SEQUENCES = 12  # from 9 rows on, kernels of ordinary decode calls differ from those of one row
NAME = "bundled"


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundled model, int8, compiled for this machine."""
    out = tmp_path_factory.mktemp("serve") / NAME
    fc.build(MODEL, target="cpu", max_batch=SEQUENCES, output=out)
    return out


@pytest.fixture(scope="session")
def alone(artifact: Path) -> Iterator[fc.runtime.Model]:
    """Return the model as one caller has it to himself."""
    with fc.load(artifact, max_sequences=1) as model:
        yield model


@pytest.fixture(scope="session")
def engine(artifact: Path) -> Iterator[EngineThread]:
    from fairy_compile.serve.worker import EngineThread

    thread = EngineThread(
        lambda: fc.load(artifact, max_sequences=SEQUENCES), max_queue=52, invariant=True
    )
    yield thread
    thread.close(30)


@contextmanager
def listening(engine: EngineThread, **options: object) -> Iterator[str]:
    """Serve ``engine`` at a free port of this machine and yield the address."""
    from fairy_compile.serve.app import create_app

    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(engine, NAME, **options)
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture(scope="session")
def address(engine: EngineThread) -> Iterator[str]:
    with listening(engine) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as session:
        yield session
