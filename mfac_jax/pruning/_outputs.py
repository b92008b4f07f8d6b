"""Blocks of the Fisher that respect the outputs of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mfac_jax import _checks
from mfac_jax._layout import Layout
from mfac_jax.inverse import Blocks, block_runs
from mfac_jax.pruning._patterns import Grouping


@dataclass(frozen=True)
class WithinOutputs:
    """Blocks for the Fisher that hold weights of one output each.

    The weights of an output are cut evenly into as few blocks as there can be. Blocks of a given
    number would begin in one output and end in the next, whose weights hardly make up for one
    another.

    Attributes:
        most: weights that a block has at the most.
    """

    most: int = 144

    def __post_init__(self) -> None:
        _checks.positive_int(self.most, "most")

    def __str__(self) -> str:
        return f"within outputs, up to {self.most}"


def as_static(
    blocks: Blocks | WithinOutputs, layout: Layout, grouping: Grouping | None = None
) -> Blocks:
    """``blocks`` in a form that can be a static argument, once it is known to fit.

    Args:
        blocks: what the caller wants.
        layout: the parameters (before they are turned).
        grouping: their groups; needed for :class:`WithinOutputs`.

    Returns:
        None, an int, ``"leaf"`` or the sizes of the blocks.
    """
    if isinstance(blocks, WithinOutputs):
        if grouping is None:
            raise TypeError("blocks=WithinOutputs(...) is for prune and prune_step.")
        blocks = _sizes(blocks.most, layout, grouping)
    block_runs(layout, blocks)
    return blocks if blocks is None or isinstance(blocks, int | str) else tuple(blocks)


def _sizes(most: int, layout: Layout, grouping: Grouping) -> tuple[int, ...]:
    sizes: list[int] = []
    leaves = zip(layout.shapes, layout.sizes, grouping.orders, grouping.sizes, strict=True)
    for shape, total, order, group in leaves:
        if not total:
            continue
        outputs = shape[order[0]] if len(shape) > 1 else 1
        sizes += _even(total, total // outputs, max(most // group, 1), group)
    return tuple(sizes)


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
