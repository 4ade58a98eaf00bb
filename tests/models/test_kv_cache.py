"""The runtime's paged cache driving our kernels: chunks, batches, popn, forks; float16 caches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  bfloat16 for NumPy
import numpy as np
import pytest
import tvm
from tvm import relax, te
from tvm.relax.frontend.nn import Tensor
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

import fairy_compile as fc
from fairy_compile.errors import FairyError
from fairy_compile.models.config import DecoderConfig
from fairy_compile.models.kv_cache import CREATE, _to_float16, add_kv_cache, attend
from fairy_compile.models.rope import Rope
from fairy_compile.op.rope import rotate
from fairy_compile.runtime.kv_cache import KVCache
from fairy_compile.runtime.pages import PAGE_SIZE, RuntimePages
from fairy_compile.targets import load_target
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
ROPE = Rope(10000.0, "linear", {"factor": 2.0})
# Rounding to float16 is relative to 2^-11. Queries and keys are rounded before and after rotation,
# so a score, a sum over pairs of size |q| |k| / sqrt(DIM) <= 4 here, moves by up to 4 such steps
# of that, values by one and outputs by one.
FLOAT16_TOLERANCE = (4 * 4 + 2) * 2**-11


class Session:
    """A cache with its attention function, and NumPy keeping the same sequences in float64."""

    def __init__(self, kv_dtype: str, **features: Any) -> None:
        config = self.config = DecoderConfig(
            "test", 64, 64, LAYERS, HEADS, KV_HEADS, DIM, 100, 1e-5, ROPE, 256, "", False,
            kv_dtype=kv_dtype, **features,
        )  # fmt: skip
        target = load_target("cpu")
        bb = relax.BlockBuilder()
        rows = tvm.tirx.Var("n", "int64")
        qkv_type = relax.TensorType((1, rows, HEADS + 2 * KV_HEADS, DIM), "float32")
        for layer in range(LAYERS):
            qkv, cache = relax.Var("qkv", qkv_type), relax.Var("cache", relax.AnyType())
            with bb.function(f"attend{layer}", [qkv, cache]):
                handle = PagedKVCache(_expr=cache, _name="cache")
                bb.emit_func_output(attend(handle, layer, Tensor(_expr=qkv), config, target)._expr)
        add_kv_cache(bb, config, target)
        executable = tvm.relax.build(bb.finalize(), target=target.to_tvm())
        self.vm = relax.VirtualMachine(executable, tvm.cpu())
        sizes = (4, 1024, 64, PAGE_SIZE, 0)
        self.handle = self.vm[CREATE](*(tvm.runtime.ShapeTuple([s]) for s in sizes))
        owner = RuntimePages(self.handle)
        self.cache = KVCache(owner, context=256, capacity=1024, max_sequences=4)
        self.rows: dict[int, np.ndarray] = {}  # sequence -> qkv of all its tokens
        self.rng = np.random.default_rng(5)

    def add(self) -> int:
        sequence = self.cache.add()
        self.rows[sequence] = np.zeros((0, LAYERS, HEADS + 2 * KV_HEADS, DIM), np.float32)
        return sequence

    def fork(self, parent: int, position: int) -> int:
        child = self.cache.fork(parent, position)
        self.rows[child] = self.rows[parent][:position]
        return child

    def popn(self, sequence: int, count: int) -> None:
        self.cache.popn(sequence, count)
        self.rows[sequence] = self.rows[sequence][: len(self.rows[sequence]) - count]

    def step(self, counts: dict[int, int]) -> float:
        """Append random tokens; return the largest error of any output."""
        total = sum(counts.values())
        new = self.rng.standard_normal((total, LAYERS, HEADS + 2 * KV_HEADS, DIM))
        new = new.astype(np.float32)
        seen = []
        with self.cache.forward(list(counts), list(counts.values())):
            for layer in range(LAYERS):
                qkv = tvm.runtime.tensor(np.ascontiguousarray(new[None, :, layer]))
                seen.append(self.vm[f"attend{layer}"](qkv, self.handle).numpy()[0])
        first, worst = 0, 0.0
        for sequence, count in counts.items():
            rows = np.concatenate([self.rows[sequence], new[first : first + count]])
            self.rows[sequence] = rows
            for layer in range(LAYERS):
                want = reference(rows[:, layer], count, self.config, layer)
                error = np.abs(seen[layer][first : first + count] - want).max()
                worst = max(worst, float(error))
            first += count
        return worst


def reference(qkv: np.ndarray, count: int, config: DecoderConfig, layer: int) -> np.ndarray:
    """Return causal attention of the last ``count`` of all tokens of a sequence, in float64."""
    x = qkv.astype(np.float64)
    at = np.arange(len(x))
    turned = rotate(x[:, : HEADS + KV_HEADS], at, config.rope_table(layer))
    q, k = turned[-count:, :HEADS], np.repeat(turned[:, HEADS:], HEADS // KV_HEADS, axis=1)
    v = np.repeat(x[:, HEADS + KV_HEADS :], HEADS // KV_HEADS, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(DIM)
    if config.attention_softcap:
        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    seen = at <= at[-count:, None]
    if config.is_local(layer):
        seen &= at > at[-count:, None] - config.window
    weights = np.exp(np.where(seen, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=2, keepdims=True), v)


# Layers with a window and without, and what Gemma 2 and 3 add. Shared pages lie inside, on the edge
# of and outside the windows.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window7": {"window": 7, "local_layers": (True, False)},
    "window30": {"window": 30, "local_layers": (False, True)},
    "all": {"window": 20, "local_layers": (True, True)},
    "gemma2": {"window": 12, "local_layers": (True, False), "attention_softcap": 2.0},
    "gemma3": {"window": 12, "local_layers": (True, False), "local_rope": Rope(100.0)},
}


# Each of the features runs always in float32, and what is compiled apart for float16 in that.
GROWING = [
    pytest.param(
        *(dtype, tolerance, name),
        marks=[pytest.mark.slow] * (dtype == "float16" and name not in {"window7", "gemma2"}),
    )
    for dtype, tolerance in (("float32", 2e-5), ("float16", FLOAT16_TOLERANCE))
    for name in FEATURES
]


@pytest.mark.parametrize(("kv_dtype", "tolerance", "features"), GROWING)
def test_every_way_of_growing_a_sequence_attends_to_its_past(kv_dtype, tolerance, features) -> None:
    session = Session(kv_dtype, **FEATURES[features])
    a, b = session.add(), session.add()
    errors = [session.step({a: 37}), session.step({a: 1}), session.step({a: 20})]
    errors.append(session.step({a: 3, b: 16}))  # ragged prefill of a batch, one with a past
    errors += [session.step({a: 1, b: 1}) for _ in range(3)]
    session.popn(a, 14)
    errors.append(session.step({a: 1, b: 1}))
    child = session.fork(a, 21)  # inside a page, which is copied
    errors.append(session.step({a: 1, b: 1, child: 1}))
    errors.append(session.step({child: 9, b: 2}))
    errors.append(session.step({a: 1, child: 1}))
    assert max(errors) <= tolerance


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("kv") / "model", "llama")


def test_a_float16_cache_keeps_the_logits_within_its_rounding(source: Path, tmp_path: Path) -> None:
    quant = fc.QuantConfig("w2", act="float")
    report = fc.build(source, quant=quant, kv_dtype="float16", output=tmp_path / "out", context=64)
    assert report.sizes["kv_dtype"] == "float16"
    tokens = list(range(40))
    with fc.load(tmp_path / "out") as model:
        logits = model.logits(tokens)
    error = relative_error(logits, Oracle(source, quant).logits(tokens))
    # Errors of layers add in the worst case; float32 arithmetic alone is near 1e-6.
    assert 1e-5 < error <= SIZES["num_hidden_layers"] * FLOAT16_TOLERANCE


def test_more_sequences_decode_together_than_a_prefill_chunk_has_tokens(source, tmp_path) -> None:
    quant = fc.QuantConfig("w2", act="float")
    fc.build(source, quant=quant, output=tmp_path / "out", context=64, prefill_chunk=2, max_batch=6)
    with fc.load(tmp_path / "out", max_sequences=6) as model:
        engine = model.engine
        sequences = [engine.add_sequence() for _ in range(5)]
        for sequence in sequences:
            engine.prefill(sequence, [7, sequence])
        found = engine.decode(sequences, [9] * 5)
        for row, sequence in zip(found, sequences, strict=True):
            assert relative_error(row, model.logits([7, sequence, 9])[-1]) <= 1e-5


def test_the_default_follows_the_activation_contract(source: Path) -> None:
    sizes = [fc.build(source, act=act, dry_run=True).sizes for act in ("int8", "float")]
    assert [s["kv_dtype"] for s in sizes] == ["float16", "float32"]


def test_an_unknown_dtype_is_refused(source: Path) -> None:
    with pytest.raises(FairyError, match="float16, float32"):
        fc.build(source, kv_dtype="int4", dry_run=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_float16_cannot_hold_is_cut_off(dtype: str) -> None:
    """The limit itself is no bfloat16: the nearest is 65536, which would become an infinity."""
    x = np.array([1e5, -1e30, 65536, 3, -0.1], dtype)
    placeholder = te.placeholder(x.shape, dtype, "x")
    function = te.create_prim_func([placeholder, _to_float16(placeholder)])
    library = tvm.compile(function, target="llvm")
    y = tvm.runtime.tensor(np.zeros(x.shape, "float16"))
    library(tvm.runtime.tensor(x), y)
    want = np.clip(x.astype("float32"), -65504, 65504).astype("float16")
    np.testing.assert_array_equal(y.numpy(), want)
