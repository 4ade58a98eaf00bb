import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile.bench import Settings, llama_cpp
from fairy_compile.bench.compare import _run_all, artifact_config, compare
from fairy_compile.bench.gguf_model import PeerModel
from fairy_compile.bench.llama_cpp import LlamaCppRunner
from fairy_compile.bench.tables import render
from fairy_compile.errors import FairyError, ModelFileError
from tests.bench.results import COMPARISON

TINY = Settings(n_prompt=(8,), n_gen=(4,), repetitions=2)


def test_a_missing_extra_is_told_with_the_command(artifact, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FairyError, match=r'llama_cpp, gguf.*pip install "fairy-compile\[bench\]"'):
        compare(artifact, TINY)


def test_unknown_peers_and_types(artifact):
    with pytest.raises(FairyError, match=r"unknown --peer 'ollama'; allowed: llama\.cpp"):
        compare(artifact, TINY, peer="ollama")
    with pytest.raises(FairyError, match="unknown --peer-types 'Q9'"):
        compare(artifact, TINY, types=["Q9"])


def test_sizes_come_from_the_artifact(artifact, tmp_path):
    config = artifact_config(artifact)
    assert (config.hidden_size, config.num_kv_heads, config.vocab_size) == (32, 1, 320)
    with pytest.raises(ModelFileError, match=r"mlc-chat-config\.json"):
        artifact_config(tmp_path)


WORKER = """
import json, sys
request = json.loads(sys.stdin.readline())
print(json.dumps({"description": "d", "size_bytes": len(request["tokens"]), "version": "1",
                  "system": "s"}), flush=True)
for line in sys.stdin:
    run = json.loads(line)
    if run["depth"]:
        print("some noise\\nillegal thing", file=sys.stderr, flush=True)
        sys.exit(3)
    print(json.dumps({"seconds": run["n_prompt"] / 2}), flush=True)
"""


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    (tmp_path / "fake_worker.py").write_text(WORKER)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(llama_cpp, "WORKER", "fake_worker")


def test_the_worker_is_asked_and_its_death_is_told(fake_worker, tmp_path):
    from fairy_compile.bench.workload import Workload

    path = tmp_path / "model.gguf"
    with LlamaCppRunner(path, vocab_size=10, threads=1, context=32, batch=None) as runner:
        assert (runner.size_bytes, runner.description) == (32, "d")
        assert runner.run(Workload(8, 0)) == 4.0
        with pytest.raises(FairyError, match=r"status 3 on model.gguf: illegal thing; delete"):
            runner.run(Workload(8, 0, 4))


def test_a_type_that_fails_does_not_lose_the_others(monkeypatch):
    files = [PeerModel(Path(f"{mix}.gguf"), mix, {}) for mix in ("Q2_K", "Q4_K_M", "TQ2_0")]

    def run(_ours, file, _config, _progress):
        if file.mix == "Q4_K_M":
            raise FairyError("llama.cpp ended with signal 4")
        return file.mix

    monkeypatch.setitem(_run_all.__globals__, "_run_pairs", run)
    runs, failed = _run_all(None, files, None, None)
    assert (runs, failed) == (["Q2_K", "TQ2_0"], {"Q4_K_M": "llama.cpp ended with signal 4"})
    with pytest.raises(FairyError, match="signal 4"):
        _run_all(None, files[1:2], None, None)
    table = render(replace(COMPARISON, failed=failed), "table")
    assert "Q4_K_M could not be run: llama.cpp ended with signal 4" in table


def test_llama_cpp_runs_the_random_model(artifact, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("fairy_compile.bench.run.default_bytes", lambda _: 1 << 20)
    found = compare(artifact, TINY, types=["Q2_K", "TQ2_0"], cache=tmp_path)
    assert [run.type for run in found.runs] == ["Q2_K", "TQ2_0"]
    for run in found.runs:
        assert [pair.workload.name for pair in run.pairs] == ["pp8", "tg4"]
        assert all(len(pair.peer.samples) == 2 and pair.ratio > 0 for pair in run.pairs)


def test_a_damaged_file_is_an_error_not_a_crash(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FairyError, match=r"llama\.cpp ended with status 1 on model\.gguf"):
        LlamaCppRunner(tmp_path / "model.gguf", vocab_size=9, threads=1, context=32, batch=None)
