"""What a target lacks is an error that names the kernel, the construct and the attribute."""

import pytest
import tvm
from tvm import tirx
from tvm.script import tirx as T

from fairy_compile.codegen import spirv
from fairy_compile.errors import UnsupportedError
from tests.emulation.vulkan_compare import bind_threads, define
from tests.emulation.vulkan_target import build, vulkan_target

pytestmark = pytest.mark.usefixtures("validator")


def refuse(function, match: str, **changes) -> None:
    spirv.register()
    with pytest.raises(UnsupportedError, match=match) as error:
        tvm.compile(function, target=vulkan_target(**changes))
    assert "main_kernel" in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "attribute"),
    [
        ("float16", "supports_float16"),
        ("float64", "supports_float64"),
        ("int8", "supports_int8"),
        ("uint8", "supports_int8"),
        ("int16", "supports_int16"),
        ("int64", "supports_int64"),
    ],
)
def test_arithmetic_without_its_capability(dtype, attribute):
    function = bind_threads(define(lambda a: a + a, [dtype], 64)[0])
    refuse(function, rf"{dtype} .*target attribute {attribute}", **{attribute: None})
    build(function)


@pytest.mark.parametrize(
    ("dtype", "attribute"), [("float16", "supports_16bit_buffer"), ("int8", "supports_8bit_buffer")]
)
def test_storage_without_its_capability(dtype, attribute):
    function = bind_threads(define(lambda a: a, [dtype], 64)[0])
    refuse(function, rf"storage buffer of {dtype}.*{attribute}", **{attribute: None})


@T.prim_func(s_tir=True)
def shared_8k(x: T.Buffer((256,), "float32")):
    T.func_attr({"global_symbol": "main"})
    for j in T.thread_binding(256, "threadIdx.x"):
        tile = T.alloc_buffer((8192,), "float32", scope="shared")
        tile[j * 32] = x[j]
        T.tvm_storage_sync("shared")
        x[j] = tile[(255 - j) * 32]


def test_limits_of_a_block():
    refuse(
        shared_8k,
        r"32644 bytes of shared memory on a target with 16384.*max_shared_memory_per_block",
        max_shared_memory_per_block=16384,
    )
    refuse(shared_8k, r"target with 16384", max_shared_memory_per_block=None)
    refuse(shared_8k, r"256 threads a block on a target with 128", max_threads_per_block=128)
    refuse(shared_8k, r"256 threads along x on a target with 64", max_block_size_x=64)
    build(shared_8k)


def test_operators_without_a_rule():
    function = bind_threads(define(lambda a: tirx.nextafter(a, a), ["float32"], 64)[0])
    refuse(function, "nextafter")
    function = bind_threads(define(tirx.sin, ["float64"], 64)[0])
    refuse(function, "Sin of float64 is not supported; no target attribute")
    function = bind_threads(
        define(lambda a: tirx.call_pure_extern("float32", "mystery", a), ["float32"], 64)[0]
    )
    refuse(function, "external function mystery")


def test_spirv_versions():
    function = bind_threads(define(lambda a: a + a, ["float16"], 64)[0])
    for version in (0x10000, 0x10300, 0x10400, 0x10500, 0x10600):
        _, kernels = build(function, max_spirv_version=version)
        (kernel,) = kernels.values()
        assert int.from_bytes(kernel.code[4:8], "little") == version
        extension = b"SPV_KHR_storage_buffer_storage_class" in kernel.code
        assert extension == (version < 0x10300)
