"""Each test is named after the mistake or attack that it shows to be stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairy_compile.artifact import inspect, verify
from fairy_compile.artifact.verify import check_loaded_metadata
from fairy_compile.errors import ModelFileError


def refused(artifact: Any, match: str, **options: Any) -> None:
    with pytest.raises(ModelFileError, match=match) as caught:
        verify(artifact.directory, **options)
    assert "\n" not in str(caught.value)


def tensor(cache: dict, index: int = 0) -> dict:
    return cache["records"][0]["records"][index]


def edit_tensor(artifact: Any, index: int = 0, **members: Any) -> None:
    artifact.edit("tensor-cache.json", lambda c: tensor(c, index).update(members))


def edit_param(artifact: Any, index: int, **members: Any) -> None:
    artifact.edit_manifest(lambda m: m["params"][index].update(members))


def overwrite(artifact: Any, index: int, data: bytes) -> None:
    """Put bytes into a tensor and sign the shard."""
    shard = artifact.directory / "params_shard_0.bin"
    content = bytearray(shard.read_bytes())
    offset = tensor(artifact.read("tensor-cache.json"), index)["byteOffset"]
    content[offset : offset + len(data)] = data
    shard.write_bytes(content)
    artifact.sign(shard.name)


def test_valid_artifact_passes(artifact):
    report = verify(artifact.directory)
    assert (report.tensors, report.warnings, report.hashed) == (4, (), True)
    assert report.files == len(list(artifact.directory.iterdir()))
    assert report.to_json()["bytes"] == report.bytes > 0


def test_missing_directory(tmp_path):
    with pytest.raises(ModelFileError, match="no directory"):
        verify(tmp_path / "none")


def test_missing_manifest(artifact):
    (artifact.directory / "fairy.json").unlink()
    refused(artifact, r"no fairy\.json")


@pytest.mark.parametrize("name", ["tensor-cache.json", "mlc-chat-config.json", "lib.so"])
def test_missing_file(artifact, name):
    (artifact.directory / name).unlink()
    refused(artifact, "missing")


def test_truncated_shard(artifact):
    shard = artifact.directory / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(artifact, r"params_shard_0\.bin has \d+ bytes")


def test_truncated_shard_with_matching_manifest(artifact):
    shard = artifact.directory / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    artifact.sign(shard.name)
    refused(artifact, "truncated or belongs to another build")


@pytest.mark.parametrize("name", ["params_shard_0.bin", "lib.so", "tokenizer.json"])
def test_changed_byte_in_file(artifact, name):
    path = artifact.directory / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    refused(artifact, "sha256")


def test_unchecked_hashes_on_request(artifact):
    (artifact.directory / "lib.so").write_bytes(b"NOT REALLY A LIBRARY")
    assert not verify(artifact.directory, hashes=False).hashed


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret.bin",
        "a/../../secret.bin",
        "..\\secret.bin",
        "C:secret.bin",
        "./params_shard_0.bin",
        "",
        "x\x00y",
        "\ud800",
        "x" * 1000,
    ],
)
def test_path_that_leaves_the_directory(artifact, name):
    (artifact.directory.parent / "secret.bin").write_bytes(b"secret")
    artifact.edit("tensor-cache.json", lambda c: c["records"][0].update(dataPath=name))
    refused(artifact, "refused")


def test_manifest_path_that_leaves_the_directory(artifact):
    (artifact.directory.parent / "secret.bin").write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": "0" * 64}
    artifact.edit_manifest(lambda m: m["files"].update({"../secret.bin": entry}))
    refused(artifact, "refused")


def test_symlink_that_leaves_the_directory(artifact):
    shard = artifact.directory / "params_shard_0.bin"
    shard.rename(artifact.directory.parent / "elsewhere.bin")
    shard.symlink_to(artifact.directory.parent / "elsewhere.bin")
    refused(artifact, "leaves the directory")


def test_symlink_inside_the_directory_is_fine(artifact):
    library = artifact.directory / "lib.so"
    library.rename(artifact.directory / "real.so")
    library.symlink_to("real.so")
    assert "real.so" in verify(artifact.directory).warnings[0]


def test_symlink_loop(artifact):
    library = artifact.directory / "lib.so"
    library.unlink()
    library.symlink_to("lib.so")
    refused(artifact, r"lib\.so")


def test_pipe_in_place_of_a_file(artifact):
    library = artifact.directory / "lib.so"
    library.unlink()
    os.mkfifo(library)
    refused(artifact, "not a regular file")


def test_directory_in_place_of_a_file(artifact):
    library = artifact.directory / "lib.so"
    library.unlink()
    library.mkdir()
    refused(artifact, "not a regular file")


@pytest.mark.parametrize("offset", [-1, -(2**63), 10**6, 2**63, 2**64, 10**4000])
def test_offset_outside_the_file(artifact, offset):
    edit_tensor(artifact, byteOffset=offset)
    refused(artifact, "outside of shard")


def test_offset_at_the_end_of_the_file(artifact):
    size = (artifact.directory / "params_shard_0.bin").stat().st_size
    edit_tensor(artifact, byteOffset=size)
    refused(artifact, "outside of shard")


@pytest.mark.parametrize("offset", [1.0, True, "0", None, [0]])
def test_offset_of_a_wrong_type(artifact, offset):
    edit_tensor(artifact, byteOffset=offset)
    refused(artifact, "byteOffset")


def test_overlapping_tensors(artifact):
    edit_tensor(artifact, 1, byteOffset=0)
    refused(artifact, "overlap")


@pytest.mark.parametrize(
    "shape", [[2**40, 2**40], [0, 4], [-1, -256], [1] * 9, [2**31], [10**4000]]
)
def test_shape_that_overflows(artifact, shape):
    edit_tensor(artifact, shape=shape)
    refused(artifact, "has shape")


def test_shape_whose_product_wraps_to_the_right_size(artifact):
    # 2^30 * 2^30 * 2^4 = 2^64 wraps to 0 in 64 bits.
    edit_tensor(artifact, shape=[2**30, 2**30, 2**4], nbytes=0)
    refused(artifact, "takes 36893488147419103232 bytes")


def test_nbytes_that_disagrees_with_the_shape(artifact):
    edit_tensor(artifact, nbytes=8)
    refused(artifact, "takes 256 bytes")


@pytest.mark.parametrize("dtype", ["float64", "handle", "int4", "", "float16x4"])
def test_unknown_dtype(artifact, dtype):
    edit_tensor(artifact, dtype=dtype)
    refused(artifact, "dtype")


def test_encoding_that_loses_precision(artifact):
    edit_tensor(artifact, format="f32-to-bf16")
    refused(artifact, "format")


def test_duplicate_tensor(artifact):
    edit_tensor(artifact, 1, name="embed")
    refused(artifact, "two tensors")


def test_duplicate_shard(artifact):
    artifact.edit("tensor-cache.json", lambda c: c["records"].append(c["records"][0]))
    refused(artifact, "twice")


def test_duplicate_key_in_json(artifact):
    path = artifact.directory / "tensor-cache.json"
    path.write_text('{"metadata": {}, "metadata": {}, "records": []}')
    artifact.sign(path.name)
    refused(artifact, "appears twice")


def test_json_nested_until_the_parser_gives_up(artifact):
    path = artifact.directory / "tensor-cache.json"
    path.write_text("[" * 200_000)
    artifact.sign(path.name)
    refused(artifact, "not valid JSON")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[]", b"{", b'{"a": NaN}', b'{"a": 1e999}'])
def test_malformed_json(artifact, text):
    path = artifact.directory / "tensor-cache.json"
    path.write_bytes(text)
    artifact.sign(path.name)
    refused(artifact, "tensor-cache.json")


def test_tensor_that_the_manifest_does_not_list(artifact):
    artifact.edit_manifest(lambda m: m["params"].pop())
    refused(artifact, "does not list")


def test_param_that_the_tensor_cache_lacks(artifact):
    artifact.edit("tensor-cache.json", lambda c: c["records"][0]["records"].pop())
    refused(artifact, "lacks")


def test_param_listed_twice(artifact):
    artifact.edit_manifest(lambda m: m["params"].append(m["params"][0]))
    refused(artifact, "twice")


def test_param_of_another_shape_in_the_manifest(artifact):
    edit_param(artifact, 0, shape=[4, 32])
    refused(artifact, r"\[4, 32\]")


def test_params_in_another_order_in_the_library(artifact):
    artifact.edit_manifest(lambda m: m["metadata"]["params"].reverse())
    refused(artifact, "the library takes as parameter 0")


def test_fewer_params_in_the_library(artifact):
    artifact.edit_manifest(lambda m: m["metadata"]["params"].pop())
    refused(artifact, "takes 3 parameters")


def test_symbolic_vocabulary_in_the_library(artifact):
    artifact.edit_manifest(
        lambda m: m["metadata"]["params"][0].update(shape=["vocab_size", 4]),
    )
    verify(artifact.directory)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0, -1.0])
def test_scale_that_is_not_finite_and_positive(artifact, scale):
    overwrite(artifact, 2, np.array([scale], "<f4").tobytes())
    refused(artifact, "finite and positive")


def test_scales_of_an_integer_dtype(artifact):
    edit_param(artifact, 1, role="scales")
    refused(artifact, "not floats")


def test_code_with_padding_bits_set(artifact):
    overwrite(artifact, 1, b"\x1f")
    refused(artifact, "bits set outside of 0xf")


@pytest.mark.parametrize("mask", [-1, 256, 2**70])
def test_mask_of_padding_bits_that_does_not_fit(artifact, mask):
    edit_param(artifact, 1, unused_bits=mask)
    refused(artifact, "unused_bits")


def test_library_without_a_function(artifact):
    artifact.edit_manifest(lambda m: m["functions"].pop("batch_decode"))
    refused(artifact, "lacks the function 'batch_decode'")


def test_library_for_another_vocabulary(artifact):
    def shrink(config):
        config["vocab_size"] = config["model_config"]["vocab_size"] = 31

    artifact.edit("mlc-chat-config.json", shrink)
    refused(artifact, "v = 31")


def test_metadata_without_a_key(artifact):
    artifact.edit_manifest(lambda m: m["metadata"].pop("sliding_window_size"))
    refused(artifact, "lacks the key 'sliding_window_size'")


def test_config_without_a_key(artifact):
    artifact.edit("mlc-chat-config.json", lambda c: c.pop("conv_template"))
    refused(artifact, "lacks the key 'conv_template'")


def test_library_name_that_is_no_library(artifact):
    artifact.edit_manifest(lambda m: m.update(library="tokenizer.json"))
    refused(artifact, "allowed endings")


@pytest.mark.parametrize("name", ["lib.so", "params_shard_0.bin", "tokenizer.json"])
def test_file_that_escapes_the_hashes(artifact, name):
    artifact.edit_manifest(lambda m: m["files"].pop(name))
    refused(artifact, "does not list the file")


def test_malformed_hash(artifact):
    artifact.edit_manifest(lambda m: m["files"]["lib.so"].update(sha256="A" * 64))
    refused(artifact, "hexadecimal")


def test_other_tvm_version_warns(artifact):
    artifact.edit_manifest(lambda m: m.update(tvm="0.99"))
    assert "0.99" in verify(artifact.directory).warnings[0]


def test_stray_file_warns(artifact):
    (artifact.directory / "notes.txt").touch()
    assert "notes.txt" in verify(artifact.directory).warnings[0]


def test_artifact_without_tokenizer_warns(artifact):
    artifact.edit("mlc-chat-config.json", lambda c: c.update(tokenizer_files=[]))
    assert "no tokenizer" in verify(artifact.directory).warnings[0]


def test_loaded_library_that_differs_from_its_record(artifact):
    manifest = verify(artifact.directory).manifest
    check_loaded_metadata(manifest, dict(manifest.metadata))
    with pytest.raises(ModelFileError, match="'max_batch_size'"):
        check_loaded_metadata(manifest, manifest.metadata | {"max_batch_size": 5})


def test_relative_directory(artifact, monkeypatch):
    monkeypatch.chdir(artifact.directory.parent)
    assert verify(Path("artifact")).tensors == 4


def test_what_this_user_may_not_read_is_told(artifact, monkeypatch):
    """Tests may run as one who reads all."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setitem(verify.__globals__, "_check_values", refuse)
    refused(artifact, "cannot read there: Permission denied; give files", hashes=False)
    monkeypatch.setitem(verify.__globals__, "hash_files", refuse)
    refused(artifact, "cannot read there: Permission denied; give files")
    monkeypatch.setattr("pathlib.Path.exists", refuse)
    refused(artifact, "cannot read there: Permission denied; give files")
    with pytest.raises(ModelFileError, match="cannot read there: Permission denied; give files"):
        inspect(artifact.directory)
