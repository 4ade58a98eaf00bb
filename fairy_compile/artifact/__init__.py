"""Artifacts: an MLC model directory plus ``fairy.json``; written, checked, shown."""

from fairy_compile.artifact.contract import check_chat_config, check_library
from fairy_compile.artifact.files import FileEntry, describe_files, human_bytes
from fairy_compile.artifact.inspect import Inspection, inspect, render
from fairy_compile.artifact.manifest import (
    LayerEntry,
    Manifest,
    ModelInfo,
    ParamEntry,
    Source,
    TargetInfo,
)
from fairy_compile.artifact.mlc_config import ChatConfig, EngineSizes, chat_config
from fairy_compile.artifact.package import PackageReport, package
from fairy_compile.artifact.params import ParamWriter, WrittenParams, read_params
from fairy_compile.artifact.signature import Signature, signatures_of
from fairy_compile.artifact.staging import check_apart, check_output, staged_directory
from fairy_compile.artifact.tokenizer_files import copy_tokenizer_files
from fairy_compile.artifact.verify import VerifyReport, check_loaded_metadata, verify

__all__ = [
    "ChatConfig",
    "EngineSizes",
    "FileEntry",
    "Inspection",
    "LayerEntry",
    "Manifest",
    "ModelInfo",
    "PackageReport",
    "ParamEntry",
    "ParamWriter",
    "Signature",
    "Source",
    "TargetInfo",
    "VerifyReport",
    "WrittenParams",
    "chat_config",
    "check_apart",
    "check_chat_config",
    "check_library",
    "check_loaded_metadata",
    "check_output",
    "copy_tokenizer_files",
    "describe_files",
    "human_bytes",
    "inspect",
    "package",
    "read_params",
    "render",
    "signatures_of",
    "staged_directory",
    "verify",
]
