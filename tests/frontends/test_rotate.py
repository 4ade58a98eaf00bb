"""Rotated models: the same function, and when quantising them pays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

import fairy_compile as fc  # noqa: E402
from fairy_compile.calibrate import Calibration  # noqa: E402
from fairy_compile.calibrate.windows import read_windows  # noqa: E402
from fairy_compile.errors import FairyError, UnsupportedError  # noqa: E402
from fairy_compile.evaluation.torch_model import source_model  # noqa: E402
from fairy_compile.frontends import convert, open_source  # noqa: E402
from fairy_compile.frontends.rotate import NOTE, RotatedSource, Rotation  # noqa: E402
from tests.tiny_models import name_it, save_model  # noqa: E402

TOKENS = torch.randint(0, 320, (1, 200), generator=torch.Generator().manual_seed(1))


def logits(source, tokens: torch.Tensor = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return source_model(source).eval()(tokens).logits.flatten(0, 1).double().numpy()


@pytest.fixture
def plain(tmp_path):
    def make(family: str = "llama", **changes):
        directory = save_model(tmp_path / f"plain-{family}", family, **changes)
        name_it(directory, "somebody/tiny")
        return directory

    return make


@pytest.mark.parametrize("size", [1, 2, 7, 8, 48, 64, 96])
def test_rotation_is_orthogonal(size):
    rotation = Rotation(size, seed=3)
    matrix = rotation.apply(np.eye(size))  # rows are images of unit vectors
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=size * 2.0**-23)
    vectors = np.random.default_rng(0).standard_normal((3, 5, size)).astype(np.float32)
    np.testing.assert_allclose(
        rotation.apply(vectors), vectors @ matrix, atol=8 * size**0.5 * 2.0**-23
    )


def test_hadamard_spreads_one_channel_over_all():
    image = Rotation(64, seed=0).apply(np.eye(64)[3])
    np.testing.assert_allclose(np.abs(image), 1 / 8, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "llama3", "llama_biased", "qwen2", "qwen3", "mistral"])
def test_rotated_model_computes_the_same(plain, family):
    source = open_source(plain(family))
    want, got = logits(source), logits(RotatedSource(source))
    # Twice as many matrix products in float32, each of rounding errors far below this.
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    rotated = RotatedSource(source)
    same = [
        name
        for name in source.names()
        if np.array_equal(source.dense(name), rotated.dense(name)) and "norm" not in name
    ]
    assert not [
        name
        for name in same
        if "q_proj.bias" not in name
        and "k_proj.bias" not in name
        and "gate_proj.bias" not in name
        and "up_proj.bias" not in name
    ]
    assert {n: rotated.dense(n).dtype.name for n in rotated.names()} == {
        n: rotated.dtype(n) for n in rotated.names()
    }


def add_outliers(directory, factor: float) -> None:
    """Make the weights of one input channel ``factor`` times larger, keeping matrices' norms."""
    path = directory / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    channels = [3]
    for name, array in tensors.items():
        if name.endswith(
            (
                "q_proj.weight",
                "k_proj.weight",
                "v_proj.weight",
                "gate_proj.weight",
                "up_proj.weight",
                "lm_head.weight",
            )
        ):
            norm = np.linalg.norm(array)
            array[:, channels] *= factor
            array *= norm / np.linalg.norm(array)
    save_file(tensors, path, {"format": "pt"})


def divergence(directory, tmp_path, tokens=TOKENS, **options) -> float:
    """Return mean KL(floating point || converted), nats a token."""
    packed = tmp_path / f"packed-{len(list(tmp_path.iterdir()))}"
    convert(directory, packed, **options)
    exact, rounded = (
        torch.log_softmax(torch.from_numpy(logits(open_source(which), tokens)), -1)
        for which in (directory, packed)
    )
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


@pytest.mark.parametrize("method", ["phase", "alternating"])
def test_pays_where_channels_are_outliers(plain, tmp_path, method):
    directory = plain(hidden_size=128)
    quant = fc.QuantConfig("w3", method=method)
    ordinary = [divergence(directory, tmp_path, quant=quant, rotate=r) for r in (False, True)]
    add_outliers(directory, 30.0)
    outliers = [divergence(directory, tmp_path, quant=quant, rotate=r) for r in (False, True)]
    print(f"{method}: ordinary {ordinary}, outliers {outliers}")
    assert outliers[1] < 0.5 * outliers[0]
    assert ordinary[1] < 1.5 * ordinary[0]  # weights without outliers gain and lose little


def test_packed_and_compiled(plain, tmp_path):
    directory = plain("qwen2")
    report = convert(directory, tmp_path / "packed", rotate=True)
    assert NOTE in report.notes
    source = open_source(tmp_path / "packed")
    assert source.config["tie_word_embeddings"] is False
    built = fc.build(directory, rotate=True, act="float", output=tmp_path / "artifact")
    assert NOTE in built.notes
    got = fc.load(tmp_path / "artifact").logits(TOKENS[0].tolist())
    want = logits(source)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_calibrated_and_tuned(plain, tmp_path):
    directory = plain()
    text = tmp_path / "text.txt"
    words = ["def", "return", "value", "x", "(y)", "+ 1", "=", "for", "in", "range"]
    random = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(random.choice(words, 8)) for _ in range(400)))
    calibration = Calibration(str(text), tokens=1024, window=64, tune=2)
    tokens = torch.from_numpy(read_windows(directory, calibration).astype(np.int64))
    calibrated = divergence(directory, tmp_path, tokens, calibrate=calibration, rotate=True)
    assert calibrated < 0.7 * divergence(directory, tmp_path, tokens, rotate=True)


def test_refusals(plain, tmp_path):
    olmo = plain("olmo2")
    with pytest.raises(UnsupportedError, match="--rotate is not possible for the family 'olmo2'"):
        convert(olmo, tmp_path / "x", rotate=True)
    with pytest.raises(UnsupportedError, match="'olmo2'"):
        fc.build(olmo, rotate=True, dry_run=True)
    directory = plain()
    convert(directory, tmp_path / "packed")
    with pytest.raises(FairyError, match="is a packed checkpoint, and --rotate is for real"):
        fc.build(tmp_path / "packed", rotate=True, output=tmp_path / "x")
    config = json.loads((directory / "config.json").read_text())
    latents = {"quantization_config": {"quant_method": "fairy2i", "latents": True}}
    (directory / "config.json").write_text(json.dumps(config | latents))
    with pytest.raises(FairyError, match="would undo what these weights were trained for"):
        convert(directory, tmp_path / "x", rotate=True)


def test_baked_weights_are_refused(plain, tmp_path):
    directory = plain()
    quant = fc.QuantConfig("w2", method="phase", stages_for={"lm_head": 2})
    convert(directory, tmp_path / "packed", quant=quant)
    source = open_source(tmp_path / "packed")
    baked = {name: np.ascontiguousarray(source.dense(name)) for name in source.names()}
    save_file(baked, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(FairyError, match="holds phase values already, and --rotate would lose"):
        convert(directory, tmp_path / "x", rotate=True, quant=quant)
    assert not (tmp_path / "x").exists()
