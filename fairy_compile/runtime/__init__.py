"""Running compiled models on TVM's virtual machine.

`load` returns a `Model` (text in, text out); `Engine` below it works on tokens and sequences.
An artifact is driven through the same library functions and KV cache calls that MLC engines use.
"""

from fairy_compile.runtime.chat import ChatSession
from fairy_compile.runtime.chat_template import ChatTemplate
from fairy_compile.runtime.engine import Engine
from fairy_compile.runtime.generation import Generation
from fairy_compile.runtime.model import Model, load
from fairy_compile.runtime.sampler import SamplingParams
from fairy_compile.runtime.stats import Stats

__all__ = [
    "ChatSession",
    "ChatTemplate",
    "Engine",
    "Generation",
    "Model",
    "SamplingParams",
    "Stats",
    "load",
]
