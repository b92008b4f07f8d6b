"""One pruning step of a search: tries every setting and descent, and the measured loss decides."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from mfac_jax._collect import LossFn, check_scalar
from mfac_jax._layout import PyTree
from mfac_jax.pruning._blocks import FisherBlocks
from mfac_jax.pruning._gradients import Curvature
from mfac_jax.pruning._masks import pruned_of_leaves
from mfac_jax.pruning._problem import Problem
from mfac_jax.pruning._scope import Selection
from mfac_jax.pruning._scores import as_score
from mfac_jax.pruning._search import Descent, Setting, Trial
from mfac_jax.pruning._step import PruneInfo, info_of, move, new_mask
from mfac_jax.pruning._targets import Target
from mfac_jax.pruning._updates import as_update, delta_of


class Step(NamedTuple):
    """The chosen step, ``tried[chosen]``.

    Attributes:
        params: the parameters after the step.
        mask: the mask after the step, false in leaves that are not prunable.
        info: the size of the update, and the rise of the loss that the model predicts for it.
        tried: all trials.
        chosen: the index of the chosen trial.
        damping: ``lambda`` of the update.
        freedom: the degrees of freedom of the Fisher under this damping.
    """

    params: PyTree
    mask: PyTree
    info: PruneInfo
    tried: tuple[Trial, ...]
    chosen: int
    damping: float
    freedom: float


class Searcher:
    """Tries every setting of a step, and every descent after the best setting."""

    def __init__(
        self,
        params: PyTree,
        mask: PyTree,
        curvature: Curvature,
        selection: Selection,
        loss_of: Callable[[PyTree], float],
    ) -> None:
        self._params, self._mask, self._selection = params, mask, selection
        self._curvature, self._loss_of = curvature, loss_of
        self._dtype = curvature.rows.dtype
        num_alive = selection.num_weights - sum(pruned_of_leaves(selection.leaves(mask)))
        mean = curvature.trace(mask) / max(num_alive, 1)
        self._mean = _or_one(mean) / curvature.filled
        self._problems: dict[tuple[object, ...], Problem] = {}
        self._masks: dict[tuple[int, bool, int], tuple[PyTree, Array]] = {}
        self._tried: list[Trial] = []

    def step(
        self,
        settings: Sequence[tuple[Setting, FisherBlocks]],
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
        for setting, blocks in settings:
            found = self._try(setting, blocks, target, keep_layers)
            best = min((f for f in (best, found) if f is not None), key=_loss_key, default=None)
        if best is None:
            raise FloatingPointError(
                "no setting gives a finite loss on the calibration batches: "
                f"tried {[str(trial) for trial in self._tried]}."
            )
        problem, filled = best.problem, self._curvature.filled
        info = jax.device_get(info_of(problem, self._selection, best.mask, best.delta))
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
            self._curvature.freedom(problem),
        )

    def _try(
        self, setting: Setting, blocks: FisherBlocks, target: Target, keep_layers: bool
    ) -> _Found | None:
        """The best scale of a setting; None if no loss is finite."""
        problem, selection = self._problem(setting, blocks), self._selection
        score = as_score(setting.score)
        # Functions need not be hashable. The setting holds the function, so its id is not reused.
        key = (id(score.function), score.of_groups, id(problem))
        if key not in self._masks:
            self._masks[key] = new_mask(problem, selection, score, target, keep_layers=keep_layers)
        mask, good = self._masks[key]
        delta = delta_of(as_update(setting.update), problem, mask)
        best: _Found | None = None
        for scale in setting.scales:
            scaled = np.asarray(scale, self._dtype)
            moved, finite = move(selection, self._params, mask, delta, scaled)
            loss = self._loss_of(moved) if good and finite else math.nan
            self._tried.append(Trial(setting, scale, loss))
            found = _Found(moved, mask, delta, problem, loss, len(self._tried) - 1)
            if math.isfinite(loss) and (best is None or loss < best.loss):
                best = found
        return best

    def _problem(self, setting: Setting, blocks: FisherBlocks) -> Problem:
        key = (setting.damping, setting.relative, blocks)
        if key not in self._problems:
            mean = self._mean if setting.relative else 1.0
            damping = np.asarray(self._curvature.filled * setting.damping * mean, self._dtype)
            self._problems[key] = Problem(
                self._params,
                self._mask,
                self._curvature.rows,
                jax.device_put(damping),
                self._selection,
                blocks,
                self._curvature.grams,
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
        is ``g``, the gradient of the loss. The next step is a step of the optimizer.
        """
        damping = relative_damping * _or_one(self._curvature.trace(mask))
        return self._curvature.direction(mask, damping)


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


def _or_one(scale: float) -> float:
    return scale if scale > 0 else 1.0


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> Array:
    return check_scalar(loss_fn(params, batch))


def mean_loss(loss_fn: LossFn, params: PyTree, *, batches: Sequence[PyTree]) -> float:
    """The mean loss over the batches, which count equally."""
    losses = jax.device_get([_loss(loss_fn, params, batch) for batch in batches])
    return float(np.mean(np.asarray(losses, np.float64)))
