"""Running a model layer by layer is running the model: Gram matrices, gradients, memory."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fairy_compile.calibrate import run as run_module  # noqa: E402
from fairy_compile.calibrate.config import Calibration  # noqa: E402
from fairy_compile.calibrate.fisher import output_fisher  # noqa: E402
from fairy_compile.calibrate.run import solve_model  # noqa: E402
from fairy_compile.calibrate.skeleton import Skeleton  # noqa: E402
from fairy_compile.calibrate.stream import Grams  # noqa: E402
from fairy_compile.calibrate.windows import read_windows  # noqa: E402
from fairy_compile.frontends import open_source  # noqa: E402
from tests.calibrate.conftest import WINDOW  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama3", "llama_biased", "qwen2", "qwen3", "mistral"])
def test_gram_matrices_are_those_of_the_whole_model(
    make_checkpoint, reference, text, tmp_path, monkeypatch, family
):
    directory = make_checkpoint(family)
    source = open_source(directory)
    windows = read_windows(directory, Calibration(str(text), tokens=10 * WINDOW, window=WINDOW))
    seen: dict[str, torch.Tensor] = {}

    def note(self, layer, gram, fisher):
        seen[layer] = gram.clone()
        return {}

    monkeypatch.setattr(run_module._Run, "_solve", note)
    solve_model(source, source.settle(_quant())[0], windows, tmp_path / "work")
    model = reference(directory)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    grams = Grams(linears)
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    grams.count(windows.size)
    assert set(seen) == set(linears)
    for leader, layers in grams.groups().items():
        want = grams.take(leader)
        for layer in layers:
            # float32 sums in another order
            torch.testing.assert_close(seen[layer], want, rtol=1e-4, atol=1e-5 * float(want.max()))
    assert ["q_proj", "k_proj", "v_proj"] in [
        [layer.rpartition(".")[2] for layer in layers] for layers in grams.groups().values()
    ]


def _quant():
    from fairy_compile import QuantConfig

    return QuantConfig("w2")


def test_fisher_is_that_of_the_whole_model(checkpoint, reference, text, tmp_path):
    windows = read_windows(checkpoint, Calibration(str(text), tokens=4 * WINDOW, window=WINDOW))
    found = output_fisher(
        Skeleton(open_source(checkpoint), CPU), windows, tmp_path, lambda words: None
    )
    model = reference(checkpoint)
    squares: dict[str, torch.Tensor] = {}

    def hook(name):
        def see(module, args, out):
            out.register_hook(
                lambda g: squares.__setitem__(name, g.flatten(0, 1).square().sum(0))
            )

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(name))
    tokens = torch.from_numpy(windows.astype(np.int64))
    logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    assert set(found) == set(squares)
    for name, total in squares.items():
        want = total.numpy() / windows.size
        np.testing.assert_allclose(found[name], want, rtol=1e-3, atol=1e-4 * want.max())
    assert list(tmp_path.iterdir()) == []


def test_only_one_decoder_layer_has_weights(checkpoint, text, tmp_path, monkeypatch):
    windows = read_windows(checkpoint, Calibration(str(text), tokens=4 * WINDOW, window=WINDOW))
    source = open_source(checkpoint)
    made: list[Skeleton] = []
    most: list[int] = []
    create, read = Skeleton.__init__, Skeleton._tensor

    def remember(self, *args):
        create(self, *args)
        made.append(self)

    def resident(skeleton):
        return sum(p.numel() for p in skeleton.model.parameters() if p.device.type != "meta")

    def watch(self, name, like):
        most.append(resident(self) + like.numel())
        return read(self, name, like)

    monkeypatch.setattr(Skeleton, "__init__", remember)
    monkeypatch.setattr(Skeleton, "_tensor", watch)
    solve_model(source, source.settle(_quant())[0], windows, tmp_path / "work", by_budget=True)
    layer = sum(p.numel() for p in made[0].layers[0].parameters())
    head = made[0].head.weight.numel() + made[0].hidden
    assert len(made[0].layers) >= 2
    assert 0 < max(most) <= max(layer, head)
    assert resident(made[0]) == 0
