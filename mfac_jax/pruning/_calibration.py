"""Choosing how to make a step by the loss it leads to.

The quadratic model behind an update oversteps where gradients are few for many weights, and
cannot see it. So several settings are worked out, and what the network then loses on
calibration batches decides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.gradients import LossFn, check_scalar
from mfac_jax.inverse import Blocks
from mfac_jax.pruning._budgets import Target
from mfac_jax.pruning._descent import descent
from mfac_jax.pruning._outputs import WithinOutputs, cut
from mfac_jax.pruning._patterns import BlocksOf, Grouping, NofM, Pattern, Slices, Unstructured
from mfac_jax.pruning._scores import LARGEST_GREEDY, SCORES, check_score
from mfac_jax.pruning._step import Problem, PruneInfo, choose, move, work_out
from mfac_jax.pruning._updates import UPDATES
from mfac_jax.rows import GradientRows


class Setting(NamedTuple):
    """One way to make a step; the arguments of :func:`prune_step` of these names.

    Attributes:
        score: which weights go.
        update: how the others make up for it.
        blocks: of the Fisher.
        damping: ``lambda``, or if it is ``relative`` a multiple of the mean of the diagonal
            of ``G^T G / n``.
        scales: what the update is multiplied by, one after another.
        relative: what ``damping`` is.
    """

    score: str
    update: str
    blocks: Blocks | WithinOutputs
    damping: float
    scales: tuple[float, ...] = (1.0,)
    relative: bool = False


class Descent(NamedTuple):
    """A step of the weights that stay, after their update, down the loss itself.

    The optimizer's own direction, ``-F^-1`` times the mean of the step's gradients; see
    :func:`mfac_jax.mfac`, which has arguments of these names.

    Attributes:
        relative_damping: ``lambda`` as a fraction of the trace of the undamped Fisher.
        learning_rate: what the direction is multiplied by.
    """

    relative_damping: float
    learning_rate: float


class Trial(NamedTuple):
    """A setting that was tried, and the loss on the calibration batches (NaN if there is none).

    Attributes:
        setting: the setting.
        scale: what its update was multiplied by.
        loss: what came out.
        descent: what was done after it.
    """

    setting: Setting
    scale: float
    loss: float
    descent: Descent | None = None

    def __str__(self) -> str:
        setting = self.setting
        if setting.blocks is None or isinstance(setting.blocks, WithinOutputs):
            blocks = str(setting.blocks or "whole")
        else:
            blocks = f"blocks {setting.blocks}"
        return (
            f"{setting.score} + {setting.update}, {blocks}, "
            f"damping {setting.damping:g}{' of the mean' if setting.relative else ''}, "
            f"scale {self.scale:g}" + (f", descent {self.descent[1]:g}" if self.descent else "")
        )


# What the paper's code does, the Fisher whole; and nothing at all.
_REFERENCE = Setting("mfac", "reference", None, 1e-5)
_NOTHING = Setting("magnitude", "none", None, 1e-5)
# Blocks of up to so many weights are well determined by the gradients of two steps, and a small
# damping suits them.
_BLOCK = 144
_RELATIVE_DAMPING = 0.03
# Short steps, nearly along the gradient or well preconditioned: with mini-batches the Fisher is
# smaller than the Hessian, about as many times as a batch has examples.
DESCENTS = (Descent(0.3, 0.1), Descent(0.3, 0.3), Descent(0.003, 0.03))


def default_settings(pattern: Pattern = Unstructured()) -> tuple[Setting, ...]:  # noqa: B008
    """What :func:`prune` chooses from in each step, unless it is told.

    Args:
        pattern: the pattern to prune in.

    Returns:
        Exact masks and joint updates inside the blocks of outputs, at two dampings; what the
        paper's code does with the whole Fisher; and magnitude without an update.
    """
    is_large = (isinstance(pattern, BlocksOf) and pattern.size > LARGEST_GREEDY) or (
        isinstance(pattern, NofM) and pattern.m > LARGEST_GREEDY
    )
    if isinstance(pattern, Slices) or is_large:
        joint = Setting("mfac", "joint", "leaf", _RELATIVE_DAMPING, (1.0, 0.5), relative=True)
        return joint, _REFERENCE, _NOTHING
    within = Setting("greedy", "joint", WithinOutputs(_BLOCK), _RELATIVE_DAMPING, relative=True)
    return within, within._replace(damping=10 * _RELATIVE_DAMPING), _REFERENCE, _NOTHING


def checked_settings(
    settings: Sequence[Setting], prunables: Layout, grouping: Grouping
) -> tuple[Setting, ...]:
    if isinstance(settings, Setting):
        raise TypeError("settings must be a sequence of Setting, got one: give [setting].")
    chosen = tuple(settings)
    if not chosen:
        raise ValueError("settings is empty: expected at least one Setting.")
    for setting in chosen:
        if not isinstance(setting, Setting):
            raise TypeError(f"settings must be Setting, got {type(setting).__name__}.")
        _checks.one_of(setting.score, "score", tuple(SCORES))
        _checks.one_of(setting.update, "update", tuple(UPDATES))
        _checks.positive_scalar(setting.damping, "damping")
        if not isinstance(setting.scales, Sequence):
            raise TypeError(
                f"scales must be a sequence of numbers, got {type(setting.scales).__name__}."
            )
        if not setting.scales:
            raise ValueError("scales is empty: expected at least one number.")
        for scale in setting.scales:
            _checks.positive_scalar(scale, "scales")
        pieces = cut(setting.blocks, prunables, grouping)
        check_score(setting.score, prunables, pieces.blocks, grouping)
    return tuple(
        setting._replace(damping=float(setting.damping), scales=tuple(map(float, setting.scales)))
        for setting in chosen
    )


def checked_descents(descents: Sequence[Descent]) -> tuple[Descent, ...]:
    for way in descents:
        if not isinstance(way, Descent):
            raise TypeError(f"descents must be Descent, got {type(way).__name__}.")
        _checks.positive_scalar(way.relative_damping, "relative_damping")
        _checks.positive_scalar(way.learning_rate, "learning_rate")
    return tuple(Descent(*map(float, way)) for way in descents)


class Step(NamedTuple):
    """A step that has been worked out; ``tried[chosen]`` is how."""

    weights: tuple[Array, ...]
    mask: tuple[Array, ...]
    info: PruneInfo
    predicted_loss_increase: float
    tried: tuple[Trial, ...]
    chosen: int
    damping: float
    freedom: float


def best_step(
    settings: Sequence[Setting],
    grouping: Grouping,
    weights: tuple[Array, ...],
    alive: tuple[Array, ...],
    rows: GradientRows,
    target: Target,
    loss_of: Callable[[Sequence[Array]], float],
    *,
    filled: float,
    mean_of_newest: Float[np.ndarray, " n"],
    descents: Sequence[Descent],
    keep_layers: bool,
) -> Step:
    """Works out every setting, and every descent after the best; what has the least loss.

    Args:
        settings: at least one, checked.
        grouping: the groups of the prunable leaves.
        weights: those leaves.
        alive: which of their weights are there.
        rows: their gradients.
        target: how many go.
        loss_of: the loss on the calibration batches, of the prunable leaves.
        filled: the fraction of the rows that hold gradients; the others are zero.
        mean_of_newest: ``a`` such that ``G^T a`` is the gradient at these weights.
        descents: to try, checked.
        keep_layers: whether the best group of every leaf stays.

    Raises:
        FloatingPointError: all losses are NaN or Inf.
    """
    masks: dict[tuple[Any, ...], tuple[tuple[Array, ...], Array]] = {}
    problems: dict[tuple[Any, ...], Problem] = {}
    tried: list[Trial] = []
    best: _Found | None = None
    chosen = -1
    # The Fisher is an average over the gradients that are there: 1 / filled times the average over
    # all rows. The latter, with filled times the damping, gives the same masks and updates.
    gram, mean_diagonal = _gram(rows, alive)
    mean = float(mean_diagonal) / filled
    for setting in settings:
        pieces = cut(setting.blocks, rows.layout, grouping)
        like = (pieces, setting.damping, setting.relative)
        if like not in problems:
            damping = filled * setting.damping * (mean if setting.relative else 1)
            lam = jax.device_put(np.asarray(damping, rows.dtype))
            problems[like] = Problem(weights, alive, rows, lam, pieces, grouping)
        problem = problems[like] = problems[like].ready_for(setting.score, setting.update)
        key = (setting.score, *like)
        if key not in masks:
            masks[key] = choose(
                problem,
                target.counts,
                score=setting.score,
                costs=target.costs,
                keep_layers=keep_layers,
            )
        mask, good = masks[key]
        delta, info = work_out(problem, mask, update=setting.update)
        for scale in setting.scales:
            moved = move(weights, mask, delta, np.asarray(scale, rows.dtype))
            loss = loss_of(moved) if bool(good) and bool(info.accepted) else math.nan
            tried.append(Trial(setting, scale, loss))
            if math.isfinite(loss) and (best is None or loss < tried[chosen].loss):
                best, chosen = _Found(moved, mask, info, problem.damping), len(tried) - 1
    if best is None:
        raise FloatingPointError(
            "no setting gives a finite loss on the calibration batches: "
            f"tried {[trial.setting for trial in tried]}."
        )
    weights = best.weights
    setting, scale = tried[chosen][:2]
    of_alive = _gram(rows, best.mask)[0] if descents else gram
    directions: dict[float, PyTree] = {}
    for way in descents:
        lam = way.relative_damping
        if lam not in directions:
            relative = np.asarray(lam, rows.dtype)
            # filled, since the inverse of the average over all rows is 1 / filled times as large.
            directions[lam] = descent(rows, of_alive, best.mask, filled * mean_of_newest, relative)
        rate = np.asarray(way.learning_rate, rows.dtype)
        moved = move(best.weights, best.mask, directions[lam], rate)
        loss = loss_of(moved)
        if loss < tried[chosen].loss:
            weights, chosen = moved, len(tried)
        tried.append(Trial(setting, scale, loss, way))
    return Step(
        weights,
        best.mask,
        best.info,
        float(best.info.predicted_loss_increase) / filled,
        tuple(tried),
        chosen,
        float(best.damping) / filled,
        float(_degrees_of_freedom(gram, best.damping)),
    )


class _Found(NamedTuple):
    """A setting that has been worked out."""

    weights: tuple[Array, ...]
    mask: tuple[Array, ...]
    info: PruneInfo
    damping: Float[Array, ""]


@jax.jit
def _gram(
    rows: GradientRows, alive: tuple[Array, ...]
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Over the alive weights: ``G G^T``, and the mean diagonal of ``G^T G / n`` or 1 if it is 0."""
    gram = rows.gram(alive)
    count = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in alive)
    mean = jnp.trace(gram) / (gram.shape[0] * jnp.maximum(jnp.asarray(count), 1)).astype(gram.dtype)
    return gram, jnp.where(mean > 0, mean, jnp.ones_like(mean))


@jax.jit
def _degrees_of_freedom(gram: Float[Array, "n n"], damping: Float[Array, ""]) -> Float[Array, ""]:
    """``sum k_i / (k_i + n lambda)`` over the eigenvalues of ``K``: directions that count."""
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(gram), 0)
    return jnp.sum(eigenvalues / (eigenvalues + gram.shape[0] * damping))


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> Array:
    return check_scalar(loss_fn(params, batch))


def mean_loss(loss_fn: LossFn, params: PyTree, batches: Sequence[PyTree]) -> float:
    """The mean over the batches, which are taken to be of one size."""
    losses = jax.device_get([_loss(loss_fn, params, batch) for batch in batches])
    return float(np.mean(np.asarray(losses, np.float64)))
