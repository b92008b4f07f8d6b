"""Pruning in one call: gradients, steps and a report. The loss judges every update."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm.auto import tqdm

from mfac_jax import _checks
from mfac_jax._collect import (
    LossFn,
    check_batches,
    check_functions,
    cycle,
    fill_rows,
    on_device,
)
from mfac_jax._durable import digest
from mfac_jax._layout import PyTree, where
from mfac_jax._processes import Agreement
from mfac_jax.pruning._block_curvature import (
    BlockCurvature,
    Settings,
    check_sums,
    settings_in_blocks,
)
from mfac_jax.pruning._blocks import FisherBlocks
from mfac_jax.pruning._finite import check_finite
from mfac_jax.pruning._functions import name_of
from mfac_jax.pruning._gradients import (
    Curvature,
    Fill,
    Gradients,
    History,
    check_gradients,
    count_of,
)
from mfac_jax.pruning._masks import initial_mask, pruned_of_leaves
from mfac_jax.pruning._record import Record, State
from mfac_jax.pruning._report import LayerReport, PruneReport, StepReport, peak_memory
from mfac_jax.pruning._schedules import schedule_of
from mfac_jax.pruning._scope import Scope, Selection, check_scope, select
from mfac_jax.pruning._search import Descent, Search, Setting
from mfac_jax.pruning._step import column_readers
from mfac_jax.pruning._targets import Start, Target, check_wanted, target_from
from mfac_jax.pruning._trials import CalibrationLoss, Searcher, Step
from mfac_jax.rows import GradientRows, Storage, WritableRows

FineTune = Callable[[PyTree, PyTree], PyTree]


class Pruned(NamedTuple):
    """What :func:`prune` returns.

    Attributes:
        params: the parameters, 0 where pruned.
        mask: a tree of booleans like ``params``, true where a weight is alive.
        report: all steps, with their losses and times, and the sparsity of each layer.
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
    steps: int | Sequence[float] = 8,
    scope: Scope = Scope(),  # noqa: B008  (immutable)
    gradients: Gradients = Gradients(),  # noqa: B008  (immutable)
    search: Search = Search(),  # noqa: B008  (immutable)
    mask: PyTree | None = None,
    fine_tune: FineTune | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Pruned:
    """Prunes a network to a given sparsity, in several steps.

    Each step takes gradients at the present weights and adds those of the step before. It tries
    every setting of ``search`` and takes the one with the least loss on calibration batches.
    The quadratic model behind an update cannot decide this: with few gradients it oversteps and
    does not notice. Then the step tries descents, which move the remaining weights a short way
    down the loss. The worse half of the trials ends after a quarter of the calibration batches,
    but two stay, and all but the best end after half of the batches.

    Args:
        params: the parameters, a tree of real floating-point arrays.
        loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch, with normalisation and
            dropout as at inference.
        batches: training data, an iterable of batches; see
            :func:`mfac_jax.collect_gradients`. Each step continues where the last one stopped
            and restarts the data when they run out. An iterator's batches are kept in memory so
            that they can be replayed; a list, or an object whose ``__iter__`` restarts, is
            not copied.
        sparsity: the final fraction of prunable weights that are pruned, or a tree of fractions
            like ``params``; see :func:`prune_step`.
        steps: the number of steps; every step keeps the same fraction of the alive weights, and
            1 is one-shot pruning. Or the sparsity after each step, rising to ``sparsity``, for
            example from :func:`sparsity_schedule`.
        scope: what may be pruned, and in which pattern.
        gradients: how many gradients each step takes, how they are stored, and how many earlier
            steps contribute theirs.
        search: which settings and descents each step tries, and on which batches.
        mask: initial mask; everything is alive by default.
        fine_tune: ``fine_tune(params, mask) -> params``, called after every step, for example
            training with :func:`sparse`. Put state that training changes, such as the
            statistics of normalisation layers, into ``params``, where the loss sees it. Exclude
            it from pruning by ``Scope(path_filter=...)``.
        checkpoint: a folder that keeps finished steps, also before ``fine_tune``, and the
            finished gradients of the next one and of the earlier steps that it uses (``4 d`` bytes
            each) unless they are summed in blocks. Plans do not count them. After an interruption,
            even by ``kill -9``, the same call goes on where it stopped, with the same result:
            ``batches`` and ``fine_tune`` must then do the same again. The folder may be removed
            afterwards. It is for parameters of one process.
        progress: whether to show a progress bar in a terminal or notebook.

    Returns:
        The pruned parameters, the mask and a report.

    Raises:
        TypeError: an argument has the wrong type; or gradients cannot be written or read in
            the way that a setting needs. The error names the setting and the storage, and comes
            before any work.
        ValueError: as :func:`prune_step` and :func:`mfac_jax.collect_gradients`; or there are
            no calibration batches or settings, or ``in_blocks`` is true and the settings do not
            share their blocks; or ``fine_tune`` returns parameters of another structure, shape or
            dtype. That raises when it returns, and a malformed batch when it is read; every other
            error comes before any work. With ``checkpoint``, the step's search is not lost.
        FloatingPointError: a weight, the loss on the calibration batches, a gradient, every loss
            of a step, or the loss after ``fine_tune`` is not finite.
        OSError: the folder of ``checkpoint`` cannot be written, another process uses it, or the
            disk is full.
        MemoryError: the gradients cannot fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mfac_jax.pruning import Gradients, prune
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> y = x[:, :2] @ jnp.array([1.0, -2.0])
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch[0] @ params["w"][:, 0] - batch[1]) ** 2)
        >>> params = {"w": jnp.array([[1.0], [-2.0], [0.1], [0.1], [0.1], [0.1], [0.1], [0.1]])}
        >>> batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
        >>> pruned = prune(params, loss_fn, batches, 0.75, steps=2, gradients=Gradients(32))
        >>> pruned.mask["w"][:, 0].tolist()
        [True, True, False, False, False, False, False, False]
    """
    _check_kinds(loss_fn, fine_tune, scope, gradients, search, checkpoint)
    plan = _Plan.of(params, sparsity, steps, scope, mask)
    settings, curvature = _curvature(gradients, params, plan, search)
    params, alive = plan.start(params)
    loss_fn = _PrunableLoss(loss_fn, plan.selection.keep)
    stream = _Stream(batches)
    held_out = _first(stream if search.calibration is None else search.calibration, search)
    _agree(params, gradients, held_out, plan, _tried(settings, search.descents, fine_tune))
    calibration = CalibrationLoss(loss_fn, held_out)
    loss = _finite(calibration.mean(params), "the loss of params on the calibration batches")

    run = _Run(plan, settings, search.descents, calibration, fine_tune, curvature)
    state, record = State(params, alive, loss, [], stream.taken), None
    if checkpoint is not None:
        origin = run.origin(params, alive, gradients, loss)
        record = Record(checkpoint, origin, params, gradients, settings, search.descents)
        state = record.load(state)
    save = functools.partial(_save, record, num_kept=curvature.num_earlier or 0)
    first, total = len(state.reports), len(plan.targets)
    state = run.fine_tuned(state, save) if first else state
    if record is not None and 0 < first < total:
        stream.skip(state.batches - stream.taken)
        curvature.resume(first, record.gradients)
    with _bar(total, first, progress) as bar:
        for number in range(first, total):
            fill = functools.partial(
                _fill,
                record=None if curvature.num_earlier is None else record,
                number=number,
                loss_fn=loss_fn,
                params=state.params,
                batches=stream,
                per_example=gradients.per_example,
                progress=progress,
            )
            state = run.step(state, number, fill)._replace(batches=stream.taken)
            state = run.fine_tuned(save(state), save)
            bar.update()
            bar.set_postfix(loss=f"{state.loss:.4g}", sparsity=f"{state.reports[-1].sparsity:.1%}")
    report = PruneReport(tuple(state.reports), plan.layers(state.alive))
    return Pruned(state.params, plan.whole(state.alive), report)


def _save(record: Record | None, state: State, *, num_kept: int) -> State:
    """Keeps a state, if there is a record, and returns it."""
    if record is not None:
        record.save(state, num_kept)
    return state


def _bar(total: int, first: int, progress: bool) -> Any:
    hidden = None if progress else True  # on None tqdm stays silent in a file
    return tqdm(total=total, initial=first, unit="step", desc="pruning", disable=hidden)


def _fill(
    rows: WritableRows, *, record: Record | None, number: int, **options: Any
) -> WritableRows:
    """Fills the rows of a step; a record keeps them as well."""
    copy = None if record is None else record.gradients(number)
    return fill_rows(rows, copy=copy, **options)


def _check_kinds(
    loss_fn: Any, fine_tune: Any, scope: Any, gradients: Any, search: Any, checkpoint: Any
) -> None:
    if checkpoint is not None:
        _checks.folder(checkpoint, "checkpoint")
    check_functions(loss_fn, None, None)
    if fine_tune is not None and not callable(fine_tune):
        raise TypeError(f"fine_tune must be a function, got {type(fine_tune).__name__}.")
    check_scope(scope)
    for value, kind in ((gradients, Gradients), (search, Search)):
        if not isinstance(value, kind):
            name = kind.__name__
            hint = "; give rows as Gradients(given=rows)" if kind is Gradients else ""
            raise TypeError(f"{name.lower()} must be a {name}, got {type(value).__name__}{hint}.")


def _curvature(
    gradients: Gradients, params: PyTree, plan: _Plan, search: Search
) -> tuple[Settings, Curvature]:
    """The settings to try, and where their gradients go; both are checked."""
    _checks.automatic_axes(params, "params")
    steps, selection = len(plan.targets), plan.selection
    settings, shared = settings_in_blocks(gradients, selection, search.settings, steps)
    if shared is not None:
        check_sums(gradients, params, shared)
        return settings, BlockCurvature(gradients, params, selection, shared)
    check_gradients(gradients, params, steps, functools.partial(_column_readers, settings))
    return settings, History(gradients, params, steps)


def _column_readers(settings: Iterable[tuple[Setting, FisherBlocks]], num_rows: int) -> list[str]:
    """The scores, updates and blocks of all settings that read columns."""
    return [
        reader
        for setting, blocks in settings
        for reader in column_readers(setting.score, setting.update, blocks, num_rows)
    ]


def _finite(loss: float, name: str) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name} is {loss}.")
    return loss


@dataclass(frozen=True)
class _Plan:
    """What may be pruned, and how much is pruned after each step.

    Attributes:
        selection: the prunable leaves.
        given: the caller's mask of all parameters; None if everything is alive.
        targets: how much is pruned after each step.
        keep_layers: whether no leaf may lose all of its weights.
    """

    selection: Selection
    given: PyTree | None
    targets: list[Target]
    keep_layers: bool

    @classmethod
    def of(
        cls,
        params: PyTree,
        sparsity: float | PyTree,
        steps: int | Sequence[float],
        scope: Scope,
        mask: PyTree | None,
    ) -> _Plan:
        """Checks the arguments of :func:`prune` and makes the plan."""
        selection = select(scope, params)
        layout = selection.layout
        if mask is not None:
            mask = jax.tree.unflatten(layout.treedef, layout.check_mask(mask))
        alive = selection.leaves(initial_mask(params) if mask is None else mask)
        check_wanted(sparsity, scope, selection)
        start = Start(selection, alive)
        fractions = schedule_of(sparsity, steps, scope, start)
        last = len(fractions) - 1
        targets = [
            target_from(start, fraction, scope, is_last=i == last)
            for i, fraction in enumerate(fractions)
        ]
        check_finite(params, layout.paths, "params")
        return cls(selection, mask, targets, not scope.allow_empty_layers)

    def start(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """The parameters, 0 where masked, and the mask of the prunable leaves."""
        if self.given is None:
            params = jax.tree.map(jnp.asarray, params)
            return params, self.selection.mask(self.selection.leaves(initial_mask(params)))
        alive = self.selection.mask(self.selection.leaves(self.given))
        return _placed(_where(self.given, params), params), alive

    def whole(self, alive: PyTree) -> PyTree:
        """The mask of all parameters, given the mask of the prunable leaves."""
        others = initial_mask(alive) if self.given is None else self.given
        return self.selection.tree(self.selection.leaves(alive), others)

    def fine_tuned(self, fine_tune: FineTune, params: PyTree, alive: PyTree) -> PyTree:
        """The parameters that ``fine_tune`` returns, 0 where pruned.

        Raises:
            ValueError: they have another structure, shape or dtype.
        """
        mask, layout = self.whole(alive), self.selection.layout
        leaves = layout.check(fine_tune(params, mask), "the parameters from fine_tune")
        for path, leaf, before in zip(layout.paths, leaves, jax.tree.leaves(params), strict=True):
            if leaf.dtype != before.dtype:
                raise ValueError(
                    f"the parameters from fine_tune{path} have another dtype: "
                    f"expected {before.dtype}, got {leaf.dtype}."
                )
        return _where(mask, jax.tree.unflatten(layout.treedef, leaves))

    def layers(self, alive: PyTree) -> tuple[LayerReport, ...]:
        """The report of each prunable leaf."""
        selection = self.selection
        counts = pruned_of_leaves(selection.leaves(alive))
        columns = zip(selection.names, selection.sizes, counts, strict=True)
        return tuple(LayerReport(name or "value", size, count) for name, size, count in columns)


_where = jax.jit(where)


def _agree(
    params: PyTree, gradients: Gradients, held_out: Any, plan: _Plan, tried: dict[str, str]
) -> None:
    """Compares the arguments of all processes that share the parameters."""
    agreement = Agreement(params, count_of(gradients))
    agreement.on(held_out, "calibration batches")
    agreement.on((plan.targets, tried), "steps, settings and descents")


def _tried(
    settings: Settings, descents: Sequence[Descent], fine_tune: FineTune | None
) -> dict[str, str]:
    """What each step tries, by name."""
    return {
        "settings": "; ".join(_described(setting) for setting, _ in settings),
        "descents": str([tuple(descent) for descent in descents]),
        "fine_tune": str(fine_tune is not None),
    }


def _described(setting: Setting) -> str:
    names = setting._replace(score=name_of(setting.score), update=name_of(setting.update))
    return _without_addresses(str(tuple(names)))


def _without_addresses(text: str) -> str:
    """A text that is the same in every process: the default form of an object has its address."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


@dataclass(frozen=True)
class _Run:
    """What all steps share; the arguments of :func:`prune`, checked."""

    plan: _Plan
    settings: Settings
    descents: Sequence[Descent]
    loss: CalibrationLoss
    fine_tune: FineTune | None
    curvature: Curvature

    def origin(
        self, params: PyTree, alive: PyTree, gradients: Gradients, loss: float
    ) -> dict[str, str | float]:
        """What the run depends on, by name. The loss stands for the function and the data."""
        earlier, given = self.curvature.num_earlier, gradients.given
        kept = "sums in blocks" if earlier is None else f"and those of {earlier} earlier steps"
        selection = self.plan.selection
        return {
            "digest of the parameters": digest(params),
            "digest of the mask": digest((alive, self.plan.given)),
            "digest of the targets": digest(self.plan.targets),
            "loss on the calibration batches": loss,
            "gradients": f"{gradients.count}, {kept}",
            "storage": _kind(gradients.storage),
            "norm of the Gram matrix of the given gradients": _size(given),
            "per_example": str(gradients.per_example),
            "pattern": str(selection.pattern),
            "digest of the order of the weights": digest(selection.order),
            **_tried(self.settings, self.descents, self.fine_tune),
        }

    def step(self, state: State, number: int, fill: Fill) -> State:
        """The state after one more step, before ``fine_tune``."""
        target, began = self.plan.targets[number], time.perf_counter()
        self.curvature.take(fill, state.alive)
        gradient_seconds = time.perf_counter() - began
        plan, selection = self.plan, self.plan.selection
        # The searcher is not kept: it holds the gradients.
        step = Searcher(state.params, state.alive, self.curvature, selection, self.loss).step(
            self.settings, self.descents, target, keep_layers=plan.keep_layers
        )
        report = _report(step, selection, state.loss, gradient_seconds, began)
        params, reports = _placed(step.params, state.params), [*state.reports, report]
        return State(params, step.mask, report.loss_after, reports, state.batches)

    def fine_tuned(self, state: State, save: Callable[[State], State]) -> State:
        """The state after ``fine_tune``, unless the last step was fine-tuned before."""
        *earlier, last = state.reports
        if self.fine_tune is None or last.loss_tuned is not None:
            return state
        began = time.perf_counter()
        params = self.plan.fine_tuned(self.fine_tune, state.params, state.alive)
        loss = _finite(self.loss.mean(params), "the loss after fine_tune")
        last = dataclasses.replace(
            last,
            loss_tuned=loss,
            seconds=last.seconds + time.perf_counter() - began,
            peak_memory=peak_memory(),
        )
        params = _placed(params, state.params)
        return save(state._replace(params=params, loss=loss, reports=[*earlier, last]))


def _kind(storage: Storage) -> str:
    """A storage in words that another process finds again."""
    if not dataclasses.is_dataclass(storage):
        return type(storage).__name__
    fields = [f.name for f in dataclasses.fields(storage) if f.name != "directory"]
    shown = [f"{name}={getattr(storage, name)!r}" for name in fields]
    return _without_addresses(f"{type(storage).__name__}({', '.join(shown)})")


def _size(given: GradientRows | None) -> float:
    """The size of given gradients; 0 if there are none."""
    return 0.0 if given is None else float(np.linalg.norm(np.asarray(given.gram(), np.float64)))


def _placed(new: PyTree, old: PyTree) -> PyTree:
    """The new parameters, where the old ones are.

    XLA chooses where results of a program are, if parameters are spread over devices.
    """

    def leaf(new: Any, old: Any) -> Any:
        is_spread = isinstance(getattr(old, "sharding", None), NamedSharding)
        return jax.device_put(new, old.sharding) if is_spread else new

    return jax.tree.map(leaf, new, old)


@dataclass(frozen=True)
class _PrunableLoss:
    """A loss in which leaves that are not prunable are constants.

    Their gradients are not used and would cost time. Two losses of the same function and leaves
    are equal, so they share one compiled program.
    """

    loss_fn: LossFn
    keep: tuple[bool, ...]

    def __call__(self, params: PyTree, batch: PyTree) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(leaves, self.keep, strict=True)
        leaves = [leaf if kept else jax.lax.stop_gradient(leaf) for leaf, kept in pairs]
        return self.loss_fn(jax.tree.unflatten(treedef, leaves), batch)


def _report(
    step: Step,
    selection: Selection,
    loss_before: float,
    gradient_seconds: float,
    began: float,
) -> StepReport:
    return StepReport(
        num_pruned=int(step.info.num_pruned),
        num_weights=selection.num_weights,
        chosen=step.chosen,
        tried=step.tried,
        loss_before=loss_before,
        loss_after=step.tried[step.chosen].loss,
        loss_tuned=None,
        predicted_loss_increase=float(step.info.predicted_loss_increase),
        update_norm=float(step.info.update_norm),
        removed_norm=float(step.info.removed_norm),
        damping=step.damping,
        degrees_of_freedom=step.freedom,
        gradient_seconds=gradient_seconds,
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(),
    )


class _Stream:
    """Batches for several loops: each ``iter`` continues where the last stopped.

    Attributes:
        taken: the number of batches so far.
    """

    def __init__(self, batches: Iterable[PyTree]):
        check_batches(batches, "batches")
        self._endless = cycle(batches)
        self.taken = 0

    def __iter__(self) -> Iterator[PyTree]:
        for _, batch in self._endless:
            self.taken += 1
            yield batch

    def skip(self, count: int) -> None:
        """Passes over some batches."""
        for _ in itertools.islice(self, count):
            pass


def _first(batches: Iterable[PyTree], search: Search) -> list[PyTree]:
    taken = [on_device(batch) for batch in itertools.islice(iter(batches), search.num_calibration)]
    if not taken:
        raise ValueError("calibration is empty: expected at least one batch.")
    return taken
