"""Scores: the expected rise of the loss when a weight or a group of weights goes.

Optimal Brain Surgeon scores a weight by ``w_q^2 / (2 [F^-1]_qq)``, the least rise of
the quadratic model over all updates of the other weights. Optimal Brain Damage scores it by
``w_q^2 F_qq / 2``, the rise if no other weight moves. Magnitude is the baseline.

A score is a function ``score(problem) -> scores`` of a :class:`mfac_jax.pruning.Problem`. It
returns a tree like the parameters; the lowest scores go first. The pattern combines the scores of
single weights into scores of groups. A function that scores groups itself is given as a
:class:`Score`. :data:`SCORES` holds the scores that have a name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree, where
from mfac_jax.inverse import GroupBlocks, fisher_inverse
from mfac_jax.pruning._blocks import FisherBlocks, check_groups
from mfac_jax.pruning._functions import ProblemFunction, as_kind, call
from mfac_jax.pruning._greedy import greedy_scores
from mfac_jax.pruning._interface import Pattern, check_group_scores
from mfac_jax.pruning._problem import Problem
from mfac_jax.pruning._scope import Selection
from mfac_jax.rows import Blocks, GradientRows
from mfac_jax.rows._base import check_rows

ScoreFn = Callable[[Problem], PyTree]

# Greedy removal keeps the B x B inverse of a block, for B up to this size.
LARGEST_GREEDY = 2048


def saliency(
    params: PyTree,
    rows: GradientRows,
    damping: ArrayLike,
    *,
    mask: PyTree | None = None,
    blocks: Blocks = None,
) -> PyTree:
    """``w_q^2 / (2 [F^-1]_qq)`` of every weight. O(d n min(n, B)).

    Args:
        params: ``w``; a tree of real floating-point arrays.
        rows: ``G``; the gradients of ``params``.
        damping: ``lambda > 0``; a number or a scalar array.
        mask: a tree of booleans like ``params``, true where a weight is alive. The Fisher is
            restricted to alive weights. Everything is alive by default.
        blocks: which blocks the Fisher has; see :func:`mfac_jax.fisher_inverse`.

    Returns:
        The scores, a tree like ``params`` in the accumulation dtype of the rows; 0
        where ``mask`` is false.

    Raises:
        TypeError: a leaf is not real floating point, the mask is not boolean, or an
            argument has the wrong type.
        ValueError: ``params`` or ``mask`` do not fit the rows, ``damping`` is not
            positive, or the blocks do not cover d.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> gradients = rows.as_rows(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> pruning.saliency(jnp.array([1.0, 1.0, 2.0]), gradients, damping=0.5)
        Array([0.5 , 1.25, 1.  ], dtype=float32)

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 4.1 (its rho_p).
    """
    inverse = fisher_inverse(rows, damping, mask=mask, blocks=blocks)
    rows.layout.check(params, "params")
    return _saliency(params, inverse.mask, inverse.diagonal())


def obd_saliency(
    params: PyTree, rows: GradientRows, damping: ArrayLike, *, mask: PyTree | None = None
) -> PyTree:
    """``w_q^2 F_qq / 2`` of every weight: the cost of removing it if no other moves. O(d n).

    The arguments, results and errors are those of :func:`saliency`. There are no blocks, because
    they do not change the diagonal of ``F``.

    Reference: LeCun, Denker, Solla, "Optimal brain damage", NeurIPS 1989.
    """
    rows = check_rows(rows)
    rows.layout.check(params, "params")
    _checks.positive_scalar(damping, "damping")
    if mask is not None:
        rows.layout.check_mask(mask)
    lam = jnp.asarray(damping).astype(rows.dtype)
    return _obd(params, mask, rows.column_square_sums(), lam, num_rows=rows.num_rows)


def magnitude(params: PyTree, *, mask: PyTree | None = None) -> PyTree:
    """``|w|`` of every weight, 0 where ``mask`` is false. This score is the baseline.

    Raises:
        TypeError: a leaf is not real floating point, or the mask is not boolean.
        ValueError: ``mask`` does not fit ``params``.
    """
    layout = Layout(params)
    if mask is not None:
        mask = jax.tree.unflatten(layout.treedef, layout.check_mask(mask))
    return _magnitude(params, mask)


def _restricted(scores: PyTree, mask: PyTree | None) -> PyTree:
    return scores if mask is None else where(mask, scores)


@jax.jit
def _saliency(params: PyTree, mask: PyTree | None, diagonal: PyTree) -> PyTree:
    scores = jax.tree.map(
        lambda d, w: jnp.asarray(w).astype(d.dtype) ** 2 / (2 * d), diagonal, params
    )
    return _restricted(scores, mask)


@functools.partial(jax.jit, static_argnames="num_rows")
def _obd(
    params: PyTree,
    mask: PyTree | None,
    squares: PyTree,
    damping: Float[Array, ""],
    *,
    num_rows: int,
) -> PyTree:
    def score(square: Array, weight: Array) -> Array:
        return jnp.asarray(weight).astype(square.dtype) ** 2 * (damping + square / num_rows) / 2

    return _restricted(jax.tree.map(score, squares, params), mask)


@jax.jit
def _magnitude(params: PyTree, mask: PyTree | None) -> PyTree:
    return _restricted(jax.tree.map(jnp.abs, params), mask)


@dataclass(frozen=True)
class Score(ProblemFunction):
    """A score, and what a step must know about it before it reads gradients.

    A function ``score(problem)`` of your own is the same as ``Score(score)``.

    Attributes:
        function: ``function(problem)`` of a :class:`Problem` returns a tree like the parameters;
            the lowest scores go first.
        reads_columns: whether the function reads columns of the gradients, as
            :attr:`Problem.diagonal` and :meth:`Problem.map_groups` do. If the gradients have no
            columns to read, there is then an error before any work.
        of_groups: whether the function scores groups, for example by
            :meth:`Problem.map_groups`. By default the pattern combines the scores of single
            weights. The score of a group that goes whole is that of its first weight in the
            order of the pattern. If the function also reads columns, a block of the Fisher that
            cuts a group raises an error before any work.
        check: ``check(pattern, largest)`` raises a ValueError if the function cannot score this
            pattern, or a Fisher whose largest block has ``largest`` weights. It is called before
            any work.

    Raises:
        TypeError: an attribute has another type.

    Example:
        Half of the score ``"mfac"`` of groups, which gives the same mask:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> def half(problem):
        ...     costs = problem.map_groups(problem.pattern.cost)
        ...     return jax.tree.map(lambda cost: cost / 2, costs)
        >>> w, alive = jnp.array([[1.0, 0.1], [2.0, 0.5]]), jnp.ones((2, 2), bool)
        >>> _, mask, _ = pruning.prune_step(
        ...     w,
        ...     alive,
        ...     rows.as_rows(jnp.ones((3, 2, 2))),
        ...     0.5,
        ...     damping=0.01,
        ...     score=pruning.Score(half, reads_columns=True, of_groups=True),
        ...     scope=pruning.Scope(pattern=pruning.BlocksOf(2)),
        ... )
        >>> mask.tolist()
        [[True, False], [True, False]]
    """

    of_groups: bool = False
    check: Callable[[Pattern, int], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.of_groups, bool):
            raise TypeError(f"of_groups must be a bool, got {type(self.of_groups).__name__}.")
        if self.check is not None and not callable(self.check):
            raise TypeError(f"check must be a function or None, got {self.check!r}.")


def _magnitude_score(problem: Problem) -> PyTree:
    single = _magnitude(problem.weights, None)
    if not (problem.has_groups and problem.pattern.prunes_whole_groups):
        return problem.combine(single)
    return _roots(problem.combine(_squares(single)))


@jax.jit
def _squares(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.square, tree)


@jax.jit
def _roots(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.sqrt, tree)


def _obd_score(problem: Problem) -> PyTree:
    rows = problem.rows
    squares, n = rows.column_square_sums(), rows.num_rows
    return _obd(problem.weights, None, squares, problem.damping, num_rows=n)


def _mfac_score(problem: Problem) -> PyTree:
    if not problem.has_groups:
        return _saliency(problem.weights, None, problem.diagonal)
    return problem.map_groups(_Cost(problem.pattern))


@dataclass(frozen=True)
class _Cost:
    """:meth:`Pattern.cost` as a value: equal patterns share one compiled program."""

    pattern: Pattern

    def __call__(
        self, blocks: GroupBlocks, weights: Float[Array, "*b g"], alive: Bool[Array, "*b g"]
    ) -> Float[Array, "*b g"]:
        costs = self.pattern.cost(blocks, weights, alive)
        return check_group_scores(costs, weights, "cost", self.pattern)


def _greedy_score(problem: Problem) -> PyTree:
    size, quota = problem.pattern.group_size or 1, problem.pattern.greedy_quota
    return problem.map_blocks(_GreedyScores(size, quota))


@dataclass(frozen=True)
class _GreedyScores:
    """:func:`greedy_scores` of a batch of blocks, as a value."""

    size: int
    quota: int | None

    def __call__(
        self, blocks: GroupBlocks, weights: Float[Array, "*b B"], alive: Bool[Array, "*b B"]
    ) -> Float[Array, "*b B"]:
        side = weights.shape[-1]
        flat = (part.reshape(-1, side) for part in (weights, alive, blocks.floor))
        inverse = blocks.matrix.reshape(-1, side, side)
        found = greedy_scores(inverse, *flat, size=self.size, quota=self.quota)
        return found.reshape(weights.shape)


def _check_greedy(pattern: Pattern, largest: int) -> None:
    size = pattern.group_size
    if size is None:
        raise ValueError(
            "score='greedy' needs a pattern whose groups have one size, "
            f"got {pattern}; use score='mfac'."
        )
    if not pattern.supports_greedy:
        raise ValueError(
            f"score='greedy' cannot follow {pattern}, which overrides combine or cost and has "
            "no greedy_quota; use score='mfac'."
        )
    if largest > LARGEST_GREEDY:
        fits = f"blocks={128 // size * size or size} is a good choice"
        hint = fits if size <= LARGEST_GREEDY else "use score='mfac'"
        raise ValueError(
            "score='greedy' removes weight by weight inside blocks of at most "
            f"{LARGEST_GREEDY} weights, got a block of {largest} weights with {pattern}; {hint}."
        )


SCORES: dict[str, Score] = {
    "mfac": Score(_mfac_score, reads_columns=True, of_groups=True),
    "greedy": Score(_greedy_score, reads_columns=True, of_groups=True, check=_check_greedy),
    "obd": Score(_obd_score),
    "magnitude": Score(_magnitude_score, of_groups=True),
}


def as_score(score: str | ScoreFn | Score) -> Score:
    """The built-in score of a name, or the caller's own score; see :func:`as_kind`."""
    return as_kind(score, "score", SCORES, Score)


def check_score(score: Score, selection: Selection, blocks: FisherBlocks) -> None:
    """Checks that the blocks and the pattern fit the score.

    Raises:
        ValueError: they do not fit.
    """
    if score.check is not None:
        score.check(selection.pattern, max((run.size for run in blocks.runs), default=0))
    if score.of_groups and score.reads_columns:
        check_groups(blocks, selection.pattern)


def scores_of(score: Score, problem: Problem) -> PyTree:
    """The scores of groups, a tree like the parameters.

    Raises:
        ValueError: the caller's own score returns another structure or shape.
        TypeError: it does not return real numbers.
    """
    found = call(score, problem.rows.layout, "scores", problem)
    return found if score.of_groups else problem.combine(found)
