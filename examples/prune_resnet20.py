"""Prune the M-FAC paper's own ResNet-20 on CIFAR-10 by every method of the library.

    python examples/prune_resnet20.py --data-dir DIR

DIR holds ``resnet20/mfac_resnet20.npz``, the pretrained weights under their PyTorch names,
and CIFAR-10 (``cifar-10-batches-py/`` or ``cifar10/``). Without DIR the program downloads CIFAR-10,
and ``--weights`` names the file of weights. There are five experiments: one-shot pruning,
recomputation, patterns, gradual pruning with training between steps, and the influence of the
number of gradients, of damping and of block size. The program writes every finished run to
``results.json`` and resumes from it (after a change of the library, give another ``--out``). At the
end it draws a figure and writes the tables.
Compiled programs are kept in ``compiled/`` beside them; this folder may be deleted.
``--smoke`` runs everything in a minute or two, with a small network on synthetic pictures.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parallel
from flax import nnx
from prune_tables import DEFAULT, PATTERNS, REFERENCES, draw, tables
from resnet20 import (
    WEIGHTS,
    Data,
    ResNet,
    augment,
    is_pruned,
    load_cifar10,
    load_weights,
    made_up,
    normalize,
)
from tqdm import tqdm

from mfac_jax import collect_gradients, pruning
from mfac_jax.pruning import Gradients, Scope, Search, Setting

DENSE = 91.4  # per cent, of the weights that the paper's authors have published
DAMPING = 1e-5  # the paper's
BLOCK = 128
METHODS = {
    "magnitude": Setting("magnitude", "none", None, DAMPING),
    "OBD": Setting("obd", "none", None, DAMPING),
    "reference, whole": Setting("mfac", "reference", None, DAMPING),
    "reference, blocks": Setting("mfac", "reference", BLOCK, DAMPING),
    "joint, whole": Setting("mfac", "joint", None, DAMPING),
    "joint, blocks": Setting("mfac", "joint", BLOCK, DAMPING),
    "greedy, blocks": Setting("greedy", "joint", BLOCK, DAMPING),
}
# The default without some of its parts.
PARTS: dict[str, dict[str, Any]] = {
    "default, no history": {"gradients": {"history": 0}},
    "default, no descent": {"search": {"descents": ()}},
}
SHAPES = {"2:4": pruning.NofM(2, 4), "1:4": pruning.NofM(1, 4), "1 x 4": pruning.BlocksOf(4)}


class Scale(NamedTuple):
    """The sizes of the experiments.

    Attributes:
        seeds: the sets of gradients for one-shot pruning and eight recomputations.
        sparsities: the sparsities of one-shot pruning.
        gradients: n for one-shot pruning and for recomputation.
        batch: the number of images for a gradient.
        recomputations: the numbers of recomputations, with the sparsities of each.
        several: the number of recomputations at which all methods run, and the sparsities at
            which all seeds run.
        patterns: the patterns, and the number of recomputations.
        gradual: the sparsities, the pruning steps, and the training steps after each.
        train_batch: the number of images in a training step.
        counts: the values of n in the last experiment.
        dampings: the dampings in the last experiment.
        blocks: the block sizes in the last experiment.
    """

    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]
    gradients: tuple[int, int]
    batch: int
    recomputations: tuple[tuple[int, tuple[float, ...]], ...]
    several: tuple[int, tuple[float, ...]]
    patterns: tuple[tuple[str, ...], int]
    gradual: tuple[tuple[float, ...], int, int]
    train_batch: int
    counts: tuple[int, ...]
    dampings: tuple[float, ...]
    blocks: tuple[int, ...]


FULL = Scale(
    seeds=(0, 1, 2),
    sparsities=(0.5, 0.6, 0.7, 0.8, 0.9),
    gradients=(256, 128),
    batch=32,
    recomputations=((8, (0.8, 0.9, 0.95)), (4, (0.8, 0.9)), (16, (0.8, 0.9))),
    several=(8, (0.8, 0.9)),
    patterns=(tuple(PATTERNS), 4),
    gradual=((0.75, 0.875, 0.95), 4, 60),
    train_batch=64,
    counts=(16, 64, 256, 1024),
    dampings=(1e-6, 1e-4, 1e-3, 1e-2),
    blocks=(32, 256),
)
# On an accelerator, training after each pruning step is as long as the paper's: two epochs.
FULL_ON_ACCELERATOR = FULL._replace(
    patterns=(tuple(PATTERNS), 8), gradual=((0.75, 0.875, 0.95), 20, 780), train_batch=128
)
SMOKE = Scale(
    seeds=(0,),
    sparsities=(0.5, 0.8),
    gradients=(8, 8),
    batch=8,
    recomputations=((3, (0.8,)),),
    several=(3, (0.8,)),
    patterns=(("2:4",), 1),
    gradual=((0.75,), 2, 2),
    train_batch=16,
    counts=(8,),
    dampings=(1e-3,),
    blocks=(32,),
)


class Network:
    """The network and its data, as functions of its parameters.

    Attributes:
        params: the pretrained parameters, with the statistics of the normalisation layers, which
            training also changes.
        training_graph: the network in training mode.
        calibration: the batches that judge the settings.
    """

    def __init__(self, model: ResNet, data: Data):
        self.data = data
        model.eval()
        self._graph, self.params = nnx.split(model)
        model.train()
        self.training_graph = nnx.graphdef(model)
        held = np.random.default_rng(2026).permutation(len(data.train))[:512]
        size = min(64, len(held))
        self.calibration = [
            (normalize(data.train[part]), data.train_labels[part])
            for part in held[: len(held) // size * size].reshape(-1, size)
        ]
        self._test = [
            (normalize(data.test[i : i + 50]), data.test_labels[i : i + 50])
            for i in range(0, len(data.test), 50)
        ]

        @jax.jit
        def count_hits(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits = nnx.merge(self._graph, params)(x)
            return jnp.sum(jnp.argmax(logits, axis=1) == y)

        self._count_hits = count_hits

    def loss(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The mean loss of a batch, as at inference."""
        x, y = batch
        logits = nnx.merge(self._graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def accuracy(self, params: Any) -> float:
        """The accuracy on the test images, in per cent."""
        hits = [self._count_hits(params, *batch) for batch in self._test]
        return 100 * sum(map(int, hits)) / len(self.data.test)

    def batches(self, seed: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Augmented training batches without end."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.data.train))
            for i in range(0, len(order) - size + 1, size):
                part = order[i : i + size]
                images = augment(rng, self.data.train[part])
                yield normalize(images), self.data.train_labels[part]


class Tuner:
    """Trains the weights under a mask and updates the normalisation; for ``fine_tune``."""

    def __init__(self, network: Network, batches: Iterator[Any], steps: int):
        self._batches, self._steps = batches, steps
        self._tx = pruning.sparse(optax.sgd(0.01, momentum=0.9))

        @jax.jit
        def step(params: Any, state: Any, batch: Any) -> Any:
            weights, statistics = nnx.split_state(params, nnx.Param, ...)

            def loss(weights: Any) -> Any:
                model = nnx.merge(network.training_graph, weights, statistics, copy=True)
                logits = model(batch[0])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
                return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

            gradient, statistics = jax.grad(loss, has_aux=True)(weights)
            updates, state = self._tx.update(gradient, state, weights)
            return nnx.merge_state(optax.apply_updates(weights, updates), statistics), state

        self._step = step

    def __call__(self, params: Any, mask: Any) -> Any:
        weights, _ = nnx.split_state(params, nnx.Param, ...)
        alive, _ = nnx.split_state(mask, nnx.Param, ...)
        state = pruning.set_mask(self._tx.init(weights), alive)
        for _ in range(self._steps):
            params, state = self._step(params, state, next(self._batches))
        return params


class Experiments:
    """All that is measured: a method for each of the five, which returns what is written down."""

    def __init__(self, network: Network, scale: Scale):
        self.network, self.scale = network, scale

    @functools.lru_cache(maxsize=2)  # noqa: B019  (there is one of these a process)
    def gradients(self, seed: int, count: int, per_example: bool = False) -> Any:
        """The first gradients of a seed, the same for all methods."""
        network = self.network
        return collect_gradients(
            network.loss,
            network.params,
            network.batches(seed, self.scale.batch),
            count,
            per_example=per_example,
            progress=False,
        )

    def one_shot(self, seed: int, method: str) -> dict[str, Any]:
        """Every sparsity, from one set of gradients."""
        n = self.scale.gradients[0]
        done = {}
        for sparsity in self.scale.sparsities:
            pruned = self._prune(sparsity, seed, n, method, steps=1)
            done[f"{sparsity:g}"] = _outcome(self.network.accuracy(pruned.params), pruned)
        return done

    def recomputation(self, steps: int, sparsity: float, seed: int, method: str) -> dict[str, Any]:
        """Several steps, each with new gradients."""
        pruned = self._prune(sparsity, seed, self.scale.gradients[1], method, steps=steps)
        return _outcome(self.network.accuracy(pruned.params), pruned)

    def patterns(self, name: str, method: str) -> dict[str, Any]:
        """Prunes in a pattern, with recomputation."""
        pattern = SHAPES[name]

        def fits(path: str, leaf: Any) -> bool:
            # The first convolution stays: three colours are not a multiple of four.
            return is_pruned(path, leaf) and leaf.shape[-2] % 4 == 0

        pruned = self._prune(
            PATTERNS[name],
            0,
            self.scale.gradients[1],
            method,
            steps=self.scale.patterns[1],
            scope=Scope(fits, pattern),
        )
        outcome = _outcome(self.network.accuracy(pruned.params), pruned)
        return outcome | {"sparsity": pruned.report.steps[-1].sparsity}

    def gradual(self, sparsity: float, method: str) -> dict[str, Any]:
        """A cubic schedule with training after each step."""
        _, steps, training = self.scale.gradual
        tuner = Tuner(self.network, self.network.batches(1, self.scale.train_batch), training)
        pruned = self._prune(
            sparsity,
            0,
            self.scale.gradients[1],
            method,
            steps=pruning.sparsity_schedule(sparsity, steps, kind="cubic"),
            fine_tune=tuner,
        )
        outcome = _outcome(self.network.accuracy(pruned.params), pruned)
        return outcome | {"training_steps": steps * training}

    def influence(self, n: int, kind: str, damping: float, block: int) -> dict[str, Any]:
        """One-shot pruning by greedy masks and joint updates, at 80 and 90 %."""
        rows = self.gradients(0, n, kind == "example")
        done = {}
        for sparsity in (0.8, 0.9):
            params, _, _ = pruning.prune_step(
                self.network.params,
                pruning.initial_mask(self.network.params),
                rows,
                sparsity,
                damping=damping,
                score="greedy",
                blocks=block,
                scope=Scope(is_pruned),
            )
            done[f"{sparsity:g}"] = self.network.accuracy(params)
        return done

    def _prune(
        self, sparsity: float, seed: int, count: int, method: str, **options: Any
    ) -> pruning.Pruned:
        network = self.network
        if method == "magnitude":
            count = 1  # its content is not used
        batches = network.batches(seed, self.scale.batch)
        for _ in range(count):
            next(batches)  # the seed of the first gradients
        if method in METHODS:
            # Only the method: no choice, no older gradients.
            parts = {
                "gradients": {"history": 0},
                "search": {"settings": [METHODS[method]], "descents": ()},
            }
        else:
            parts = PARTS.get(method, {})
        held_out = network.calibration
        return pruning.prune(
            network.params,
            network.loss,
            batches,
            sparsity,
            gradients=Gradients(
                count, given=self.gradients(seed, count), **parts.get("gradients", {})
            ),
            search=Search(
                calibration=held_out, num_calibration=len(held_out), **parts.get("search", {})
            ),
            progress=False,
            **{"scope": Scope(is_pruned), **options},
        )


def _outcome(accuracy: float, pruned: pruning.Pruned) -> dict[str, Any]:
    steps = pruned.report.steps
    return {
        "accuracy": accuracy,
        "loss": steps[-1].loss_after,
        "chosen": [str(step.tried[step.chosen]) for step in steps],
        "step_seconds": [step.seconds - step.gradient_seconds for step in steps],
    }


class Run(NamedTuple):
    """One run to measure.

    Attributes:
        part: the method of :class:`Experiments`.
        arguments: the arguments of the method.
    """

    part: str
    arguments: tuple[Any, ...]

    @property
    def key(self) -> str:
        """The name of the run in the results."""
        return " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in self.arguments)


def compared(scale: Scale, steps: int, sparsity: float, seed: int) -> list[str]:
    """The methods to compare at a number of recomputations, a sparsity and a set of gradients."""
    many, sparsities = scale.several
    is_several = steps == many and sparsity in sparsities
    if seed != scale.seeds[0]:
        return [*REFERENCES, DEFAULT] if is_several else []
    methods = [*REFERENCES]
    if steps == many:  # the number of steps does not matter for magnitude
        methods = ["magnitude", *methods]
    if is_several:
        methods += ["joint, blocks", "greedy, blocks"]
        methods += PARTS if sparsity == sparsities[-1] else []
    return [*methods, DEFAULT]


def runs(scale: Scale) -> list[Run]:
    """All runs, in order."""
    todo = []
    for steps, sparsities in scale.recomputations:
        for seed in scale.seeds:
            for sparsity in sparsities:
                methods = compared(scale, steps, sparsity, seed)
                todo += [Run("recomputation", (steps, sparsity, seed, m)) for m in methods]
    todo.append(Run("one_shot", (scale.seeds[0], "magnitude")))
    for seed in scale.seeds:
        todo += [Run("one_shot", (seed, method)) for method in [*METHODS, DEFAULT][1:]]
    names, _ = scale.patterns
    todo += [Run("patterns", (name, m)) for name in names for m in ("magnitude", DEFAULT)]
    for sparsity in scale.gradual[0]:
        todo += [Run("gradual", (sparsity, method)) for method in ("magnitude", DEFAULT)]
    middle = scale.counts[len(scale.counts) // 2]
    todo += [Run("influence", (middle, "batch", x, BLOCK)) for x in scale.dampings]
    todo += [Run("influence", (middle, "batch", DAMPING, x)) for x in scale.blocks]
    for kind in ("batch", "example"):
        todo += [Run("influence", (n, kind, DAMPING, BLOCK)) for n in scale.counts]
    return todo


class Setup(NamedTuple):
    """The information that a process needs for a run."""

    smoke: bool
    data_dir: Path | None
    weights: Path | None
    out: Path


@functools.cache
def experiments(setup: Setup) -> Experiments:
    """The network and the data, loaded once in each process."""
    if setup.smoke:
        return Experiments(Network(ResNet(nnx.Rngs(0), width=4, depth=1), made_up()), SMOKE)
    model = ResNet(nnx.Rngs(0))
    load_weights(model, setup.weights)
    return Experiments(Network(model, load_cifar10(setup.data_dir)), full_scale())


def full_scale() -> Scale:
    """The sizes for which this device has time."""
    return FULL if jax.default_backend() == "cpu" else FULL_ON_ACCELERATOR


def measure(setup: Setup, run: Run) -> dict[str, Any]:
    """Performs a run."""
    return getattr(experiments(setup), run.part)(*run.arguments)


def run_all(setup: Setup, todo: list[Run], path: Path) -> dict[str, Any]:
    """Performs the runs that ``path`` does not hold yet, and writes each to it."""
    network = experiments(setup).network
    dense = network.accuracy(network.params)
    if not setup.smoke and abs(dense - DENSE) > 0.2:
        sys.exit(
            f"The dense network has {dense:.2f} %: expected {DENSE} %, with the paper's weights."
        )
    scale = json.loads(json.dumps(experiments(setup).scale._asdict()))
    environment = parallel.environment() | {"scale": scale}
    results = {"environment": environment | {"date": time.strftime("%Y-%m-%d")}}
    results |= {"dense": dense}
    if path.exists():
        results = json.loads(path.read_text())
        there = {key: results["environment"].get(key) for key in environment}
        if there != environment:
            sys.exit(f"{path} comes from elsewhere: expected {environment}, got {there}.")
    todo = [run for run in todo if run.key not in results.get(run.part, {})]
    print(f"Dense accuracy {results['dense']:.2f} %; {len(todo)} runs to do.")
    with tqdm(total=len(todo), unit="run", disable=None) as bar:
        workers = 1 if setup.smoke else parallel.num_workers()
        arguments = {run: (setup, run) for run in todo}
        for run, done in parallel.outcomes(measure, arguments, setup.out / "compiled", workers):
            results.setdefault(run.part, {})[run.key] = done
            part = path.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1) + "\n")
            part.replace(path)  # an interruption leaves the file as it was
            bar.update()
            bar.set_description(f"{run.part} {run.key}")
    return results


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, runs all experiments and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with CIFAR-10 and the weights")
    parser.add_argument("--weights", type=Path, help=f"the weights; by default DIR/{WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("prune_resnet20"), help="for the results")
    parser.add_argument("--smoke", action="store_true", help="a quick try on made-up pictures")
    every = sorted({run.part for run in runs(SMOKE)})
    parser.add_argument("--only", nargs="+", choices=every, default=every, help="experiments")
    options = parser.parse_args(arguments)
    weights = options.weights or (options.data_dir and options.data_dir / WEIGHTS)
    setup = Setup(options.smoke, options.data_dir, weights, options.out)
    if not options.smoke and (weights is None or not weights.exists()):
        sys.exit(
            f"The pretrained weights are needed: expected --data-dir DIR with DIR/{WEIGHTS}, "
            f"or --weights FILE; got {weights}. --smoke does without."
        )
    try:
        experiments(setup)
    except OSError as error:
        sys.exit(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    todo = runs(SMOKE if options.smoke else full_scale())
    path = options.out / ("smoke.json" if options.smoke else "results.json")
    results = run_all(setup, [run for run in todo if run.part in options.only], path)
    parallel.write_up(results, path, tables, draw, "accuracy.png")
    return results


if __name__ == "__main__":
    main()
