"""A trained network with its data, as the experiments on pruning use it.

A network has a part of the data to train on, a part to choose on and a part to test on. 512 of
the training examples, the calibration batches, judge settings while the network is pruned. They are
in no training batch. A network without a file of weights is trained once and kept in a folder.
"""

from __future__ import annotations

import functools
import itertools
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optimizer_tasks import Batch, Split
from pruning_recipes import recipe
from tqdm import tqdm

from mfac_jax import pruning

PARTS = ("validation", "test")
CALIBRATION = 8  # batches
RECALIBRATION = 16, 128  # batches, and the images of each
KEEP_EVERY = 200  # training steps


class Files(NamedTuple):
    """Where everything is.

    Attributes:
        data_dir: the folder of the data; without one, CIFAR-10 is downloaded.
        weights: the files of weights of ``resnet20`` and ``akamaster``, by name; by default
            ``resnet20/mfac_resnet20.npz`` and ``resnet20/akamaster_resnet20.npz`` in the data.
        minilm: the folder of MiniLM's weights; without one, those of the installed package.
        networks: the folder in which trained networks are kept.
        smoke: tiny networks and made-up data instead of all these.
    """

    data_dir: Path | None
    weights: dict[str, Path]
    minilm: Path | None
    networks: Path
    smoke: bool = False


class Network:
    """A network and its data; :meth:`prepare` completes it.

    Attributes:
        name: the name in tables.
        training_seconds: the processor time of its training; None for pretrained networks.
        params: all that the loss needs: weights and statistics of normalisation layers.
        batch: the number of examples in a batch for one gradient.
        train: the data to train on, without the calibration examples.
        validation: the data to choose on.
        test: the data of the last table.
        calibration: batches of the training part, not augmented, that judge the settings.
    """

    name: str
    training_seconds: float | None = None
    batch = 32
    params: Any

    def __init__(self, files: Files):
        """Loads the data and the first weights, and trains nothing."""
        self.files, self.smoke = files, files.smoke
        model = self._model(files)
        model.train()
        self._training_graph = nnx.graphdef(model)
        model.eval()
        self._graph, self.params = nnx.split(model)
        train, self.validation, self.test = self._data(files)
        self.train, held = self._hold_out(train)
        size = len(held.y) // CALIBRATION
        self.calibration = [(self.inputs(x), y) for x, y in held.batches(size)]

    def prepare(self) -> None:
        """Makes the network ready to prune: trains it if it must."""

    def _model(self, files: Files) -> nnx.Module:
        """The network with its first weights."""
        raise NotImplementedError

    def _data(self, files: Files) -> tuple[Split, Split, Split]:
        """The data to train on, to choose on and to test on."""
        raise NotImplementedError

    def _hold_out(self, train: Split) -> tuple[Split, Split]:
        """The data for training batches, and for the calibration batches."""
        order = np.random.default_rng(2026).permutation(len(train.y))
        count = min(64, len(order) // (8 * CALIBRATION)) * CALIBRATION
        held, rest = order[:count], np.sort(order[count:])
        return Split(train.x[rest], train.y[rest]), Split(train.x[held], train.y[held])

    def augment(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        """The examples of a training batch; as they are by default."""
        del rng
        return x

    def inputs(self, x: np.ndarray) -> np.ndarray:
        """What the network takes, from stored examples."""
        return x

    def is_pruned(self, path: str, leaf: Any) -> bool:
        """The leaves that may be pruned: all kernels by default."""
        del leaf
        return "kernel" in path

    @property
    def has_statistics(self) -> bool:
        """Whether the network normalises batches."""
        return bool(jax.tree.leaves(nnx.filter_state(self.params, nnx.BatchStat)))

    def loss(self, params: Any, batch: Batch) -> jax.Array:
        """The mean loss of a batch, as at inference."""
        logits = nnx.merge(self._graph, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def loss_of_batch(self, params: Any, batch: Batch) -> jax.Array:
        """The mean loss of a batch with the batch's own statistics, as in training."""
        logits = nnx.merge(self._training_graph, params, copy=True)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """Training batches without end.

        Raises:
            ValueError: a batch is larger than the training data.
        """
        count = len(self.train.y)
        if size > count:
            raise ValueError(f"{self.name} has {count} training examples, got batches of {size}.")
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(count)
            for i in range(0, count - size + 1, size):
                part = order[i : i + size]
                yield self.inputs(self.augment(rng, self.train.x[part])), self.train.y[part]

    def batches_of_training(self, seed: int, size: int) -> Iterator[Batch]:
        """The batches that the network is trained with before it is pruned."""
        return self.batches(seed, size)

    def accuracy(self, params: Any, part: str) -> float:
        """The accuracy in per cent.

        Args:
            params: the parameters.
            part: ``"validation"`` or ``"test"``.
        """
        split = {"validation": self.validation, "test": self.test}[part]
        batches = ((self.inputs(x), y) for x, y in split.batches(250))
        return 100 * sum(int(self._hits(params, *batch)) for batch in batches) / split.y.size

    @functools.cached_property
    def _hits(self) -> Callable[..., jax.Array]:
        @jax.jit
        def hits(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.sum(nnx.merge(self._graph, params)(x).argmax(-1) == y)

        return hits

    def recalibrate(self, params: Any) -> Any:
        """The parameters with new statistics of their normalisation layers.

        They are the means, over batches of augmented training images, of the statistics of a batch.
        """
        if not self.has_statistics:
            return params
        count, size = RECALIBRATION
        batches = itertools.islice(self.batches(2026, min(size, len(self.train.y))), count)
        found = [self._statistics(params, x) for x, _ in batches]
        means = jax.tree.map(lambda *leaves: sum(leaves) / count, *found)
        return nnx.merge_state(params, means)

    @functools.cached_property
    def _statistics(self) -> Callable[..., Any]:
        @jax.jit
        def statistics(params: Any, x: jax.Array) -> Any:
            model = nnx.merge(self._training_graph, params, copy=True)
            model.set_attributes(nnx.BatchNorm, momentum=0.0)  # forgets all earlier batches
            model(x)
            return nnx.state(model, nnx.BatchStat)

        return statistics

    def trainer(
        self, tx: optax.GradientTransformation, seed: int, size: int
    ) -> Callable[[Any, Any, int], Any]:
        """A function that trains under a mask.

        Its arguments are parameters, mask and number of steps; it returns the new parameters. The
        optimizer's state and the batches continue from call to call.

        Args:
            tx: any optimizer.
            seed: the seed of the batches.
            size: the number of examples in a batch.
        """
        tx = pruning.sparse(tx)
        step = self._step(tx)
        batches = self.batches(seed, size)
        state = None

        def tune(params: Any, mask: Any, steps: int) -> Any:
            nonlocal state
            if state is None:
                state = tx.init(nnx.filter_state(params, nnx.Param))
            state = pruning.set_mask(state, nnx.filter_state(mask, nnx.Param))
            for batch in itertools.islice(batches, steps):
                params, state = step(params, state, batch)
            return params

        return tune

    def _step(self, tx: optax.GradientTransformation) -> Callable[[Any, Any, Batch], Any]:
        """A training step: parameters, optimizer's state and batch to new parameters and state."""

        @jax.jit
        def step(params: Any, state: Any, batch: Batch) -> Any:
            weights, others = nnx.split_state(params, nnx.Param, ...)

            def loss(weights: Any) -> Any:
                model = nnx.merge(self._training_graph, weights, others, copy=True)
                losses = optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1])
                return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

            gradient, others = jax.grad(loss, has_aux=True)(weights)
            updates, state = tx.update(gradient, state, weights)
            return nnx.merge_state(optax.apply_updates(weights, updates), others), state

        return step


class Trained(Network):
    """A network that is trained once and kept in a folder."""

    def prepare(self) -> None:
        """Reads the trained network, or trains and keeps it."""
        files = self.files
        # A quick try never takes the place of a network.
        path = files.networks / f"{'smoke_' if files.smoke else ''}{self.name}.npz"
        if path.exists():
            self.params, seconds = _read(path, (self.params, np.float32(0)))
            self.training_seconds = float(seconds)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.params, self.training_seconds = self._train(path.with_suffix(".part.npz"))
        _write(path, (self.params, np.float32(self.training_seconds)))
        path.with_suffix(".part.npz").unlink(missing_ok=True)
        found = [f"{part} {self.accuracy(self.params, part):.2f} %" for part in PARTS]
        print(f"{self.name} is trained: {', '.join(found)}.")

    def _train(self, part: Path) -> tuple[Any, float]:
        """Trains the network; resumes from ``part``, which holds the state every few steps.

        Returns:
            The parameters, and the processor time that it took.
        """
        steps, size, tx = recipe(self.name, self.smoke)
        step = self._step(tx)
        params, state = self.params, tx.init(nnx.filter_state(self.params, nnx.Param))
        done, seconds = np.int32(0), np.float32(0)
        if part.exists():
            params, state, done, seconds = _read(part, (params, state, done, seconds))
        began = time.process_time() - float(seconds)
        batches = itertools.islice(self.batches_of_training(0, size), int(done), steps)
        bar = tqdm(batches, f"training {self.name}", steps, initial=int(done), disable=None)
        for i, batch in enumerate(bar, int(done) + 1):
            params, state = step(params, state, batch)
            if i % KEEP_EVERY == 0:
                seconds = np.float32(time.process_time() - began)
                _write(part, (params, state, np.int32(i), seconds))
        return jax.block_until_ready(params), time.process_time() - began


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def _write(path: Path, tree: Any) -> None:
    """Writes the leaves of a tree; an interruption leaves the file as it was."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **{name: np.asarray(leaf) for name, leaf in _named(tree).items()})
    part.replace(path)


def _read(path: Path, like: Any) -> Any:
    """A tree like ``like`` from the leaves in a file.

    Raises:
        ValueError: the file is damaged, or a leaf is missing or has another shape.
    """
    try:
        with path.open("rb") as file, np.load(file) as content:
            arrays = dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to train again.") from error
    expected = _named(like)
    for name, leaf in expected.items():
        found = arrays[name].shape if name in arrays else None
        if found != leaf.shape:
            raise ValueError(
                f"{path}: expected shape {leaf.shape} for {name}, got {found}: delete the file to "
                "train again."
            )
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[n]) for n in expected])
