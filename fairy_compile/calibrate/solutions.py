"""Solved layers on disk, one file a part of the model, until the checkpoint is put together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fairy_compile.calibrate.gptq import Solved
from fairy_compile.config import Granularity
from fairy_compile.frontends.safetensors_file import SafetensorsFile
from fairy_compile.frontends.safetensors_writer import SafetensorsWriter
from fairy_compile.phase import PhaseTensor

_KEY = "layers"


@dataclass(frozen=True)
class Candidate:
    """A solved layer without its data.

    Attributes:
        stages: T.
        reason: how its codes were made.
        nmse: see `Solved`.
        output_error: see `Solved`.
        plain_nmse: with one stage, that with the published rule's scales.
        plain_output_error: likewise.
    """

    stages: int
    reason: str
    nmse: float
    output_error: float
    plain_nmse: float | None = None
    plain_output_error: float | None = None


@dataclass(frozen=True)
class _Stored:
    candidate: Candidate
    file: Path
    n: int
    m: int
    scale: Granularity


class Solutions:
    """Candidates by layer and T.

    Args:
        directory: where the files lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stored: dict[str, dict[int, _Stored]] = {}

    def path(self, part: int) -> Path:
        """Return the file of a part of the model."""
        return self._directory / f"part-{part:04d}.safetensors"

    def save(self, part: int, solved: Mapping[str, Mapping[int, tuple[Solved, str]]]) -> None:
        """Write a part's file, which appears complete or not at all.

        Args:
            part: number of the part.
            solved: layer -> T -> (solution, how it was made).
        """
        arrays, table = {}, []
        for layer, by_stages in solved.items():
            for stages, (solution, reason) in by_stages.items():
                tensor = solution.tensor
                arrays[f"{layer}@{stages}.codes"] = tensor.codes
                arrays[f"{layer}@{stages}.scales"] = tensor.scales
                errors = [solution.nmse, solution.output_error]
                if solution.plain is not None:
                    arrays[f"{layer}@{stages}.plain"] = solution.plain.tensor.scales
                    errors += [solution.plain.nmse, solution.plain.output_error]
                candidate = Candidate(stages, reason, *errors)
                place = {"layer": layer, "n": tensor.n, "m": tensor.m, "scale": tensor.scale}
                table.append(place | asdict(candidate))
        partial = self.path(part).with_suffix(".partial")
        layout = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        with SafetensorsWriter(partial, layout, {_KEY: json.dumps(table)}) as writer:
            for name, array in arrays.items():
                writer.add(name, array)
        partial.replace(self.path(part))
        self.load(part)

    def load(self, part: int) -> None:
        """Take in the file of a part."""
        file = self.path(part)
        for entry in json.loads(SafetensorsFile(file).metadata[_KEY]):
            layer, n, m, scale = (entry.pop(key) for key in ("layer", "n", "m", "scale"))
            candidate = Candidate(**entry)
            stored = _Stored(candidate, file, n, m, scale)
            self._stored.setdefault(layer, {})[candidate.stages] = stored

    def layers(self) -> list[str]:
        """Return the layers that are solved."""
        return list(self._stored)

    def candidates(self, layer: str) -> dict[int, Candidate]:
        """Return T -> candidate of a layer."""
        return {stages: stored.candidate for stages, stored in self._stored[layer].items()}

    def has_plain(self, layer: str, stages: int) -> bool:
        """Tell whether a candidate is there with the published rule's scales, too."""
        return self._stored[layer][stages].candidate.plain_nmse is not None

    def tensor(self, layer: str, stages: int, *, plain: bool = False) -> PhaseTensor:
        """Read the codes and scales of a candidate, with ``plain`` the rule's if it has both."""
        stored = self._stored[layer][stages]
        file = SafetensorsFile(stored.file)
        both = plain and stored.candidate.plain_nmse is not None
        parts = ("codes", "plain" if both else "scales")
        codes, scales = (file.read(f"{layer}@{stages}.{part}") for part in parts)
        return PhaseTensor(codes, scales, stored.n, stored.m, ("U", "W"), stored.scale)
