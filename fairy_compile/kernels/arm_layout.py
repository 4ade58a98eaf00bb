"""Packed weights of the ARM kernels: one layout, R8C8, for every instruction set.

A row tile is 8 complex rows and a column block 8 complex columns, so the 64 bytes of a plane are
four NEON registers of two rows each:

    codes[row tile][step][plane][8 * row + column]  =  c0 | c1 << 2 | c2 << 4 | c3 << 6

    register v  =  [ row 2v, columns 0..7 | row 2v + 1, columns 0..7 ]

which is the 2 x 8 operand of smmla; sdot leaves two sums a row, which one addp adds. Nibbles,
steps, planes, and the other arrays are those of `x86_layout`, with signed tables.
"""

from __future__ import annotations

from fairy_compile.kernels.x86_layout import X86Layout

ROWS = 8
BLOCK = 8
# Joint entries are at most p + q in size, and tables are int8.
JOINT_LIMIT = 127

ARM_LAYOUT = X86Layout(ROWS, JOINT_LIMIT, block=BLOCK, signed=True, pair_terms=True)
