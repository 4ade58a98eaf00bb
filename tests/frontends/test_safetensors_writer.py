"""The streaming writer against the safetensors library."""

import numpy as np
import pytest

from fairy_compile.frontends.safetensors_writer import SafetensorsWriter

TENSORS = {
    "codes": np.arange(5, dtype=np.uint8),
    "scales": np.array([[1.5], [2.5]], np.float32),
    "norm": np.ones(3, np.float16),
}
LAYOUT = {name: (array.dtype.name, array.shape) for name, array in TENSORS.items()}


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS))])
def test_any_order_gives_a_file_others_read(tmp_path, order):
    from safetensors.numpy import load_file

    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, LAYOUT, {"format": "pt"}) as writer:
        for name in order:
            writer.add(name, TENSORS[name])
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_slices_are_written_as_they_look(tmp_path):
    from safetensors.numpy import load_file

    array = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2].T
    with SafetensorsWriter(tmp_path / "x", {"a": ("float32", (2, 3))}, {}) as writer:
        writer.add("a", array)
    np.testing.assert_array_equal(load_file(tmp_path / "x")["a"], array)


def test_mistakes_of_the_caller(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x", LAYOUT, {})
    with pytest.raises(ValueError, match="announced"):
        writer.add("norm", np.ones(4, np.float16))
    with pytest.raises(ValueError, match="announced"):
        writer.add("other", np.ones(4, np.float16))
    writer.add("norm", TENSORS["norm"])
    with pytest.raises(ValueError, match="announced"):
        writer.add("norm", TENSORS["norm"])
    with pytest.raises(ValueError, match="lacks announced tensors"):
        writer.close()
