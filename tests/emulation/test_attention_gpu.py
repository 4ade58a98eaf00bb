"""Our attention kernels for GPUs, with windows and caps, on simulated devices and lavapipe.

Emulation shows that they are right, not that they are fast.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fairy_compile.kernels import attention_gpu_decode, attention_gpu_prefill
from fairy_compile.kernels.attention_shape import AttentionShape
from fairy_compile.kernels.attention_tvm import shared_bytes
from tests.emulation import metal_rig
from tests.emulation.attention_gpu_cases import BUILD, Device, Sequences
from tests.emulation.gpu_cases import host_target
from tests.emulation.rigs import RIGS

slow = pytest.mark.slow


# Windows of a part of a page, of whole pages, and of more than any sequence has; heads that are no
# multiple of a vector, that fill registers, that no power of two divides.
SHAPES = {
    "window": AttentionShape(4, 2, 64, "float16", window=37),
    "one": AttentionShape(2, 2, 32, "float32", window=1),
    "pages": AttentionShape(4, 1, 128, "float16", window=48),
    "wide": AttentionShape(2, 1, 96, "float32", window=5000),
    "capped": AttentionShape(8, 4, 256, "float32", window=20, softcap=1.5),
    "capped16": AttentionShape(8, 4, 256, "float16", window=20, softcap=50.0),
    "softcap": AttentionShape(4, 2, 64, "float32", softcap=0.7),
    "nine": AttentionShape(9, 1, 128, "float16"),
    "odd": AttentionShape(5, 1, 36, "float32"),
    "prime": AttentionShape(3, 1, 17, "float16", window=9),
    "many": AttentionShape(40, 2, 64, "float16"),
}
QUICK = {("metal", "window"), ("vulkan", "capped")}
CASES = [
    pytest.param(kind, name, marks=() if (kind, name) in QUICK else slow)
    for kind in RIGS
    for name, shape in SHAPES.items()
    if (kind, shape.dtype) != ("opencl", "float16")  # which PoCL does not have
]
# Contexts of one key, within a page, of whole tiles, of several with a rest, and of several parts.
DECODE = {
    1: Sequences((70,), (1,), (0,)),
    2: Sequences((1, 33), (1, 1), (0, 5)),
    17: Sequences(tuple(range(1, 400, 24)), (1,) * 17, tuple(range(17))),
}
LONG = Sequences((3000, 515), (1, 1), (0, 100))
PREFILL = {
    "one": Sequences((33,), (33,), (0,)),
    "several": Sequences((1, 9, 32, 150, 70), (1, 9, 20, 33, 70), (0, 0, 7, 3, 200)),
}
OLDER = Sequences((0, 9, 32, 150, 70), (1, 9, 20, 33, 70), (0, 0, 7, 3, 200), behind=0)
CHUNKS = Sequences((1, 9, 20, 33, 70), (1, 9, 20, 33, 70), (0, 4, 7, 3, 200))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_attention_equals_numpy(rig_of, tmp_path: Path, kind: str, name: str) -> None:
    rig = rig_of(kind)
    shape = SHAPES[name]
    for order in (0, 7) if kind == "metal" else (0,):
        rig.order = order
        rig.optimize = False  # of PoCL, see there
        device = Device(shape, host_target(kind), tmp_path)
        for local in (False, True) if shape.window else (False,):
            for batch, sequences in DECODE.items():
                assert device.error("decode", sequences, local=local) <= 1, (batch, local)
            assert device.error("decode", LONG, local=local) <= 1, local
            for causal in (False, True):
                for sequences in PREFILL.values():
                    assert device.error("paged", sequences, local=local, causal=causal) <= 1
                assert device.error("ragged", CHUNKS, local=local, causal=causal) <= 1
            assert device.error("paged", OLDER, local=local) <= 1, local


@pytest.mark.parametrize("name", list(SHAPES))
def test_kernels_fit_every_device(name: str) -> None:
    """16 KiB of shared memory and 128 threads are what the smallest targets have."""
    for build in BUILD.values():
        assert 0 < shared_bytes(build(SHAPES[name])) <= 16384


@slow
def test_a_removed_barrier_is_caught(rig_of, tmp_path: Path) -> None:
    """In some order, threads then read what is not there yet, or no longer."""
    rig = rig_of("metal")
    shape, target = AttentionShape(2, 1, 64, "float16", window=37), host_target("metal")
    rig.order = 0
    Device(shape, target, tmp_path)
    count = max(metal_rig.barriers(kernel.source) for kernel in rig.kernels)
    assert count >= 5
    missed = []
    for number in range(count):
        rig.edit = lambda source, number=number: metal_rig.without_barrier(source, number)
        worst = 0.0
        for rig.order in (0, 1):
            device = Device(shape, target, tmp_path)
            worst = max(
                worst,
                device.error("decode", LONG, local=False),
                device.error("paged", PREFILL["several"], local=True, causal=True),
            )
        if worst <= 1:
            missed.append(number)
    rig.edit = lambda source: source
    assert not missed


def test_sizes_that_no_kernel_takes() -> None:
    for dim, served in ((256, True), (127, True), (260, False), (255, False)):
        shape = AttentionShape(2, 1, dim, "float16")
        both = attention_gpu_decode.serves(shape) and attention_gpu_prefill.serves(shape)
        assert both == served
