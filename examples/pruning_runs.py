"""The runs of ``prune_networks.py``: which networks, methods, sparsities and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pruning_tasks
from prune_tables import (
    CHITA,
    CHITA_BLOCKS,
    DEFAULT,
    MAGNITUDE,
    METHODS,
    REFERENCE,
    REFERENCE_BLOCKS,
    key_of,
    mean_accuracy,
)
from pruning_methods import BLOCK, CHOICES, DAMPING, PATTERNS, Choice

from mfac_jax import pruning

# The networks with batch normalisation.
NORMALISED = ("resnet20", "akamaster", "squeezenet")
SGD, MFACW = "SGD", "mfacw"
# The optimizers of fine-tuning, with their learning rates to choose from.
RATES = {SGD: (0.003, 0.01, 0.03), MFACW: (0.001, 0.003, 0.01)}


def _descents(factor: float) -> Choice:
    """Descents at other rates."""
    own = pruning.Search().descents
    rates = [x._replace(learning_rate=factor * x.learning_rate) for x in own]
    return {}, {"descents": rates}, ""


def _paper_in_blocks() -> Choice:
    setting = pruning.Setting("mfac", "reference", BLOCK, DAMPING)
    return {"history": 0}, {"settings": [setting], "descents": ()}, ""


# The rival's damping is relative to each step's diagonal; here it stays that of the paper.
PAPER_IN_BLOCKS = "reference, blocks, damping 1e-5, 8 x"
# More choices. They stand here because a change of pruning_methods.py begins all runs anew.
CHOICES.update(
    {
        "a third of the descents' rates": lambda: _descents(1 / 3),
        "three times the descents' rates": lambda: _descents(3),
        "one setting, no history": lambda: (
            {"history": 0},
            {"settings": pruning.default_settings()[:1]},
            "",
        ),
        PAPER_IN_BLOCKS: _paper_in_blocks,
    }
)

# The dampings to choose from, relative to the mean of the diagonal of the Fisher: for one step,
ONE_STEP = {
    REFERENCE_BLOCKS: (0.003, 0.03, 0.3, 3.0, 30.0, 300.0),
    CHITA: (10.0, 100.0, 1000.0, 10_000.0, 100_000.0),
    CHITA_BLOCKS: (10.0, 100.0, 1000.0, 10_000.0, 100_000.0),
}
# for several,
SEVERAL_STEPS = {REFERENCE_BLOCKS: (0.003, 0.03, 0.3), CHITA: (1.0, 10.0, 100.0)}
# and for CHITA at the setting of its authors.
AUTHORS_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
# The sparsity in one step at which dampings are chosen.
TUNED_AT = 0.8

# Those that several sets of gradients compare, and that every network has.
STRONG = (REFERENCE_BLOCKS, CHITA, DEFAULT)
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
    tuned: Mapping[str, tuple[float, ...]] = SEVERAL_STEPS
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
        recomputed=tuple(method for method in METHODS if method != CHITA_BLOCKS),
        tried_at=(0.5,),
        one_shot_seeds=3,
    ),
    "akamaster": Scale(sparsities=(0.9,), seeds=3),
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
    ),
    "characters": Scale(),
    "minilm": Scale(  # a stage of CHITA takes minutes for ten million weights
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
        tuned={**SEVERAL_STEPS, CHITA: (10.0, 100.0, 1000.0, 10_000.0)},
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
        tuned={**SEVERAL_STEPS, CHITA_BLOCKS: (10.0,)},
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


# What is tried of the default's parts on networks that take long, for want of time.
_FEW = (DEFAULT, "one setting", "no descents", "no history")
_SHORT = {"minilm": _FEW, "squeezenet": (*_FEW, "blocks of 288")}


def validation_runs(name: str, scale: Scale) -> list[Run]:
    """The runs that choose, on validation data."""
    one, several = scale.counts
    todo = []
    if name in pruning_tasks.DEVELOPED_ON:
        todo += [
            Run("dampings", name, method, 1, sparsity, 0, damping, one)
            for sparsity in (TUNED_AT, *scale.tried_at)
            for method in scale.methods
            for damping in ONE_STEP.get(method, ())
        ]
        todo += [
            Run("dampings", name, method, scale.tuning, scale.middle, 0, damping, several)
            for method, grid in scale.tuned.items()
            for damping in grid
        ]
    if scale.authors and name in pruning_tasks.DEVELOPED_ON:
        count, batch, _ = scale.authors
        stages = scale.authors_tuning
        todo += [
            Run("dampings", name, CHITA, stages, scale.middle, 0, x, count, batch, "authors ")
            for x in AUTHORS_GRID
        ]
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
            seeds = scale.seeds if is_middle and method in STRONG else 1
            todo += [
                Run("recomputation", name, method, scale.steps, sparsity, seed, count=several)
                for seed in range(seeds)
            ]
    todo += [
        Run("recomputation", name, method, steps, scale.middle, count=several)
        for steps in scale.other_steps
        for method in scale.elsewhere
        if method in STRONG
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
            for method in (CHITA, DEFAULT)
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
    what = "authors " if run.part == "authors" else ""
    for name in (run.network, "resnet20"):
        planned = [
            tried
            for tried in validation_runs(name, scales[name])
            if (tried.part, tried.method, tried.what) == ("dampings", run.method, what)
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
        run = run._replace(damping=_best(tried, runs, f"{run.network}, {run.method}").damping)
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
