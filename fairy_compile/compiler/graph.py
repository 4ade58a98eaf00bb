"""`build_graph`: an ONNX model or a PyTorch module in, an artifact with its own inputs out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from fairy_compile.artifact import (
    ModelInfo,
    WrittenParams,
    check_output,
    signatures_of,
    staged_directory,
)
from fairy_compile.artifact.graph_contract import GRAPH, check_graph
from fairy_compile.compiler.clock import Clock
from fairy_compile.compiler.cuda_binary import check_nvcc
from fairy_compile.compiler.export import check_linker, export_library
from fairy_compile.compiler.graph_layers import MAIN, GraphLayers, find_layers, replace_layers
from fairy_compile.compiler.library import Param
from fairy_compile.compiler.params import Demands
from fairy_compile.compiler.pipeline import Progress, compile_module
from fairy_compile.compiler.plan import Planner
from fairy_compile.compiler.report import BuildReport, LayerReport, describe_call
from fairy_compile.compiler.write import (
    OTHER_FILES_BYTES,
    manifest_of,
    param_nbytes,
    write_params,
)
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.graph import Graph, GraphSource
from fairy_compile.frontends.plan import unmatched_notes
from fairy_compile.models.engine_functions import add_metadata
from fairy_compile.targets import Target

ENTRY_POINTS = [MAIN, "_metadata"]


@dataclass
class GraphWork:
    """The pieces the build of a graph passes along."""

    graph: Graph
    quant: QuantConfig
    target: Target
    system_lib = ""  # MLC's apps run chat models only

    def __post_init__(self) -> None:
        self.layers: GraphLayers = find_layers(self.graph)
        taken = {f"{matrix.layer}.weight" for matrix in self.layers.matrices}
        # A weight that is also looked up, say, keeps its stored form besides, under another name.
        self.stored = {w: f"{w}.stored" if w in taken else w for w in self.graph.weights}
        self.source = GraphSource(self.graph, self.layers.matrices, self.stored)
        self.quant, self.quant_note = self.source.settle(self.quant)

    @property
    def name(self) -> str:
        """What reports call the model."""
        return self.graph.name

    def define(self, demands: Demands | None = None) -> None:
        """Plan kernels and put their calls into the graph."""
        self.planner = Planner(self.source, self.quant, self.target, demands)
        calls = {}
        for matrix in self.layers.matrices:
            rows, columns = matrix.shape
            (calls[matrix.layer],) = self.planner.linear(
                matrix.layer, [matrix.layer], columns, [rows]
            )
        module, params = replace_layers(self.graph, self.layers, calls, self.stored, self.target)
        main = module[MAIN]
        types = list(main.params)[-1].ty.fields if params else []
        self.params = [
            Param(name, tuple(int(d) for d in ty.shape), str(ty.dtype), call, array)
            for (name, call, array), ty in zip(params, types, strict=True)
        ]
        self.metadata = self._metadata(main)
        bb = relax.BlockBuilder(module)
        add_metadata(bb, self.metadata)
        self.module = bb.finalize()
        self.signatures = signatures_of(self.module)
        problems = check_graph({k: str(v) for k, v in self.signatures.items()}, self.metadata)
        if problems:
            raise UnsupportedError(f"{self.graph.name} cannot be built: {problems[0]}")

    def _metadata(self, main: relax.Function) -> dict[str, Any]:
        inputs = [
            _tensor(name, var.ty) for name, var in zip(self.graph.inputs, main.params, strict=False)
        ]
        results = main.ret_ty.fields if isinstance(main.ret_ty, tvm.ir.TupleType) else [main.ret_ty]
        outputs = [_tensor(name, ty) for name, ty in zip(self.graph.outputs, results, strict=True)]
        return {
            "kind": GRAPH,
            "quantization": f"fairy-{self.quant.quant}",
            "inputs": inputs,
            "outputs": outputs,
            "params": [
                {"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in self.params
            ],
        }

    def rows(self) -> list[LayerReport]:
        """Return the report: planned layers, then products that stay as they are."""
        rows = []
        calls = {matrix.layer: matrix.calls for matrix in self.layers.matrices}
        for call in self.planner.calls:
            row = describe_call(call)
            if calls[call.name] > 1:
                reason = f"{row.reason}; {calls[call.name]} nodes share this weight"
                row = LayerReport(**(vars(row) | {"reason": reason}))
            rows.append(row)
        for kept in self.layers.kept:
            shape = (1, 1, *kept.shape)[-2:]
            rows.append(
                LayerReport(
                    name=kept.name,
                    sources=(kept.name,),
                    shape=(shape[0], shape[1]),
                    kernel="graph",
                    layout="as stored",
                    act="graph",
                    stages=0,
                    terms="",
                    scale="",
                    bytes=0,
                    reason=f"stays an operator of the graph: {kept.reason}",
                )
            )
        return rows


def _tensor(name: str, ty: Any) -> dict[str, Any]:
    """Return what the metadata says of an input or output."""
    if not isinstance(ty, relax.TensorType):
        raise UnsupportedError(
            f"{name} is no tensor ({type(ty).__name__}); leave this input or output out of the "
            "graph"
        )
    values = getattr(ty.shape, "values", None)
    if values is None:
        shape: list[Any] = ["?"] * max(int(ty.ndim), 0)
    else:
        shape = [_dim(value) for value in values]
    return {"name": name, "shape": shape, "dtype": str(ty.dtype)}


def _dim(value: Any) -> int | str:
    if isinstance(value, int) or hasattr(value, "value"):
        return int(value)
    return str(value)


def build_graph(
    graph: Graph,
    *,
    target: Target,
    quant: QuantConfig,
    output: str | Path | None,
    force: bool,
    dry_run: bool,
    debug_dump: str | Path | None,
    progress: Progress | None,
    clock: Clock,
) -> BuildReport:
    """Compile an imported graph; arguments and errors are those of `compiler.build`."""
    if output is not None:
        check_output(output, force=force)
        check_linker(target)
        if target.device == "cuda":
            check_nvcc(target)
    work = GraphWork(graph, quant, target)
    if not work.layers.matrices:
        raise FairyError(
            f"{graph.name} has no linear layer: no MatMul or Gemm with a constant matrix was found"
            + "".join(f"; {kept.name}: {kept.reason}" for kept in work.layers.kept[:3])
            + "; fairy_compile quantises linear layers alone"
        )
    with clock("define"):
        work.define()
    report = _report(work)
    report.notes += unmatched_notes(quant, [matrix.layer for matrix in work.layers.matrices])
    if dry_run:
        report.seconds = clock.seconds
        return report
    needed = report.param_bytes + OTHER_FILES_BYTES
    with staged_directory(output, force=force, needed_bytes=needed) as directory:
        with clock("weights"):
            written, demands = write_params(work, directory, progress)
        if demands:
            with clock("define again"):
                work.define(demands)
                report.layers = work.rows()
        with clock("compile"):
            executable = _compile(work, debug_dump, progress)
            export_library(executable, target, directory)
        with clock("finish"):
            _write_manifest(work, directory, written, report)
    report.output = str(output)
    report.seconds = clock.seconds
    return report


def _compile(work: GraphWork, debug_dump: str | Path | None, progress: Progress | None) -> Any:
    try:
        return compile_module(
            work.module,
            work.target,
            ENTRY_POINTS,
            graph=True,
            debug_dump=Path(debug_dump) if debug_dump else None,
            progress=progress,
        )
    except FairyError:
        raise
    except Exception as error:  # whatever TVM's passes raise on operators we did not write
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        advice = "try --target cpu, or leave" if work.target.is_gpu else "leave"
        raise UnsupportedError(
            f"the operators of {work.graph.name} that are no linear layers cannot be compiled for "
            f"target {work.target.name}: {lines[-1][:300] if lines else repr(error)}; {advice} "
            "those operators out of the graph"
        ) from error


def _report(work: GraphWork) -> BuildReport:
    rows = work.rows()
    notes = [work.quant_note] if work.quant_note else []
    dense = [row for row in rows if not row.stages]
    if dense:
        notes.append(f"{len(dense)} of {len(rows)} linear layers stay dense; see their reasons")
    if work.layers.counts:
        others = ", ".join(f"{count} {name}" for name, count in work.layers.counts.items())
        notes.append(f"left as they are: {others}")
    return BuildReport(
        model=work.graph.name,
        family=f"{work.graph.kind} graph",
        target=work.target.name,
        output=None,
        layers=rows,
        param_bytes=sum(param_nbytes(p) for p in work.params),
        sizes={
            key: [f"{t['name']} {t['dtype']} {t['shape']}" for t in work.metadata[key]]
            for key in ("inputs", "outputs")
        },
        notes=notes,
    )


def _write_manifest(
    work: GraphWork, directory: Path, written: WrittenParams, report: BuildReport
) -> None:
    manifest = manifest_of(
        work,
        directory,
        written,
        report,
        kind=GRAPH,
        model=ModelInfo(report.family, report.sizes),
        others=[],
        functions=ENTRY_POINTS,
    )
    manifest.write(directory)
    report.files = {name: entry.bytes for name, entry in manifest.files.items()}
