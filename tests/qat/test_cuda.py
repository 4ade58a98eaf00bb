"""Training and calibration on CUDA against the CPU.

The reference is the same network in float64, whose codes are those of the float32 or bfloat16
latents it was made of. How far the CPU is from it says what rounding does to this network; CUDA
adds in another order and may be some times further off, but not more.
"""

from __future__ import annotations

import contextlib
import copy
import os

# Before CUDA starts: with it, matrix products are the same every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fairy_compile as fc
from fairy_compile.calibrate import Calibration
from fairy_compile.train import TrainConfig, train
from fairy_compile.train.metrics import read_metrics
from tests.tiny_models import name_it, save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TIMES = 8  # errors against the CPU's: another order of sums, not another size of error


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def outcome(model, tokens, autocast=False):
    """Return logits and all gradients of a loss, float64 vectors on the CPU."""
    tokens = tokens.to(model.device)
    kind = model.device.type
    with torch.autocast(kind, torch.bfloat16) if autocast else contextlib.nullcontext():
        logits = model(input_ids=tokens, use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(
        flat if flat.dtype == torch.float64 else flat.float(), tokens[:, 1:].flatten()
    ).backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters()]
    return logits.detach().flatten().double().cpu(), torch.cat(gradients)


def error(seen, want):
    return float((seen - want).norm() / want.norm())


def check_against_cpu(cpu, gpu, tokens, autocast=False):
    exact = outcome(copy.deepcopy(cpu).double(), tokens)
    near = outcome(cpu, tokens, autocast)
    seen = outcome(gpu, tokens, autocast)
    for part, want, own in zip(seen, exact, near, strict=True):
        assert part.isfinite().all()
        assert error(part, want) <= TIMES * error(own, want)


def prepared(make_model, quant="w2", dtype=torch.float32, device="cpu"):
    model = make_model().to(dtype).to(device)
    fc.qat.prepare(model, fc.QuantConfig(quant, stages_for={"lm_head": 3}))
    return model


@pytest.mark.parametrize("quant", ["w1", "w2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(make_model, tokens, quant, dtype):
    cpu, gpu = (prepared(make_model, quant, dtype, device) for device in ("cpu", "cuda"))
    check_against_cpu(cpu, gpu, tokens)


def test_autocast(make_model, tokens):
    cpu, gpu = (prepared(make_model, device=device) for device in ("cpu", "cuda"))
    check_against_cpu(cpu, gpu, tokens, autocast=True)


def test_gradient_checkpointing(make_model, tokens):
    cpu, gpu = (prepared(make_model, device=device) for device in ("cpu", "cuda"))
    gpu.gradient_checkpointing_enable()
    check_against_cpu(cpu, gpu, tokens)


def test_stacked(make_model, tokens):
    plain, together = (prepared(make_model, device="cuda") for _ in range(2))
    want = outcome(plain, tokens)
    with fc.qat.stacked(together):
        seen = outcome(together, tokens)
    for part, other in zip(seen, want, strict=True):
        assert torch.equal(part, other)


def test_torch_compile(make_model, tokens):
    cpu, gpu = (prepared(make_model, device=device) for device in ("cpu", "cuda"))
    gpu.compile()
    check_against_cpu(cpu, gpu, tokens)


def test_export_writes_the_bytes_of_the_cpu(make_model, tmp_path):
    for device in ("cpu", "cuda"):
        fc.qat.export(prepared(make_model, device=device), tmp_path / device)
    want, seen = (load_file(tmp_path / d / "model.safetensors") for d in ("cpu", "cuda"))
    assert want.keys() == seen.keys()
    assert any(name.endswith(".codes") for name in want)
    for name, tensor in want.items():
        assert torch.equal(tensor, seen[name]), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = save_model(tmp_path_factory.mktemp("model") / "model", "llama")
    name_it(directory, "somebody/tiny")  # an ordinary model's: calibration refuses master weights
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["def", "return", "value", "x", "(y)", "+ 1", "=", "for", "in", "range"]
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(400)))
    return path


class Stopped(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_train_goes_on_as_if_it_had_not_been_stopped(checkpoint, text, tmp_path, precision):
    def config(name):
        return TrainConfig(
            model=str(checkpoint),
            data=str(text),
            output=str(tmp_path / name),
            steps=12,
            block=32,
            batch=4,
            lr=3e-3,
            log_every=2,
            save_every=4,
            precision=precision,
        )

    def stop(progress):
        if progress.step >= 8:
            raise Stopped

    torch.cuda.reset_peak_memory_stats()
    train(config("whole"))
    assert torch.cuda.max_memory_allocated() > 0, "trained elsewhere"
    with pytest.raises(Stopped):
        train(config("stopped"), progress=stop)
    assert train(config("stopped")).resumed_from >= 4
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "stopped")]
    for key in ("loss", "eval_loss", "grad_norm"):
        pairs = [(a[key], b[key]) for a, b in zip(*rows, strict=True) if a[key] is not None]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-6)
    losses = [row["loss"] for row in rows[0] if row["loss"] is not None]
    assert losses[-1] < losses[0]


def test_calibration_computes_on_cuda_what_the_cpu_does(checkpoint, text, tmp_path, monkeypatch):
    from fairy_compile.calibrate import run

    calibration = Calibration(str(text), tokens=2048, window=64)
    torch.cuda.reset_peak_memory_stats()
    seen = fc.convert(checkpoint, tmp_path / "cuda", calibrate=calibration)
    assert torch.cuda.max_memory_allocated() > 0, "calibrated elsewhere"
    monkeypatch.setattr(run, "device", lambda: torch.device("cpu"))
    want = fc.convert(checkpoint, tmp_path / "cpu", calibrate=calibration)
    for ours, theirs in zip(seen.layers, want.layers, strict=True):
        assert ours.name == theirs.name
        # Rounding decides between codes that are nearly as good; a column's choice moves the next
        # ones', so that codes differ, at errors that hardly do.
        assert ours.output_error == pytest.approx(theirs.output_error, rel=0.02)
