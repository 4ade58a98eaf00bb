"""Compiled models against PyTorch running the dequantised weights: the test that matters most."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.compiler import schedules
from fairy_compile.kernels.x86 import CODEBOOK_KERNELS
from tests.greedy import greedy
from tests.tiny_models import FAMILIES, SIZES, Oracle, relative_error, save_model

TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()
FLOAT_TOLERANCE = 1e-4

# The int8 contract rounds each group of 128 activations to 1/127 of its peak. Rounding errors are
# uniform, so a call's relative error is (peak/rms) / (127 sqrt(12)) with peak/rms <= sqrt(128).
# A token passes 4 calls a layer and the head; independent errors add in squares.
CALLS = 4 * SIZES["num_hidden_layers"] + 1
INT8_BOUND = math.sqrt(CALLS) * math.sqrt(128) / (127 * math.sqrt(12))
# int16 has 257 times as many levels, which leaves float rounding in sight.
INT16_BOUND = INT8_BOUND / 257 + FLOAT_TOLERANCE
# Against PyTorch with the same contract and split tables, each side rounds floats in its own order.
# That moves single activations across a rounding tie, by a whole step of 1/127 of the peak, which
# moves more of the layers that follow: after a few layers the sides' roundings are unrelated, and
# they differ by sqrt(2) of the contract's noise. The bound takes the worst peak/rms, sqrt(128); of
# 128 Gaussian values it is 2.8, so that noise is a quarter of the bound, and sqrt(2) / 4 < 1 / 2.
SAME_CONTRACT_TOLERANCE = INT8_BOUND / 2


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """Return build(family, **options) -> (artifact directory, QuantConfig, model directory)."""
    root = tmp_path_factory.mktemp("parity")
    cache: dict[tuple, tuple] = {}

    def get(family: str, kv_dtype: str | None = None, **options):
        key = (family, kv_dtype, *sorted(options.items()))
        if key not in cache:
            source = root / family
            if not source.exists():
                save_model(source, family)
            quant = fc.QuantConfig(**options)
            out = root / f"artifact{len(cache)}"
            sizes = {"context": 128, "prefill_chunk": 32}
            fc.build(source, quant=quant, kv_dtype=kv_dtype, output=out, **sizes)
            cache[key] = (out, quant, source)
        return cache[key]

    return get


@pytest.mark.parametrize("quant", ["w1", "w2"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_float_logits_and_64_greedy_tokens_equal_pytorch(built, family: str, quant: str) -> None:
    out, config, source = built(family, quant=quant, act="float")
    oracle = Oracle(source, config)
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), oracle.logits(TOKENS)) <= FLOAT_TOLERANCE
        assert greedy(model, TOKENS[:5], 64) == oracle.greedy(TOKENS[:5], 64)


# Each family and each number of stages runs always, their other pairs with the slow tests.
INT8_CASES = [
    ("llama", "w2"),
    ("qwen2", "w1"),
    pytest.param("llama", "w1", marks=pytest.mark.slow),
    pytest.param("qwen2", "w2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "quant"), INT8_CASES)
def test_int8_logits_stay_within_the_contracts_bound(built, family: str, quant: str) -> None:
    out, _, source = built(family, quant=quant, act="int8")
    exact = Oracle(source, fc.QuantConfig(quant, act="float")).logits(TOKENS)
    with fc.load(out) as model:
        for logits in whole_and_by_eight(model):
            assert relative_error(logits, exact) <= INT8_BOUND


@pytest.mark.parametrize(("family", "quant"), INT8_CASES)
def test_int8_logits_equal_pytorch_with_the_same_contract(
    monkeypatch, tmp_path: Path, family: str, quant: str
) -> None:
    """Kernels trade accuracy of weights for speed by default; here tuned knobs forbid it.

    A float16 cache moves more roundings than float rounding does; see test_kv_cache.py.
    """
    knobs = {"single": "{ tables = 'split' }", "many": "{ tables = 'split', panels = 'split' }"}
    (tmp_path / "cpu.toml").write_text(
        "".join(
            f"[[knobs]]\nkernel = '{kernel.name}'\nbatch = '{batch}'\nvalues = {values}\n"
            for kernel in CODEBOOK_KERNELS
            for batch, values in knobs.items()
        )
    )
    monkeypatch.setattr(schedules, "schedules_directory", lambda: tmp_path)
    source = save_model(tmp_path / "model", family)
    config = fc.QuantConfig(quant, act="int8")
    fc.build(source, quant=config, kv_dtype="float32", output=tmp_path / "out", context=64)
    want = Oracle(source, config).logits(TOKENS)
    with fc.load(tmp_path / "out") as model:
        for logits in whole_and_by_eight(model):
            assert relative_error(logits, want) <= SAME_CONTRACT_TOLERANCE


@pytest.mark.parametrize("quant", ["w1", "w2"])
def test_int16_logits_are_nearly_exact(built, quant: str) -> None:
    out, _, source = built("llama", kv_dtype="float32", quant=quant, act="int16")
    exact = Oracle(source, fc.QuantConfig(quant, act="float")).logits(TOKENS)
    with fc.load(out) as model:
        logits = model.logits(TOKENS)
    assert relative_error(logits, exact) <= INT16_BOUND


# One of a kind of each new part runs always; the others differ from it in what is tested apart.
SLOW = {"llama_yarn", "llama_dynamic", "mistral_window", "phi3", "stablelm", "gemma3", "qwen3_moe"}
OTHERS = [
    pytest.param(family, marks=pytest.mark.slow) if family in SLOW else family
    for family in sorted(set(FAMILIES) - {"llama", "qwen2"})
]


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_matches_pytorch(built, family: str) -> None:
    out, config, source = built(family, quant="w2", act="float")
    oracle = Oracle(source, config)
    want = oracle.logits(TOKENS)
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), want) <= FLOAT_TOLERANCE
        engine = model.engine
        chunks, single = engine.add_sequence(), engine.add_sequence()
        for start in range(0, len(TOKENS), 7):
            by_chunk = engine.prefill(chunks, TOKENS[start : start + 7])
        for token in TOKENS:
            by_token = engine.decode([single], [token])[0]
        assert relative_error(by_chunk, want[-1]) <= FLOAT_TOLERANCE
        assert relative_error(by_token, want[-1]) <= FLOAT_TOLERANCE
        assert greedy(model, TOKENS[:5], 24) == oracle.greedy(TOKENS[:5], 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3_longrope", {"original_max_position_embeddings": 32}),
        ("llama_dynamic", {"max_position_embeddings": 45}),
    ],
)
def test_a_longer_context_takes_the_angles_of_long_sequences(
    tmp_path: Path, family: str, changes: dict[str, int]
) -> None:
    """PyTorch does so for a sequence as long as that in one piece."""
    source = save_model(tmp_path / "model", family, **changes)
    quant = fc.QuantConfig("w2", act="float")
    context = len(TOKENS) + (0 if family == "phi3_longrope" else 15)
    tokens = (TOKENS * 2)[:context]
    report = fc.build(source, quant=quant, output=tmp_path / "out", context=context)
    assert any("rotates by other angles" in note for note in report.notes)
    with fc.load(tmp_path / "out") as model:
        want = Oracle(source, quant).logits(tokens)
        assert relative_error(model.logits(tokens), want) <= FLOAT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi3", "gemma2", "gemma3", "stablelm_12b"])
def test_int8_logits_of_other_families(built, family: str) -> None:
    out, _, source = built(family, quant="w2", act="int8")
    exact = Oracle(source, fc.QuantConfig("w2", act="float")).logits(TOKENS)
    with fc.load(out) as model:
        for logits in whole_and_by_eight(model):
            assert relative_error(logits, exact) <= INT8_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_int8_logits_of_mixtures(tmp_path: Path, family: str) -> None:
    """Every token takes every expert: rounding could change a choice, which knows no bound."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 4, "num_hidden_layers": 2}
    if family == "qwen3_moe":
        changes |= {"num_experts": changes.pop("num_local_experts"), "mlp_only_layers": []}
    source = save_model(tmp_path / "model", family, **changes)
    fc.build(source, quant="w2", act="int8", output=tmp_path / "out", context=64)
    exact = Oracle(source, fc.QuantConfig("w2", act="float")).logits(TOKENS)
    with fc.load(tmp_path / "out") as model:
        for logits in whole_and_by_eight(model):
            assert relative_error(logits, exact) <= INT8_BOUND


def test_a_mixture_has_one_row_a_layer_and_serves_every_batch(built) -> None:
    out, config, source = built("mixtral", quant="w2", act="float")
    report = fc.build(source, quant=config, dry_run=True)
    rows = {row.name: row for row in report.layers}
    experts = rows["model.layers.0.block_sparse_moe.experts.gate_up_proj"]
    assert experts.shape == (5 * 2 * SIZES["intermediate_size"], SIZES["hidden_size"])
    assert len(experts.sources) == 10
    assert "5 experts" in experts.reason
    assert rows["model.layers.0.block_sparse_moe.gate"].reason == "routes tokens to experts"
    oracle = Oracle(source, config)
    prompts = [TOKENS[i : i + 3 + i] for i in range(4)]
    with fc.load(out) as model:
        engine = model.engine
        for count in range(1, 5):
            ids = [engine.add_sequence() for _ in range(count)]
            engine.prefill_many(dict(zip(ids, prompts, strict=False)))
            step = engine.decode(ids, [7 + i for i in range(count)])
            for i, sequence in enumerate(ids):
                want = oracle.logits([*prompts[i], 7 + i])[-1]
                assert relative_error(step[i], want) <= FLOAT_TOLERANCE
                engine.remove_sequence(sequence)


@pytest.mark.parametrize("scale", ["row", "tile64"])
def test_scale_granularities_match_pytorch(built, scale: str) -> None:
    out, config, source = built("llama", quant="w2", scale=scale, act="float")
    with fc.load(out) as model:
        want = Oracle(source, config).logits(TOKENS)
        assert relative_error(model.logits(TOKENS), want) <= FLOAT_TOLERANCE


@pytest.mark.parametrize("scale", ["row", "tile64"])
@pytest.mark.parametrize("act", ["int8", "int16"])
def test_scales_of_sizes_that_leave_padding(tmp_path: Path, scale: str, act: str) -> None:
    """Rows that are no whole tiles and columns that are no whole groups: artifacts load."""
    source = save_model(tmp_path / "model", "llama", vocab_size=1000, intermediate_size=344)
    config = fc.QuantConfig("w2", scale=scale, act=act)
    out, sizes = tmp_path / "out", {"context": 128, "prefill_chunk": 32}
    fc.build(source, quant=config, kv_dtype="float32", output=out, **sizes)
    exact = Oracle(source, replace(config, act="float")).logits(TOKENS)
    with fc.load(out) as model:
        error = relative_error(model.logits(TOKENS), exact)
    assert error <= (INT8_BOUND if act == "int8" else INT16_BOUND)


def test_stages_per_layer_and_dense_head_match_pytorch(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "llama")
    quant = fc.QuantConfig(
        "w2", act="float", exempt=("lm_head",), stages_for={"*.v_proj": 4, "*.down_proj": 3}
    )
    report = fc.build(source, quant=quant, output=tmp_path / "out", context=64)
    rows = {row.name: row for row in report.layers}
    assert rows["lm_head"].kernel == "dense"
    assert "exempt" in rows["lm_head"].reason
    assert rows["model.layers.0.self_attn.v_proj"].stages == 4
    assert rows["model.layers.0.self_attn.qkv_proj"].sources[-1].endswith("k_proj")
    assert rows["model.layers.0.mlp.down_proj"].stages == 3
    with fc.load(tmp_path / "out") as model:
        want = Oracle(source, quant).logits(TOKENS)
        assert relative_error(model.logits(TOKENS), want) <= FLOAT_TOLERANCE


def test_odd_layers_stay_dense_and_are_reported(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "llama", intermediate_size=161)
    quant = fc.QuantConfig("w2", act="float", exempt=("*.gate_proj", "*.up_proj", "*.down_proj"))
    report = fc.build(source, quant="w2", act="float", output=tmp_path / "out", context=64)
    dense = {row.name: row.reason for row in report.layers if row.kernel == "dense"}
    assert set(dense) == {
        f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("gate_up_proj", "down_proj")
    }
    assert all("161" in reason for reason in dense.values())
    with fc.load(tmp_path / "out") as model:
        want = Oracle(source, quant).logits(TOKENS)
        assert relative_error(model.logits(TOKENS), want) <= FLOAT_TOLERANCE


def test_tied_dense_head_reads_the_embedding(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen2")
    quant = fc.QuantConfig("w2", act="float", exempt=("lm_head",))
    report = fc.build(source, quant=quant, output=tmp_path / "out", context=64)
    assert report.layers[-1].bytes == 0
    with fc.load(tmp_path / "out") as model:
        want = Oracle(source, quant).logits(TOKENS)
        assert relative_error(model.logits(TOKENS), want) <= FLOAT_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_match_pytorch(tmp_path: Path, dtype: str) -> None:
    source = save_model(tmp_path / "model", "llama", dtype)
    quant = fc.QuantConfig("w2", act="float", exempt=("*.o_proj",))
    fc.build(source, quant=quant, output=tmp_path / "out", context=64)
    with fc.load(tmp_path / "out") as model:
        want = Oracle(source, quant).logits(TOKENS)
        assert relative_error(model.logits(TOKENS), want) <= FLOAT_TOLERANCE


def test_prefill_in_one_chunk_in_several_and_token_by_token_agree(built) -> None:
    out, _, _ = built("llama", quant="w2", act="float")
    tokens = TOKENS[:30]
    with fc.load(out) as model:
        engine = model.engine
        whole, parts, single = (engine.add_sequence() for _ in range(3))
        one_chunk = engine.prefill(whole, tokens)
        for start in range(0, 30, 7):
            several = engine.prefill(parts, tokens[start : start + 7])
        for token in tokens:
            by_token = engine.decode([single], [token])[0]
    assert relative_error(several, one_chunk) <= FLOAT_TOLERANCE
    assert relative_error(by_token, one_chunk) <= FLOAT_TOLERANCE


def test_batch_of_four_equals_four_singles(built) -> None:
    out, _, _ = built("qwen2", quant="w2", act="float")
    prompts = [TOKENS[i : i + 3 + 4 * i] for i in range(4)]
    with fc.load(out) as model:
        engine = model.engine
        alone = []
        for prompt in prompts:
            sequence = engine.add_sequence()
            first = engine.prefill(sequence, prompt)
            alone.append((first, engine.decode([sequence], [int(first.argmax())])[0]))
            engine.remove_sequence(sequence)
        ids = [engine.add_sequence() for _ in prompts]
        together = engine.prefill_many(dict(zip(ids, prompts, strict=True)))
        step = engine.decode(ids, [int(together[i].argmax()) for i in ids])
    for i, sequence in enumerate(ids):
        assert relative_error(together[sequence], alone[i][0]) <= FLOAT_TOLERANCE
        assert relative_error(step[i], alone[i][1]) <= FLOAT_TOLERANCE


def test_a_run_proves_which_kernels_executed(built) -> None:
    out, _, _ = built("llama", quant="w2", act="float")
    with fc.load(out) as model:
        calls = model.trace_kernels(TOKENS[:4])
    generic = sum(count for name, count in calls.items() if name.startswith("generic_single"))
    assert generic == CALLS


def whole_and_by_eight(model) -> list[np.ndarray]:
    """Return the logits of `TOKENS` by the kernels for many rows, and by those for few."""
    engine = model.engine
    sequence = engine.add_sequence()
    pieces = [engine.prefill_logits(sequence, TOKENS[i : i + 8]) for i in range(0, 45, 8)]
    return [model.logits(TOKENS), np.concatenate(pieces)]
