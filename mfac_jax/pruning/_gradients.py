"""The gradients of a pruning run: their source, and which of them are kept.

A step has few gradients of its own. Gradients of earlier steps were taken nearby, with fewer
weights pruned, and describe nearly the same curvature. Only their size differs, because gradients
grow with the loss. They are therefore scaled to the newest ones.

Each step's gradients are separate rows, which are stacked. All rows exist from the first step, so
every step runs the same programs. Rows without gradients are zero.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float

from mfac_jax import _checks
from mfac_jax._collect import read_rows
from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse._inverse import whole_inverse
from mfac_jax.pruning._finite import check_finite_gradients
from mfac_jax.pruning._problem import Grams, Problem
from mfac_jax.rows import (
    Dense,
    FileRows,
    GradientRows,
    StackedRows,
    Storage,
    WritableRows,
    partition,
)
from mfac_jax.rows._base import check_columns, check_products, check_rows, check_writable
from mfac_jax.rows._room import require_room
from mfac_jax.rows._storage import check_storage

Fill = Callable[[WritableRows], WritableRows]

_COUNT = 128
_HISTORY = 1


# Compared by identity: two arrays are not simply equal or different.
@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients that :func:`prune` uses in each step.

    Two of them are equal only if they are the same object.

    Attributes:
        count: the number of gradients that each step takes; by default that of ``given``, or
            128.
        per_example: take one gradient for each example instead of one for each batch.
        given: the gradients of the first step, taken at ``params``, for all leaves. Several
            sparsities can share them. They are used in their own storage, and never copied or
            changed. By default the first step computes its gradients.
        history: the number of earlier steps whose gradients are used as well. Each needs the
            memory of ``count`` gradients, from the first step. By default 1, and 0 with sums in
            blocks.
        storage: how gradients are stored; see :class:`mfac_jax.rows.Dense`.
        in_blocks: whether no gradients are kept, but the sums of their products in the blocks of
            the settings (:class:`mfac_jax.rows.BlockSums`): d B numbers for any ``count``. All
            settings then share their blocks, and a step uses its own gradients only. By default
            true if the gradients would take more than 2 GiB, the sums take less than half of that,
            and nothing that you set excludes it: settings that do not share their blocks or have
            functions of yours, ``given``, ``history``, or a ``storage`` other than ``Dense()``.

    Raises:
        TypeError: an attribute has another type.
        ValueError: ``count`` is below 1, ``history`` is below 0, ``given`` does not hold
            ``count`` gradients, ``in_blocks`` comes with ``given`` or with ``history`` above 0, or
            ``storage`` is :class:`mfac_jax.rows.InBlocks`.
    """

    count: int | None = None
    per_example: bool = False
    given: GradientRows | None = None
    history: int | None = None
    storage: Storage = Dense()  # noqa: RUF009  (immutable)
    in_blocks: bool | None = None

    def __post_init__(self) -> None:
        if self.count is not None:
            _checks.positive_int(self.count, "count")
        if self.history is not None:
            _checks.non_negative_int(self.history, "history")
        if not check_storage(self.storage).has_products:
            raise ValueError(
                "sums take their blocks from the settings: expected in_blocks=True, got "
                f"storage={self.storage!r}."
            )
        self._check_in_blocks()
        if not isinstance(self.per_example, bool):
            raise TypeError(f"per_example must be a bool, got {type(self.per_example).__name__}.")
        if self.given is None:
            object.__setattr__(self, "count", self.count or _COUNT)
            return
        try:
            check_rows(self.given)
        except TypeError as error:
            raise TypeError(
                "given must be gradient rows (from mfac_jax.collect_gradients or "
                f"mfac_jax.rows.as_rows), got {type(self.given).__name__}."
            ) from error
        check_products(self.given, "Gradients(given=...)")
        if self.count is None:
            object.__setattr__(self, "count", self.given.num_rows)
        if self.given.num_rows != self.count:
            raise ValueError(
                f"given must be count={self.count} gradients, got {self.given.num_rows}."
            )

    def _check_in_blocks(self) -> None:
        _checks.instance(self.in_blocks, "in_blocks", bool | None)
        if not self.in_blocks:
            return
        if self.history:
            raise ValueError(
                "in_blocks=True uses the gradients of the newest step only: expected history=0, "
                f"got history={self.history}."
            )
        if self.given is not None:
            raise ValueError(
                "in_blocks=True keeps no gradients, so none can be given: expected given=None, "
                f"got {type(self.given).__name__}."
            )


def check_gradients(
    gradients: Gradients,
    params: PyTree,
    steps: int,
    column_readers: Callable[[int], list[str]],
) -> None:
    """Checks before any work that gradients can be stored and read.

    Their rows must be writable, and their columns readable where a setting needs them.

    Args:
        gradients: how the run takes gradients.
        params: the parameters.
        steps: the number of steps.
        column_readers: names what needs the columns of rows; the argument is their number.

    Raises:
        TypeError: rows cannot be written, or columns cannot be read.
        ValueError: the given gradients belong to other parameters.
        FloatingPointError: a given gradient has NaN or Inf in it.
        MemoryError: the gradients cannot fit.
    """
    given, storage = gradients.given, gradients.storage
    readers = column_readers(num_kept(gradients, steps))
    if given is None or steps > 1:
        rows = storage.empty(like(params), 1)  # any number of rows shows what they can do
        check_writable(rows, f"prune with storage={storage!r}")
        for reader in readers:
            check_columns(rows, f"{reader} with storage={storage!r}")
        parts, count = num_new_parts(gradients, steps)
        require_room(storage, like(params), count, "Gradients.count", parts=parts, gram=True)
    if given is None:
        return
    own, other = Layout(params), given.layout
    if (own.paths, own.shapes) != (other.paths, other.shapes):
        raise ValueError(
            f"given must be gradients of params: expected {own.describe()}, "
            f"got gradients of {other.describe()}."
        )
    for reader in readers:
        check_columns(given, f"{reader} with the given gradients")
    check_finite_gradients(given, "given")


def num_kept(gradients: Gradients, steps: int) -> int:
    """The number of gradients that are kept."""
    return _num_parts(gradients, steps) * count_of(gradients)


def _num_parts(gradients: Gradients, steps: int) -> int:
    """The number of steps whose gradients are kept."""
    history = _HISTORY if gradients.history is None else gradients.history
    return min(1 + history, steps)


def num_new_parts(gradients: Gradients, steps: int) -> tuple[int, int]:
    """How many sets of rows a run makes, beside given ones, and the number of rows of each."""
    parts = _num_parts(gradients, steps)
    if gradients.given is not None:
        parts -= steps <= parts  # its place is free for others once it is too old
    return parts, count_of(gradients)


def count_of(gradients: Gradients) -> int:
    """The number of gradients of a step, which :class:`Gradients` has set."""
    return cast(int, gradients.count)


def like(params: PyTree) -> PyTree:
    """The shapes, dtypes and shardings of the parameters."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        own = sharding if isinstance(sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=own)

    return jax.tree.map(struct, params)


class Curvature(abc.ABC):
    """What a step knows of the loss: gradients, whole or summed in blocks, and their Fisher.

    The Fisher averages over the filled rows: 1 / ``filled`` times the average over all rows. The
    average over all rows, with ``filled`` times the damping, gives the same masks and updates.

    Attributes:
        rows: the gradients.
        grams: the Gram matrices of these rows.
    """

    rows: GradientRows
    grams: Grams

    @property
    @abc.abstractmethod
    def num_earlier(self) -> int | None:
        """The number of earlier steps whose gradients are used; None if none are kept."""

    @abc.abstractmethod
    def resume(self, taken: int, gradients_of: Callable[[int], FileRows]) -> None:
        """Reads the gradients of earlier steps after an interruption.

        Args:
            taken: the number of steps that were taken.
            gradients_of: the gradients of a step.
        """

    @abc.abstractmethod
    def take(self, fill: Fill, alive: PyTree) -> None:
        """Takes the gradients of a step.

        Args:
            fill: ``fill(rows)`` writes the gradients into ``rows``, which are donated.
            alive: the mask of all parameters.
        """

    @property
    @abc.abstractmethod
    def filled(self) -> float:
        """The fraction of the rows that hold gradients."""

    @abc.abstractmethod
    def trace(self, mask: PyTree) -> float:
        """The trace of ``G^T G / n`` over a mask."""

    @abc.abstractmethod
    def freedom(self, problem: Problem) -> float:
        """The degrees of freedom of the Fisher over the mask and under the damping of a problem."""

    @abc.abstractmethod
    def direction(self, mask: PyTree, damping: float) -> PyTree:
        """``(lambda I + G^T G / n)^-1`` over a mask, times the mean of the newest gradients."""


class History(Curvature):
    """Keeps the gradients of the latest steps; a new step replaces the oldest.

    :attr:`rows` are all kept gradients; older ones are scaled.
    """

    def __init__(self, gradients: Gradients, params: PyTree, steps: int) -> None:
        self._gradients = gradients
        self._num_parts, self._count = _num_parts(gradients, steps), count_of(gradients)
        self._like = like(params)
        self._parts: list[GradientRows] = []
        self._taken = 0

    def take(self, fill: Fill, alive: PyTree) -> None:
        slot = self._taken % self._num_parts
        if self._taken == 0:
            given = self._gradients.given
            first = fill(self._empty()) if given is None else given
            self._parts = [first, *(self._empty() for _ in range(self._num_parts - 1))]
        else:
            oldest = self._parts[slot]
            if oldest is self._gradients.given:  # belongs to the caller
                oldest = self._empty()
            # The errors are those of gradients at other weights.
            oldest = check_writable(oldest, "the history of gradients").without_errors()
            self._parts[slot] = fill(oldest)
        self._taken += 1
        if self._num_parts == 1:
            self.rows = self._parts[0]
            self.grams = Grams(self.rows)
            return
        parts = tuple(self._parts)
        ones = np.ones(self._num_parts, np.float32)
        stacked = StackedRows.of(parts, jnp.asarray(ones, parts[0].dtype))
        gram = np.asarray(stacked.gram(alive))
        scales = _scales_to_newest(gram, slot, self._num_parts)
        self.rows = StackedRows.of(parts, jax.device_put(scales))
        self.grams = Grams(self.rows)
        each = np.repeat(scales, self._count)
        self.grams.add(alive, jax.device_put(gram * each[:, None] * each[None, :]))

    @property
    def num_earlier(self) -> int:
        return self._num_parts - 1

    def resume(self, taken: int, gradients_of: Callable[[int], FileRows]) -> None:
        self._taken = taken
        earlier = range(max(taken - self.num_earlier, 0), taken)
        steps = {step % self._num_parts: step for step in earlier}
        self._parts = [
            self._empty() if slot not in steps else self._kept(steps[slot], gradients_of)
            for slot in range(self._num_parts)
        ]

    def _kept(self, step: int, gradients_of: Callable[[int], FileRows]) -> GradientRows:
        """The gradients of an earlier step."""
        if step == 0 and self._gradients.given is not None:
            return self._gradients.given
        kept = gradients_of(step)
        if kept.num_finished < kept.num_rows:
            raise ValueError(
                f"the gradients of step {step + 1} are missing: expected {kept.num_rows}, got "
                f"{kept.num_finished}. Use another folder for the checkpoint."
            )
        return read_rows(self._empty(), kept)

    @property
    def filled(self) -> float:
        return min(self._taken, self._num_parts) / self._num_parts

    @property
    def mean(self) -> Float[np.ndarray, " m"]:
        """``a`` such that ``G^T a`` is the mean of the newest gradients."""
        slot, count = (self._taken - 1) % self._num_parts, self._count
        is_newest = np.repeat(np.arange(self._num_parts) == slot, count)
        return (is_newest / count).astype(np.float32)

    def trace(self, mask: PyTree) -> float:
        gram = np.asarray(self.grams.of(mask))
        return float(np.trace(gram, dtype=np.float64)) / len(gram)

    def freedom(self, problem: Problem) -> float:
        """``sum k_i / (k_i + n lambda)`` over the eigenvalues ``k_i`` of ``K``."""
        gram = np.asarray(self.grams.of(problem.mask))
        eigenvalues = np.maximum(np.linalg.eigvalsh(gram), 0).astype(np.float64)
        shift = len(gram) * float(problem.damping)
        return float(np.sum(eigenvalues / (eigenvalues + shift)))

    def direction(self, mask: PyTree, damping: float) -> PyTree:
        # ``g`` is a mean of the rows, so nothing is subtracted.
        whole, own = partition(self.rows.layout, None), np.asarray(damping, self.rows.dtype)
        gram = self.grams.of(mask)
        inverse = whole_inverse(self.rows, mask, jax.device_put(own), whole, gram)
        # The inverse of the average over all rows is 1 / filled times as large.
        return inverse.combination(self.filled * self.mean)

    def _empty(self) -> WritableRows:
        return self._gradients.storage.empty(self._like, self._count)


def _scales_to_newest(
    gram: Float[np.ndarray, "m m"], newest: int, num_parts: int
) -> Float[np.ndarray, " p"]:
    """The scales that give every part the mean square of the newest part."""
    squares = np.diagonal(gram).reshape(num_parts, -1).sum(axis=1)
    # A part whose gradients are all zero is not scaled, and no other part is scaled to it.
    is_scaled = (squares > 0) & (squares[newest] > 0)
    ratios = np.divide(squares[newest], squares, out=np.ones_like(squares), where=is_scaled)
    return np.sqrt(ratios)
