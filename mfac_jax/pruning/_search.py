"""The search of a pruning step: it tries several settings, and the measured loss decides.

With few gradients for many weights, the quadratic model behind an update oversteps and does not
notice. The loss of the network on calibration batches shows it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.gradients import LossFn, check_batches, check_scalar
from mfac_jax.inverse import FisherInverse
from mfac_jax.pruning._blocks import Cut, WithinOutputs, cut
from mfac_jax.pruning._budgets import Target
from mfac_jax.pruning._gradients import History
from mfac_jax.pruning._masks import pruned_of_leaves
from mfac_jax.pruning._patterns import Pattern, Unstructured
from mfac_jax.pruning._problem import Problem
from mfac_jax.pruning._scope import Selection
from mfac_jax.pruning._scores import (
    LARGEST_GREEDY,
    ScoreFn,
    as_score,
    check_score,
    name_of,
)
from mfac_jax.pruning._step import PruneInfo, info_of, move, new_mask
from mfac_jax.pruning._updates import UpdateFn, as_update, delta_of
from mfac_jax.rows import Blocks, partition


class Setting(NamedTuple):
    """One way to make a step; see the arguments of :func:`prune_step`.

    Attributes:
        score: which weights go: a name, or your own function.
        update: how the other weights compensate: a name, or your own function.
        blocks: the blocks of the Fisher.
        damping: ``lambda``; if ``relative`` is true, ``lambda`` is ``damping`` times the mean of
            the diagonal of ``G^T G / n``.
        scales: factors for the update; each is tried.
        relative: whether ``damping`` is relative.
    """

    score: str | ScoreFn
    update: str | UpdateFn
    blocks: Blocks | WithinOutputs
    damping: float
    scales: tuple[float, ...] = (1.0,)
    relative: bool = False


class Descent(NamedTuple):
    """A step of the remaining weights down the loss, after their update.

    Its direction is that of the optimizer, ``-F^-1`` times the mean of the step's gradients. The
    attributes are those of :func:`mfac_jax.mfac`.

    Attributes:
        relative_damping: ``lambda`` as a fraction of the trace of the undamped Fisher.
        learning_rate: the factor of the direction.
    """

    relative_damping: float
    learning_rate: float


class Trial(NamedTuple):
    """A setting that was tried, and its loss on the calibration batches.

    Attributes:
        setting: the setting.
        scale: the factor for its update.
        loss: the loss after the trial; NaN if the step is not finite.
        descent: the descent after the update; None without a descent.
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
            f"{name_of(setting.score)} + {name_of(setting.update)}, {blocks}, "
            f"damping {setting.damping:g}{' of the mean' if setting.relative else ''}, "
            f"scale {self.scale:g}" + (f", descent {self.descent[1]:g}" if self.descent else "")
        )


# The setting of the paper's code with the whole Fisher, and magnitude without an update.
_REFERENCE = Setting("mfac", "reference", None, 1e-5)
_NOTHING = Setting("magnitude", "none", None, 1e-5)
# The gradients of two steps determine blocks of at most this many weights well, so a small damping
# suits them.
_BLOCK = 144
_RELATIVE_DAMPING = 0.03
# Short steps, nearly along the gradient or well preconditioned. With batches of B examples the
# Fisher is about B times smaller than the Hessian.
DESCENTS = (Descent(0.3, 0.1), Descent(0.3, 0.3), Descent(0.003, 0.03))


def default_settings(pattern: Pattern = Unstructured()) -> tuple[Setting, ...]:  # noqa: B008
    """The settings that :func:`prune` tries in each step by default.

    Args:
        pattern: the pattern to prune in.

    Returns:
        Greedy masks and joint updates inside the blocks of outputs, at two dampings; the setting
        of the paper's code with the whole Fisher; and magnitude without an update. For patterns
        without a common group size, or with very large groups, joint updates in a block for
        each leaf replace the first two.
    """
    size = pattern.group_size
    if size is None or size > LARGEST_GREEDY or not pattern.is_greedy:
        joint = Setting("mfac", "joint", "leaf", _RELATIVE_DAMPING, (1.0, 0.5), relative=True)
        return joint, _REFERENCE, _NOTHING
    within = Setting("greedy", "joint", WithinOutputs(_BLOCK), _RELATIVE_DAMPING, relative=True)
    return within, within._replace(damping=10 * _RELATIVE_DAMPING), _REFERENCE, _NOTHING


@dataclass(frozen=True)
class Search:
    """The settings and descents that :func:`prune` tries in each step.

    Attributes:
        settings: the settings to try; :func:`default_settings` by default.
        descents: the descents to try after the best setting; () for none.
        calibration: the batches that measure the loss; by default the first batches of
            ``batches``. When ``batches`` restarts, gradients may come from the same batches.
            Never give test data.
        num_calibration: the number of calibration batches.
    """

    settings: Sequence[Setting] | None = None
    descents: Sequence[Descent] = DESCENTS
    calibration: Iterable[PyTree] | None = None
    num_calibration: int = 8

    def __post_init__(self) -> None:
        _checks.positive_int(self.num_calibration, "num_calibration")
        if self.calibration is not None:
            check_batches(self.calibration, "calibration")
        if self.settings is not None:
            object.__setattr__(self, "settings", _checked_settings(self.settings))
        object.__setattr__(self, "descents", _checked_descents(self.descents))

    def cut(self, selection: Selection) -> tuple[tuple[Setting, Cut], ...]:
        """The settings, each with its blocks.

        Raises:
            ValueError: a setting does not fit the pattern.
        """
        settings = self.settings
        if settings is None:
            settings = default_settings(selection.pattern)
        pairs = tuple((setting, cut(setting.blocks, selection)) for setting in settings)
        for setting, pieces in pairs:
            check_score(as_score(setting.score), selection, pieces)
        return pairs


def _checked_settings(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    if isinstance(settings, Setting):
        raise TypeError("settings must be a sequence of Setting, got one: give [setting].")
    chosen = tuple(settings)
    if not chosen:
        raise ValueError("settings is empty: expected at least one Setting.")
    for setting in chosen:
        if not isinstance(setting, Setting):
            raise TypeError(f"settings must be Setting, got {type(setting).__name__}.")
        as_score(setting.score)
        as_update(setting.update)
        _checks.positive_scalar(setting.damping, "damping")
        if not isinstance(setting.scales, Sequence):
            raise TypeError(
                f"scales must be a sequence of numbers, got {type(setting.scales).__name__}."
            )
        if not setting.scales:
            raise ValueError("scales is empty: expected at least one number.")
        for scale in setting.scales:
            _checks.positive_scalar(scale, "scales")
    return tuple(
        setting._replace(damping=float(setting.damping), scales=tuple(map(float, setting.scales)))
        for setting in chosen
    )


def _checked_descents(descents: Sequence[Descent]) -> tuple[Descent, ...]:
    for descent in descents:
        if not isinstance(descent, Descent):
            raise TypeError(f"descents must be Descent, got {type(descent).__name__}.")
        _checks.positive_scalar(descent.relative_damping, "relative_damping")
        _checks.positive_scalar(descent.learning_rate, "learning_rate")
    return tuple(Descent(*map(float, descent)) for descent in descents)


class Step(NamedTuple):
    """The chosen step, ``tried[chosen]``.

    Attributes:
        params: the parameters after the step.
        mask: the mask after the step, false in leaves that are not prunable.
        info: the size of the update, and the rise of the loss that the model predicts for it.
        tried: all trials.
        chosen: the index of the chosen trial.
        damping: ``lambda`` of the update.
        freedom: the degrees of freedom of the whole Fisher under this damping.
    """

    params: PyTree
    mask: PyTree
    info: PruneInfo
    tried: tuple[Trial, ...]
    chosen: int
    damping: float
    freedom: float


class Searcher:
    """Tries every setting of a step, and every descent after the best setting.

    The Fisher is an average over the filled rows, which is 1 / ``filled`` times the average over
    all rows. The average over all rows, with ``filled`` times the damping, gives the same masks
    and updates.
    """

    def __init__(
        self,
        params: PyTree,
        mask: PyTree,
        history: History,
        selection: Selection,
        loss_of: Callable[[PyTree], float],
    ) -> None:
        self._params, self._mask, self._selection = params, mask, selection
        self._history, self._loss_of = history, loss_of
        self._dtype = history.rows.dtype
        self._gram = np.asarray(history.grams.of(mask))
        num_alive = selection.num_weights - sum(pruned_of_leaves(selection.leaves(mask)))
        mean = _trace(self._gram) / max(num_alive, 1)
        self._mean = _or_one(mean) / history.filled
        self._problems: dict[tuple[object, ...], Problem] = {}
        self._masks: dict[tuple[int, int], tuple[PyTree, Array]] = {}
        self._tried: list[Trial] = []

    def step(
        self,
        settings: Sequence[tuple[Setting, Cut]],
        descents: Sequence[Descent],
        target: Target,
        *,
        keep_layers: bool,
    ) -> Step:
        """The best step.

        Args:
            settings: the settings to try, each with its blocks.
            descents: the descents to try after the best setting.
            target: how many weights go.
            keep_layers: whether the best group of every leaf stays.

        Raises:
            FloatingPointError: all losses are NaN or Inf.
        """
        best: _Found | None = None
        for setting, pieces in settings:
            found = self._try(setting, pieces, target, keep_layers)
            best = min((f for f in (best, found) if f is not None), key=_loss_key, default=None)
        if best is None:
            raise FloatingPointError(
                "no setting gives a finite loss on the calibration batches: "
                f"tried {[str(trial) for trial in self._tried]}."
            )
        problem, filled = best.problem, self._history.filled
        info = jax.device_get(info_of(problem, best.mask, best.delta))
        info = info._replace(
            predicted_loss_increase=info.predicted_loss_increase / filled,
            undamped_loss_increase=info.undamped_loss_increase / filled,
        )
        params, chosen = self._descend(best, descents)
        return Step(
            params,
            best.mask,
            info,
            tuple(self._tried),
            chosen,
            float(problem.damping) / filled,
            _degrees_of_freedom(self._gram, float(problem.damping)),
        )

    def _try(
        self, setting: Setting, pieces: Cut, target: Target, keep_layers: bool
    ) -> _Found | None:
        """The best scale of a setting; None if no loss is finite."""
        problem = self._problem(setting, pieces)
        score = as_score(setting.score)
        key = (id(score), id(problem))  # a score or a problem need not be hashable
        if key not in self._masks:
            self._masks[key] = new_mask(problem, score, target, keep_layers=keep_layers)
        mask, good = self._masks[key]
        delta = delta_of(as_update(setting.update), problem, mask)
        best: _Found | None = None
        for scale in setting.scales:
            scaled = np.asarray(scale, self._dtype)
            moved, finite = move(self._selection, self._params, mask, delta, scaled)
            loss = self._loss_of(moved) if good and finite else math.nan
            self._tried.append(Trial(setting, scale, loss))
            found = _Found(moved, mask, delta, problem, loss, len(self._tried) - 1)
            if math.isfinite(loss) and (best is None or loss < best.loss):
                best = found
        return best

    def _problem(self, setting: Setting, pieces: Cut) -> Problem:
        key = (setting.damping, setting.relative, *pieces[1:])
        if key not in self._problems:
            mean = self._mean if setting.relative else 1.0
            damping = np.asarray(self._history.filled * setting.damping * mean, self._dtype)
            self._problems[key] = Problem(
                self._params,
                self._mask,
                self._history.rows,
                jax.device_put(damping),
                self._selection,
                pieces,
                self._history.grams,
            )
        return self._problems[key]

    def _descend(self, best: _Found, descents: Sequence[Descent]) -> tuple[PyTree, int]:
        """The parameters after the best descent, or without one; and the index of that trial."""
        params, chosen = best.params, best.trial
        directions: dict[float, PyTree] = {}
        for descent in descents:
            damping = descent.relative_damping
            if damping not in directions:
                directions[damping] = self._direction(best.mask, damping)
            rate = np.asarray(-descent.learning_rate, self._dtype)
            moved, finite = move(self._selection, best.params, best.mask, directions[damping], rate)
            loss = self._loss_of(moved) if finite else math.nan
            if loss < self._tried[chosen].loss:
                params, chosen = moved, len(self._tried)
            setting, scale = self._tried[best.trial][:2]
            self._tried.append(Trial(setting, scale, loss, descent))
        return params, chosen

    def _direction(self, mask: PyTree, relative_damping: float) -> PyTree:
        """``F^-1 g`` over the weights that stay, for the mean ``g`` of the step's gradients.

        At the minimum of the quadratic model over the weights that stay, the remaining gradient
        is ``g``, the gradient of the loss. The next step is a step of the optimizer. ``g`` is a
        mean of the rows, so nothing is subtracted.
        """
        history, rows = self._history, self._history.rows
        gram = history.grams.of(mask)
        damping = np.asarray(relative_damping * _or_one(_trace(np.asarray(gram))), self._dtype)
        whole = partition(rows.layout, None)
        inverse = FisherInverse.whole(rows, mask, jax.device_put(damping), whole, gram)
        # The inverse of the average over all rows is 1 / filled times as large.
        return inverse.combination(history.filled * history.mean)


class _Found(NamedTuple):
    """The result of a setting.

    Attributes:
        params: the parameters after the step.
        mask: the mask after the step.
        delta: the update.
        problem: the problem before the step.
        loss: the loss on the calibration batches.
        trial: the index of the trial.
    """

    params: PyTree
    mask: PyTree
    delta: PyTree
    problem: Problem
    loss: float
    trial: int


def _loss_key(found: _Found) -> tuple[float, int]:
    return found.loss, found.trial


# Numbers that only steer the search are computed on the host, which needs no compilation.
def _trace(gram: Float[np.ndarray, "n n"]) -> float:
    """The trace of ``G^T G / n``."""
    return float(np.trace(gram, dtype=np.float64)) / len(gram)


def _or_one(scale: float) -> float:
    return scale if scale > 0 else 1.0


def _degrees_of_freedom(gram: Float[np.ndarray, "n n"], damping: float) -> float:
    """``sum k_i / (k_i + n lambda)`` over the eigenvalues ``k_i`` of ``K``."""
    eigenvalues = np.maximum(np.linalg.eigvalsh(gram), 0).astype(np.float64)
    return float(np.sum(eigenvalues / (eigenvalues + len(gram) * damping)))


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> Array:
    return check_scalar(loss_fn(params, batch))


def mean_loss(loss_fn: LossFn, params: PyTree, *, batches: Sequence[PyTree]) -> float:
    """The mean loss over the batches, which count equally."""
    losses = jax.device_get([_loss(loss_fn, params, batch) for batch in batches])
    return float(np.mean(np.asarray(losses, np.float64)))
