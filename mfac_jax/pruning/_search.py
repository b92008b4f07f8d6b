"""The search of a pruning step: which settings and descents it tries, and on which batches.

With few gradients for many weights, the quadratic model behind an update oversteps and does not
notice. The loss of the network on calibration batches shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mfac_jax import _checks
from mfac_jax._collect import check_batches
from mfac_jax._layout import PyTree
from mfac_jax.pruning._blocks import (
    FisherBlocks,
    WithinOutputs,
    check_blocks,
    cut_into_blocks,
)
from mfac_jax.pruning._functions import name_of
from mfac_jax.pruning._interface import Pattern, check_pattern
from mfac_jax.pruning._patterns import Unstructured
from mfac_jax.pruning._scope import Selection
from mfac_jax.pruning._scores import LARGEST_GREEDY, Score, ScoreFn, as_score, check_score
from mfac_jax.pruning._updates import Update, UpdateFn, as_update
from mfac_jax.rows import Blocks


class Setting(NamedTuple):
    """One way to make a step; see the arguments of :func:`prune_step`.

    Attributes:
        score: which weights go: a name, or your own function or :class:`Score`.
        update: how the other weights compensate: a name, or your own function or
            :class:`Update`.
        blocks: the blocks of the Fisher.
        damping: ``lambda``; if ``relative`` is true, ``lambda`` is ``damping`` times the mean of
            the diagonal of ``G^T G / n``.
        scales: factors for the update; each is tried.
        relative: whether the dampings are relative.
        score_damping: ``lambda`` of the score; ``damping`` by default. Settings that differ only
            in ``damping`` and share ``score_damping`` share a mask, which is computed once.
    """

    score: str | ScoreFn | Score
    update: str | UpdateFn | Update
    blocks: Blocks | WithinOutputs
    damping: float
    scales: tuple[float, ...] = (1.0,)
    relative: bool = False
    score_damping: float | None = None


class Descent(NamedTuple):
    """A step of the remaining weights down the loss, after their update.

    Its direction is that of the optimizer, ``-F^-1`` times the mean of the step's gradients. The
    attributes have the meaning they have in :func:`mfac_jax.mfac`.

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
        loss: the mean loss over the first ``num_batches`` batches; NaN if the step is not finite.
        descent: the descent after the update; None without a descent.
        num_batches: the number of calibration batches until the trial was chosen or given up; 0 if
            the step is not finite.
    """

    setting: Setting
    scale: float
    loss: float
    descent: Descent | None = None
    num_batches: int = 0

    def __str__(self) -> str:
        setting = self.setting
        if setting.blocks is None or isinstance(setting.blocks, WithinOutputs):
            blocks = str(setting.blocks or "whole")
        else:
            blocks = f"blocks {setting.blocks}"
        return (
            f"{name_of(setting.score)} + {name_of(setting.update)}, {blocks}, "
            f"damping {_dampings(setting)}{' of the mean' if setting.relative else ''}, "
            f"scale {self.scale:g}" + (f", descent {self.descent[1]:g}" if self.descent else "")
        )


def _dampings(setting: Setting) -> str:
    own = f"{setting.damping:g}"
    if setting.score_damping in (None, setting.damping):
        return own
    return f"{own} (score: {setting.score_damping:g})"


# Magnitude without an update; the damping is unused.
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
        A greedy mask inside the blocks of outputs, with joint updates at two dampings; and
        magnitude without an update. For patterns without a common group size, or with very large
        groups, joint updates in a block for each leaf replace the first two.

    Raises:
        TypeError: ``pattern`` is not a pattern.
    """
    check_pattern(pattern)
    size = pattern.group_size
    if size is None or size > LARGEST_GREEDY or not pattern.supports_greedy:
        joint = Setting("mfac", "joint", "leaf", _RELATIVE_DAMPING, (1.0, 0.5), relative=True)
        return joint, _NOTHING
    within = Setting("greedy", "joint", WithinOutputs(_BLOCK), _RELATIVE_DAMPING, relative=True)
    more = within._replace(damping=10 * _RELATIVE_DAMPING, score_damping=_RELATIVE_DAMPING)
    return within, more, _NOTHING


# Compared by identity: two arrays of a batch are not simply equal or different.
@dataclass(frozen=True, eq=False)
class Search:
    """The settings and descents that :func:`prune` tries in each step.

    Two of them are equal only if they are the same object.

    Attributes:
        settings: the settings to try; :func:`default_settings` by default.
        descents: the descents to try after the best setting; () for none.
        calibration: the batches that measure the loss; by default the first batches of
            ``batches``. When ``batches`` restarts, gradients may come from the same batches.
            Never give test data.
        num_calibration: the number of calibration batches.

    Raises:
        TypeError: an attribute, or an attribute of a setting or descent, has another type.
        ValueError: a number is out of range, a name is unknown, or there are no settings or
            scales.
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


def settings_on(
    selection: Selection, settings: Sequence[Setting] | None
) -> tuple[tuple[Setting, FisherBlocks], ...]:
    """The settings to try, by default those of the pattern, each with its blocks.

    Raises:
        ValueError: a setting does not fit the parameters or the pattern.
    """
    chosen = default_settings(selection.pattern) if settings is None else settings
    pairs = tuple((setting, cut_into_blocks(setting.blocks, selection)) for setting in chosen)
    for setting, blocks in pairs:
        check_score(as_score(setting.score), selection, blocks)
    return pairs


def _checked_settings(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    chosen = _sequence(settings, Setting, "setting")
    if not chosen:
        raise ValueError("settings is empty: expected at least one Setting.")
    for setting in chosen:
        if not isinstance(setting, Setting):
            raise TypeError(f"settings must be Setting, got {type(setting).__name__}.")
        as_score(setting.score)
        as_update(setting.update)
        check_blocks(setting.blocks)
        _checks.positive_scalar(setting.damping, "damping")
        if setting.score_damping is not None:
            _checks.positive_scalar(setting.score_damping, "score_damping")
        if not isinstance(setting.scales, Sequence):
            raise TypeError(
                f"scales must be a sequence of numbers, got {type(setting.scales).__name__}."
            )
        if not setting.scales:
            raise ValueError("scales is empty: expected at least one number.")
        for scale in setting.scales:
            _checks.positive_scalar(scale, "scales")
    return tuple(
        setting._replace(
            damping=float(setting.damping),
            scales=tuple(map(float, setting.scales)),
            score_damping=None if setting.score_damping is None else float(setting.score_damping),
        )
        for setting in chosen
    )


def _sequence(values: Any, kind: type, name: str) -> tuple[Any, ...]:
    if isinstance(values, kind) or not isinstance(values, Sequence) or isinstance(values, str):
        got = f"one: give [{name}]" if isinstance(values, kind) else type(values).__name__
        raise TypeError(f"{name}s must be a sequence of {kind.__name__}, got {got}.")
    return tuple(values)


def _checked_descents(descents: Sequence[Descent]) -> tuple[Descent, ...]:
    descents = _sequence(descents, Descent, "descent")
    for descent in descents:
        if not isinstance(descent, Descent):
            raise TypeError(f"descents must be Descent, got {type(descent).__name__}.")
        _checks.positive_scalar(descent.relative_damping, "relative_damping")
        _checks.positive_scalar(descent.learning_rate, "learning_rate")
    return tuple(Descent(*map(float, descent)) for descent in descents)
