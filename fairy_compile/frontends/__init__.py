"""Model sources: Hugging Face directories, hub models and packed checkpoints; `convert`."""

from fairy_compile.frontends.convert import ConvertReport, LayerReport, convert
from fairy_compile.frontends.packed_writer import PackedWriter, write_packed
from fairy_compile.frontends.source import LayerPlan, ModelSource, open_source

__all__ = [
    "ConvertReport",
    "LayerPlan",
    "LayerReport",
    "ModelSource",
    "PackedWriter",
    "convert",
    "open_source",
    "write_packed",
]
