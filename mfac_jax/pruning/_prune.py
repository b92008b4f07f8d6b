"""Pruning in one call: gradients, steps and a report, every update judged by the loss."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.gradients import collect_gradients, cycle
from mfac_jax.pruning._budgets import Target, target_of
from mfac_jax.pruning._filters import PathFilter, prunable
from mfac_jax.pruning._inputs import as_static
from mfac_jax.pruning._masks import initial_mask
from mfac_jax.pruning._patterns import (
    BlocksOf,
    Grouping,
    NofM,
    Pattern,
    Slices,
    Unstructured,
    check_pattern,
    group,
)
from mfac_jax.pruning._report import (
    LayerReport,
    PruneReport,
    Setting,
    StepReport,
    Trial,
    peak_memory,
)
from mfac_jax.pruning._schedules import sparsity_schedule
from mfac_jax.pruning._scores import SCORES, check_score
from mfac_jax.pruning._step import PruneInfo, choose, merge, move, narrow, work_out
from mfac_jax.pruning._updates import UPDATES
from mfac_jax.rows import SelectedRows

LossFn = Callable[[PyTree, PyTree], Any]
FineTune = Callable[[PyTree, PyTree], PyTree]


# What the paper's code does, and nothing at all.
_REFERENCE = Setting("mfac", "reference", None, 1e-5)
_NOTHING = Setting("magnitude", "none", None, 1e-5)
_BLOCK = 128
# Blocks of up to n weights are well determined by n gradients, and a small damping suits them.
_RELATIVE_DAMPING = 1e-2


def default_settings(pattern: Pattern = Unstructured()) -> tuple[Setting, ...]:  # noqa: B008
    """What :func:`prune` chooses from in each step, unless it is told.

    Args:
        pattern: the pattern to prune in.

    Returns:
        Exact masks and joint updates inside blocks, at full and half length; what the paper's
        code does; and magnitude without an update.
    """
    if isinstance(pattern, Slices):
        joint = Setting("mfac", "joint", "leaf", _RELATIVE_DAMPING, (1.0, 0.5), relative=True)
        return joint, _REFERENCE, _NOTHING
    size = 1
    if isinstance(pattern, NofM | BlocksOf):
        size = pattern.m if isinstance(pattern, NofM) else pattern.size
    blocks = max(_BLOCK // size, 1) * size
    inside = [
        Setting(score, "joint", blocks, _RELATIVE_DAMPING, (1.0, 0.5), relative=True)
        for score in ("greedy", "mfac")
    ]
    return *inside, _REFERENCE, _NOTHING


class Pruned(NamedTuple):
    """What :func:`prune` returns.

    Attributes:
        params: the parameters, 0 where pruned.
        mask: a tree of booleans like them, true where a weight is alive.
        report: what was done, and what it cost.
    """

    params: PyTree
    mask: PyTree
    report: PruneReport


def prune(
    params: PyTree,
    loss_fn: LossFn,
    batches: Iterable[PyTree],
    sparsity: float | PyTree,
    *,
    steps: int = 8,
    schedule: str | Sequence[float] = "geometric",
    num_gradients: int = 128,
    per_example: bool = False,
    settings: Sequence[Setting] | None = None,
    calibration: Iterable[PyTree] | None = None,
    num_calibration: int = 8,
    mask: PyTree | None = None,
    fine_tune: FineTune | None = None,
    path_filter: PathFilter = None,
    pattern: Pattern = Unstructured(),  # noqa: B008  (immutable)
    budget: str = "global",
    costs: PyTree | None = None,
    allow_empty_layers: bool = False,
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> Pruned:
    """Prunes a network: a percentage is all it takes.

    In each of ``steps`` steps gradients are taken at the weights as they are, every one of
    ``settings`` is worked out, and the one with the least loss on calibration batches is
    taken: the quadratic model behind an update oversteps where gradients are few, and says
    nothing of it.

    Args:
        params: the parameters, a tree of real floating-point arrays.
        loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch, with normalisation and
            dropout as at inference.
        batches: training data, an iterable of batches; see
            :func:`mfac_jax.collect_gradients`. It is gone on with from step to step, and begun
            again when it ends.
        sparsity: the fraction of prunable weights to prune in the end, or a tree of fractions
            like ``params``; see :func:`prune_step`.
        steps: how often gradients are taken anew; 1 is one-shot pruning.
        schedule: of the sparsity, see :func:`sparsity_schedule`; or the sparsities after each
            step, rising to ``sparsity`` (then ``steps`` does not count).
        num_gradients: ``n`` of each step.
        per_example: one gradient an example in place of one a batch.
        settings: what to choose from in each step; by default :func:`default_settings`, a few
            that include the paper's own and no update at all.
        calibration: the batches the loss is measured on; by default the next of ``batches``
            before the first step. Never give test data.
        num_calibration: how many batches of it.
        mask: what is alive at first; all by default.
        fine_tune: ``fine_tune(params, mask) -> params``, called after every step: training
            with :func:`sparse`, for example.
        path_filter: which leaves may be pruned; see :func:`prunable`.
        pattern: which weights can only go together; see :func:`prune_step`.
        budget: where ``sparsity`` holds; see there.
        costs: of a weight of each leaf; see there.
        allow_empty_layers: whether a leaf may lose all of its weights.
        dtype: what gradients are stored in.
        progress: show a progress bar, if there is a terminal or notebook to show it.

    Returns:
        The pruned parameters, the mask and a report.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as :func:`prune_step` and :func:`mfac_jax.collect_gradients`; or there are
            no calibration batches or settings. Nothing has been done then.
        FloatingPointError: a weight, a gradient, or every loss after a step is not finite.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mfac_jax.pruning import prune
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> y = x[:, :2] @ jnp.array([1.0, -2.0])
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch[0] @ params["w"][:, 0] - batch[1]) ** 2)
        >>> params = {"w": jnp.array([[1.0], [-2.0], [0.1], [0.1], [0.1], [0.1], [0.1], [0.1]])}
        >>> batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
        >>> pruned = prune(params, loss_fn, batches, 0.75, steps=2, num_gradients=32)
        >>> pruned.mask["w"][:, 0].tolist()
        [True, True, False, False, False, False, False, False]
    """
    layout = Layout(params)
    mask_leaves = layout.check_mask(initial_mask(params) if mask is None else mask)
    keep = tuple(jax.tree.leaves(prunable(params, path_filter)))
    check_pattern(pattern)
    shapes = zip(layout.shapes, layout.dtypes, keep, strict=True)
    prunables = Layout(tuple(jax.ShapeDtypeStruct(*like) for *like, kept in shapes if kept))
    names = [path for path, kept in zip(layout.paths, keep, strict=True) if kept]
    network = _Network(layout, keep, prunables, group(pattern, prunables, names))
    alive = narrow(mask_leaves, keep)
    settings = _checked_settings(
        default_settings(pattern) if settings is None else settings, prunables, network.grouping
    )
    targets = [
        target_of(
            fraction,
            budget,
            prunables,
            network.grouping,
            layout=layout,
            keep=keep,
            costs=costs,
            allow_empty_layers=allow_empty_layers,
            mask=alive,
        )
        for fraction in _fractions(sparsity, schedule, steps, mask_leaves)
    ]
    _check_finite(params, layout)
    stream = _Stream(batches)
    held_out = _take(stream if calibration is None else calibration, num_calibration)
    params = jax.tree.unflatten(layout.treedef, [jnp.asarray(x) for x in jax.tree.leaves(params)])
    loss = mean_loss(loss_fn, params, held_out)

    reports = []
    hidden = None if progress else True  # on None tqdm stays silent in a file
    with tqdm(total=len(targets), unit="step", desc="pruning", disable=hidden) as bar:
        for target in targets:
            began = time.perf_counter()
            rows = collect_gradients(
                loss_fn,
                params,
                stream,
                num_gradients,
                per_example=per_example,
                dtype=dtype,
                progress=progress,
            )
            gradient_seconds = time.perf_counter() - began
            leaves = jax.tree.leaves(params)

            def loss_of(weights: Sequence[Array], leaves: list[Array] = leaves) -> float:
                return mean_loss(loss_fn, network.tree(leaves, weights), held_out)

            step = _best_step(
                settings,
                network,
                narrow(leaves, keep),
                alive,
                SelectedRows.of(rows, keep),
                target,
                not allow_empty_layers,
                loss_of,
            )
            del rows
            params, alive = network.tree(leaves, step.weights), step.mask
            mask = network.tree(mask_leaves, alive)
            tuned = None
            if fine_tune is not None:
                params = _under_mask(fine_tune(params, mask), mask, layout)
                tuned = mean_loss(loss_fn, params, held_out)
            reports.append(
                StepReport(
                    num_pruned=int(step.info.num_pruned),
                    num_weights=prunables.size,
                    chosen=step.chosen,
                    tried=step.tried,
                    loss_before=loss,
                    loss_after=step.tried[step.chosen].loss,
                    loss_tuned=tuned,
                    predicted_loss_increase=float(step.info.predicted_loss_increase),
                    update_norm=float(step.info.update_norm),
                    removed_norm=float(step.info.removed_norm),
                    damping=step.damping,
                    degrees_of_freedom=step.freedom,
                    gradient_seconds=gradient_seconds,
                    seconds=time.perf_counter() - began,
                    peak_memory=peak_memory(),
                )
            )
            loss = reports[-1].loss_after if tuned is None else tuned
            bar.update()
            bar.set_postfix(loss=f"{loss:.4g}", sparsity=f"{reports[-1].sparsity:.1%}")
    layers = tuple(
        LayerReport(layout.paths[i] or "value", leaf.size, int(jnp.sum(~leaf)))
        for i, leaf in zip(np.flatnonzero(keep), alive, strict=True)
    )
    return Pruned(params, mask, PruneReport(tuple(reports), layers))


class _Network(NamedTuple):
    """What does not change from step to step.

    Attributes:
        layout: all parameters.
        keep: which of them are prunable.
        prunables: those.
        grouping: their groups.
    """

    layout: Layout
    keep: tuple[bool, ...]
    prunables: Layout
    grouping: Grouping

    def tree(self, leaves: Sequence[Array], selected: Sequence[Array]) -> PyTree:
        """All parameters, from all leaves and the new prunable ones."""
        return jax.tree.unflatten(self.layout.treedef, merge(leaves, selected, self.keep))


class _Step(NamedTuple):
    """A step that has been worked out; ``tried[chosen]`` is how."""

    weights: tuple[Array, ...]
    mask: tuple[Array, ...]
    info: PruneInfo
    tried: tuple[Trial, ...]
    chosen: int
    damping: float
    freedom: float = 0.0


def _best_step(
    settings: Sequence[Setting],
    network: _Network,
    weights: tuple[Array, ...],
    alive: tuple[Array, ...],
    rows: SelectedRows,
    target: Target,
    keep_layers: bool,
    loss_of: Callable[[Sequence[Array]], float],
) -> _Step:
    """Works out every setting; the one of least loss.

    Raises:
        FloatingPointError: all losses are NaN or Inf.
    """
    masks: dict[tuple[Any, ...], tuple[tuple[Array, ...], Array]] = {}
    tried: list[Trial] = []
    best: _Step | None = None
    gram = rows.gram(alive)
    mean = _mean_diagonal(gram, alive)
    for setting in settings:
        damping = jnp.asarray(setting.damping, rows.dtype)
        if setting.relative:
            damping = damping * mean
        blocks = as_static(setting.blocks, rows)
        key = (setting.score, blocks, setting.damping, setting.relative)
        if key not in masks:
            masks[key] = choose(
                weights,
                alive,
                rows,
                target.counts,
                damping,
                score=setting.score,
                blocks=blocks,
                grouping=network.grouping,
                costs=target.costs,
                keep_layers=keep_layers,
            )
        mask, good = masks[key]
        delta, info = work_out(
            weights,
            alive,
            mask,
            rows,
            damping,
            update=setting.update,
            blocks=blocks,
            grouping=network.grouping,
        )
        for scale in setting.scales:
            moved = move(weights, mask, delta, jnp.asarray(scale, rows.dtype))
            loss = loss_of(moved) if bool(good & info.accepted) else math.nan
            tried.append(Trial(setting, scale, loss))
            if math.isfinite(loss) and (best is None or loss < tried[best.chosen].loss):
                best = _Step(moved, mask, info, (), len(tried) - 1, float(damping))
    if best is None:
        raise FloatingPointError(
            "no setting gives a finite loss on the calibration batches: "
            f"tried {[trial.setting for trial in tried]}."
        )
    freedom = _degrees_of_freedom(gram, jnp.asarray(best.damping, gram.dtype))
    return best._replace(tried=tuple(tried), freedom=float(freedom))


@jax.jit
def _mean_diagonal(gram: Float[Array, "n n"], alive: tuple[Array, ...]) -> Float[Array, ""]:
    """The mean of the diagonal of ``G^T G / n`` over the alive weights; 1 if it is 0."""
    count = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in alive)
    mean = jnp.trace(gram) / (gram.shape[0] * jnp.maximum(jnp.asarray(count), 1)).astype(gram.dtype)
    return jnp.where(mean > 0, mean, jnp.ones_like(mean))


@jax.jit
def _degrees_of_freedom(gram: Float[Array, "n n"], damping: Float[Array, ""]) -> Float[Array, ""]:
    """``sum k_i / (k_i + n lambda)`` over the eigenvalues of ``K``: directions that count."""
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(gram), 0)
    return jnp.sum(eigenvalues / (eigenvalues + gram.shape[0] * damping))


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> Array:
    return jnp.asarray(loss_fn(params, batch))


def mean_loss(loss_fn: LossFn, params: PyTree, batches: Sequence[PyTree]) -> float:
    """The mean over the batches, which are taken to be of one size."""
    losses = jax.device_get([_loss(loss_fn, params, batch) for batch in batches])
    return float(np.mean(np.asarray(losses, np.float64)))


class _Stream:
    """Batches that are gone on with from one ``iter`` to the next, and begun again at the end."""

    def __init__(self, batches: Iterable[PyTree]):
        if isinstance(batches, jax.Array | np.ndarray) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of batches, got {type(batches).__name__}; "
                "a single batch is given as [batch]."
            )
        self._endless = cycle(batches)

    def __iter__(self) -> Iterator[PyTree]:
        return (batch for _, batch in self._endless)


def _take(batches: Iterable[PyTree], count: int) -> list[PyTree]:
    _checks.positive_int(count, "num_calibration")
    taken = [jax.tree.map(jnp.array, batch) for batch in itertools.islice(iter(batches), count)]
    if not taken:
        raise ValueError("calibration is empty: expected at least one batch.")
    return taken


def _fractions(
    sparsity: float | PyTree, schedule: str | Sequence[float], steps: int, mask: Sequence[Array]
) -> list[Any]:
    """The sparsity after each step: numbers, or trees of them."""
    is_number = jax.tree_util.all_leaves([sparsity])
    if not isinstance(schedule, str):
        given = [float(s) for s in schedule]
        if not given or given != sorted(given) or given[-1] <= 0:
            raise ValueError(f"schedule must be sparsities that rise, got {schedule!r}.")
        if is_number and given[-1] != sparsity:
            raise ValueError(
                f"schedule must end at sparsity={sparsity}, got {given[-1]} as its last entry."
            )
        if is_number:
            return given
        return [jax.tree.map(lambda leaf, part=s / given[-1]: leaf * part, sparsity) for s in given]
    pruned = [int(jnp.sum(~leaf)) for leaf in mask]
    if is_number:
        _checks.unit_interval(sparsity, "sparsity")
        total = sum(leaf.size for leaf in mask)
        start = min(sum(pruned) / max(total, 1), float(sparsity))
        return list(sparsity_schedule(float(sparsity), steps, kind=schedule, initial=start))
    leaves, treedef = jax.tree.flatten(sparsity)
    if len(leaves) != len(mask):
        return [sparsity]  # for the check of the structure to say so
    columns = [
        sparsity_schedule(
            float(leaf), steps, kind=schedule, initial=min(gone / max(m.size, 1), float(leaf))
        )
        for leaf, gone, m in zip(leaves, pruned, mask, strict=True)
    ]
    return [jax.tree.unflatten(treedef, row) for row in zip(*columns, strict=True)]


def _checked_settings(
    settings: Sequence[Setting], prunables: Layout, grouping: Grouping
) -> tuple[Setting, ...]:
    chosen = tuple(settings)
    if not chosen:
        raise ValueError("settings is empty: expected at least one Setting.")
    for setting in chosen:
        if not isinstance(setting, Setting):
            raise TypeError(f"settings must be Setting, got {type(setting).__name__}.")
        _checks.one_of(setting.score, "score", tuple(SCORES))
        _checks.one_of(setting.update, "update", tuple(UPDATES))
        _checks.positive_scalar(setting.damping, "damping")
        check_score(setting.score, prunables, setting.blocks, grouping)
    return chosen


def _check_finite(params: PyTree, layout: Layout) -> None:
    for path, leaf in zip(layout.paths, jax.tree.leaves(params), strict=True):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise FloatingPointError(f"params{path} has NaN or Inf in it.")


def _under_mask(params: PyTree, mask: PyTree, layout: Layout) -> PyTree:
    leaves = layout.check(params, "the parameters from fine_tune")
    pairs = zip(leaves, layout.check_mask(mask), strict=True)
    kept = [jnp.where(alive, leaf, jnp.zeros_like(leaf)) for leaf, alive in pairs]
    return jax.tree.unflatten(layout.treedef, kept)
