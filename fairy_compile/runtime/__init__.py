"""Running compiled models on TVM's virtual machine.

`load` returns a `Model` (text in, text out) of a language model; `Engine` below it works on tokens
and sequences. Of any other network it returns a `GraphModel` (arrays in, arrays out).
An artifact is driven through the same library functions and KV cache calls that MLC engines use.
"""

from fairy_compile.runtime.chat import ChatSession
from fairy_compile.runtime.chat_template import ChatTemplate
from fairy_compile.runtime.engine import Engine
from fairy_compile.runtime.generation import Generation
from fairy_compile.runtime.graph_model import GraphModel
from fairy_compile.runtime.model import Model, load, load_language_model
from fairy_compile.runtime.sampler import SamplingParams
from fairy_compile.runtime.stats import Stats

__all__ = [
    "ChatSession",
    "ChatTemplate",
    "Engine",
    "Generation",
    "GraphModel",
    "Model",
    "SamplingParams",
    "Stats",
    "load",
    "load_language_model",
]
