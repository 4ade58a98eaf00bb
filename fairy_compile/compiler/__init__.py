"""From a checkpoint to an artifact: plan, define, compile, pack, write."""

from fairy_compile.compiler.build import build
from fairy_compile.compiler.report import BuildReport, LayerReport

__all__ = ["BuildReport", "LayerReport", "build"]
