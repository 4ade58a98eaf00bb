"""Names that keep TVM's compile times short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

if TYPE_CHECKING:
    from tvm.ir import Expr


def opaque(value: Expr, dtype: str = "int32") -> Expr:
    """Return an integer as a name of which TVM knows nothing.

    It puts the definitions of names into the expressions it simplifies, again for every vector
    access: with indices that come of divisions and look-ups this takes seconds a kernel. Reading
    memory ends that, and LLVM removes it.
    """
    holder = T.alloc_buffer((1,), dtype)
    T.buffer_store(holder, value, [0])
    return T.bind(holder[0])
