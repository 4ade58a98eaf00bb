import pytest

from fairy_compile.bench.bandwidth import DEFAULT_BYTES, ReadBandwidth, default_bytes


def test_every_byte_is_read():
    read = ReadBandwidth(3_000_000)
    assert read.nbytes >= 3_000_000
    assert read.measure() > 0
    read._data[-1, -1] = 5  # the last word: the check of the sums notices
    with pytest.raises(RuntimeError, match="whole buffer"):
        read.measure()


def test_small_machines_read_less():
    assert default_bytes(0) == default_bytes(64 << 30) == DEFAULT_BYTES
    assert default_bytes(4 << 30) == 512 << 20
