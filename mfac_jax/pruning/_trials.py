"""One pruning step of a search: tries every setting and descent, and the measured loss decides.

The trials are in a race: after a quarter of the calibration batches the worse half of them is given
up, but two stay; after half of the batches all but the best.
"""

from __future__ import annotations

import dataclasses
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

# A race compares the trials on a quarter, half and all of the batches.
_SHARES = (4, 2, 1)


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


class CalibrationLoss:
    """The losses of parameters on the calibration batches."""

    def __init__(self, loss_fn: LossFn, batches: Sequence[PyTree]) -> None:
        self._loss_fn, self._batches = loss_fn, batches

    @property
    def num_batches(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def on(self, params: PyTree, batches: slice) -> list[float]:
        """The losses on some of the batches."""
        losses = [_loss(self._loss_fn, params, batch) for batch in self._batches[batches]]
        return [float(loss) for loss in jax.device_get(losses)]

    def mean(self, params: PyTree) -> float:
        """The mean loss over all batches, which count equally."""
        return _mean(self.on(params, slice(None)))


class Searcher:
    """Tries every setting of a step, and every descent after the best setting."""

    def __init__(
        self,
        params: PyTree,
        mask: PyTree,
        curvature: Curvature,
        selection: Selection,
        loss: CalibrationLoss,
    ) -> None:
        self._params, self._mask, self._selection = params, mask, selection
        self._curvature, self._loss = curvature, loss
        self._dtype = curvature.rows.dtype
        num_alive = selection.num_weights - sum(pruned_of_leaves(selection.leaves(mask)))
        mean = curvature.trace(mask) / max(num_alive, 1)
        self._mean = _or_one(mean) / curvature.filled
        self._problems: dict[tuple[object, ...], Problem] = {}
        self._masks: dict[tuple[int, bool, int], tuple[PyTree, Array]] = {}

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
        found = [self._find(*pair, target, keep_layers) for pair in settings]
        updates = [
            _Candidate(setting, scale, None, self._scaled(moves, scale))
            for (setting, _), moves in zip(settings, found, strict=True)
            for scale in setting.scales
        ]
        of = [i for i, (setting, _) in enumerate(settings) for _ in setting.scales]
        first = self._race(updates)
        if first is None:
            raise FloatingPointError(
                "no setting gives a finite loss on the calibration batches: "
                f"tried {[str(update.trial) for update in updates]}."
            )
        best, start = found[of[first]], updates[first]
        trials = [update.trial for update in updates]
        del found, updates  # the updates of the others
        problem, filled = best.problem, self._curvature.filled
        info = jax.device_get(info_of(problem, self._selection, best.mask, best.delta))
        info = info._replace(
            predicted_loss_increase=info.predicted_loss_increase / filled,
            undamped_loss_increase=info.undamped_loss_increase / filled,
        )
        params, _ = start.moved()
        steps = self._descents(start, params, best.mask, descents)
        second = self._race(steps)
        chosen = first
        if second is not None and steps[second].loss < start.loss:
            (params, _), chosen = steps[second].moved(), len(trials) + second
        return Step(
            params,
            best.mask,
            info,
            (*trials, *(step.trial for step in steps)),
            chosen,
            float(problem.damping) / filled,
            self._curvature.freedom(problem),
        )

    def _find(
        self, setting: Setting, blocks: FisherBlocks, target: Target, keep_layers: bool
    ) -> _Found:
        """The mask and the update of a setting."""
        damping = setting.damping
        of_score = damping if setting.score_damping is None else setting.score_damping
        score = as_score(setting.score)
        judge = self._problem(setting._replace(damping=of_score), blocks)
        # Functions need not be hashable. The setting holds the function, so its id is not reused.
        key = (id(score.function), score.of_groups, id(judge))
        if key not in self._masks:
            self._masks[key] = new_mask(
                judge, self._selection, score, target, keep_layers=keep_layers
            )
        mask, good = self._masks[key]
        problem = self._problem(setting, blocks)
        return _Found(mask, good, delta_of(as_update(setting.update), problem, mask), problem)

    def _scaled(self, found: _Found, scale: float) -> Callable[[], tuple[PyTree, bool]]:
        """The parameters after an update, and whether they and the scores are finite."""

        def moved() -> tuple[PyTree, bool]:
            factor = np.asarray(scale, self._dtype)
            params, finite = move(self._selection, self._params, found.mask, found.delta, factor)
            return params, bool(found.good) and bool(finite)

        return moved

    def _descents(
        self, start: _Candidate, params: PyTree, mask: PyTree, descents: Sequence[Descent]
    ) -> list[_Candidate]:
        """The candidates that go on from a start."""
        directions: dict[float, PyTree] = {}

        def moved(descent: Descent) -> tuple[PyTree, bool]:
            rate = np.asarray(-descent.learning_rate, self._dtype)
            direction = directions[descent.relative_damping]
            new, finite = move(self._selection, params, mask, direction, rate)
            return new, bool(finite)

        for descent in descents:
            damping = descent.relative_damping
            if damping not in directions:
                directions[damping] = self._direction(mask, damping)
        return [
            _Candidate(start.setting, start.scale, descent, functools.partial(moved, descent))
            for descent in descents
        ]

    def _race(self, candidates: Sequence[_Candidate]) -> int | None:
        """The index of the best candidate on all batches; None if no loss is finite."""
        left = list(range(len(candidates)))
        given_up: list[int] = []
        for share in _SHARES:
            until = -(-self._loss.num_batches // share)
            for i in left:
                candidates[i].measure(self._loss, until)
            left = [i for i in left if math.isfinite(candidates[i].loss)]
            left.sort(key=lambda i: (candidates[i].loss, i))
            kept = max((len(left) + 1) // 2, 2) if share == _SHARES[0] else 1
            left, given_up = left[:kept], left[kept:] + given_up
        # If those that stay turn out to be not finite on later batches, the others may be finite.
        while not left and given_up:
            i = given_up.pop(0)
            candidates[i].measure(self._loss, self._loss.num_batches)
            left = [i] if math.isfinite(candidates[i].loss) else []
        return left[0] if left else None

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

    def _direction(self, mask: PyTree, relative_damping: float) -> PyTree:
        """``F^-1 g`` over the weights that stay, for the mean ``g`` of the step's gradients.

        At the minimum of the quadratic model over the weights that stay, the remaining gradient
        is ``g``, the gradient of the loss. The next step is a step of the optimizer.
        """
        damping = relative_damping * _or_one(self._curvature.trace(mask))
        return self._curvature.direction(mask, damping)


class _Found(NamedTuple):
    """The mask and the update of a setting.

    Attributes:
        mask: the mask after the step.
        good: whether the scores of all weights that go are finite.
        delta: the update.
        problem: the problem of the update.
    """

    mask: PyTree
    good: Array
    delta: PyTree
    problem: Problem


@dataclasses.dataclass
class _Candidate:
    """A trial in a race.

    Attributes:
        setting: the setting.
        scale: the factor for its update.
        descent: the descent after the update, or None.
        moved: makes the parameters, and says whether they are finite. They are made again when
            they are needed, which takes less than to keep those of every candidate.
        losses: the losses on the first batches.
    """

    setting: Setting
    scale: float
    descent: Descent | None
    moved: Callable[[], tuple[PyTree, bool]]
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean loss so far; NaN without any."""
        return _mean(self.losses) if self.losses else math.nan

    @property
    def trial(self) -> Trial:
        """The candidate for the report."""
        return Trial(self.setting, self.scale, self.loss, self.descent, len(self.losses))

    def measure(self, loss: CalibrationLoss, until: int) -> None:
        """Measures the losses up to a number of batches."""
        if len(self.losses) >= until:
            return
        params, finite = self.moved()
        if finite:
            self.losses += loss.on(params, slice(len(self.losses), until))


def _or_one(scale: float) -> float:
    return scale if scale > 0 else 1.0


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> Array:
    return check_scalar(loss_fn(params, batch))


def _mean(losses: Sequence[float]) -> float:
    return float(np.mean(np.asarray(losses, np.float64)))
