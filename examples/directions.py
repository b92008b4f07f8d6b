"""How good the directions of optimizers are, along one training.

    python examples/directions.py --data-dir DIR [--out DIR] [--only TASK ...] [--smoke]

A network of ``optimizers.py`` is trained by AdamW. Every optimizer receives the same gradients. At
some steps the gauge of :mod:`mfac_jax.gauge` measures the direction of each on the batch and on
other training examples: how far one step along it, of the best length, can reduce the loss. It says
in minutes what trainings say in hours, as far as one step can tell.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import parallel
from flax import nnx
from optimizer_tasks import Task
from optimizers import CONTENDERS, TASKS
from tqdm import tqdm

from mfac_jax import mfac_precondition, mfacw
from mfac_jax.gauge import gauge
from mfac_jax.rows import Int8, TopK

NAMES = ("characters", "cifar", "mlp")
STEPS, MEASURED = 400, (50, 100, 200, 300, 400)
EXAMPLES = 512
RATE = 3e-3


def usual(name: str) -> optax.GradientTransformation:
    """A contender of ``optimizers.py``, without decay; the gauge does not see lengths."""
    return CONTENDERS[name].make(optax.constant_schedule(1.0), 0.0)


def directions() -> dict[str, optax.GradientTransformation]:
    """The optimizers by their names."""
    return {
        "gradient": optax.scale(-1.0),
        "SGD + momentum": usual("SGD + momentum"),
        "AdamW": usual("AdamW"),
        "Muon": usual("Muon"),
        "mfac, m = 64": usual("mfac"),
        "mfac, m = 256": optax.chain(mfac_precondition(256), optax.scale(-1.0)),
        "mfacw, m = 4": mfacw(1.0, 0.0, window_size=4),
        "mfacw, m = 16": mfacw(1.0, 0.0),
        "mfacw, m = 64": mfacw(1.0, 0.0, window_size=64),
        "mfacw, m = 16, int8": mfacw(1.0, 0.0, storage=Int8()),
        "mfacw, m = 64, by leaf": mfacw(1.0, 0.0, window_size=64, blocks="leaf"),
        "mfacw, m = 64, by leaf, largest 1 %": mfacw(
            1.0, 0.0, window_size=64, blocks="leaf", storage=TopK(0.01, error_bits=4)
        ),
        "mfacw, relative damping 0.1": mfacw(1.0, 0.0, relative_damping=0.1),
        "mfacw, relative damping 1e-4": mfacw(1.0, 0.0, relative_damping=1e-4),
    }


def measure(task: Task, steps: int, measured: tuple[int, ...]) -> list[dict[str, Any]]:
    """The best decrease of every direction at some steps of a training."""
    params, rest = task.init(0)
    trainer = optax.adamw(optax.warmup_constant_schedule(0.0, RATE, max(steps // 20, 1)))
    state = trainer.init(params)
    optimizers = directions()
    states = {name: tx.init(params) for name, tx in optimizers.items()}

    @jax.jit
    def step(params: Any, rest: Any, state: Any, batch: Any) -> Any:
        (_, rest), grads = jax.value_and_grad(task.loss, has_aux=True)(params, rest, batch)
        updates, state = trainer.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, grads

    updates_of = {name: jax.jit(tx.update) for name, tx in optimizers.items()}

    @jax.jit
    def decrease(params: Any, rest: Any, batch: Any, direction: Any) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        def outputs(params: Any) -> jax.Array:
            model = nnx.merge(task.graphs[1], params, rest)
            logits: jax.Array = model(batch[0])
            return logits

        found = gauge(outputs, loss, params, direction)
        return jax.numpy.where(found.slope > 0, found.best_decrease, 0.0)

    others = next(iter(task.train.batches(EXAMPLES)))
    found = []
    batches = itertools.islice(task.batches(1), steps)
    for i, batch in enumerate(tqdm(batches, task.name, steps, disable=None), 1):
        before = params, rest
        params, rest, state, grads = step(params, rest, state, batch)
        for name, update in updates_of.items():
            updates, states[name] = update(grads, states[name], before[0])
            if i in measured:
                direction = jax.tree.map(lambda u: -u, updates)
                own, other = (float(decrease(*before, b, direction)) for b in (batch, others))
                found.append({"step": i, "direction": name, "batch": own, "others": other})
    return found


def table(results: dict[str, Any]) -> str:
    """The mean best decreases, in units of those of the plain gradient."""
    names = list(results["tasks"])
    lines = ["| direction | " + " | ".join(f"{n}, other examples (batch)" for n in names) + " |"]
    lines.append("| --- " * (1 + len(names)) + "|")
    for direction in directions():
        cells = []
        for name in names:
            means = {}
            for where in ("others", "batch"):
                values = [
                    np.mean([r[where] for r in results["tasks"][name] if r["direction"] == which])
                    for which in (direction, "gradient")
                ]
                means[where] = values[0] / values[1]
            cells.append(f"{means['others']:.2f} ({means['batch']:.2f})")
        lines.append(f"| {direction} | {' | '.join(cells)} |")
    at = results["environment"]
    lines.append(f"\n{at['device']}, jax {at['jax']}, {at['date']}.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the data")
    parser.add_argument("--out", type=Path, default=Path("directions"), help="for the results")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="tasks")
    parser.add_argument("--smoke", action="store_true", help="all in small on made-up data")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "directions.json"
    results = parallel.open_results(path, parallel.environment())
    results = {"environment": results["environment"], "tasks": results.get("tasks", {})}
    for name in options.only:
        if name not in results["tasks"]:
            task = TASKS[name](options.data_dir, options.smoke)
            limits = (task.steps, (task.steps // 2, task.steps)) if options.smoke else None
            results["tasks"][name] = measure(task, *(limits or (STEPS, MEASURED)))
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
