"""Cutting the coordinates into consecutive blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from mfac_jax import _checks
from mfac_jax._layout import Layout

Blocks = int | str | Sequence[int] | None


class BlockRun(NamedTuple):
    """``count`` neighbouring blocks of one ``size``, from coordinate ``start`` on."""

    start: int
    count: int  # type: ignore[assignment]  # hides the method of tuples
    size: int

    @property
    def width(self) -> int:
        """Coordinates in all."""
        return self.count * self.size


def block_runs(layout: Layout, blocks: Blocks) -> tuple[BlockRun, ...]:
    """The partition ``blocks`` names, as runs of equally large blocks.

    Args:
        layout: the parameters.
        blocks: None for one block of all coordinates; an int B for blocks of B
            coordinates, the last one smaller if need be; ``"leaf"`` for a block a
            parameter; or the block sizes, in order, that add up to d.

    Returns:
        The runs, in order of coordinates; blocks of size 0 are left out.

    Raises:
        TypeError: ``blocks`` is none of these.
        ValueError: a size is below 1 or the sizes do not add up to d.
    """
    d = layout.size
    if isinstance(blocks, int | np.integer) and not isinstance(blocks, bool):
        size = _checks.positive_int(blocks, "blocks")
        count, rest = divmod(d, size)
        runs = (BlockRun(0, count, size), BlockRun(count * size, 1, rest))
        return tuple(run for run in runs if run.width)
    if blocks is None:
        sizes: Sequence[int] = [d]
    elif isinstance(blocks, str):
        _checks.one_of(blocks, "blocks", ("leaf",))
        sizes = layout.sizes
    elif isinstance(blocks, Sequence):
        sizes = [_checks.positive_int(size, "blocks") for size in blocks]
        if sum(sizes) != d:
            raise ValueError(
                f"blocks must cover all coordinates: expected sizes that add up to d = {d}, "
                f"got {len(sizes)} sizes that add up to {sum(sizes)}."
            )
    else:
        raise TypeError(
            "blocks must be None, an int, 'leaf' or a sequence of sizes, "
            f"got {type(blocks).__name__}."
        )
    found, start = [], 0
    for size, group in groupby(size for size in sizes if size):
        found.append(BlockRun(start, len(list(group)), size))
        start += found[-1].width
    return tuple(found)
