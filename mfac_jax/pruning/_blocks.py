"""Blocks of the Fisher in pruning: cut output by output, from the alive weights.

Blocks follow the order of a :class:`Selection`, in which the weights of an output are neighbours
and the weights of a group are neighbours. Alive weights move to the front and pruned ones to the
end, so a block of 128 holds 128 alive weights as long as there are enough. A weight moves only
within its own row. A row is all weights, or one output. The order is data, so a new mask compiles
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.pruning._interface import Pattern
from mfac_jax.pruning._scope import Selection
from mfac_jax.rows import BlockRun, Blocks, Partition, partition


@dataclass(frozen=True)
class WithinOutputs:
    """Blocks for the Fisher that hold weights of one output each.

    The weights of an output are cut evenly into as few blocks as possible. The weights of two
    outputs hardly compensate for one another, so a block that begins in one output and ends in
    the next is worse. Such blocks, all of one size, are used only if no even cut needs at most
    twice the fewest blocks. If groups run along the outputs, inputs take the place of outputs.

    Attributes:
        most: the largest number of weights in a block. A larger group is a block of its own.
    """

    most: int = 144

    def __post_init__(self) -> None:
        _checks.positive_int(self.most, "most")

    def __str__(self) -> str:
        return f"within outputs, at most {self.most}"


class FisherBlocks(NamedTuple):
    """The blocks of the Fisher over a selection, under any mask.

    Attributes:
        given: the argument ``blocks`` of the caller; a sequence of sizes as a tuple.
        runs: the blocks, as runs of places in the order of the selection, or of coordinates.
        segments: the rows in which alive weights move to the front. Each segment is
            ``(rows, width)``. Empty if weights do not move.
        is_ordered: whether ``runs`` count places in the order of the selection.
    """

    given: Blocks | WithinOutputs
    runs: tuple[BlockRun, ...]
    segments: tuple[tuple[int, int], ...] = ()
    is_ordered: bool = True


def check_blocks(blocks: Blocks | WithinOutputs) -> None:
    """Checks ``blocks``, as far as possible without the parameters.

    Raises:
        TypeError: ``blocks`` is of another kind.
        ValueError: a size is below 1.
    """
    if not isinstance(blocks, WithinOutputs):
        sizes = blocks if isinstance(blocks, Sequence) and not isinstance(blocks, str) else ()
        total = sum(_checks.positive_int(size, "blocks") for size in sizes)
        partition(_flat(total), blocks)


def cut_into_blocks(blocks: Blocks | WithinOutputs, selection: Selection) -> FisherBlocks:
    """Checks ``blocks`` and cuts the Fisher over a selection into them.

    Weights move only if groups go whole and all groups have one size. In N:M patterns, groups
    keep some of their weights. Slices have a different size in each leaf. If the caller gives
    block sizes, weights do not move.

    Raises:
        TypeError: ``blocks`` is of another kind.
        ValueError: a size is below 1, or sizes do not add up to the number of weights.
    """
    pattern, total = selection.pattern, selection.num_weights
    moves = pattern.prunes_whole_groups and pattern.group_size is not None
    if isinstance(blocks, WithinOutputs):
        return _within_outputs(blocks, selection, moves)
    leaves = [jax.ShapeDtypeStruct(shape, np.float32) for shape in selection.shapes]
    runs = partition(Layout(leaves), blocks).runs
    if isinstance(blocks, str) and not selection.has_groups:
        pairs = zip(selection.starts.tolist(), selection.sizes, strict=True)
        leaf_runs = tuple(BlockRun(start, 1, size) for start, size in pairs if size)
        return FisherBlocks(blocks, leaf_runs, is_ordered=False)
    if isinstance(blocks, int | np.integer):
        return FisherBlocks(int(blocks), runs, ((1, total),) if moves and total else ())
    given = blocks if blocks is None or isinstance(blocks, str) else tuple(blocks)
    return FisherBlocks(given, runs)


def check_groups(blocks: FisherBlocks, pattern: Pattern) -> None:
    """Checks that the blocks hold whole groups of the pattern.

    Raises:
        ValueError: a block cuts a group.
    """
    size = pattern.group_size
    if size is None and not (blocks.given is None or blocks.given == "leaf"):
        raise ValueError(
            f"the groups of {pattern} do not fit into blocks smaller than a leaf: "
            f"expected blocks=None or blocks='leaf', got blocks={blocks.given!r}."
        )
    if size is not None and any(run.size % size for run in blocks.runs):
        raise ValueError(
            f"blocks must hold whole groups of {pattern}: expected sizes that are multiples "
            f"of {size}, got blocks={blocks.given!r}."
        )


def _flat(size: int) -> Layout:
    return Layout(jax.ShapeDtypeStruct((size,), np.float32))


def _within_outputs(blocks: WithinOutputs, selection: Selection, moves: bool) -> FisherBlocks:
    sizes: list[int] = []
    segments = []
    for total, groups in zip(selection.sizes, selection.groups, strict=True):
        if total:
            width = total // groups.num_outputs
            most = max(blocks.most // groups.size, 1)
            inside = _even(total, width, most, groups.size)
            sizes += inside
            segments.append((total // width, width) if width % inside[0] == 0 else (1, total))
    runs = partition(_flat(selection.num_weights), sizes).runs
    return FisherBlocks(blocks, runs, tuple(segments) if moves else ())


def _even(total: int, width: int, most: int, group: int) -> Sequence[int]:
    """The sizes of blocks of whole groups, for ``total`` weights with ``width`` in each output.

    Args:
        total: the number of weights of a leaf.
        width: the number of weights of an output.
        most: the largest number of groups in a block.
        group: the number of weights of a group.
    """
    units = width // group
    fewest = -(-units // most)
    for parts in range(fewest, 2 * fewest + 1):
        if units % parts == 0:
            return [group * units // parts] * (total // width * parts)
    # No even cut: blocks of one size that cross the ends of outputs.
    count, rest = divmod(total, most * group)
    return [most * group] * count + [rest] * (rest > 0)


def blocks_under(blocks: FisherBlocks, selection: Selection, mask: PyTree) -> Partition:
    """The coordinates of the blocks under a mask.

    Args:
        blocks: the blocks of the Fisher.
        selection: the prunable weights.
        mask: which weights are alive, a tree like all parameters.
    """
    if blocks.segments:
        order = _alive_first(
            tuple(jax.tree.leaves(mask)),
            selection.device_order,
            segments=blocks.segments,
            group=max(selection.group_sizes),
        )
        return Partition(order, blocks.runs)
    is_as_it_lies = np.array_equal(selection.order, np.arange(selection.layout.size))
    if is_as_it_lies or not blocks.is_ordered:
        return Partition(None, blocks.runs)
    return Partition(selection.device_order, blocks.runs)


@functools.partial(jax.jit, static_argnames=("segments", "group"))
def _alive_first(
    mask: tuple[Array, ...],
    order: Int[Array, " k"],
    *,
    segments: tuple[tuple[int, int], ...],
    group: int,
) -> Int[Array, " k"]:
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in mask])
    return order[alive_first(flat[order], segments, group)]


def alive_first(
    alive: Bool[Array, " d"], segments: tuple[tuple[int, int], ...], group: int
) -> Int[Array, " d"]:
    """All places, reordered in each row: groups with an alive weight come first.

    Apart from that, places keep their order.

    Args:
        alive: which weights are alive, at each place.
        segments: the rows, as ``(rows, width)``; see :class:`FisherBlocks`.
        group: the number of weights of a group.
    """
    here = jnp.any(alive.reshape(-1, group), axis=1).astype(jnp.int32)
    until = jnp.cumsum(here, dtype=jnp.int32)
    before = until - here
    # For every group: the first group of its row, and the number of groups in the row.
    firsts: list[Array] = []
    widths: list[Array] = []
    start = 0
    for count, width in segments:
        size = width // group
        own = jnp.arange(count * size, dtype=jnp.int32)
        firsts.append(start + own // size * size)
        widths.append(jnp.full_like(own, size))
        start += count * size
    first, in_row = jnp.concatenate(firsts), jnp.concatenate(widths)
    there = before - before[first]
    own = jnp.arange(here.size, dtype=jnp.int32)
    pruned = own - first - there
    alive_in_row = until[first + in_row - 1] - before[first]
    place = first + jnp.where(here > 0, there, alive_in_row + pruned)
    groups = jnp.zeros_like(own).at[place].set(own, unique_indices=True)
    return (groups[:, None] * group + jnp.arange(group, dtype=jnp.int32)[None]).reshape(-1)
