"""Relax functions of an engine's GPU sampler, over `kernels.sampler_gpu`.

Names and signatures follow `artifact.contract`; an engine draws with them without copying
probabilities to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax, tirx

from fairy_compile.kernels import sampler_gpu as kernels
from fairy_compile.kernels import sort_gpu


def add_gpu_sampler(bb: relax.BlockBuilder, vocab: int) -> None:
    """Add the five functions to the module under construction."""
    b, s, k = (tirx.Var(name, "int64") for name in ("batch", "samples", "count"))

    def floats(*shape: object) -> relax.TensorType:
        return relax.TensorType(shape, "float32")

    def ints(*shape: object) -> relax.TensorType:
        return relax.TensorType(shape, "int32")

    width = sort_gpu.sort_width(vocab)
    rows = (b, vocab)
    _add(
        bb,
        "multinomial_from_uniform",
        kernels.build_multinomial(),
        {"probs": floats(*rows), "uniform": floats(s), "row_of": ints(s)},
        [ints(s)],
    )
    _add(
        bb,
        "argsort_probs",
        sort_gpu.build_argsort(vocab),
        {"probs": floats(*rows)},
        [floats(*rows), ints(*rows), floats(b, width), ints(b, width)],
        results=2,
    )
    _add(
        bb,
        "sample_with_top_p",
        kernels.build_sample_top_p(),
        {
            "sorted_probs": floats(*rows),
            "sorted_index": ints(*rows),
            "uniform": floats(s),
            "row_of": ints(s),
            "top_p": floats(b),
        },
        [ints(s)],
    )
    _add(
        bb,
        "sampler_take_probs",
        kernels.build_take_probs(),
        {
            "probs": floats(*rows),
            "sorted_index": ints(*rows),
            "row_of": ints(s),
            "token": ints(s),
            "offset": ints(k),
        },
        [floats(s), floats(k), ints(k)],
        results=3,
    )
    _add(
        bb,
        "renormalize_by_top_p",
        kernels.build_renormalize_top_p(),
        {"probs": floats(*rows), "top_p": floats(b), "initial_pivots": floats(b, 3)},
        [floats(*rows)],
    )


def _add(
    bb: relax.BlockBuilder,
    name: str,
    kernel: tirx.PrimFunc,
    arguments: dict[str, relax.TensorType],
    outputs: Sequence[relax.TensorType],
    results: int = 1,
) -> None:
    """Add a function that calls ``kernel`` and returns its first ``results`` outputs."""
    params = [relax.Var(argument, ty) for argument, ty in arguments.items()]
    function = bb.add_func(kernel.with_attr("op_pattern", 8), f"{name}_kernel")
    with bb.function(name, params):
        with bb.dataflow():
            out = list(outputs)
            called = bb.emit(relax.call_tir(function, params, out if len(out) > 1 else out[0]))
            if len(out) == 1:
                result = called
            else:
                result = relax.Tuple([relax.TupleGetItem(called, i) for i in range(results)])
            result = bb.emit_output(result)
        bb.emit_func_output(result)
