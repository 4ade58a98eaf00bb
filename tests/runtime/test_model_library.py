import numpy as np
import pytest

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.runtime.library import ModelLibrary
from fairy_compile.runtime.sampler import Sampler, SamplingParams


def test_trace_reports_each_kernel_of_one_decode(model):
    before = model.stats().functions
    calls = model.trace_kernels([1, 2, 3])
    assert not any(name.startswith("vm.") for name in calls)
    assert sum(count for name, count in calls.items() if "matmul" in name) == 5  # 4 + head
    assert sum(count for name, count in calls.items() if "rms_norm" in name) == 3
    assert {f.name: f.calls for f in model.stats().functions}.get("decode", 0) == {
        f.name: f.calls for f in before
    }.get("decode", 0)
    assert model.engine.cache.sequences == []
    # The instrument is gone with its machine.
    assert model.trace_kernels([1]) == calls


def test_library_penalties_agree_with_the_sampler(engine):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 320)).astype(np.float32)
    params = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={5: 2.5, 7: -100.0},
    )
    sampler = Sampler(params)
    sampler._counts = {3: 1, 7: 4, 200: 2}
    want = sampler.adjust(logits[0])

    def tensor(values, dtype):
        return engine.to_device(np.array(values, dtype))

    device = engine.to_device(logits)
    bias = tensor([0, 0], "int32"), tensor([5, 7], "int32"), tensor([2.5, -100.0], "float32")
    engine.library.call("apply_logit_bias_inplace", device, *bias)
    engine.library.call(
        "apply_penalty_inplace",
        device,
        tensor([0], "int32"),
        tensor([0, 0, 0], "int32"),
        tensor([3, 7, 200], "int32"),
        tensor([1, 4, 2], "int32"),
        tensor([[0.4, 0.2, 1.3]], "float32"),
    )
    np.testing.assert_allclose(device.numpy()[0], want, rtol=1e-6)


def test_library_softmax_agrees_with_numpy(engine):
    logits = np.random.default_rng(2).normal(size=(2, 1, 320)).astype(np.float32)
    temperature = np.array([0.7, 1.5], np.float32)
    got = engine.library.call(
        "softmax_with_temperature", engine.to_device(logits), engine.to_device(temperature)
    ).numpy()
    want = np.exp(logits / temperature[:, None, None])
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), rtol=1e-4)


def test_library_bitmask_forbids_tokens(engine):
    mask = np.full((1, 10), -1, np.int32)
    mask[0, 1] &= ~(1 << 3)  # token 35
    logits = engine.to_device(np.zeros((1, 320), np.float32))
    engine.library.call(
        "apply_bitmask_inplace",
        logits,
        engine.to_device(np.zeros(1, np.int32)),
        engine.to_device(mask),
    )
    assert np.flatnonzero(logits.numpy()[0]).tolist() == [35]
    assert logits.numpy()[0, 35] == np.finfo(np.float32).min


def test_a_file_that_is_no_library_is_one_sentence(engine, tmp_path):
    path = tmp_path / "model.so"
    path.write_bytes(b"not an ELF file")
    with pytest.raises(ModelFileError, match="cannot load the model library") as raised:
        ModelLibrary(path, engine.device)
    assert "\n" not in str(raised.value)


def test_a_place_of_temporary_files_that_does_not_serve_is_told(tiny, engine, monkeypatch):
    path = tiny[0] / "model.so"
    monkeypatch.setattr("fairy_compile.runtime.library._runs_nothing", lambda _: True)
    with pytest.raises(FairyError, match=r"no code in it may run \(noexec\); set TMPDIR"):
        ModelLibrary(path, engine.device)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy", refuse)
    with pytest.raises(FairyError, match=r"cannot copy .*: No space left on device; free some"):
        ModelLibrary(path, engine.device)


def test_a_library_without_the_contract_is_refused(engine, tmp_path):
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    with builder.function("embed", []):
        builder.emit_func_output(relax.ShapeExpr([1]))
    path = tmp_path / "other.so"
    tvm.relax.build(builder.finalize(), target="llvm").export_library(str(path))
    with pytest.raises(ModelFileError, match="no function '_metadata'"):
        ModelLibrary(path, engine.device)


def test_missing_weights_are_named(tiny, engine, tmp_path):
    import json

    directory, _ = tiny
    cache = json.loads((directory / "tensor-cache.json").read_text())
    cache["records"][0]["records"] = [
        r for r in cache["records"][0]["records"] if r["name"] != "down.weight"
    ]
    (tmp_path / "tensor-cache.json").write_text(json.dumps(cache))
    shard = cache["records"][0]["dataPath"]
    (tmp_path / shard).write_bytes((directory / shard).read_bytes())
    with pytest.raises(ModelFileError, match=r"down\.weight"):
        engine.library.load_params(tmp_path)
    engine.library.load_params(directory)  # the failed load left nothing behind
