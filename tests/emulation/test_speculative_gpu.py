"""Speculative sampling on simulated devices, against NumPy; NumPy's against the distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fairy_compile.kernels.speculative_gpu import speculative_functions
from tests.emulation.gpu_cases import call, compile_functions, host_target

KINDS = ("metal", "cuda", "vulkan")


@pytest.fixture(
    params=[KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def run(request, rig_of, tmp_path: Path):
    """Return run(name, *arrays) -> the arrays after the call, on one device after the other."""
    rig_of(request.param)
    target = host_target(request.param)
    library = compile_functions(speculative_functions(), target, tmp_path)
    return lambda name, *arrays: call(library, name, target, arrays)


def verify(
    draft_probs: np.ndarray,
    draft_tokens: np.ndarray,
    probs: np.ndarray,
    first_child: np.ndarray,
    next_sibling: np.ndarray,
    uniform: np.ndarray,
    last: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (probs, last) after ``sampler_verify_draft_tokens``; see `build_verify_drafts`."""
    probs, last = probs.copy(), last.copy()
    for sequence, parent in enumerate(last):
        node = first_child[parent]
        while node >= 0:
            token = draft_tokens[node]
            rest = np.maximum(probs[parent] - draft_probs[node], 0)
            likely = probs[parent, token] >= uniform[node] * draft_probs[node, token]
            if likely or rest.sum() <= 1e-7:
                parent, node = node, first_child[node]
            else:
                probs[parent] = rest / rest.sum()
                node = next_sibling[node]
        last[sequence] = parent
    return probs, last


def random_trees(rng: np.random.Generator, sizes: list[int]) -> tuple[np.ndarray, ...]:
    """Return (first_child, next_sibling, roots) of one tree a sequence, any of its shapes."""
    nodes = sum(sizes)
    first_child, next_sibling = (np.full(nodes, -1, np.int32) for _ in range(2))
    roots = np.cumsum([0, *sizes[:-1]]).astype(np.int32)
    for root, size in zip(roots, sizes, strict=True):
        newest: dict[int, int] = {}
        for node in range(root + 1, root + size):
            parent = int(rng.integers(root, node))
            if parent in newest:
                next_sibling[newest[parent]] = node
            else:
                first_child[parent] = node
            newest[parent] = node
    return first_child, next_sibling, roots


@pytest.mark.parametrize("vocab", [7, 700])
def test_drafts_are_verified_as_numpy_does(run, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    sizes = [1, 2, 5, 9, 4, 12]
    for spread in (0.05, 3.0):
        first_child, next_sibling, roots = random_trees(rng, sizes)
        nodes = sum(sizes)
        draft_probs = rng.dirichlet(np.full(vocab, spread), nodes).astype(np.float32)
        probs = rng.dirichlet(np.full(vocab, spread), nodes).astype(np.float32)
        draft_probs[::3] = probs[::3]  # some that nothing is left of
        tokens = np.array([rng.choice(vocab, p=p / p.sum()) for p in draft_probs.astype(float)])
        tokens = tokens.astype(np.int32)
        tokens[roots] = 1 << 30  # which an engine leaves as they were
        arrays = [
            draft_probs, tokens, probs, first_child, next_sibling,
            rng.random(nodes).astype(np.float32), roots,
        ]  # fmt: skip
        want_probs, want_last = verify(*arrays)
        *_, got_last = got = run("sampler_verify_draft_tokens", *arrays)
        np.testing.assert_array_equal(got_last, want_last)
        # Sums of at most 700 numbers of one sign in another order, and a division, for each of at
        # most 11 refusals.
        np.testing.assert_allclose(got[2], want_probs, rtol=11 * 700 * 2.0**-24, atol=1e-7)
    assert (want_last != roots).any()


def test_drafts_with_a_greedy_model(run) -> None:
    """Probabilities of 0 and 1, as at temperature 0: kept is what the model would write."""
    vocab, length = 300, 5
    nodes = np.arange(length)
    writes = np.array([11, 299, 5, 0, 42])
    for good in range(length):
        tokens = np.array([77, *writes[:-1]], np.int32)
        tokens[good + 1 :] = 200  # the first ``good`` are what the model writes
        eye = np.eye(vocab, dtype=np.float32)
        first_child = np.append(nodes[1:], -1).astype(np.int32)
        next_sibling, uniform = np.full(length, -1, np.int32), np.zeros(length, np.float32)
        uniform[:] = 0.25
        *_, last = got = run(
            "sampler_verify_draft_tokens", eye[tokens], tokens, eye[writes], first_child,
            next_sibling, uniform, np.zeros(1, np.int32),
        )  # fmt: skip
        assert last == [good]
        assert got[2][good].argmax() == writes[good]


def test_numpy_draws_what_the_model_would_have_drawn() -> None:
    """The token after the root, accepted or drawn from what is left, has the model's odds."""
    rng, vocab, trials = np.random.default_rng(0), 6, 20000
    draft, model = (rng.dirichlet(np.full(vocab, 0.7)).astype(np.float32) for _ in range(2))
    # A root and two proposals, one beside the other.
    links = np.array([1, -1, -1], np.int32), np.array([-1, 2, -1], np.int32)
    counts = np.zeros(vocab)
    for _ in range(trials):
        tokens = np.array([0, *rng.choice(vocab, 2, p=draft / draft.sum())], np.int32)
        probs, last = verify(
            np.tile(draft, (3, 1)), tokens, np.tile(model, (3, 1)), *links,
            rng.random(3).astype(np.float32), np.zeros(1, np.int32),
        )  # fmt: skip
        left = probs[0].astype(np.float64)
        drawn = rng.choice(vocab, p=left / left.sum())
        counts[tokens[last[0]] if last[0] else drawn] += 1
    # Five standard deviations of a count.
    allowed = 5 * np.sqrt(trials * model * (1 - model)) + 1
    assert np.all(np.abs(counts - trials * model) <= allowed)


def test_rows_move(run) -> None:
    rng = np.random.default_rng(1)
    many, few = rng.random((9, 700)).astype(np.float32), rng.random((4, 700)).astype(np.float32)
    index = np.array([8, 0, 3, 5], np.int32)
    np.testing.assert_array_equal(run("gather_probs", many, index, few)[2], many[index])
    want = many.copy()
    want[index] = few
    np.testing.assert_array_equal(run("scatter_probs", few, index, many)[2], want)
