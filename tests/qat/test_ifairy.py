"""The iFairy model in PyTorch: formulas, gradients, training, export and its way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import fairy_compile as fc
from fairy_compile.evaluation.torch_model import TorchModel
from fairy_compile.frontends import open_source
from fairy_compile.op.token_int8 import round_tokens
from fairy_compile.qat import PhaseComplexLinear, ifairy, phase_layers, rule
from fairy_compile.qat.ifairy import ComplexNetConfig, ComplexNetLM
from fairy_compile.train.models import quiet_transformers
from tests.tiny_ifairy import SIZES, Published, save_ifairy, tokens_away_from_ties
from tests.tiny_models import relative_error, save_tokenizer

QUANT = fc.QuantConfig("w1", terms=("W",))


def load(directory, act: str | None) -> ComplexNetLM:
    """Return the model of a directory, prepared unless ``act`` is None."""
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model, ComplexNetLM)
    if act is not None:
        fc.qat.prepare(model, fc.QuantConfig("w1", terms=("W",), act=act))
    return model.eval()


@torch.no_grad()
def logits(model: ComplexNetLM, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture
def fresh():
    torch.manual_seed(3)
    config = ComplexNetConfig(**SIZES, initializer_range=0.12)
    return ComplexNetLM(config).train()


@pytest.fixture
def tokens():
    return torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "attention_multiplier": 0.25}])
def test_a_published_directory_computes_the_published_formulas(tmp_path, changes) -> None:
    directory = save_ifairy(tmp_path / "model", **changes)
    ids = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 40).tolist()
    exact = Published(directory, int8=False)
    assert relative_error(logits(load(directory, "float"), ids), exact.logits(ids)) <= 1e-5
    rounded = Published(directory, int8=True)
    ids = tokens_away_from_ties(rounded, 6, 1e-4)
    assert relative_error(logits(load(directory, "int8"), ids), rounded.logits(ids)) <= 1e-5


def test_rounding_equals_its_definition_bit_for_bit() -> None:
    sizes = 10 ** torch.linspace(-6, 4, 50)[:, None]
    x = torch.randn(50, 301, generator=torch.manual_seed(0)) * sizes
    both = np.concatenate([x.numpy(), np.zeros_like(x.numpy())], axis=1)
    np.testing.assert_array_equal(rule.int8_activations(x).numpy(), round_tokens(both)[:, :301])


def test_gradients_are_straight_through_weights_and_inputs() -> None:
    """Against autograd of the formula with quantised values put in as constants."""
    torch.manual_seed(0)
    layer = PhaseComplexLinear(7, 5, int8_inputs=True)
    x = torch.randn(3, 14, requires_grad=True)
    probe = torch.randn(3, 10)
    (layer(x) * probe).sum().backward()

    latent = [
        part.detach().double().requires_grad_() for part in (layer.weight_real, layer.weight_imag)
    ]
    fixed = layer.phase_tensor().dequantize_terms()["W"]
    w_re, w_im = (
        part + (torch.from_numpy(value).double() - part).detach()
        for part, value in zip(latent, fixed, strict=True)
    )
    inputs = x.detach().double().requires_grad_()
    rounded = torch.from_numpy(round_tokens(x.detach().numpy())).double()
    x_re, x_im = (inputs + (rounded - inputs).detach()).chunk(2, dim=1)
    y = torch.complex(x_re, -x_im) @ torch.complex(w_re, w_im).T
    (torch.cat([y.real, y.imag], dim=1) * probe.double()).sum().backward()
    for seen, want in zip(
        (layer.weight_real.grad, layer.weight_imag.grad, x.grad),
        (latent[0].grad, latent[1].grad, inputs.grad),
        strict=True,
    ):
        torch.testing.assert_close(seen.double(), want, rtol=1e-5, atol=1e-6)


def test_gradients_of_what_lies_between_the_layers() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(ifairy.ComplexRMSNorm(4, 1e-5).double(), x)
    assert torch.autograd.gradcheck(ifairy.complex_relu2, x)
    rope = tuple(part.double() for part in ifairy.rotations(0, 3, 4, 1e4, "cpu"))
    assert torch.autograd.gradcheck(lambda v: ifairy.rotate(v, rope), x)


def test_a_cache_and_padding_change_nothing(fresh, tokens) -> None:
    fc.qat.prepare(fresh, QUANT)
    model = fresh.eval()
    with torch.no_grad():
        whole = model(tokens).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(tokens[:, i : i + 5], past_key_values=cache).logits for i in range(0, 16, 5)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        padded = torch.cat([tokens, tokens[:, :4]], dim=1)
        mask = (torch.arange(20) < 16).long().expand(2, -1)
        seen = model(padded, attention_mask=mask).logits[:, :16]
        torch.testing.assert_close(seen, whole, rtol=1e-4, atol=1e-4)
        kept = model(tokens, logits_to_keep=2).logits
        torch.testing.assert_close(kept, whole[:, -2:], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(fresh, tokens) -> None:
    fc.qat.prepare(fresh, QUANT)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            new = getattr(fresh, "activation_checkpointing_enable", None)  # transformers 5
            (new or fresh.gradient_checkpointing_enable)({"use_reentrant": False})
        fresh.zero_grad()
        fresh(tokens, labels=tokens).loss.backward()
        gradients.append(fresh.layer[0].mlp.up_proj.weight_imag.grad.clone())
    torch.testing.assert_close(*gradients)


def test_training_from_scratch_learns_and_exports_its_last_codes(fresh, tokens, tmp_path) -> None:
    report = fc.qat.prepare(fresh, QUANT)
    assert len(report.phase) == 14
    assert [layer.name for layer in report.dense] == ["lm_head"]
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = fresh(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    save_tokenizer(tmp_path)
    exported = fc.qat.export(fresh, tmp_path / "ckpt", tokenizer=tmp_path)
    packed, latents = open_source(exported.output), open_source(exported.latents)
    assert set(packed.layers) == set(phase_layers(fresh))
    assert set(packed.names()) == set(latents.names())
    fc.convert(exported.latents, tmp_path / "converted")
    converted = open_source(tmp_path / "converted")
    for name, layer in phase_layers(fresh).items():
        parts = (layer.weight_real.detach(), layer.weight_imag.detach())
        codes, scales = rule.codes_and_scales(*parts, 1, "tensor", 1e-5)
        for source in (packed, latents, converted):
            stored = source.phase(name, packed.quant)
            np.testing.assert_array_equal(stored.unpack()[:, 0], codes.numpy())
            np.testing.assert_array_equal(stored.scales[:, 0], scales.numpy())


def test_exporting_an_export_changes_nothing(fresh, tmp_path) -> None:
    save_tokenizer(tmp_path)
    fc.qat.prepare(fresh, QUANT)
    with quiet_transformers():
        fc.qat.export(fresh, tmp_path / "one", tokenizer=tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "latents")
        fc.qat.prepare(again, QUANT)
        fc.qat.export(again, tmp_path / "two", tokenizer=tmp_path / "one" / "latents")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_export_has_the_published_names(fresh, tmp_path) -> None:
    from safetensors import safe_open

    published = save_ifairy(tmp_path / "published")
    fc.qat.prepare(fresh, QUANT)
    fc.qat.export(fresh, tmp_path / "ckpt")
    shapes = []
    for directory in (published, tmp_path / "ckpt" / "latents"):
        with safe_open(str(directory / "model.safetensors"), "np") as file:
            shapes.append({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118  no mapping
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("exempt", [(), ("*.o_proj",)])
def test_evaluation_runs_a_packed_checkpoint_in_pytorch(fresh, tokens, tmp_path, exempt) -> None:
    fc.qat.prepare(fresh, fc.QuantConfig("w1", terms=("W",), exempt=exempt))
    fc.qat.export(fresh.eval(), tmp_path / "ckpt")
    model = TorchModel(open_source(tmp_path / "ckpt"))
    (seen,) = model.logits(tokens[0].numpy(), 0, 16)
    # The same values through the same operations.
    assert relative_error(seen, logits(fresh, tokens[0].tolist())) <= 1e-6


def test_exempt_complex_layers_export_as_real_maps(fresh, tmp_path) -> None:
    fc.qat.prepare(fresh, fc.QuantConfig("w1", terms=("W",), exempt=("*.o_proj",)))
    fc.qat.export(fresh, tmp_path / "ckpt")
    packed, latents = open_source(tmp_path / "ckpt"), open_source(tmp_path / "ckpt" / "latents")
    assert set(packed.names()) == set(latents.names())
    name = "layer.1.self_attn.o_proj"
    for source in (packed, latents):
        assert not source.plan(name, packed.quant).phase
    np.testing.assert_array_equal(packed.dense(f"{name}.weight"), latents.dense(f"{name}.weight"))
