"""Blocks of the Fisher, of a size or within the outputs of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mfac_jax import _checks
from mfac_jax._layout import Layout
from mfac_jax.inverse import Blocks, block_runs
from mfac_jax.pruning._arrange import Cut
from mfac_jax.pruning._patterns import BlocksOf, Grouping, Unstructured


@dataclass(frozen=True)
class WithinOutputs:
    """Blocks for the Fisher that hold weights of one output each.

    The weights of an output are cut evenly into as few blocks as there can be. Blocks of a given
    number would begin in one output and end in the next, whose weights hardly make up for one
    another; so they do here only where no even cut is near. Outputs are what comes first in the
    order in which leaves are turned: with groups along the outputs, the inputs.

    Attributes:
        most: weights that a block has at the most, or one group of a pattern if that is larger.
    """

    most: int = 144

    def __post_init__(self) -> None:
        _checks.positive_int(self.most, "most")

    def __str__(self) -> str:
        return f"within outputs, up to {self.most}"


def as_static(blocks: Blocks, layout: Layout) -> Blocks:
    """``blocks`` in a form that can be a static argument, once it is known to fit."""
    block_runs(layout, blocks)
    if isinstance(blocks, int | np.integer):
        return int(blocks)
    return blocks if blocks is None or isinstance(blocks, str) else tuple(blocks)


def cut(blocks: Blocks | WithinOutputs, layout: Layout, grouping: Grouping) -> Cut:
    """The blocks of a step, once they are known to fit.

    Args:
        blocks: what the caller wants.
        layout: the parameters (before they are turned).
        grouping: their groups.

    Returns:
        The blocks, and where weights may move. In N:M patterns, whose groups keep some of
        their weights, in slices, whose groups need not be of one size, and in blocks of given
        sizes they stay.
    """
    moves = isinstance(grouping.pattern, Unstructured | BlocksOf)
    if not isinstance(blocks, WithinOutputs):
        static = as_static(blocks, layout)
        is_size = isinstance(static, int) and moves and layout.size > 0
        return Cut(static, ((1, layout.size),) if is_size else ())
    sizes: list[int] = []
    segments = []
    leaves = zip(layout.shapes, layout.sizes, grouping.orders, grouping.sizes, strict=True)
    for shape, total, order, group in leaves:
        if total:
            width = total // (shape[order[0]] if len(shape) > 1 else 1)
            inside = _even(total, width, max(blocks.most // group, 1), group)
            sizes += inside
            segments.append((total // width, width) if width % inside[0] == 0 else (1, total))
    return Cut(as_static(tuple(sizes), layout), tuple(segments) if moves else ())


def _even(total: int, width: int, most: int, group: int) -> Sequence[int]:
    """The sizes that cut ``total`` weights, ``width`` an output, in blocks of whole groups."""
    units = width // group
    fewest = -(-units // most)
    for parts in range(fewest, 2 * fewest + 1):
        if units % parts == 0:
            return [group * units // parts] * (total // width * parts)
    # No even cut is near: blocks of one size, over the ends of outputs.
    count, rest = divmod(total, most * group)
    return [most * group] * count + [rest] * (rest > 0)
