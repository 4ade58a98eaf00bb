"""What is measured: prompts and generations of fixed lengths, as ``llama-bench`` names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fairy_compile.errors import FairyError

_LIMIT = 1 << 20


@dataclass(frozen=True)
class Workload:
    """One test: ``pp``, a prompt processed at once, or ``tg``, tokens generated one by one.

    Attributes:
        n_prompt: tokens of the prompt; 0 in a ``tg`` test.
        n_gen: tokens generated; 0 in a ``pp`` test.
        depth: tokens that are in the KV cache before the clock starts.
    """

    n_prompt: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:
        """llama-bench's name of the test, e.g. ``tg128 @ d512``."""
        kind = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{kind} @ d{self.depth}" if self.depth else kind

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def is_decode(self) -> bool:
        """Whether tokens go through the model one at a time."""
        return self.n_prompt == 0


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        n_prompt: lengths of ``pp`` tests; 0 for none.
        n_gen: lengths of ``tg`` tests; 0 for none.
        depth: every test runs at each of these.
        repetitions: timed runs of a test, after one that warms up.
        threads: CPU threads; None is one a physical core.
        cpus: CPUs to run on; None is any.
        batch: most prompt tokens of one call; None is what the model was built for.
        cooldown: seconds to sleep before each timed run.
        device: TVM device; None is the one the artifact was built for.

    Raises:
        FairyError: a number is out of range, or there is nothing to run.
    """

    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    depth: tuple[int, ...] = (0,)
    repetitions: int = 5
    threads: int | None = None
    cpus: list[int] | None = None
    batch: int | None = None
    cooldown: float = 0.0
    device: str | None = None

    def __post_init__(self) -> None:
        for what, values in (
            ("--n-prompt", self.n_prompt),
            ("--n-gen", self.n_gen),
            ("--depth", self.depth),
        ):
            for value in values:
                _check(what, value, 0)
        _check("--repetitions", self.repetitions, 1)
        if self.batch is not None:
            _check("--batch", self.batch, 1)
        if not 0 <= self.cooldown <= 3600:
            raise FairyError(f"--cooldown is {self.cooldown}; allowed: 0 to 3600 seconds")
        if not self.workloads():
            raise FairyError("there is nothing to run; give --n-prompt or --n-gen above 0")

    def workloads(self) -> list[Workload]:
        """Return the tests: at every depth, prompts first."""
        return [
            Workload(prompt, gen, depth)
            for depth in self.depth
            for prompt, gen in [
                *((n, 0) for n in self.n_prompt if n),
                *((0, n) for n in self.n_gen if n),
            ]
        ]

    @property
    def context(self) -> int:
        """Tokens the KV cache must hold."""
        return max(w.depth + w.tokens for w in self.workloads())


def parse_lengths(what: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list such as ``128,512``.

    Raises:
        FairyError: something in it is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FairyError(
            f"{what} is {text!r}; allowed: a whole number, or several separated by commas"
        ) from None


def tokens(vocab_size: int, count: int) -> list[int]:
    """Return ``count`` random token ids; the same in every call, for every program measured."""
    return np.random.default_rng(0).integers(0, vocab_size, count).tolist()


def alternate(first: str, second: str, rounds: int) -> Iterator[str]:
    """Yield ``rounds`` of each in the order A B B A A B B A ..., so that drift hits both alike."""
    for i in range(rounds):
        yield from (first, second) if i % 2 == 0 else (second, first)


def _check(what: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not least <= value <= _LIMIT:
        raise FairyError(f"{what} is {value}; allowed: {least} to {_LIMIT}")
