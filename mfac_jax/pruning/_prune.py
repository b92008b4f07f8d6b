"""Pruning in one call: gradients, steps and a report, every update judged by the loss."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array
from tqdm.auto import tqdm

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.gradients import (
    LossFn,
    check_batches,
    check_functions,
    cycle,
    fill_rows,
    on_device,
)
from mfac_jax.pruning._budgets import check_wanted, target_of
from mfac_jax.pruning._calibration import (
    DESCENTS,
    Descent,
    Setting,
    Step,
    best_step,
    checked_descents,
    checked_settings,
    default_settings,
    mean_loss,
)
from mfac_jax.pruning._filters import PathFilter, prunable
from mfac_jax.pruning._history import History
from mfac_jax.pruning._inputs import check_finite, check_finite_gradients
from mfac_jax.pruning._masks import initial_mask, pruned_of_leaves
from mfac_jax.pruning._network import Network, TurnedLoss
from mfac_jax.pruning._patterns import Pattern, Unstructured, check_pattern, group
from mfac_jax.pruning._report import LayerReport, PruneReport, StepReport, peak_memory
from mfac_jax.pruning._schedules import schedule_of
from mfac_jax.pruning._step import merge, narrow
from mfac_jax.rows import (
    FlatRows,
    GradientRows,
    SelectedRows,
    TransposedRows,
    check_rows,
    empty_rows,
)

FineTune = Callable[[PyTree, PyTree], PyTree]


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
    gradients: GradientRows | None = None,
    history: int = 1,
    descents: Sequence[Descent] = DESCENTS,
    mask: PyTree | None = None,
    fine_tune: FineTune | None = None,
    path_filter: PathFilter = None,
    pattern: Pattern = Unstructured(),  # noqa: B008  (immutable)
    budget: str = "global",
    costs: PyTree | None = None,
    allow_empty_layers: bool = False,
    output_axis: int = -1,
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> Pruned:
    """Prunes a network: a percentage is all it takes.

    In each of ``steps`` steps gradients are taken at the weights as they are, beside those of
    the step before; every one of ``settings`` is worked out, and the one with the least loss on
    calibration batches is taken: the quadratic model behind an update oversteps where gradients
    are few, and says nothing of it. Then ``descents`` are tried: short steps of the weights that
    stay, down the loss.

    Args:
        params: the parameters, a tree of real floating-point arrays.
        loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch, with normalisation and
            dropout as at inference.
        batches: training data, an iterable of batches; see
            :func:`mfac_jax.collect_gradients`. Each step continues where the last one stopped
            and restarts the data when they run out. An iterator's batches are kept in memory so
            that they can be replayed; a list, or an object whose ``__iter__`` starts afresh, is
            not copied.
        sparsity: the fraction of prunable weights to prune in the end, or a tree of fractions
            like ``params``; see :func:`prune_step`.
        steps: how often gradients are taken anew; 1 is one-shot pruning.
        schedule: of the sparsity, see :func:`sparsity_schedule`; or the sparsities after each
            step, rising to ``sparsity`` (then ``steps`` does not count).
        num_gradients: how many each step takes.
        per_example: one gradient an example in place of one a batch.
        settings: what to choose from in each step; by default :func:`default_settings`, a few
            that include the paper's own with the whole Fisher and no update at all.
        calibration: the batches the loss is measured on; by default the first of ``batches``,
            which gradients may be taken of as well once ``batches`` begins again. Never give test
            data.
        num_calibration: how many batches of it.
        gradients: those of the first step, taken at ``params`` (all leaves), where they are at
            hand: to prune to several sparsities out of the same, for example. Later ones are
            stored as they are.
        history: how many earlier steps' gradients are used as well; each takes as much memory
            again, from the first step on.
        descents: what to try after the best setting: steps of the weights that stay, down the
            loss; () for none.
        mask: initial mask; everything is alive by default.
        fine_tune: ``fine_tune(params, mask) -> params``, called after every step: training
            with :func:`sparse`, for example. State that training moves, such as the statistics
            of normalisation layers, belongs into ``params``, where the loss sees it; say by
            ``path_filter`` that it is not pruned.
        path_filter: which leaves may be pruned; see :func:`prunable`.
        pattern: which weights can only go together; see :func:`prune_step`.
        budget: where ``sparsity`` holds; see there.
        costs: of a weight of each leaf; see there.
        allow_empty_layers: whether a leaf may lose all of its weights.
        output_axis: the axis of the outputs in leaves of several axes; see :func:`prune_step`.
        dtype: what gradients are stored in; not with ``gradients``.
        progress: show a progress bar, if there is a terminal or notebook to show it.

    Returns:
        The pruned parameters, the mask and a report.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as :func:`prune_step` and :func:`mfac_jax.collect_gradients`; or there are
            no calibration batches or settings. Nothing has been done then.
        FloatingPointError: a weight, the loss on the calibration batches, a gradient, every loss
            after a step, or the loss after ``fine_tune`` is not finite.

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
    check_functions(loss_fn, None, None)
    if fine_tune is not None and not callable(fine_tune):
        raise TypeError(f"fine_tune must be a function, got {type(fine_tune).__name__}.")
    _checks.positive_int(num_gradients, "num_gradients")
    layout = Layout(params)
    mask_leaves = layout.check_mask(initial_mask(params) if mask is None else mask)
    keep = tuple(jax.tree.leaves(prunable(params, path_filter)))
    check_pattern(pattern)
    shapes = zip(layout.shapes, layout.dtypes, keep, strict=True)
    prunables = Layout(tuple(jax.ShapeDtypeStruct(*like) for *like, kept in shapes if kept))
    names = [path for path, kept in zip(layout.paths, keep, strict=True) if kept]
    grouping = group(pattern, prunables, names, output_axis)
    network = Network(layout, keep, grouping)
    alive = narrow(mask_leaves, keep)
    settings = checked_settings(
        default_settings(pattern) if settings is None else settings, prunables, grouping
    )
    descents = checked_descents(descents)
    check_wanted(sparsity, budget, costs, layout, keep)
    fractions = schedule_of(sparsity, schedule, steps, mask_leaves, keep, costs)
    targets = [
        target_of(
            fraction,
            budget,
            prunables,
            grouping,
            layout=layout,
            keep=keep,
            costs=costs,
            allow_empty_layers=allow_empty_layers,
            mask=alive,
            is_last=i == len(fractions) - 1,
        )
        for i, fraction in enumerate(fractions)
    ]
    left_out = [jax.device_put(np.zeros(shape, bool)) for shape in layout.shapes]
    held = min(1 + _checks.non_negative_int(history, "history"), len(targets))
    past = History(held, num_gradients)
    if gradients is not None:
        _check_given(gradients, params, num_gradients, dtype)
    check_finite(params, layout.paths, "params")
    stream = _Stream(batches)
    held_out = _first(stream if calibration is None else calibration, num_calibration)
    # All the way parameters are turned, and their gradients are collected so.
    params, turned_mask = network.turned(params, mask_leaves)
    alive = narrow(turned_mask, keep)
    turned_loss = TurnedLoss(loss_fn, network.orders, keep)
    loss = mean_loss(turned_loss, params, held_out)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of params on the calibration batches is {loss}.")

    reports = []
    hidden = None if progress else True  # on None tqdm stays silent in a file
    with tqdm(total=len(targets), unit="step", desc="pruning", disable=hidden) as bar:
        for target in targets:
            began = time.perf_counter()
            collect = functools.partial(
                _collect,
                loss_fn=turned_loss,
                params=params,
                stream=stream,
                count=num_gradients,
                num_rows=past.num_rows,
                given=None if gradients is None else TransposedRows.of(gradients, network.orders),
                per_example=per_example,
                dtype=dtype,
                progress=progress,
            )
            gradients = None
            rows = past.take(collect, merge(left_out, alive, keep))
            gradient_seconds = time.perf_counter() - began
            leaves = jax.tree.leaves(params)

            def loss_of(weights: Sequence[Array], leaves: list[Array] = leaves) -> float:
                return mean_loss(turned_loss, network.tree(leaves, weights), held_out)

            step = best_step(
                settings,
                grouping.turned,
                narrow(leaves, keep),
                alive,
                SelectedRows.of(rows, keep),
                target,
                loss_of,
                filled=past.filled,
                mean_of_newest=past.mean,
                descents=descents,
                keep_layers=not allow_empty_layers,
            )
            params, alive = network.tree(leaves, step.weights), step.mask
            tuned = None
            if fine_tune is not None:
                found, mask = network.back(params, mask_leaves, alive)
                trained = fine_tune(found, mask)
                layout.check(trained, "the parameters from fine_tune")
                params, _ = network.turned(trained, jax.tree.leaves(mask))
                tuned = mean_loss(turned_loss, params, held_out)
                if not math.isfinite(tuned):
                    raise FloatingPointError(f"the loss after fine_tune is {tuned}.")
            reports.append(_report(step, prunables.size, loss, tuned, gradient_seconds, began))
            loss = reports[-1].loss_after if tuned is None else tuned
            bar.update()
            bar.set_postfix(loss=f"{loss:.4g}", sparsity=f"{reports[-1].sparsity:.1%}")
    params, mask = network.back(params, mask_leaves, alive)
    counts = pruned_of_leaves(narrow(jax.tree.leaves(mask), keep))
    sized = zip(names, prunables.sizes, counts, strict=True)
    layers = tuple(LayerReport(name or "value", *sizes) for name, *sizes in sized)
    return Pruned(params, mask, PruneReport(tuple(reports), layers))


def _check_given(
    gradients: GradientRows, params: PyTree, num_gradients: int, dtype: DTypeLike | None
) -> None:
    check_rows(gradients)
    gradients.layout.check(params, "params")
    if dtype is not None:
        raise ValueError("dtype is that of the gradients where they are given: leave it out.")
    if gradients.num_rows != num_gradients:
        raise ValueError(
            f"gradients must be num_gradients={num_gradients} rows, got {gradients.num_rows}."
        )
    check_finite_gradients(gradients, gradients.layout.paths)


def _report(
    step: Step,
    num_weights: int,
    loss_before: float,
    loss_tuned: float | None,
    gradient_seconds: float,
    began: float,
) -> StepReport:
    return StepReport(
        num_pruned=int(step.info.num_pruned),
        num_weights=num_weights,
        chosen=step.chosen,
        tried=step.tried,
        loss_before=loss_before,
        loss_after=step.tried[step.chosen].loss,
        loss_tuned=loss_tuned,
        predicted_loss_increase=step.predicted_loss_increase,
        update_norm=float(step.info.update_norm),
        removed_norm=float(step.info.removed_norm),
        damping=step.damping,
        degrees_of_freedom=step.freedom,
        gradient_seconds=gradient_seconds,
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(),
    )


def _collect(
    rows: FlatRows | None,
    first: int,
    *,
    loss_fn: LossFn,
    params: PyTree,
    stream: _Stream,
    count: int,
    num_rows: int,
    given: GradientRows | None,
    per_example: bool,
    dtype: DTypeLike | None,
    progress: bool,
) -> FlatRows:
    """Writes ``count`` gradients into rows; without rows it makes some, of those given if any."""
    if given is not None:
        return _given_rows(given, num_rows=num_rows)
    if rows is None:
        empty = empty_rows(params, num_rows, dtype=dtype)
        assert isinstance(empty, FlatRows)
        rows = empty
    return fill_rows(
        rows,
        first,
        count,
        loss_fn,
        params,
        stream,
        per_example=per_example,
        progress=progress,
    )


@functools.partial(jax.jit, static_argnames="num_rows")
def _given_rows(given: GradientRows, *, num_rows: int) -> FlatRows:
    matrix = given.columns(0, given.layout.size)
    matrix = jnp.pad(matrix, ((0, num_rows - given.num_rows), (0, 0)))
    return FlatRows.of(matrix, given.layout, given.implementation)


class _Stream:
    """Batches that continue from one ``iter`` to the next and restart at the end."""

    def __init__(self, batches: Iterable[PyTree]):
        check_batches(batches, "batches")
        self._endless = cycle(batches)

    def __iter__(self) -> Iterator[PyTree]:
        return (batch for _, batch in self._endless)


def _first(batches: Iterable[PyTree], count: int) -> list[PyTree]:
    _checks.positive_int(count, "num_calibration")
    check_batches(batches, "calibration")
    taken = [on_device(batch) for batch in itertools.islice(iter(batches), count)]
    if not taken:
        raise ValueError("calibration is empty: expected at least one batch.")
    return taken
