"""``.bin`` checkpoints: read by weights-only loading, and nothing else."""

import builtins
import pickle

import numpy as np
import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends import open_source
from fairy_compile.frontends.torch_file import TorchFile
from fairy_compile.phase import quantize

from .conftest import tiny_tensors, write_index

torch = pytest.importorskip("torch")


@pytest.fixture
def directory(make_model):
    path = make_model()
    (path / "model.safetensors").unlink()
    return path


def as_torch(tensors: dict[str, np.ndarray], dtype: object) -> dict:
    return {name: torch.tensor(array).to(dtype) for name, array in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_a_state_dict(directory, dtype):
    state = as_torch(tiny_tensors(), getattr(torch, dtype))
    torch.save(state, directory / "pytorch_model.bin")
    source = open_source(directory)
    assert source.names() == list(state)
    for name, tensor in state.items():
        assert (source.dtype(name), source.shape(name)) == (dtype, tuple(tensor.shape))
        assert source.dense(name).dtype.name == dtype
        np.testing.assert_array_equal(source.dense(name).astype(np.float32), tensor.float().numpy())
    assert set(source.sha256()) >= {"pytorch_model.bin", "config.json"}


def test_phase_codes_are_those_of_the_weight(directory, tensors):
    torch.save(as_torch(tensors, torch.float32), directory / "pytorch_model.bin")
    got = open_source(directory).phase("model.layers.0.mlp.up_proj", QuantConfig(method="phase"))
    want = quantize(tensors["model.layers.0.mlp.up_proj.weight"])
    np.testing.assert_array_equal(got.codes, want.codes)


def test_reads_shards(directory, tensors):
    state = as_torch(tensors, torch.float32)
    weight_map = {name: f"part-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in state.items() if weight_map[n] == file}, directory / file)
    write_index(directory, weight_map, "pytorch_model.bin")
    source = open_source(directory)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.dense(name), array)


def test_safetensors_are_preferred(make_model, tensors):
    directory = make_model(tensors)
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_source(directory).names() == list(tensors)


def test_transposed_tensors_are_read_as_they_look(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch.save({"a": torch.tensor(array).T}, tmp_path / "x.bin")
    np.testing.assert_array_equal(TorchFile(tmp_path / "x.bin").read("a"), array.T)


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pickle_that_runs_code(tmp_path, capsys):
    torch.save({"a": Malicious()}, tmp_path / "x.bin")
    with pytest.raises(ModelFileError, match="weights-only loading"):
        TorchFile(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ModelFileError, match="weights-only loading"):
        TorchFile(tmp_path / "y.bin")
    assert capsys.readouterr().out == ""


def test_truncated_file(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "x.bin").write_bytes(data[:size])
        with pytest.raises(ModelFileError):
            TorchFile(tmp_path / "x.bin")


def test_strides_of_zero_that_claim_terabytes(tmp_path):
    torch.save({"a": torch.ones(1).expand(2**40)}, tmp_path / "x.bin")
    with pytest.raises(ModelFileError, match="claims 4398046511104 bytes"):
        TorchFile(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}]
)
def test_contents_that_are_not_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ModelFileError, match="state dict of tensors"):
        TorchFile(tmp_path / "x.bin")


def test_sparse_tensors(tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "x.bin")
    with pytest.raises(ModelFileError, match="not a plain dense tensor"):
        TorchFile(tmp_path / "x.bin")


def test_without_torch_the_extra_is_named(directory, monkeypatch):
    torch.save({"a": torch.ones(2)}, directory / "pytorch_model.bin")
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(FairyError, match=r'pip install "fairy-compile\[qat\]"'):
        open_source(directory)
