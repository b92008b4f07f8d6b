"""The runs of ``prune_networks.py``: which networks, methods, sparsities and sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pruning_tasks
from prune_tables import (
    CHITA,
    CHITA_BLOCKS,
    DEFAULT,
    MAGNITUDE,
    METHODS,
    OF_AUTHORS,
    REFERENCE,
    REFERENCE_BLOCKS,
    WITHOUT,
    key_of,
    mean_accuracy,
)
from pruning_methods import CHOICES, PAPER_IN_BLOCKS, PATTERNS

# The networks with batch normalisation.
NORMALISED = ("resnet20", "akamaster", "squeezenet")
SGD, MFACW = "SGD", "mfacw"
# The optimizers of fine-tuning, with their learning rates to choose from.
RATES = {SGD: (0.003, 0.01, 0.03), MFACW: (0.001, 0.003, 0.01)}

Dampings = Mapping[str, tuple[float, ...]]

# The dampings to choose from by method, relative to the mean of the diagonal of the Fisher: for one
# step, for several, and at the setting of CHITA's authors. CHITA is tried with its first-order term
# and without it.
ONE_STEP = {
    REFERENCE_BLOCKS: (0.003, 0.03, 0.3, 3.0, 30.0, 300.0),
    CHITA: (10.0, 100.0, 1000.0, 10_000.0, 100_000.0),
    CHITA_BLOCKS: (10.0, 100.0, 1000.0, 10_000.0, 100_000.0),
}
ONE_STEP_WITHOUT = {
    CHITA: (0.3, 3.0, 30.0, 300.0, 3000.0),
    CHITA_BLOCKS: (0.03, 0.3, 3.0, 30.0, 300.0),
}
SEVERAL_STEPS = {REFERENCE_BLOCKS: (0.003, 0.03, 0.3)}
SEVERAL_STEPS_WITHOUT = {CHITA_BLOCKS: (0.003, 0.03, 0.3)}
AUTHORS = {CHITA: (0.01, 0.1, 1.0, 10.0, 100.0)}
AUTHORS_WITHOUT = {CHITA_BLOCKS: (0.01, 0.1, 1.0)}
# The sparsity in one step at which dampings are chosen.
TUNED_AT = 0.8

# Those that several sets of gradients compare, and that every network has.
STRONG = (REFERENCE_BLOCKS, CHITA_BLOCKS, DEFAULT)
# The methods with fine-tuning, and their optimizers.
TRAINED = (
    (MAGNITUDE, SGD),
    (REFERENCE_BLOCKS, SGD),
    (DEFAULT, SGD),
    (DEFAULT, MFACW),
)


class Scale(NamedTuple):
    """The sizes of the experiments with one network.

    Attributes:
        counts: the number of gradients for one-shot pruning, and for each of several steps.
        one_shot: the sparsities of one-shot pruning.
        sparsities: the sparsities with recomputation.
        middle: the one at which dampings are chosen and several sets of gradients are compared.
        steps: the number of recomputations.
        tuning: the number of recomputations that choose dampings.
        other_steps: other numbers of recomputations, at ``middle``.
        seeds: the number of sets of gradients at ``middle``.
        choices: the number of recomputations that compare parts of the default; 0 for none.
        patterns: the names of the patterns.
        pattern_steps: the number of steps with patterns.
        gradual: the sparsities with fine-tuning.
        training: the number of pruning steps with fine-tuning, the training steps after each, and
            the examples in a training step.
        authors: the gradients, examples and stages of CHITA's authors; None leaves this out.
        authors_tuning: the number of stages that choose the damping there; all would take hours.
        methods: the methods of one-shot pruning.
        recomputed: the methods with recomputation, at ``middle``.
        elsewhere: the methods at other sparsities and numbers of recomputations.
        tuned: the dampings to choose from with recomputation, by method.
        tuned_without: those of CHITA without its first-order term.
        tried_at: other sparsities in one step that show how far dampings carry over; none is
            chosen there.
        one_shot_seeds: the number of sets of gradients of one-shot pruning.
    """

    counts: tuple[int, int] = (256, 128)
    one_shot: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    sparsities: tuple[float, ...] = (0.8, 0.9)
    middle: float = 0.9
    steps: int = 8
    tuning: int = 8
    other_steps: tuple[int, ...] = ()
    seeds: int = 1
    choices: int = 0
    patterns: tuple[str, ...] = ()
    pattern_steps: int = 4
    gradual: tuple[float, ...] = ()
    training: tuple[int, int, int] = (4, 265, 64)
    authors: tuple[int, int, int] | None = None
    authors_tuning: int = 4
    methods: tuple[str, ...] = (MAGNITUDE, *STRONG)
    recomputed: tuple[str, ...] = (MAGNITUDE, *STRONG)
    elsewhere: tuple[str, ...] = (MAGNITUDE, *STRONG)
    tuned: Dampings = SEVERAL_STEPS
    tuned_without: Dampings = SEVERAL_STEPS_WITHOUT
    tried_at: tuple[float, ...] = ()
    one_shot_seeds: int = 1

    @property
    def sizes(self) -> dict[str, Any]:
        """What a run depends on beside its key."""
        names = ("counts", "one_shot", "training", "authors")
        return {name: getattr(self, name) for name in names}


FULL = {
    "resnet20": Scale(
        sparsities=(0.8, 0.9, 0.95),
        seeds=3,
        choices=4,
        patterns=("2:4", "1 x 4"),
        gradual=(0.9, 0.95),
        authors=(500, 16, 16),
        methods=METHODS,
        recomputed=METHODS,
        elsewhere=(MAGNITUDE, CHITA, *STRONG),
        tuned={**SEVERAL_STEPS, CHITA: (1.0, 10.0, 100.0), CHITA_BLOCKS: (100.0, 1000.0)},
        tried_at=(0.5,),
        one_shot_seeds=3,
    ),
    "akamaster": Scale(
        sparsities=(0.9,),
        seeds=3,
        methods=(MAGNITUDE, CHITA, *STRONG),
        recomputed=(MAGNITUDE, CHITA, *STRONG),
    ),
    "squeezenet": Scale(choices=4),
    "mlp": Scale(
        sparsities=(0.9, 0.98),
        middle=0.98,
        seeds=3,
        choices=4,
        methods=METHODS,
        recomputed=METHODS,
        tuned={
            REFERENCE_BLOCKS: (0.003, 0.03, 0.3, 3.0, 30.0),
            CHITA: (1.0, 10.0, 100.0, 1000.0, 10_000.0),
            CHITA_BLOCKS: (10.0, 100.0, 1000.0, 10_000.0, 100_000.0),
        },
        tuned_without={
            CHITA: (0.03, 0.3, 3.0, 30.0, 300.0),
            CHITA_BLOCKS: (0.003, 0.03, 0.3, 3.0),
        },
    ),
    "characters": Scale(),
    "minilm": Scale(  # a stage of CHITA in blocks takes three minutes there
        counts=(64, 64),
        one_shot=(0.5, 0.6, 0.7, 0.8, 0.9),
        sparsities=(0.5, 0.8, 0.9),
        middle=0.8,
        tuning=4,
        other_steps=(4, 16),
        choices=4,
        patterns=("2:4", "1 x 4", "channels"),
        gradual=(0.9,),
        training=(4, 60, 32),
        methods=tuple(method for method in METHODS if method != CHITA_BLOCKS),
        elsewhere=(MAGNITUDE, REFERENCE_BLOCKS, DEFAULT),
        tuned_without={CHITA_BLOCKS: (0.03, 0.3)},
    ),
}
_TINY = Scale(counts=(8, 8), one_shot=(0.5, 0.8), sparsities=(0.8,), middle=0.8, steps=2, tuning=2)
SMOKE = {
    "resnet20": _TINY._replace(
        choices=2,
        methods=METHODS,
        patterns=("2:4",),
        pattern_steps=1,
        gradual=(0.8,),
        training=(2, 2, 8),
        authors=(8, 8, 2),
        authors_tuning=2,
    ),
    "akamaster": _TINY,
    "squeezenet": _TINY,
    "mlp": _TINY._replace(
        seeds=2,
        methods=METHODS,
        recomputed=METHODS,
        tuned={**SEVERAL_STEPS, CHITA: (10.0,)},
        tried_at=(0.5,),
        one_shot_seeds=2,
    ),
    "characters": _TINY,
    "minilm": _TINY._replace(
        other_steps=(1,),
        patterns=("channels",),
        pattern_steps=1,
        gradual=(0.8,),
        training=(2, 2, 8),
    ),
}


class Run(NamedTuple):
    """One run to measure.

    Attributes:
        part: the experiment.
        network: the name of the network.
        method: the method, or the part of the default that differs.
        steps: the number of steps.
        sparsity: the sparsity after the last step; 0 for all those of one-shot pruning.
        seed: the set of gradients.
        damping: the damping of a rival that is tuned, relative to the mean of the diagonal.
        count: the number of gradients of a step.
        batch: the number of examples for a gradient.
        what: the pattern, or the optimizer of fine-tuning.
        rate: the learning rate of fine-tuning.
        first_order: whether CHITA has its first-order term.
    """

    part: str
    network: str
    method: str
    steps: int
    sparsity: float
    seed: int = 0
    damping: float | None = None
    count: int = 0
    batch: int = 0
    what: str = ""
    rate: float = 0.0
    first_order: bool = True

    @property
    def key(self) -> str:
        """The name of the run in the results.

        Chosen dampings and learning rates are no part of it, only those to choose from.
        """
        choice = {"dampings": self.damping, "rates": self.rate}.get(self.part)
        what = self.what if choice is None else f"{self.what}{choice:g}"
        return key_of(
            self.part, self.network, self.method, self.steps, self.sparsity, self.seed, what
        )

    def is_choice_of(self, done: dict[str, Any]) -> bool:
        """Whether a result has the same damping, learning rate and first-order term."""
        return self.chosen == (
            done.get("damping"),
            done.get("rate", 0.0),
            done.get("first_order", True),
        )

    @property
    def chosen(self) -> tuple[float | None, float, bool]:
        """What validation data choose."""
        return self.damping, self.rate, self.first_order


# What is tried of the default's parts on networks that take long, for want of time.
_FEW = (DEFAULT, "one setting", "no descents", "no history")
_SHORT = {"minilm": _FEW, "squeezenet": (*_FEW, "blocks of 288")}


def _with_dampings(
    run: Run, methods: Collection[str], dampings: Dampings, without: Dampings
) -> list[Run]:
    """A run with each of some methods and their dampings."""
    todo = []
    for method in methods:
        for grid, first_order in ((dampings, True), (without, False)):
            what = run.what if first_order else run.what + WITHOUT
            todo += [
                run._replace(method=method, damping=x, what=what, first_order=first_order)
                for x in grid.get(method, ())
            ]
    return todo


def validation_runs(name: str, scale: Scale) -> list[Run]:
    """The runs that choose, on validation data."""
    one, several = scale.counts
    todo = []
    if name in pruning_tasks.DEVELOPED_ON:
        for sparsity in (TUNED_AT, *scale.tried_at):
            run = Run("dampings", name, "", 1, sparsity, count=one)
            todo += _with_dampings(run, scale.methods, ONE_STEP, ONE_STEP_WITHOUT)
        run = Run("dampings", name, "", scale.tuning, scale.middle, count=several)
        todo += _with_dampings(run, METHODS, scale.tuned, scale.tuned_without)
        if scale.authors:
            count, batch, _ = scale.authors
            run = run._replace(
                steps=scale.authors_tuning, count=count, batch=batch, what=OF_AUTHORS
            )
            todo += _with_dampings(run, METHODS, AUTHORS, AUTHORS_WITHOUT)
    if scale.choices:
        kinds = _SHORT.get(name, tuple(CHOICES))
        todo += [
            Run("choices", name, kind, scale.choices, scale.middle, seed, count=several)
            for kind in kinds
            if name in NORMALISED or "statistics" not in kind
            if kind != PAPER_IN_BLOCKS
            for seed in range(3 if kind == DEFAULT and name != "minilm" else 1)
        ]
        if PAPER_IN_BLOCKS in kinds and name == "resnet20":
            kind = PAPER_IN_BLOCKS
            todo.append(Run("choices", name, kind, scale.steps, scale.middle, count=several))
    todo += [
        Run("rates", name, MAGNITUDE, 1, scale.middle, count=1, what=f"{tx} ", rate=rate)
        for tx, rates in RATES.items()
        for rate in rates
        if scale.gradual
    ]
    return todo


def test_runs(name: str, scale: Scale) -> list[Run]:
    """The runs of the last tables, on test data; dampings and rates are not filled in."""
    one, several = scale.counts
    todo = []
    for sparsity in scale.sparsities:
        is_middle = sparsity == scale.middle
        for method in scale.recomputed if is_middle else scale.elsewhere:
            seeds = scale.seeds if is_middle and method in (CHITA, *STRONG) else 1
            todo += [
                Run("recomputation", name, method, scale.steps, sparsity, seed, count=several)
                for seed in range(seeds)
            ]
    todo += [
        Run("recomputation", name, method, steps, scale.middle, count=several)
        for steps in scale.other_steps
        for method in (REFERENCE_BLOCKS, DEFAULT)
    ]
    todo += [
        Run("one_shot", name, method, 1, 0.0, seed, count=one)
        for method in scale.methods
        for seed in range(scale.one_shot_seeds if method in STRONG else 1)
    ]
    if scale.authors:
        count, batch, stages = scale.authors
        todo += [
            Run("authors", name, method, stages, scale.middle, 0, None, count, batch)
            for method in (CHITA, CHITA_BLOCKS, DEFAULT)
        ]
    todo += [
        Run("patterns", name, method, scale.pattern_steps, PATTERNS[x][1], count=several, what=x)
        for x in scale.patterns
        for method in (MAGNITUDE, REFERENCE if x == "channels" else REFERENCE_BLOCKS, DEFAULT)
    ]
    todo += [
        Run("gradual", name, method, scale.training[0], sparsity, count=several, what=tx)
        for sparsity in scale.gradual
        for method, tx in TRAINED
    ]
    return todo


PARTS = {
    "dampings": validation_runs,
    "choices": validation_runs,
    "rates": validation_runs,
    "recomputation": test_runs,
    "one_shot": test_runs,
    "authors": test_runs,
    "patterns": test_runs,
    "gradual": test_runs,
}


def tried_dampings(run: Run, scales: dict[str, Scale]) -> list[Run]:
    """The runs that choose the damping of a run.

    They are of the same network, of one step or of several. Where none is planned, they are of one
    step, and then of the paper's ResNet-20.
    """
    of_authors = run.part == "authors"
    for name in (run.network, "resnet20"):
        planned = [
            tried
            for tried in validation_runs(name, scales[name])
            if (tried.part, tried.method) == ("dampings", run.method)
            if tried.what.startswith(OF_AUTHORS) == of_authors
            if tried.steps > 1 or tried.sparsity == TUNED_AT
        ]
        for several in (run.steps > 1, False):
            found = [tried for tried in planned if (tried.steps > 1) == several]
            if found:
                return found
    raise ValueError(f"no damping is tried for {run}.")


def filled(run: Run, runs: dict[str, Any], scales: dict[str, Scale]) -> Run:
    """A run with the damping and the learning rate that the validation data chose.

    Raises:
        LookupError: they were not chosen yet.
    """
    if run.method in ONE_STEP and run.part != "dampings":
        tried = tried_dampings(run, scales)
        best = _best(tried, runs, f"{run.network}, {run.method}")
        run = run._replace(damping=best.damping, first_order=best.first_order)
    if run.part == "gradual":
        tried = [
            other
            for other in validation_runs(run.network, scales[run.network])
            if (other.part, other.what) == ("rates", f"{run.what} ")
        ]
        run = run._replace(rate=_best(tried, runs, f"{run.network}, {run.what}").rate)
    return run


def _best(tried: list[Run], runs: dict[str, Any], what: str) -> Run:
    missing = [run for run in tried if run.key not in runs]
    if missing:
        raise LookupError(
            f"{what}: waits for --networks {missing[0].network} --only {missing[0].part}"
        )
    return max(tried, key=lambda run: mean_accuracy(runs[run.key]))
