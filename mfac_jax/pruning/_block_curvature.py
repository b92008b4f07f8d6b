"""The curvature of a step from sums in blocks, and when :func:`prune` takes it.

A step adds its gradients to :class:`mfac_jax.rows.BlockSums` and keeps none. Sums of earlier steps
are not used: alive weights move to the front, so the blocks of two steps hold different weights.
The Fisher is the one in blocks everywhere, in descents too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mfac_jax._layout import PyTree
from mfac_jax.inverse._inverse import inverse_of
from mfac_jax.pruning._blocks import FisherBlocks, blocks_under
from mfac_jax.pruning._functions import name_of
from mfac_jax.pruning._gradients import Curvature, Fill, Gradients, count_of, like, num_kept
from mfac_jax.pruning._problem import Grams, Problem
from mfac_jax.pruning._scope import Selection
from mfac_jax.pruning._scores import as_score
from mfac_jax.pruning._search import Setting, settings_on
from mfac_jax.rows import BlockSums, Dense, FileRows, InBlocks, Partition
from mfac_jax.rows._room import require_room

Settings = Sequence[tuple[Setting, FisherBlocks]]

# Gradients of at most this many numbers, 2 GiB in float32, are kept unless the caller asks for sums
# in blocks.
_MOST_KEPT = 2**29


class BlockCurvature(Curvature):
    """The sums of the newest step."""

    rows: BlockSums

    def __init__(
        self, gradients: Gradients, params: PyTree, selection: Selection, blocks: FisherBlocks
    ) -> None:
        self._storage, self._count = gradients.storage, count_of(gradients)
        self._like, self._selection, self._blocks = like(params), selection, blocks

    @property
    def num_earlier(self) -> None:
        return None

    def resume(self, taken: int, gradients_of: Callable[[int], FileRows]) -> None:
        del taken, gradients_of

    def take(self, fill: Fill, alive: PyTree) -> None:
        if hasattr(self, "rows"):  # makes room for the new sums
            del self.rows, self.grams
        self._cut = blocks_under(self._blocks, self._selection, alive)
        empty = InBlocks(self._cut, self._storage).empty(self._like, self._count)
        self.rows = cast(BlockSums, fill(empty))
        self.grams = Grams(self.rows)

    @property
    def filled(self) -> float:
        return 1.0

    def trace(self, mask: PyTree) -> float:
        return float(_sum_over(mask, self.rows.column_square_sums())) / self._count

    def freedom(self, problem: Problem) -> float:
        """``sum_j (1 - lambda [F^-1]_jj)`` over the mask."""
        return float(_freedom(problem.mask, problem.diagonal, problem.damping))

    def direction(self, mask: PyTree, damping: float) -> PyTree:
        own = jax.device_put(np.asarray(damping, self.rows.dtype))
        gram = functools.partial(self.grams.of, mask)
        return inverse_of(self.rows, mask, own, self._cut, gram).ihvp(self.rows.mean)


@jax.jit
def _sum_over(mask: PyTree, tree: PyTree) -> Float[Array, ""]:
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(tree), strict=True)
    return functools.reduce(jnp.add, [jnp.sum(leaf, where=keep) for keep, leaf in pairs])


@jax.jit
def _freedom(mask: PyTree, diagonal: PyTree, damping: Float[Array, ""]) -> Float[Array, ""]:
    return _sum_over(mask, jax.tree.map(lambda leaf: 1 - damping * leaf, diagonal))


def settings_in_blocks(
    gradients: Gradients, selection: Selection, settings: Sequence[Setting] | None, steps: int
) -> tuple[Settings, FisherBlocks | None]:
    """The settings to try, each with its blocks; and the blocks of the sums that a run takes.

    With sums in blocks, settings that need no inverse take the blocks of the others.

    Args:
        gradients: how the run takes gradients.
        selection: the prunable weights.
        settings: the caller's settings; None for the default ones.
        steps: the number of steps.

    Returns:
        The settings and the blocks; None if the run keeps gradients.

    Raises:
        ValueError: a setting does not fit the parameters or the pattern, or ``in_blocks`` is true
            and the settings do not share their blocks.
    """
    plain = settings_on(selection, settings)
    if gradients.in_blocks is False:
        return plain, None
    inverting = [(setting, cut) for setting, cut in plain if _needs_inverse(setting)]
    why_not = _why_not(inverting, selection)
    if why_not and gradients.in_blocks:
        raise ValueError(
            f"in_blocks=True needs settings that share their blocks, none of them whole; {why_not}."
        )
    if why_not or not (gradients.in_blocks or _is_better(gradients, inverting, selection, steps)):
        return plain, None
    shared = inverting[0][1]
    return tuple((setting, shared) for setting, _ in plain), shared


def check_sums(gradients: Gradients, params: PyTree, blocks: FisherBlocks) -> None:
    """Checks before any work that gradients can be stored until they are added.

    Raises:
        TypeError: they cannot.
        MemoryError: the sums cannot fit.
    """
    InBlocks(1, gradients.storage).empty(like(params), 1)  # any number shows what rows can do
    sums = InBlocks(Partition(None, blocks.runs), gradients.storage)
    require_room(sums, like(params), count_of(gradients), "Gradients.count")


def _needs_inverse(setting: Setting) -> bool:
    return setting.score not in ("magnitude", "obd") or setting.update != "none"


def _why_not(inverting: Settings, selection: Selection) -> str | None:
    """Why sums in the blocks of these settings do not suffice; None if they do."""
    if not inverting:
        return "no setting inverts blocks"
    blocks = inverting[0][1]
    for setting, cut in inverting:
        name = f"the setting {name_of(setting.score)} + {name_of(setting.update)}"
        if cut.given is None:
            return f"{name} inverts the whole Fisher"
        if cut[1:] != blocks[1:]:
            return f"{name} has blocks={cut.given!r}, another has blocks={blocks.given!r}"
        score = as_score(setting.score)
        if score.of_groups and score.reads_columns and selection.pattern.group_size is None:
            return f"{name} has groups of several sizes with {selection.pattern}"
    return None


def _is_better(gradients: Gradients, inverting: Settings, selection: Selection, steps: int) -> bool:
    """Whether a run takes sums although the caller does not ask for them."""
    is_plain = gradients.given is None and not gradients.history and gradients.storage == Dense()
    # What functions of the caller need is not known.
    is_known = all(isinstance(s.score, str) and isinstance(s.update, str) for s, _ in inverting)
    kept = num_kept(gradients, steps) * selection.layout.size
    sums = sum(run.width * run.size for run in inverting[0][1].runs)
    return is_plain and is_known and kept > max(_MOST_KEPT, 2 * sums)
