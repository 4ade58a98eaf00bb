from __future__ import annotations

import pytest

from fairy_compile.artifact import Signature, signatures_of
from fairy_compile.errors import ModelFileError


@pytest.mark.parametrize(
    "text",
    [
        "",
        "->",
        "(n int32 -> none",
        "(n) -> none",
        "a -> none",
        "object, -> none",
        "object",
        "object -> none none",
        "[[object]] -> none",
        "(n, ) int32 -> none",
        "(n) 3 -> none",
        "object \u00e9 -> none",
        "object," * 10000 + "object -> none",
    ],
)
def test_malformed_text(text):
    with pytest.raises(ModelFileError, match="malformed"):
        Signature.parse(text)


def test_text_survives_a_round_trip():
    text = "(1, n, 4) float16, object, params -> [(1, 1, ?) float32, object]"
    assert str(Signature.parse(text)) == text
    assert str(Signature.parse(" -> () float32 ")) == "-> () float32"


def test_signatures_of_a_relax_module():
    import tvm
    from tvm import relax
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import spec
    from tvm.script import tirx as T

    class Model(nn.Module):
        def __init__(self):
            self.table = nn.Embedding(8, 4)

        def embed(self, ids: nn.Tensor):
            return self.table(ids)

        def prefill(self, x: nn.Tensor, cache: nn.Object):
            return x, cache

    packed = {"param_mode": "packed", "effect_mode": "none"}
    module, _ = Model().export_tvm(
        spec={
            "embed": {"ids": spec.Tensor(["n"], "int32"), "$": packed},
            "prefill": {
                "x": spec.Tensor([1, "n", 4], "float32"),
                "cache": spec.Object(object_type=nn.Object),
                "$": packed,
            },
        }
    )
    builder = relax.BlockBuilder(module)
    with builder.function("_metadata", []):
        builder.emit_func_output(tvm.ir.StringImm("{}"))
    size = tvm.tirx.Var("size", "int64")
    with builder.function("shape_of", [relax.Var("s", relax.ShapeType([size]))]):
        builder.emit_func_output(relax.ShapeExpr([size]))
    module = builder.finalize()

    @T.prim_func(s_tir=True)
    def add_one(a: T.handle, b: T.handle):
        T.func_attr({"global_symbol": "add_one"})
        k = T.int32()
        x = T.match_buffer(a, (k, 3), "float32")
        y = T.match_buffer(b, (k * 2,), "int32")
        for i in range(k):
            x[i, 0] += T.cast(y[i], "float32")

    module["add_one"] = add_one
    found = {name: str(signature) for name, signature in signatures_of(module).items()}
    assert found == {
        "embed": "(n) int32, params -> (n, 4) float32",
        "prefill": "(1, n, 4) float32, object, params -> [(1, n, 4) float32, object]",
        "_metadata": "-> string",
        "shape_of": "shape -> shape",
        "add_one": "(k, 3) float32, (?) int32 -> none",
    }
