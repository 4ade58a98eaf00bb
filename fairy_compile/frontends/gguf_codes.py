"""Phase codes as Fairy2i's GGUF files hold them, in either of two layouts.

The format is that of the authors' llama.cpp (docs/fairy2i/spec.md there). Both layouts have the
2-bit codes 0, 1, 2, 3 for -1, 1, -i, i, and scales per complex tile of 64x64, real before
imaginary:

    tile64_v2       one tensor a term and stage, ``<layer>.U.s0`` .. ``<layer>.W.s1``, with blocks
                    of 20 bytes for 64 columns of a row: 16 bytes of codes, of which byte b holds
                    the columns b, b + 16, b + 32, b + 48, lowest bits first; two float16 scales,
                    which all 64 rows of a tile repeat
    bundle_m64k64   ``<layer>.bundle.codes``, bytes (tiles, 64, branches, 16): tiles by rows, in
                    each for every subtile of 16 rows and every four columns, lowest bits first, and
                    every branch a byte for each of the 16 rows; ``<layer>.bundle.scales`` (tiles,
                    branches, 2), float16 or bfloat16; branches are U0, W0 or U0, U1, W0, W1
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fairy_compile.errors import ModelFileError
from fairy_compile.frontends.gguf_file import GgufFile
from fairy_compile.phase import PhaseTensor, pack_codes
from fairy_compile.phase.signed_scales import with_signed_scales
from fairy_compile.phase.tensor import TILE

BLOCK = 20
BRANCHES = {1: "U0,W0", 2: "U0,U1,W0,W1"}
# Ours for theirs: 1, i, -1, -i are 0, 1, 2, 3.
_OURS = np.array([2, 0, 3, 1], np.uint8)
_OURS_OF_BYTE = pack_codes(_OURS[(np.arange(256)[:, None] >> [0, 2, 4, 6]) & 3])[:, 0]


@dataclass(frozen=True)
class CodedLayer:
    """A layer with phase codes in a GGUF file.

    Attributes:
        name: its name in the file, e.g. ``"blk.0.attn_q"``.
        stages: T.
        bundle: whether it has the layout of bundles.
        shape: (2n, 2m), the real map.
        first: its first complex row, where several layers share tensors.
        whole: complex rows of those tensors.
    """

    name: str
    stages: int
    bundle: bool
    shape: tuple[int, int]
    first: int
    whole: int

    def rows(self, first: int, count: int) -> CodedLayer:
        """Return the layer of ``count`` complex rows from ``first``."""
        return replace(self, first=first, shape=(2 * count, self.shape[1]))

    def tensors(self) -> list[str]:
        """Return the names of its tensors."""
        if self.bundle:
            return [f"{self.name}.bundle.codes", f"{self.name}.bundle.scales"]
        return [f"{self.name}.{term}.s{t}" for term in "UW" for t in range(self.stages)]


def find_layer(
    file: GgufFile, name: str, stages: int, *, bundle: bool, columns: int
) -> CodedLayer | None:
    """Return the coded layer ``name`` with its shape, or None if the file has none of its tensors.

    Args:
        file: where to look.
        name: e.g. ``"blk.0.attn_q"``.
        stages: T.
        bundle: which layout.
        columns: complex columns m.

    Raises:
        ModelFileError: tensors of it are missing, of another stage or layout, or of another shape.
    """
    present = {
        tensor
        for both in (True, False)
        for t in (1, 2)
        for tensor in CodedLayer(name, t, both, (0, 0), 0, 0).tensors()
        if tensor in file.tensors
    }
    layer = CodedLayer(name, stages, bundle, (0, 2 * columns), 0, 0)
    wanted = layer.tensors()
    if not present:
        return None
    if present != set(wanted):
        raise ModelFileError(
            f"{file.path} has {', '.join(sorted(present))} for {name}; its metadata ask for "
            f"{', '.join(wanted)}"
        )
    shapes = [file.tensors[tensor].shape for tensor in wanted]
    tiles = columns // TILE
    if bundle:
        branches = 2 * stages
        count = shapes[0][0] if shapes[0] else 0
        wants = [(count, TILE, branches, TILE // 4), (count, branches, 2)]
        shapes[1] = shapes[1][-3:] if shapes[1][:-3] == (1,) else shapes[1]
        rows = count // tiles * TILE if tiles else 0
        fits = shapes == wants and tiles and count % tiles == 0
    else:
        rows = shapes[0][0] if shapes[0] else 0
        fits = all(shape == (rows, columns) for shape in shapes) and rows % TILE == 0
    if not fits or rows == 0 or columns % TILE:
        raise ModelFileError(
            f"{file.path}: {wanted[0]} has the shape {shapes[0]} and {wanted[-1]} {shapes[-1]}, "
            f"which are no tiles of 64x64 for {columns} complex columns"
        )
    return replace(layer, shape=(2 * rows, 2 * columns), whole=rows)


def read_layer(file: GgufFile, layer: CodedLayer) -> PhaseTensor:
    """Return the codes and scales of a layer.

    Raises:
        ModelFileError: the file is too short, or scales are not finite or differ within a tile.
    """
    codes, scales = (_read_bundle if layer.bundle else _read_tiles)(file, layer)
    if not np.isfinite(scales).all():
        raise ModelFileError(f"{file.path}: scales of {layer.name} are not finite")
    return with_signed_scales(codes, scales)


def _read_bundle(file: GgufFile, layer: CodedLayer) -> tuple[np.ndarray, np.ndarray]:
    """Return packed codes (T, 2, n, m/4) and scales (T, 2, 2, n/64, m/64)."""
    codes_name, scales_name = layer.tensors()
    t, across = layer.stages, layer.shape[1] // (2 * TILE)
    down = layer.whole // TILE
    own = slice(layer.first // TILE, (layer.first + layer.shape[0] // 2) // TILE)
    raw = file.read_bytes(codes_name, (down, across, 4, 16, 2, t, 16), whole=True)[own]
    codes = _OURS_OF_BYTE[raw].transpose(5, 4, 0, 2, 6, 1, 3)  # T, term, strip, subtile, row, ...
    scales = file.read(scales_name).astype(np.float32).reshape(down, across, 2, t, 2)[own]
    return codes.reshape(t, 2, -1, across * 16), scales.transpose(3, 2, 4, 0, 1)


def _read_tiles(file: GgufFile, layer: CodedLayer) -> tuple[np.ndarray, np.ndarray]:
    """Return packed codes (T, 2, n, m/4) and scales (T, 2, 2, n/64, m/64)."""
    across, own = layer.shape[1] // (2 * TILE), layer.shape[0] // 2
    codes = np.empty((layer.stages, 2, own, across * 16), np.uint8)
    scales = np.empty((layer.stages, 2, 2, own // TILE, across), np.float32)
    for k, name in enumerate(layer.tensors()):
        term, stage = divmod(k, layer.stages)
        raw = file.read_bytes(name, (layer.whole, across, BLOCK), whole=True)[layer.first :][:own]
        lanes = [(raw[..., :16] >> shift) & 3 for shift in (0, 2, 4, 6)]
        columns = np.stack(lanes, axis=2).reshape(own, across * TILE)
        codes[stage, term] = pack_codes(_OURS[columns])
        pairs = np.ascontiguousarray(raw[..., 16:]).view(np.float16)
        pairs = pairs.reshape(-1, TILE, across, 2)
        if (pairs.view(np.uint16) != pairs[:, :1].view(np.uint16)).any():
            raise ModelFileError(f"{file.path}: scales of {name} differ within a tile of 64x64")
        scales[stage, term] = pairs[:, 0].astype(np.float32).transpose(2, 0, 1)
    return codes, scales
