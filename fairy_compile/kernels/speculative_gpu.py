"""What an engine calls on GPUs for speculative decoding: drafts' probabilities, and their test.

A draft model proposes tokens, as nodes of a tree for each sequence; the model itself says how
likely each is. Speculative sampling (Leviathan, Kalman and Matias, arXiv 2211.17192, algorithm 1)
keeps a proposal with probability min(1, p / q), and otherwise goes on with max(p - q, 0), scaled to
sum to 1, so that tokens are distributed as if the model had drawn them all. Signatures:
`artifact.contract`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import (
    THREADS,
    build_function,
    ceildiv,
    launch,
    local,
    reduce_group,
    store,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

_ROUNDING = 1e-7
"""What is left of p - q is no more than rounding below this: the proposal is kept."""


def build_verify_drafts() -> PrimFunc:
    """Return ``sampler_verify_draft_tokens``, one thread group a sequence.

    Nodes are the last token of each sequence, which is the root of a tree, and the proposals after
    it. Arguments, of which the third and the last are changed in place:

        draft_probs float32 (n, v): what node i was drawn from.
        draft_tokens int32 (n,): the token of node i; a root's is not read.
        probs float32 (n, v): what follows node i, according to the model. Of nodes whose proposals
            were refused, it becomes what is left to draw from.
        first_child, next_sibling int32 (n,): nodes, or -1.
        uniform float32 (n,): a number of [0, 1) for each node.
        last int32 (b,): the root of each sequence; becomes the last node that is kept, from whose
            row of ``probs`` the engine draws the token after it.
    """

    def body() -> None:
        nodes, vocab, sequences = T.int32(), T.int32(), T.int32()

        def rows(name: str) -> Buffer:
            return T.arg(name, T.buffer((nodes, vocab), "float32"))

        def each(name: str, dtype: str = "int32", count: Any = nodes) -> Buffer:
            return T.arg(name, T.buffer((count,), dtype))

        draft_probs, draft_tokens, probs = rows("draft_probs"), each("draft_tokens"), rows("probs")
        first_child, next_sibling = each("first_child"), each("next_sibling")
        uniform, last = each("uniform", "float32"), each("last", count=sequences)
        with launch({"blockIdx.x": sequences, "threadIdx.x": THREADS}) as (sequence, thread):
            parent, child, token, kept = (local((1,), "int32") for _ in range(4))
            own, left = local((1,)), local((1,))
            store(parent, 0, last[sequence])
            store(child, 0, first_child[parent[0]])
            # Every turn looks at one node, and at none where a sequence has no more: all threads of
            # a group take all turns, since they meet in each.
            with T.serial(0, nodes):
                looks = child[0] >= 0
                node = T.bind(T.max(child[0], T.int32(0)))
                above = T.bind(parent[0])

                def rest(i: Expr, above: Expr = above, node: Expr = node) -> Expr:
                    return T.max(probs[above, i] - draft_probs[node, i], T.float32(0))

                def each_token(condition: Expr, body: Callable[[Expr], None]) -> None:
                    count = T.if_then_else(condition, ceildiv(vocab, THREADS), 0)
                    with T.serial(0, count) as step:
                        i = T.bind(step * THREADS + thread)
                        with when(i < vocab):
                            body(i)

                # A thread reads what it wrote itself in an earlier turn, and no other's.
                store(token, 0, T.int32(0))
                store(own, 0, T.float32(0))
                with when(looks):
                    store(token, 0, draft_tokens[node])
                    with when(token[0] % THREADS == thread):
                        store(own, 0, probs[above, token[0]])
                mass = reduce_group([own[0]], lambda a, b: a + b, thread, THREADS)[0]
                likely = mass >= uniform[node] * draft_probs[node, token[0]]
                store(kept, 0, T.if_then_else(likely, T.int32(1), T.int32(0)))
                store(left, 0, T.float32(0))
                tried = T.And(looks, kept[0] == 0)
                each_token(tried, lambda i: store(left, 0, left[0] + rest(i)))
                total = reduce_group([left[0]], lambda a, b: a + b, thread, THREADS)[0]
                with when(total <= T.float32(_ROUNDING)):
                    store(kept, 0, T.int32(1))
                refused = T.And(looks, kept[0] == 0)
                each_token(refused, lambda i: store(probs, (above, i), rest(i) / total))
                with when(looks):
                    store(parent, 0, T.if_then_else(kept[0] == 0, above, node))
                    links = (next_sibling[node], first_child[node])
                    store(child, 0, T.if_then_else(kept[0] == 0, *links))
            with when(thread == 0):
                store(last, sequence, parent[0])

    return build_function("sampler_verify_draft_tokens", body)


def build_move_rows(name: str, scatter: bool) -> PrimFunc:
    """Return a copy of rows: x (m, v), index int32 (b,), y (b, v), y[i] = x[index[i]].

    With ``scatter``, x is (b, v) and y (m, v), and y[index[i]] = x[i].
    """

    def body() -> None:
        many, few, vocab = T.int32(), T.int32(), T.int32()
        first, second = (few, many) if scatter else (many, few)
        x = T.arg("x", T.buffer((first, vocab), "float32"))
        index = T.arg("index", T.buffer((few,), "int32"))
        y = T.arg("y", T.buffer((second, vocab), "float32"))
        extents = {
            "blockIdx.y": few,
            "blockIdx.x": ceildiv(vocab, THREADS),
            "threadIdx.x": THREADS,
        }
        with launch(extents) as (row, block, thread):
            i = T.bind(block * THREADS + thread)
            with when(T.And(row < few, i < vocab)):
                far = T.bind(index[row])
                to, source = ((far, i), (row, i)) if scatter else ((row, i), (far, i))
                store(y, to, x[source])

    return build_function(name, body)


def speculative_functions() -> dict[str, PrimFunc]:
    """Return the three functions an engine calls beside the models."""
    return {
        "sampler_verify_draft_tokens": build_verify_drafts(),
        "gather_probs": build_move_rows("gather_probs", scatter=False),
        "scatter_probs": build_move_rows("scatter_probs", scatter=True),
    }
