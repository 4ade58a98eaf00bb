"""Tensors of a checkpoint that no parameter is made of: refused or told, never passed over.

A bias or a norm that a family does not know changes every answer, and the model runs without it as
if nothing were missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from fairy_compile.compiler.library import Param
from fairy_compile.errors import UnsupportedError
from fairy_compile.frontends.source import ModelSource

# Buffers that are computed from config.json and that older checkpoints hold nevertheless.
_COMPUTED = re.compile(r"\.rotary_emb\.|\.rotary_pos_emb\.|\.masked_bias$")
_DECODER_LAYER = re.compile(r"(.*?\blayers?\.\d+)\.")
_SHOWN = 3


def check_unread(source: ModelSource, params: Iterable[Param]) -> list[str]:
    """Return notes on the tensors that a library's parameters leave out.

    Args:
        source: the weights.
        params: parameters of the library.

    Raises:
        UnsupportedError: such a tensor lies in a module or decoder layer that the model computes,
            and is not zero throughout.
    """
    read = _read_tensors(source, params)
    modules = {name.rpartition(".")[0] for name in read}
    layers = {match[1] for name in read if (match := _DECODER_LAYER.match(name))}
    beside = []
    for name in source.names():
        if name in read or _COMPUTED.search(name):
            continue
        layer = _DECODER_LAYER.match(name)
        within = name.rpartition(".")[0] in modules or (layer is not None and layer[1] in layers)
        if not within:
            beside.append(name)
        elif np.any(source.dense(name)):
            raise UnsupportedError(
                f"{source.origin} has the tensor {name!r}, which models of type "
                f"{source.config.get('model_type')!r} do not have here: built without it, the "
                "model would give other answers; correct model_type or the switches in "
                "config.json, or take the tensor out of the files if it has no part in the model"
            )
    if not beside:
        return []
    names = ", ".join(beside[:_SHOWN]) + (", ..." if len(beside) > _SHOWN else "")
    count = "1 tensor" if len(beside) == 1 else f"{len(beside)} tensors"
    verb = "belongs" if len(beside) == 1 else "belong"
    return [f"{count} of the checkpoint {verb} to no layer of the model: {names}"]


def _read_tensors(source: ModelSource, params: Iterable[Param]) -> set[str]:
    read: set[str] = set()
    for param in params:
        if param.call is None:
            read.add(param.name)
            continue
        for layer in param.call.sources:
            read.add(f"{layer}.weight")
            if param.call.bias:
                read.add(f"{layer}.bias")
    return read | {tied for tied, stored in source.tied.items() if stored in read}
