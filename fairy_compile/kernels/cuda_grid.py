"""The grids of CUDA phase kernels, and what they leave to each other in scratch memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arrange:
    """A grid that runs before another, which takes an image of x instead of x.

    Attributes:
        function: name of the device function (x, image, batch).
        blocks: ``blockIdx.x``; ``blockIdx.y`` counts ``rows`` rows of x.
        threads: of a block.
        rows: of x of a block; they divide those of a block of the other grid.
    """

    function: str
    blocks: int
    threads: int
    rows: int


@dataclass(frozen=True)
class Add:
    """A grid that runs after another, and adds the sums of its splits up.

    Attributes:
        function: name of the device function (scratch, y, batch).
        blocks: ``blockIdx.x``; ``blockIdx.y`` is the row of x.
        threads: of a block.
    """

    function: str
    blocks: int
    threads: int


@dataclass(frozen=True)
class Launch:
    """A grid for some numbers of rows.

    Attributes:
        function: name of the device function.
        source: CUDA C++ that defines it.
        blocks: blocks along the output rows, ``blockIdx.x``.
        rows: rows of x of a block; ``blockIdx.y`` counts these.
        threads: of a block.
        most: most rows of x it is meant for; None is any number.
        image_bytes: of an image of ``rows`` rows of x, which the device function takes in place of
            x, with a pointer to dynamic shared memory after ``batch``; 0 where it takes x.
        shared: bytes of dynamic shared memory of a block.
        arrange: what makes the image; None where another kernel did.
        splits: blocks that share the columns, ``blockIdx.z``. More than one write their sums to
            scratch memory, after the image, and ``add`` runs after them.
        add: the grid that adds them up. ``source`` defines all functions.
        sum_bytes: of those sums, for ``rows`` rows of x.
        bias: whether functions take a bias before y, and add it.
    """

    function: str
    source: str
    blocks: int
    rows: int
    threads: int
    most: int | None
    image_bytes: int = 0
    shared: int = 0
    arrange: Arrange | None = None
    splits: int = 1
    add: Add | None = None
    sum_bytes: int = 0
    bias: bool = False

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory for ``rows`` rows of x."""
        return (self.image_bytes if self.arrange else 0) + self.sum_bytes

    @property
    def takes_image(self) -> bool:
        """Tell whether the image comes from elsewhere."""
        return bool(self.image_bytes) and self.arrange is None
