"""Partitions of the coordinates into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree

Blocks = int | str | Sequence[int] | None

# A piece of columns holds at least this many entries of the gradients: 8 MiB in float32.
PIECE_ENTRIES = 2**21

_MOST_COORDINATES = 2**31 - 1


class BlockRun(NamedTuple):
    """``count`` neighbouring blocks of one ``size``; the first begins at place ``start``."""

    start: int
    count: int  # type: ignore[assignment]  # hides the method of tuples
    size: int

    @property
    def width(self) -> int:
        """The number of coordinates in the run."""
        return self.count * self.size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Partition:
    """Blocks of coordinates; a pytree.

    Attributes:
        order: the coordinate at each place; (k,), without repetition. None if the place of a
            coordinate is its number. The order is data, so a new order compiles nothing.
        runs: the blocks as runs of equal size, in ascending order of places (static). Places
            between two runs are in no block.
    """

    order: Int[Array, " k"] | None
    runs: tuple[BlockRun, ...] = field(metadata={"static": True})

    @property
    def is_whole(self) -> bool:
        """Whether there is only one block."""
        return len(self.runs) == 1 and self.runs[0].count == 1

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return sum(run.count for run in self.runs)

    @property
    def sizes(self) -> Int[np.ndarray, " blocks"]:
        """The number of coordinates of each block."""
        return np.repeat([run.size for run in self.runs], [run.count for run in self.runs])

    def split(self, vector: PyTree, dtype: jnp.dtype) -> list[Shaped[Array, "b B"]]:
        """The parts of a vector, one array for each run of blocks of consecutive coordinates.

        Args:
            vector: a tree like the parameters, of numbers or booleans.
            dtype: the dtype of the parts of numbers.
        """
        flat = flat_vector(jax.tree.leaves(vector), dtype)
        return [
            flat[run.start : run.start + run.width].reshape(run.count, run.size)
            for run in self.runs
        ]

    def join(self, parts: Sequence[Shaped[Array, "..."]], layout: Layout) -> PyTree:
        """Puts results for all blocks together.

        Args:
            parts: the results, in the order of the blocks: numbers for each coordinate, (b, B),
                or one for each block, (b,).
            layout: the parameters.

        Returns:
            A tree like the parameters, which is 0 (or false) at coordinates outside all blocks;
            or, for numbers for each block, an array of them.
        """
        values = jnp.concatenate([part.reshape(-1) for part in parts])
        if parts[0].ndim == 1:
            return values
        d, order = layout.size, self.order
        covered, places = sum(run.width for run in self.runs), d if order is None else order.size
        if order is None and covered == d:
            return layout.unflatten(values)
        here: Array | np.ndarray | slice
        here = _places(self.runs) if covered != places else slice(None)
        if order is not None:
            here = order[here]
        whole = jnp.zeros(d, values.dtype).at[here].set(values, unique_indices=True)
        return layout.unflatten(whole)


def _places(runs: Sequence[BlockRun]) -> Int[np.ndarray, " k"]:
    parts = [np.arange(run.start, run.start + run.width, dtype=np.int32) for run in runs]
    return np.concatenate([*parts, np.zeros(0, np.int32)])


def flat_vector(leaves: Sequence[Array], dtype: jnp.dtype) -> Shaped[Array, " d"]:
    """The leaves as one vector of ``dtype``, or of booleans if they are boolean."""
    wide = [leaf if leaf.dtype == jnp.bool_ else leaf.astype(dtype) for leaf in leaves]
    return jnp.concatenate([jnp.ravel(leaf) for leaf in wide]) if wide else jnp.zeros(0, dtype)


def runs_of(sizes: Sequence[int], start: int = 0) -> tuple[BlockRun, ...]:
    """Runs of consecutive blocks of these sizes, without blocks of size 0."""
    found = []
    for size, group in groupby(size for size in sizes if size):
        found.append(BlockRun(start, len(list(group)), size))
        start += found[-1].width
    return tuple(found)


def pieces_of(size: int, num_rows: int) -> Partition:
    """Cuts ``size`` coordinates into pieces of about :data:`PIECE_ENTRIES`."""
    width = min(max(PIECE_ENTRIES // num_rows, 1), max(size, 1))
    whole, rest = divmod(size, width)
    return Partition(None, runs_of([width] * whole + [rest]))


def check_size(layout: Layout) -> None:
    """Checks that int32 can number the coordinates.

    Raises:
        ValueError: there are too many coordinates.
    """
    if layout.size > _MOST_COORDINATES:
        raise ValueError(
            f"at most {_MOST_COORDINATES} coordinates can be cut into blocks, got {layout.size}."
        )


def check_partition(partition: Any, layout: Layout, *, by_run: bool = False) -> None:
    """Checks that ``partition`` is a partition of coordinates of the parameters.

    Args:
        partition: the blocks.
        layout: the parameters.
        by_run: whether results are wanted for each run of blocks.

    Raises:
        TypeError: it has another type.
        ValueError: a block has places that do not exist, or ``by_run`` is set for blocks that are
            not of consecutive coordinates.
    """
    if not isinstance(partition, Partition):
        raise TypeError(
            "partition must be a Partition, for example from mfac_jax.rows.partition, "
            f"got {type(partition).__name__}."
        )
    places = layout.size if partition.order is None else partition.order.size
    end = max((run.start + run.width for run in partition.runs), default=0)
    if max(places, end) > layout.size or end > places:
        raise ValueError(
            f"the blocks of a partition must lie within its {min(places, layout.size)} places, "
            f"got a block that ends at {end} and an order of {places} of {layout.size} coordinates."
        )
    if by_run and partition.order is not None:
        raise ValueError(
            "by_run needs blocks of consecutive coordinates, got a partition with an order."
        )


def partition(layout: Layout, blocks: Blocks) -> Partition:
    """The partition that ``blocks`` names.

    Args:
        layout: the parameters.
        blocks: None for one block of all coordinates; an int B for blocks of B
            coordinates, where the last block may be smaller; ``"leaf"`` for one block for each
            parameter; or the block sizes in order, which add up to d.

    Returns:
        The partition, in the order of the coordinates, without blocks of size 0.

    Raises:
        TypeError: ``blocks`` has another type.
        ValueError: a size is below 1 or the sizes do not add up to d.
    """
    d = layout.size
    check_size(layout)
    if isinstance(blocks, int | np.integer) and not isinstance(blocks, bool):
        size = _checks.positive_int(blocks, "blocks")
        count, rest = divmod(d, size)
        runs = (BlockRun(0, count, size), BlockRun(count * size, 1, rest))
        return Partition(None, tuple(run for run in runs if run.width))
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
    return Partition(None, runs_of(sizes))
