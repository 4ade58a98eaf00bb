"""Page tables against the runtime's cache as a model of them, and where step inputs lie."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.errors import FairyError
from fairy_compile.runtime.kv_cache import KVCache
from fairy_compile.runtime.pages import PAGE_SIZE, OwnPages, pages_of
from fairy_compile.runtime.steps import StepInputs

CAPACITY, CONTEXT, SEQUENCES = 512, 200, 4


class Memory:
    """Pages that hold a token a slot, and the texts that should be in them."""

    def __init__(self) -> None:
        self.slots = np.full((pages_of(CAPACITY) + 1, PAGE_SIZE), -1)
        self.owner = OwnPages(len(self.slots), self.copy)
        self.cache = KVCache(
            self.owner, context=CONTEXT, capacity=CAPACITY, max_sequences=SEQUENCES
        )
        self.texts: dict[int, list[int]] = {}
        self.rng = np.random.default_rng(5)

    def copy(self, source: int, target: int) -> None:
        assert source != target
        self.slots[target] = self.slots[source]

    def step(self, counts: dict[int, int]) -> None:
        """Append random tokens as model functions do, by the tables alone."""
        new = {s: self.rng.integers(0, 1000, n).tolist() for s, n in counts.items()}
        with self.cache.forward(list(counts), list(counts.values())):
            tables = self.owner.tables()
            tokens = [token for own in new.values() for token in own]
            for place, token in zip(tables.places, tokens, strict=True):
                self.slots[place // PAGE_SIZE, place % PAGE_SIZE] = token
            for s, own in new.items():
                self.texts[s] = self.texts[s] + own
            for i, s in enumerate(counts):
                pages = tables.values[tables.indptr[i] : tables.indptr[i + 1]]
                keys = (len(pages) - 1) * PAGE_SIZE + tables.last_page[i]
                assert self.slots[pages].ravel()[:keys].tolist() == self.texts[s]
                positions = tables.positions[tables.rows[i] : tables.rows[i + 1]]
                assert positions.tolist() == list(range(keys - counts[s], keys))


def test_random_histories_keep_every_text() -> None:
    """Texts of sequences that share pages survive whatever others do."""
    memory = Memory()
    rng, cache, texts = np.random.default_rng(2), memory.cache, memory.texts
    done = dict.fromkeys(("add", "fork", "popn", "remove", "step"), 0)
    for _ in range(3000):
        kind = rng.choice(["add", "fork", "popn", "remove", "step", "step", "step"])
        known = list(texts)
        try:
            if kind == "add":
                texts[cache.add()] = []
            elif kind == "step" and known:
                chosen = rng.permutation(known)[: rng.integers(1, len(known) + 1)].tolist()
                memory.step({s: int(rng.choice([1, 1, 5, 30])) for s in chosen})
            elif known:
                sequence = int(rng.choice(known))
                count = int(rng.integers(0, len(texts[sequence]) + 1))
                if kind == "fork":
                    texts[cache.fork(sequence, count)] = texts[sequence][:count]
                elif kind == "popn":
                    cache.popn(sequence, count)
                    texts[sequence] = texts[sequence][: len(texts[sequence]) - count]
                elif rng.random() < 0.3:
                    cache.remove(sequence)
                    del texts[sequence]
                    done["remove"] += 1
        except FairyError:
            continue  # no room: nothing has changed, which later steps see
        done[kind] += 1
        assert cache.used_pages <= cache.pages
    assert min(done.values()) > 50
    for sequence in list(texts):
        cache.remove(sequence)
    assert cache.used_pages == 0


def test_a_step_that_fails_takes_no_pages() -> None:
    memory = Memory()
    sequence = memory.cache.add()
    memory.texts[sequence] = []
    memory.step({sequence: 17})
    with pytest.raises(RuntimeError), memory.cache.forward([sequence], [40]):
        raise RuntimeError
    assert memory.cache.length(sequence) == 17
    assert memory.cache.used_pages == 2
    memory.step({sequence: 1})


def test_step_inputs_stay_where_they_are() -> None:
    """Steps of one size find the inputs of each at the same address, however many there are."""
    import tvm

    memory = Memory()
    ids = {memory.cache.add(): 3 + i for i in range(3)}
    memory.texts.update({s: [] for s in ids})
    memory.step(ids)
    inputs = StepInputs(tvm.cpu(), SEQUENCES, len(memory.slots))
    addresses = set()
    for turn in range(150):  # more than are on their way at once
        with memory.cache.forward(list(ids), [1] * 3):
            tables = memory.owner.tables()
        tokens = np.arange(3, dtype=np.int32) + turn
        arrays = inputs.write(tokens, tables)
        addresses.add(tuple((a.data_ptr(), a.shape) for a in arrays))
        assert arrays[0].numpy().tolist() == tokens.tolist()
        names = ("positions", "places", "indptr", "values", "last_page")
        for name, array in zip(names, arrays[1:6], strict=True):
            want = getattr(tables, name)
            np.testing.assert_array_equal(array.numpy()[: len(want)], want)
        assert not arrays[6].numpy().any()
        for s in ids:
            memory.cache.popn(s, turn % 2)
    sizes = {shapes[4][1] for shapes in addresses}
    assert len(addresses) == len(sizes) <= 3
