"""x86 phase GEMM: nibbles of codes look up int8 tables, which meet int8 or int16 activations.

For every step of every row tile (see `x86_layout` for the bytes) and every look-up of it:

    entries = shuffle(table, nibble)              one byte per (row, column of the block)
    sum_a  += dot4(entries, q_re of the block)    one int32 per row
    sum_b  += dot4(entries, q_im of the block)

and, when the scale of weights or activations changes, sums are scaled into float32 outputs. With
R, I a term's real and imaginary tables and a, b = Re x, Im x:

    U x:       re += R.a - I.b,  im += R.b + I.a
    W conj x:  re += R.a + I.b,  im += I.a - R.b

Two table modes share the packed bytes. ``split`` has a table of -1, 0, 1 for each stage and is
exact. ``joint`` (tensor scales) has one table for each pair of stages, holding p and q in the ratio
of their scales: half the look-ups and dot products for a ratio error that `joint_ratio` bounds. A
single stage pairs U with W instead, whose sums and differences are the entries of the real matrix:

    re += (RU + RW).a + (IW - IU).b,  im += (IU + IW).a + (RU - RW).b

AVX2 takes three instructions for a dot product, so for T = 2 it combines more: in mode ``combined``
the look-ups of U and W are integers of one unit for each axis, whose sums and differences are the
entries above, again for half of the dot products.

int16 activations are two int8 digits, 256 hi + lo, with a dot product for each.

Batches of 9 rows and more decode the codes first, as `x86_panels` describes, with table modes of
their own; `x86_panel_dot` multiplies them, or `x86_amx` on machines with AMX. Where each row has to
give what it gives alone (batch ``decode``), tables stay those of one row: `x86_amx_decode`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fairy_compile.kernels import codebook_cpu
from fairy_compile.kernels.base import Batch, choose_knobs
from fairy_compile.kernels.x86_layout import BLOCK, has_joint
from fairy_compile.kernels.x86_panel_layout import (
    MIN_TOKENS,
    WORD_LIMIT,
    PanelLayout,
    TableMode,
    combined_error,
)
from fairy_compile.kernels.x86_tables import joint_offset, joint_ratio_error
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.targets import Target


@dataclass(frozen=True)
class Isa:
    """What an instruction set offers this kernel.

    Attributes:
        name: short name for reports.
        features: LLVM feature names it needs.
        rows: complex rows of a row tile: a vector holds 4 bytes of each.
        shuffle: LLVM intrinsic (table, index) that looks bytes up in a table of 16.
        masked_index: the shuffle gives 0 for indices above 127, so nibbles must be cut out.
        dot: LLVM intrinsic (int32 sums, unsigned, signed) adding dot products of 4 bytes, or None
            where AVX2's pmaddubsw and pmaddwd take its place.
        joint_limit: largest p + q of a joint table. 127 is what a byte holds. pmaddubsw saturates
            at int16: with entries up to 2 * 63 + 1, a pair is at most 2 * 127 * 127 = 32258.
        sums: accumulators to keep in registers at a time.
        block: rows of x that meet a panel's vectors in registers; two sums each.
        amx: AMX tiles serve batches of `MIN_TOKENS` and more.
    """

    name: str
    features: tuple[str, ...]
    rows: int
    shuffle: str
    masked_index: bool
    dot: str | None
    joint_limit: int
    sums: int
    block: int
    amx: bool = False

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return BLOCK * self.rows

    @property
    def panel_offset(self) -> int:
        """What makes the entries of panels unsigned; AMX multiplies signed ones."""
        return 0 if self.amx else joint_offset(self.joint_limit)

    @property
    def dotless(self) -> bool:
        """There is no dot product instruction; what else takes its place pays here alone."""
        return self.dot is None


AVX512_VBMI = Isa(
    name="avx512vbmi",
    features=("avx512bw", "avx512vnni", "avx512vbmi"),
    rows=16,
    shuffle="llvm.x86.avx512.permvar.qi.512",
    masked_index=False,
    dot="llvm.x86.avx512.vpdpbusd.512",
    joint_limit=127,
    sums=16,
    block=12,
)
AVX512_AMX = replace(
    AVX512_VBMI,
    name="avx512amx",
    features=(*AVX512_VBMI.features, "amx-int8", "amx-tile"),
    amx=True,
)
AVX512_VNNI = Isa(
    name="avx512vnni",
    features=("avx512bw", "avx512vnni"),
    rows=16,
    shuffle="llvm.x86.avx512.pshuf.b.512",
    masked_index=True,
    dot="llvm.x86.avx512.vpdpbusd.512",
    joint_limit=127,
    sums=16,
    block=12,
)
AVX_VNNI = Isa(
    name="avxvnni",
    features=("avx2", "avxvnni"),
    rows=8,
    shuffle="llvm.x86.avx2.pshuf.b",
    masked_index=True,
    dot="llvm.x86.avx512.vpdpbusd.256",  # LLVM selects the VEX form where there is no AVX512
    joint_limit=127,
    sums=8,
    block=6,
)
AVX2 = Isa(
    name="avx2",
    features=("avx2",),
    rows=8,
    shuffle="llvm.x86.avx2.pshuf.b",
    masked_index=True,
    dot=None,
    joint_limit=63,
    sums=8,
    block=5,
)


class X86Codebook:
    """Codebook kernel for one instruction set; implements `PhaseKernel`.

    Knobs:
        tables: ``joint`` (with tensor scales, and T >= 2 or both terms; elsewhere the same as
            ``split``) or ``split``, for few tokens; with AVX2 also ``combined`` (with tensor
            scales, T = 2 and both terms; elsewhere the same as ``joint``).
        panels: ``combined``, ``joint`` (with tensor scales and T >= 2) or ``split``, for many
            tokens; with AVX2 also ``words``.
        prefetch: bytes of codes to prefetch ahead; 0 for none; for panels on AMX alone.
        tokens: rows of x that share a look-up where there are several; half as many for int16.
        columns: columns to decode to panels at a time.
    """

    decode_from = MIN_TOKENS

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.name = f"x86.codebook.{isa.name}"
        # With a dot product instruction, two more of them cost as much as combining look-ups, and
        # products of words four times as much as those of bytes.
        combined, words = (("combined",), ("words",)) if isa.dotless else ((), ())
        self.layout = PanelLayout(isa.rows, isa.joint_limit, isa.dotless)
        self.knobs: Mapping[str, Sequence[Any]] = {
            "tables": (*combined, "joint", "split"),
            "panels": ("combined", *words, "joint", "split"),
            "prefetch": (4096, 8192, 2048, 0),
            "tokens": (4, 2, 1),
            "columns": (128, 256, 512, 1024),
        }

    def unsupported(self, spec: PhaseSpec, target: Target) -> str | None:
        """Return None if the kernel can serve ``spec`` on ``target``, else the reason in words."""
        if target.tvm.get("kind") != "llvm":
            return f"it is for CPUs; target {target.name} is {target.tvm.get('kind')}"
        if self.isa.amx and not _is_linux(target):
            return f"it asks Linux for AMX tiles; target {target.name} is another system"
        return codebook_cpu.unsupported(self.isa.features, self.layout, spec, target)

    def table_mode(self, spec: PhaseSpec, batch: Batch, knobs: Mapping[str, Any]) -> TableMode:
        """Return the tables that `build` with these knobs uses: of panels for batch ``many``.

        ``joint`` panels pair stages; they know no pairs of terms, which combined ones cover.
        """
        single = batch != "many"
        mode: TableMode = choose_knobs(self, knobs)["tables" if single else "panels"]
        if single and mode == "combined" and not self.layout.has_combined_tables(spec):
            mode = "joint"
        joint = self.layout.has_joint(spec) if single else has_joint(spec)
        return "split" if mode == "joint" and not joint else mode

    def demands(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> Mapping[str, Any]:
        """Return the fastest ``tables`` and ``panels`` that are accurate enough, or defaults."""
        joint_limit, combined_limit = codebook_cpu.error_limits(spec.act)
        demands = {}
        joint = self.layout.has_joint(spec)
        if joint and joint_ratio_error(parts, self.isa.joint_limit) > joint_limit:
            joint = False
        if self.layout.has_combined_tables(spec):
            if combined_error(parts, self.isa.joint_limit) > combined_limit:
                demands["tables"] = "joint" if joint else "split"
        elif self.layout.has_joint(spec) and not joint:
            demands["tables"] = "split"
        if combined_error(parts, self.isa.joint_limit) > combined_limit:
            if self.isa.dotless and combined_error(parts, WORD_LIMIT) <= joint_limit:
                demands["panels"] = "words"
            else:
                demands["panels"] = "joint" if joint and has_joint(spec) else "split"
        return demands

    def build(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """Return a scheduled function (x, *arrays in `layout.arrays` order, y).

        x is float32 (b, 2m) and y float32 (b, 2n); b is 1 for batch ``single`` and symbolic for
        the others, of which ``decode`` has no panels: every row meets the tables of ``single``,
        in integers, on AMX in tiles. Knobs left out take their defaults.

        Raises:
            FairyError: an unknown knob or value.
        """
        from fairy_compile.kernels.x86_activations import DIGITS
        from fairy_compile.kernels.x86_amx import TileMultiply
        from fairy_compile.kernels.x86_amx_decode import TableTiles
        from fairy_compile.kernels.x86_codegen import CodebookFunction
        from fairy_compile.kernels.x86_panel_dot import DotMultiply

        chosen = choose_knobs(self, knobs)
        wide = None
        if batch == "many":
            multiply = TileMultiply if self.isa.amx else DotMultiply
            mode = self.table_mode(spec, batch, knobs)
            wide = partial(multiply, mode=mode, columns=chosen["columns"])
        elif batch == "decode" and self.isa.amx:
            wide = TableTiles
        return CodebookFunction(
            isa=self.isa,
            layout=self.layout,
            spec=spec,
            batch=batch,
            tables=self.table_mode(spec, "single", knobs),
            tokens=1 if batch == "single" else max(1, chosen["tokens"] // DIGITS[spec.act]),
            prefetch=chosen["prefetch"],
            wide=wide,
        ).emit()


def _is_linux(target: Target) -> bool:
    triple = target.tvm.get("mtriple")
    return "linux" in triple if triple else platform.system() == "Linux"


ISAS = (AVX512_AMX, AVX512_VBMI, AVX512_VNNI, AVX_VNNI, AVX2)
CODEBOOK_KERNELS = tuple(X86Codebook(isa) for isa in ISAS)
"""The family, best first: use the first whose `unsupported` is None."""
