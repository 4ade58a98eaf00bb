"""ARM phase GEMM: nibbles of codes look up int8 tables, which meet int8 or int16 activations.

For every step of every row tile (see `arm_layout` for the bytes) and every look-up of it:

    entries = tbl(table, nibble)                one signed byte per (row, column of the block)
    sums   += entries . (re and im of x)        smmla, or sdot twice, or smull

and, when the scale of weights or activations changes, sums are scaled into float32 outputs. With
R, I a term's real and imaginary tables and a, b = Re x, Im x:

    U x:       re += R.a - I.b,  im += R.b + I.a
    W conj x:  re += R.a + I.b,  im += I.a - R.b

Three table modes share the packed bytes: ``split`` and ``joint``, as described in `x86`, and
``combined``, with half the multiplies of joint tables for T = 2, or of split ones for T = 1, see
`arm_tables`. All instruction sets share the packed bytes, too.

int16 activations are two int8 digits, 256 hi + lo, with a multiply for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fairy_compile.kernels import codebook_cpu
from fairy_compile.kernels.arm_layout import ARM_LAYOUT
from fairy_compile.kernels.arm_tables import APART, TOGETHER, combined_error, has_combined
from fairy_compile.kernels.base import Batch, choose_knobs
from fairy_compile.kernels.x86_layout import has_joint
from fairy_compile.kernels.x86_tables import joint_ratio_error
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
        sums_per_quad: accumulators of four rows, for one token and a unit of two products. smmla
            sums both halves of x for two rows in one register, sdot needs one for each half, and
            smull one for each half and row.
        sums: accumulators to keep in registers at a time. Of 32, the others hold tables, outputs
            and look-ups in flight; smmla's wide sums leave it with more of the latter.
        terms: the set of combined tables it reads. smmla multiplies with both halves of x whether
            they are wanted or not, and so looks up U and W apart.
        one_stage: it gains by combined tables of one stage. smull's products of their entries need
            to be widened one by one, those of split tables do not.
    """

    name: str
    features: tuple[str, ...]
    sums_per_quad: int
    sums: int
    terms: int = TOGETHER
    one_stage: bool = True


I8MM = Isa("i8mm", ("neon", "i8mm"), sums_per_quad=2, sums=8, terms=APART)
DOTPROD = Isa("dotprod", ("neon", "dotprod"), sums_per_quad=4, sums=16)
NEON = Isa("neon", ("neon",), sums_per_quad=8, sums=16, one_stage=False)

TableMode = Literal["combined", "joint", "split"]


class ArmCodebook:
    """Codebook kernel for one instruction set; implements `PhaseKernel`.

    Knobs:
        tables: ``combined`` (where `has_combined` and the instruction set gains; elsewhere the same
            as ``joint``), ``joint`` (where the spec has tensor scales and T >= 2; elsewhere the
            same as ``split``) or ``split``.
        tokens: rows of x that share a look-up in batch ``many``, as many as registers allow; half
            as many for int16.
    """

    layout = ARM_LAYOUT
    decode_from = None

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.name = f"arm.codebook.{isa.name}"
        tokens = tuple(t for t in (4, 2, 1) if t * isa.sums_per_quad <= isa.sums)
        self.knobs: Mapping[str, Sequence[Any]] = {
            "tables": ("combined", "joint", "split"),
            "tokens": tokens,
        }

    def unsupported(self, spec: PhaseSpec, target: Target) -> str | None:
        """Return None if the kernel can serve ``spec`` on ``target``, else the reason in words."""
        if target.tvm.get("kind") != "llvm":
            return f"it is for CPUs; target {target.name} is {target.tvm.get('kind')}"
        return codebook_cpu.unsupported(self.isa.features, self.layout, spec, target)

    def table_mode(self, spec: PhaseSpec, knobs: Mapping[str, Any]) -> TableMode:
        """Return the tables that `build` with these knobs reads."""
        mode: TableMode = choose_knobs(self, knobs)["tables"]
        if mode == "combined" and not self._has_combined(spec):
            mode = "joint"
        return "split" if mode == "joint" and not has_joint(spec) else mode

    def demands(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> Mapping[str, Any]:
        """Return the fastest ``tables`` that are accurate enough, if not the default."""
        joint_limit, combined_limit = codebook_cpu.error_limits(spec.act)
        if self._has_combined(spec):
            # With one stage, combined tables are as good as joint ones of two.
            limit = joint_limit if spec.stages == 1 else combined_limit
            if combined_error(parts, self.isa.terms) <= limit:
                return {}
        if not has_joint(spec):
            return {"tables": "split"} if self._has_combined(spec) else {}
        if joint_ratio_error(parts, self.layout.joint_limit) > joint_limit:
            return {"tables": "split"}
        return {"tables": "joint"} if self._has_combined(spec) else {}

    def build(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """Return a scheduled function (x, *arrays in `layout.arrays` order, y).

        x is float32 (b, 2m) and y float32 (b, 2n); b is 1 for batch ``single`` and symbolic for
        ``many``. Knobs left out take their defaults.

        Raises:
            FairyError: an unknown knob or value.
        """
        from fairy_compile.kernels.arm_codegen import CodebookFunction
        from fairy_compile.kernels.x86_activations import DIGITS

        chosen = choose_knobs(self, knobs)
        return CodebookFunction(
            isa=self.isa,
            spec=spec,
            batch=batch,
            mode=self.table_mode(spec, knobs),
            tokens=max(1, chosen["tokens"] // DIGITS[spec.act]) if batch != "single" else 1,
        ).emit()

    def _has_combined(self, spec: PhaseSpec) -> bool:
        return has_combined(spec) and (spec.stages > 1 or self.isa.one_stage)


CODEBOOK_KERNELS = tuple(ArmCodebook(isa) for isa in (I8MM, DOTPROD, NEON))
"""The family, best first: use the first whose `unsupported` is None."""
