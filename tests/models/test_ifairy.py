"""Compiled iFairy models against the published formulas in NumPy and against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fairy_compile as fc
from fairy_compile.cli import app
from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError
from fairy_compile.kernels.arm import CODEBOOK_KERNELS as ARM
from fairy_compile.kernels.x86 import CODEBOOK_KERNELS as X86
from fairy_compile.models import parse_config
from fairy_compile.qat.ifairy import ComplexNetConfig, ComplexNetLM
from fairy_compile.targets import load_target
from tests.greedy import greedy
from tests.tiny_ifairy import PUBLISHED, SIZES, Published, save_ifairy, tokens_away_from_ties
from tests.tiny_models import relative_error, save_tokenizer

TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()
TOLERANCE = 1e-4
# Steps of an int8 activation. Activations come with errors of some 1e-6 of their peak, so that
# those nearer to a tie may be rounded either way.
MARGIN = 2e-4
CONFIG = {**PUBLISHED, **SIZES}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ifairy(tmp_path_factory.mktemp("ifairy") / "model")


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return build(act) -> artifact directory."""
    root = tmp_path_factory.mktemp("artifacts")

    def get(act: str) -> Path:
        out = root / act
        if not out.exists():
            sizes = {"context": 128, "prefill_chunk": 32}
            fc.build(model, act=act, kv_dtype="float32", output=out, **sizes)
        return out

    return get


@torch.no_grad()
def torch_logits(directory: Path, act: str, tokens: list[int]) -> np.ndarray:
    network = ComplexNetLM.from_pretrained(directory, dtype=torch.float32).eval()
    fc.qat.prepare(network, fc.QuantConfig("w1", terms=("W",), act=act))
    return network(torch.tensor([tokens])).logits[0].numpy()


def test_float_logits_and_64_greedy_tokens(model: Path, built) -> None:
    formulas = Published(model, int8=False)
    for start in range(40):  # until no token is chosen by rounding
        prompt = TOKENS[start : start + 5]
        want, lead = formulas.greedy(prompt, 64)
        if lead > 1e-3:
            break
    assert lead > 1e-3
    with fc.load(built("float")) as compiled:
        seen = compiled.logits(TOKENS)
        assert relative_error(seen, formulas.logits(TOKENS)) <= TOLERANCE
        assert relative_error(seen, torch_logits(model, "float", TOKENS)) <= TOLERANCE
        assert greedy(compiled, prompt, 64) == want


def test_int8_a_token_is_reproduced_exactly(model: Path, built) -> None:
    formulas = Published(model, int8=True)
    for count in (6, 12):  # tokens fed to the kernels for few rows, and to those for many
        tokens = tokens_away_from_ties(formulas, count, MARGIN / count * 6)
        want = formulas.logits(tokens)
        with fc.load(built("int8")) as compiled:
            seen = compiled.logits(tokens)
            assert relative_error(seen, want) <= TOLERANCE
            assert relative_error(seen, torch_logits(model, "int8", tokens)) <= TOLERANCE
            engine = compiled.engine
            sequence = engine.add_sequence()
            engine.prefill(sequence, tokens[:1])
            steps = [engine.decode([sequence], [token])[0] for token in tokens[1:]]
            assert relative_error(np.stack(steps), want[1:]) <= TOLERANCE
    exact = Published(model, int8=False).logits(tokens)
    assert relative_error(want, exact) > 10 * TOLERANCE  # it does make a difference


def test_a_model_trained_from_scratch_talks_as_it_did_in_pytorch(tmp_path: Path) -> None:
    """Training, export and build end to end; a trained model is sure of its 64 greedy tokens."""
    follows = np.random.default_rng(0).permutation(96)  # the token after each
    torch.manual_seed(0)
    network = ComplexNetLM(ComplexNetConfig(**SIZES | {"num_hidden_layers": 1})).train()
    fc.qat.prepare(network, fc.QuantConfig("w1", terms=("W",)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(250):
        tokens = torch.randint(0, 96, (16, 1))
        for _ in range(11):
            tokens = torch.cat([tokens, torch.from_numpy(follows)[tokens[:, -1:]]], dim=1)
        loss = network(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_tokenizer(tmp_path)
    exported = fc.qat.export(network.eval(), tmp_path / "ckpt", tokenizer=tmp_path)
    formulas = Published(exported.latents, int8=True)
    want, lead = formulas.greedy([5, 6], 64)
    assert lead > 0.5
    assert want[0] == follows[6]
    fc.build(
        exported.output, kv_dtype="float32", output=tmp_path / "out", context=128, prefill_chunk=32
    )
    tokens = tokens_away_from_ties(formulas, 6, MARGIN)
    with fc.load(tmp_path / "out") as compiled, torch.no_grad():
        assert greedy(compiled, [5, 6], 64) == want
        seen = compiled.logits(tokens)
        assert relative_error(seen, formulas.logits(tokens)) <= TOLERANCE
        assert relative_error(seen, network(torch.tensor([tokens])).logits[0].numpy()) <= TOLERANCE


def test_kernels_with_int8_activations_serve_it(model: Path) -> None:
    report = fc.build(model, dry_run=True)
    rows = {row.name: row for row in report.layers}
    assert list(rows)[:4] == [
        f"layer.0.{part}"
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    assert rows["lm_head"].kernel == "dense"
    for name, row in rows.items():
        if name != "lm_head":
            assert (row.stages, row.terms, row.scale) == (1, "W", "tensor")
            assert "int8" in row.reason
            assert row.act == ("float" if row.kernel == "generic" else "int8")
    assert rows["layer.0.mlp.down_proj"].shape == (64, 176)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "x86-amx", "arm64-linux", "rpi5"])
def test_every_kernel_family_is_planned_with_guards_and_exact_tables(model, target) -> None:
    from fairy_compile.compiler.plan import Planner
    from fairy_compile.frontends import open_source

    source = open_source(model)
    quant, _ = source.settle(fc.QuantConfig())
    planner = Planner(source, quant, load_target(target))
    (call,) = planner.linear("x", ["layer.0.mlp.down_proj"], 176, [64], token_int8=True)
    assert call.guarded
    assert call.spec.in_features == 2 * (88 + 2)
    for kernel in (*X86, *ARM):
        if kernel.name == call.kernel_name:
            for batch, values in call.knobs.items():
                for knob in {"tables", "panels"} & set(kernel.knobs):
                    assert values[knob] == "split", batch


@pytest.mark.slow
def test_packed_checkpoints_build_to_the_same_numbers(model: Path, built, tmp_path: Path) -> None:
    fc.convert(model, tmp_path / "packed")
    fc.build(
        tmp_path / "packed", kv_dtype="float32", output=tmp_path / "out", context=128,
        prefill_chunk=32,
    )  # fmt: skip
    with fc.load(tmp_path / "out") as one, fc.load(built("int8")) as other:
        np.testing.assert_array_equal(one.logits(TOKENS), other.logits(TOKENS))


@pytest.mark.slow
def test_exempt_layers_and_half_precision(tmp_path: Path) -> None:
    directory = save_ifairy(tmp_path / "model", dtype="float16", num_key_value_heads=4)
    quant = fc.QuantConfig(act="float", exempt=("*.k_proj", "*.down_proj"))
    report = fc.build(directory, quant=quant, output=tmp_path / "out", context=64)
    dense = {row.name for row in report.layers if row.kernel == "dense"}
    assert "layer.1.self_attn.k_proj" in dense
    assert "layer.1.mlp.down_proj" in dense
    network = ComplexNetLM.from_pretrained(directory, dtype=torch.float32).eval()
    exempt = fc.QuantConfig("w1", terms=("W",), act="float", exempt=quant.exempt)
    fc.qat.prepare(network, exempt)
    with torch.no_grad():
        want = network(torch.tensor([TOKENS])).logits[0].numpy()
    with fc.load(tmp_path / "out") as compiled:
        assert relative_error(compiled.logits(TOKENS), want) <= TOLERANCE


def test_batches_and_generation_and_verification(built) -> None:
    from fairy_compile.artifact import verify

    verify(built("int8"))
    with fc.load(built("int8")) as compiled:
        engine = compiled.engine
        ids = [engine.add_sequence() for _ in range(3)]
        prompts = [TOKENS[i : i + 4 + i] for i in range(3)]
        together = engine.prefill_many(dict(zip(ids, prompts, strict=True)))
        for sequence, prompt in zip(ids, prompts, strict=True):
            want = compiled.logits(prompt)[-1]
            assert relative_error(together[sequence], want) <= TOLERANCE
        assert isinstance(compiled.generate("def f", max_tokens=4), str)


def test_the_command_line_takes_the_artifact(built) -> None:
    def run(*arguments: str, stdin: str | None = None) -> str:
        result = CliRunner().invoke(
            app, [*arguments[:1], str(built("int8")), *arguments[1:]], stdin
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "is good" in run("verify").replace("\n", "")
    shown = json.loads(run("inspect", "--json"))
    assert "complexnet" in json.dumps(shown)
    assert "1 W tensor" in run("inspect")
    assert run("run", "--prompt", "def", "--max-tokens", "3")
    run("chat", "--max-tokens", "3", stdin="hello\n")


def test_sizes_count_real_numbers() -> None:
    config = parse_config(CONFIG)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (64, 176, 16)
    assert config.attention_scale == 8**-0.5
    assert parse_config(CONFIG | {"attention_multiplier": 0.25}).attention_scale == 0.25
    assert parse_config(CONFIG | {"rope_parameters": {"rope_theta": 500.0}}).rope.theta == 500.0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden_act": "silu"}, UnsupportedError, "'silu'.*relu2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedError, "rope_scaling"),
        ({"attention_bias": True}, UnsupportedError, "attention_bias"),
        ({"tie_word_embeddings": True}, UnsupportedError, "tie_word_embeddings"),
        ({"num_attention_heads": 5}, ModelFileError, "hidden_size 32, 5 attention heads"),
        ({"num_key_value_heads": 3}, ModelFileError, "multiple"),
        ({"hidden_size": None}, ModelFileError, "hidden_size = None"),
        ({"attention_multiplier": -1}, ModelFileError, "attention_multiplier = -1"),
    ],
)
def test_refusals_name_key_and_value(changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        parse_config(CONFIG | changes)


@pytest.mark.parametrize("name", ["lm_head.weight", "layer.1.mlp.up_proj", "final_norm"])
def test_missing_tensors_are_named(tmp_path: Path, name: str) -> None:
    from safetensors.numpy import load_file, save_file

    directory = save_ifairy(tmp_path / "model")
    file = str(directory / "model.safetensors")
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(name)}, file)
    with pytest.raises(FairyError, match=name):
        fc.build(directory, output=tmp_path / "out", context=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4"])
def test_other_targets_reproduce_int8_a_token(model: Path, tmp_path: Path, target: str) -> None:
    if not load_target(target).runs_here():
        pytest.skip(f"this machine cannot execute {target}")
    formulas = Published(model, int8=True)
    tokens = tokens_away_from_ties(formulas, 12, MARGIN / 2)
    fc.build(model, target=target, kv_dtype="float32", output=tmp_path / "out", context=64)
    with fc.load(tmp_path / "out") as compiled:
        assert relative_error(compiled.logits(tokens), formulas.logits(tokens)) <= TOLERANCE


# Of the published models; with few words, since the vocabulary is plain.
LARGE = {
    "700m": {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5460, "num_attention_heads": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_layer_of_the_published_sizes(tmp_path: Path, name: str) -> None:
    sizes = LARGE[name]
    directory = save_ifairy(
        tmp_path / "model",
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        num_hidden_layers=1,
    )
    tokens = TOKENS[:20]
    for act in ("float", "int8"):
        out = tmp_path / act
        fc.build(directory, act=act, kv_dtype="float32", output=out, context=64, prefill_chunk=32)
        want = Published(directory, int8=act == "int8").logits(tokens)
        with fc.load(out) as compiled:
            seen = compiled.logits(tokens)
        errors = np.linalg.norm(seen - want, axis=1) / np.linalg.norm(want, axis=1)
        # Of 20,000 activations a token a few may be next to a tie; most tokens have none.
        assert np.quantile(errors, 1 if act == "float" else 0.6) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arm64-linux", "macos-cpu", "android-cpu"])
def test_foreign_targets_build(model: Path, tmp_path: Path, name: str) -> None:
    from fairy_compile.compiler.export import find_linker

    target = load_target(name)
    if target.library != "tar":
        try:
            find_linker(target)
        except FairyError as error:
            pytest.skip(str(error))
    report = fc.build(model, target=name, output=tmp_path / "out", context=64)
    assert any("guard" in row.reason for row in report.layers)
