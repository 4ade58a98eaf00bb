"""A tiny artifact measured end to end; what is timed is never compared with a number."""

import pytest

import fairy_compile as fc
from fairy_compile.bench import BenchResult, Settings, bench
from fairy_compile.bench.kernels import ATTENTION
from fairy_compile.bench.run import EngineRunner
from fairy_compile.bench.workload import Workload
from fairy_compile.errors import FairyError

SETTINGS = Settings(n_prompt=(8,), n_gen=(4,), depth=(0, 16), repetitions=1)


@pytest.fixture(scope="module", autouse=True)
def small_buffer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairy_compile.bench.run.default_bytes", lambda _: 1 << 20)
        yield


@pytest.fixture(scope="module")
def result(artifact) -> BenchResult:
    return bench(artifact, SETTINGS, command="a command")


def test_every_test_ran(result):
    assert [t.workload.name for t in result.tests] == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    for test in result.tests:
        assert len(test.tokens_per_second.samples) == 1
        assert test.tokens_per_second.median > 0
        assert test.cores_busy > 0
        assert (test.read_share is not None) == test.workload.is_decode


def test_facts_come_from_the_manifest(result, artifact):
    from fairy_compile.artifact.files import sha256_file
    from fairy_compile.artifact.manifest import Manifest

    manifest = Manifest.load(artifact)
    assert result.model.weight_bytes == sum(layer.bytes for layer in manifest.layers)
    assert result.model.manifest_sha256 == sha256_file(artifact / "fairy.json")
    # Embedding and head 320 x 32, q k v o, gate up down, three norms.
    assert (
        result.model.parameters
        == 2 * 320 * 32 + (32 * 32) * 2 + (32 * 16) * 2 + 3 * (32 * 48) + 3 * 32
    )
    assert result.threads == result.machine.cores
    assert result.command == "a command"
    assert result.versions["fairy-compile"] == fc.__version__


def test_kernels_are_those_of_one_decode_step(result):
    calls = {kernel.name: kernel.calls for kernel in result.kernels}
    assert sum(n for name, n in calls.items() if "phase_gemm" in name) == 5
    assert calls[ATTENTION] == 1
    assert sum(kernel.share for kernel in result.kernels) == pytest.approx(1)
    assert result.kernel_depth == 16


def test_runner_keeps_depth_and_chunk(artifact):
    with fc.load(artifact, max_sequences=1, context=64) as model:
        engine = model.engine
        runner = EngineRunner(engine)
        sequence = runner.at_depth(16)
        before = engine.prefill_phase.tokens
        runner.run(Workload(8, 0, 16))
        runner.run(Workload(0, 4, 16))
        assert engine.prefill_phase.tokens - before == 8  # the 16 were not run again
        assert engine.decode_phase.tokens == 4
        assert runner.at_depth(16) == sequence
        assert engine.length(sequence) == 16
        runner.run(Workload(8, 0))
        assert engine.cache.sequences == [runner._sequence]


def test_batch_limits_a_prompt_call(artifact):
    settings = Settings(n_prompt=(8,), n_gen=(0,), repetitions=1, batch=4)
    assert bench(artifact, settings).prefill_chunk == 4


def test_the_whole_context_can_be_used_and_no_more(artifact):
    assert bench(artifact, Settings(n_prompt=(128,), n_gen=(0,), repetitions=1)).tests
    with pytest.raises(FairyError, match="context is 129 tokens"):
        bench(artifact, Settings(n_prompt=(129,), n_gen=(0,), repetitions=1))
