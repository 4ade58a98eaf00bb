from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fairy_compile as fc
from fairy_compile.qat import ComplexLinear, PhaseComplexLinear, PhaseLinear, frozen, phase_layers
from tests.qat.conftest import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_linear_of_a_causal_lm_becomes_a_phase_layer(make_model, tokens, family):
    model = make_model(family)
    latents = {name: p.data_ptr() for name, p in model.named_parameters()}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    report = fc.qat.prepare(model, fc.QuantConfig("w2"))
    assert [layer.name for layer in report.phase] == linears
    assert list(phase_layers(model)) == linears
    assert "lm_head" in linears
    after = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert latents.items() <= after.items()  # optimisers made before still hold the parameters
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for name in linears:
        assert model.get_submodule(name).weight.grad.abs().sum() > 0


def test_patterns_that_match_no_layer_are_told(make_model):
    quant = fc.QuantConfig(exempt=("q_proj", "*.o_proj"), stages_for={"head": 3, "lm_head": 3})
    notes = fc.qat.prepare(make_model(), quant).notes
    assert [note.split(" and ")[0] for note in notes] == [
        "--exempt 'q_proj' matches no linear layer",
        "--layer-quant 'head' matches no linear layer",
    ]


def test_forward_uses_the_rules_weights(make_model, tokens):
    model = make_model()
    plain = make_model()
    fc.qat.prepare(model, fc.QuantConfig("w2", stages_for={"*.v_proj": 4}, exempt=("*.o_proj",)))
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("o_proj"):
            stages = 4 if name.endswith("v_proj") else 2
            fixed = fc.quantize(module.weight, stages).dequantize()
            module.weight = nn.Parameter(torch.from_numpy(fixed))
    with torch.no_grad():
        want, seen = plain(input_ids=tokens).logits, model(input_ids=tokens).logits
        with frozen(model):
            again = model(input_ids=tokens).logits
    assert (seen - want).norm() <= 1e-6 * want.norm()
    assert torch.equal(again, seen)
    assert all(layer._frozen is None for layer in phase_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_forward_is_the_rule_in_both_dtypes_and_autocast(dtype):
    torch.manual_seed(0)
    layer = PhaseLinear.of(nn.Linear(48, 80, dtype=dtype), 3, "tile64")
    x = torch.randn(4, 48, dtype=dtype)
    exact = torch.from_numpy(fc.quantize(layer.weight, 3, scale="tile64").dequantize())
    want = x.double() @ exact.double().T + layer.bias.double()
    # Rounding of weight, product and sum: 1e-6 in float32, some 2^-8 in bfloat16.
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert (layer(x).double() - want).norm() <= bound * want.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() <= 1e-2 * want.norm()
    y.float().sum().backward()
    assert layer.weight.grad.dtype == dtype


def test_tied_head_is_untied_or_stays_tied_and_dense(make_model):
    model = make_model("qwen2")
    report = fc.qat.prepare(model, "w2")
    assert len(report.notes) == 1
    assert "lm_head was tied to model.embed_tokens" in report.notes[0]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    kept = make_model("qwen2")
    report = fc.qat.prepare(kept, fc.QuantConfig("w2", exempt=("lm_head",)))
    assert report.notes == []
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    assert [layer.name for layer in report.dense] == ["lm_head"]
    assert "exempt" in report.dense[0].reason


def test_odd_sizes_stay_dense_and_are_reported():
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4), nn.Linear(4, 4))
    report = fc.qat.prepare(model, "w1")
    assert [(entry.name, entry.reason) for entry in report.dense] == [
        ("0", "odd dimension 7"),
        ("1", "odd dimension 7"),
    ]
    assert [entry.stages for entry in report.phase] == [1]
    assert report.to_json()["layers"][2]["phase"] is True


def test_complex_layers_take_the_w_term_alone():
    torch.manual_seed(0)
    model = nn.Sequential(ComplexLinear(6, 10), nn.Linear(20, 4))
    x = torch.randn(3, 12)
    report = fc.qat.prepare(model, fc.QuantConfig("w1", terms=("W",), act="float", scale="row"))
    layer = model[0]
    assert isinstance(layer, PhaseComplexLinear)
    assert "real matrix" in report.dense[0].reason
    tensor = layer.phase_tensor()
    assert tensor.terms == ("W",)
    want = x @ torch.from_numpy(tensor.dequantize()).T
    assert (layer(x) - want).norm() <= 1e-6 * want.norm()
    # y = w conj(x), by the definition
    re, im = (torch.from_numpy(part) for part in tensor.dequantize_terms()["W"])
    y = torch.complex(x[:, :6], -x[:, 6:]) @ torch.complex(re, im).T
    assert (torch.cat([y.real, y.imag], -1) - want).norm() <= 1e-6 * want.norm()
    model(x).sum().backward()
    assert layer.weight_imag.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients(make_model, tokens):
    grads = []
    for checkpointing in (False, True):
        model = make_model()
        fc.qat.prepare(model, "w2")
        if checkpointing:
            new = getattr(model, "activation_checkpointing_enable", None)  # transformers 5
            (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.slow  # compiles C++
def test_torch_compile_gives_the_same_loss_and_gradients(make_model, tokens):
    model = make_model()
    fc.qat.prepare(model, "w2")
    weight = model.model.layers[0].mlp.up_proj.weight
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    want = weight.grad.clone()
    weight.grad = None
    compiled = torch.compile(model, fullgraph=True)
    again = compiled(input_ids=tokens, labels=tokens).loss
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.grad, want, rtol=1e-3, atol=1e-6)
    assert list(phase_layers(compiled)) == list(phase_layers(model))


@pytest.mark.parametrize(
    ("model", "quant", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 5)), "w2", "odd dimension"),
        (lambda: nn.Sequential(nn.ReLU()), "w2", "no linear layer to convert"),
        (lambda: nn.Linear(4, 4), fc.QuantConfig("w2", method="alternating"), "method 'phase'"),
        (lambda: nn.Linear(4, 4), "w5", "allowed: w1, w2, w3, w4"),
    ],
)
def test_bad_input_is_refused_in_words(model, quant, words):
    with pytest.raises(fc.FairyError, match=words):
        fc.qat.prepare(nn.Sequential(model()), quant)


def test_preparing_twice_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    fc.qat.prepare(model, "w2")
    with pytest.raises(fc.FairyError, match="already"):
        fc.qat.prepare(model, "w2")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fairy_compile; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    "code",
    ["fairy_compile.qat", "fairy_compile.train.train"],
)
def test_without_torch_the_extra_is_named(code):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import fairy_compile, fairy_compile.train\n"
        f"try: {code}\n"
        "except fairy_compile.FairyError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'fairy_compile[train]'" in run.stdout


@pytest.mark.parametrize("quant", ["w1", "w2"])
def test_stacked_gives_the_same_values_and_gradients(make_model, tokens, quant):
    results = []
    for context in (nullcontext, fc.qat.stacked):
        model = make_model()
        fc.qat.prepare(model, fc.QuantConfig(quant, stages_for={"lm_head": 3}))
        with context(model):
            logits = model(tokens, use_cache=False).logits
        logits.square().mean().backward()
        assert all(layer._frozen is None for layer in phase_layers(model).values())
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (plain, want), (together, seen) = results
    assert torch.equal(plain, together)
    assert want.keys() == seen.keys()
    for name, gradient in want.items():
        assert torch.equal(gradient, seen[name]), name


@pytest.mark.parametrize("model", [None, 3, "model", nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(fc.FairyError, match=r"the model is .*; allowed: a torch.nn.Module"):
        fc.qat.prepare(model)
    with pytest.raises(fc.FairyError, match="has no phase layers"):
        fc.qat.export(model, "out")


def test_a_single_layer_is_refused_since_it_has_no_place_of_its_own():
    layer = nn.Linear(4, 4)
    with pytest.raises(fc.FairyError, match=r"single Linear.*Sequential"):
        fc.qat.prepare(layer)
    assert not list(layer.children())


def test_a_layer_that_is_used_twice_is_converted_in_both_places():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "inner": nn.Sequential(layer, nn.Linear(4, 4))})
    fc.qat.prepare(model)
    assert isinstance(model["one"], PhaseLinear)
    assert model["one"] is model["inner"][0]


@pytest.mark.parametrize("masked", [False, True])
def test_encoders_of_pytorch_compute_with_codes_in_evaluation_too(masked):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    fc.qat.prepare(model)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False, False, True], [False, False, False]]) if masked else None
    with_codes = model(x, src_key_padding_mask=mask)  # with gradients, no fused function
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), with_codes)
