"""A server whose model runs on a GPU: a simulated Metal device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fairy_compile as fc
from tests.emulation import metal_rig
from tests.emulation.gpu_targets import use_linux_host
from tests.tiny_models import save_model

pytest.importorskip("fastapi", reason="fastapi is missing: pip install '.[serve]'")
missing = metal_rig.missing_tools()
pytestmark = [pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.slow]

SEQUENCES = 3
PROMPTS = ("hello", "a longer one, of several tokens", "x", "and others that wait", "hello there")


def test_clients_get_the_answers_they_would_get_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More clients than sequences, a window that answers outgrow, prefixes that are shared."""
    from fairy_compile.serve.worker import EngineThread
    from tests.serve.conftest import listening, openai

    metal_rig.MetalRig(tmp_path).order = 7
    use_linux_host(monkeypatch, tmp_path / "targets", "metal")
    source = save_model(tmp_path / "model", "mistral_window")
    sizes = {"context": 128, "prefill_chunk": 32, "max_batch": SEQUENCES}
    fc.build(source, target="metal", act="float", output=tmp_path / "out", **sizes)
    with fc.load(tmp_path / "out") as model:
        want = [model.generate(prompt, 24, temperature=0.0) for prompt in PROMPTS]
    engine = EngineThread(
        lambda: fc.load(tmp_path / "out", max_sequences=SEQUENCES), invariant=True
    )
    try:
        with listening(engine) as address, ThreadPoolExecutor(len(PROMPTS)) as pool:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600)

            def ask(prompt: str) -> str:
                reply = client.completions.create(
                    model="bundled", prompt=prompt, max_tokens=24, temperature=0.0
                )
                return reply.choices[0].text

            assert list(pool.map(ask, PROMPTS)) == want
            counts = engine.model.engine.counts
            assert engine.decode_rows == SEQUENCES
            assert counts["batch_decode"].tokens > counts["batch_decode"].calls
    finally:
        engine.close(30)
