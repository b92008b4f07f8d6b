"""The networks of ``prune_networks.py`` with their data.

Two ResNet-20 are pretrained: files of weights hold them. The others are trained once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import jax
import minilm
import numpy as np
import optimizer_tasks
import resnet20
from flax import nnx
from optimizer_tasks import Batch, Split
from pruning_network import CALIBRATION, Files, Network, Trained
from squeezenet import SqueezeNet


class Cifar(Network):
    """What networks for CIFAR-10 have in common: crops, mirrored images and normalisation."""

    mean, std = resnet20.MFAC_MEAN, resnet20.MFAC_STD

    def _data(self, files: Files) -> tuple[Split, Split, Split]:
        data = resnet20.made_up() if files.smoke else resnet20.load_cifar10(files.data_dir)
        return *_cut(data.train, data.train_labels), Split(data.test, data.test_labels)

    def augment(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        return resnet20.augment(rng, x)

    def inputs(self, x: np.ndarray) -> np.ndarray:
        return resnet20.normalize(x, self.mean, self.std)


class ResNet20(Cifar):
    """The M-FAC paper's pretrained ResNet-20."""

    name = "resnet20"
    shortcut = "conv"
    weights = "mfac_resnet20.npz"

    def _model(self, files: Files) -> nnx.Module:
        if files.smoke:
            return resnet20.ResNet(nnx.Rngs(0), width=4, depth=1, shortcut=self.shortcut)
        path = files.weights.get(self.name)
        if path is None and files.data_dir is not None:
            path = files.data_dir / "resnet20" / self.weights
        if path is None or not path.exists():
            raise FileNotFoundError(
                f"{self.name} needs its pretrained weights: expected resnet20/{self.weights} in "
                f"the folder of data, or {self.name}=FILE; got {path}. {checkpoints.SOURCES}"
            )
        model = resnet20.ResNet(nnx.Rngs(0), shortcut=self.shortcut)
        resnet20.load_weights(model, checkpoints.read(path))
        return model

    def is_pruned(self, path: str, leaf: Any) -> bool:
        return resnet20.is_pruned(path, leaf)


class Akamaster(ResNet20):
    """A public pretrained ResNet-20 with shortcuts without weights."""

    name = "akamaster"
    shortcut = "pad"
    weights = "akamaster_resnet20.npz"
    mean, std = resnet20.AKAMASTER_MEAN, resnet20.AKAMASTER_STD


class Squeeze(Trained, Cifar):
    """A small SqueezeNet with batch normalisation."""

    name = "squeezenet"

    def _model(self, files: Files) -> nnx.Module:
        if files.smoke:
            return SqueezeNet(nnx.Rngs(0), 4, (((2, 4),), ((4, 4),)))
        return SqueezeNet(nnx.Rngs(0))


class Dense(nnx.Module):
    """Three layers with ReLU between them."""

    def __init__(self, widths: tuple[int, int, int, int], rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([nnx.Linear(a, b, kernel_init=init, rngs=rngs) for a, b in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Mlp(Trained):
    """784-300-100-10 on MNIST."""

    name = "mlp"

    def _model(self, files: Files) -> nnx.Module:
        return Dense((784, 6, 4, 10) if files.smoke else (784, 300, 100, 10), nnx.Rngs(0))

    def _data(self, files: Files) -> tuple[Split, Split, Split]:
        if files.smoke:
            data = resnet20.made_up()
            train, test = data.train[:, 2:30, 2:30, 0], data.test[:, 2:30, 2:30, 0]
            return *_cut(train, data.train_labels), Split(test, data.test_labels)
        with np.load(_existing(files, "mnist.npz")) as file:
            data = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        labels = {key: data[key].astype(np.int32) for key in ("y_train", "y_test")}
        train, validation = _cut(data["x_train"], labels["y_train"], 55_000)
        return train, validation, Split(data["x_test"], labels["y_test"])

    def inputs(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1).astype(np.float32) / 255.0


class Characters(Trained):
    """The character transformer of the comparison of optimizers, on the works of Shakespeare."""

    name = "characters"
    batch = 16

    def _model(self, files: Files) -> nnx.Module:
        self._task = optimizer_tasks.Characters(files.data_dir, files.smoke)
        return self._task.network(nnx.Rngs(0))

    def _data(self, files: Files) -> tuple[Split, Split, Split]:
        del files
        return self._task.train, self._task.validation, self._task.test

    def _hold_out(self, train: Split) -> tuple[Split, Split]:
        """Calibration takes the end of the text; training batches are windows anywhere before."""
        text, length = self._task.text, self._task.length
        count = min(64, len(text) // length // (8 * CALIBRATION)) * CALIBRATION
        cut = len(text) - count * length - 2
        self._task.text = text[:cut]
        return train, self._task.windows(text[cut:])

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        task = copy.copy(self._task)
        task.batch = size
        return task.batches(seed)


class MiniLM(Trained):
    """MiniLM-L6, fine-tuned on SST-2.

    The embeddings stay as they are and are no part of the parameters: a batch holds them, with 1
    for a word and 0 for padding behind. Sentences are cut to 64 tokens. Those of a training or
    calibration batch have similar lengths; training batches hide a tenth of their words behind
    BERT's mask.
    """

    name = "minilm"
    batch = 16
    # The training data hold sentences and their parts, down to single words. Those of less than
    # ``least`` words serve to fine-tune only; ``held`` of the others are the validation part.
    least, held = 5, 2_000
    hidden = 0.1
    lengths = (8, 16, 24, 32, 48, 64)

    def _model(self, files: Files) -> nnx.Module:
        if files.smoke:
            encoder = minilm.MiniLM(nnx.Rngs(0), width=8, layers=2, heads=2, vocabulary=50)
        else:
            self._folder = minilm.model_folder(files.minilm)
            encoder = minilm.MiniLM(nnx.Rngs(0))
            minilm.load_weights(encoder, self._folder)
        top = minilm.Top(encoder, len(encoder.layers))
        encoder.layers = nnx.List([])
        graph, self._embeddings = nnx.split(encoder)
        self._embed = jax.jit(lambda state, tokens: nnx.merge(graph, state).hidden(tokens, 0))
        return top

    def _data(self, files: Files) -> tuple[Split, Split, Split]:
        if files.smoke:
            rng = np.random.default_rng(0)
            x, y = rng.integers(1, 50, (256, 8), np.int32), rng.integers(0, 2, 256, np.int32)
            self._short = Split(x[:16], y[:16])
            return *_cut(x[:192], y[:192]), Split(x[192:], y[192:])
        folder = _existing(files, "glue/SST-2")
        sentences, labels = minilm.read_glue(folder, "train")
        is_long = np.array([len(sentence.split()) >= self.least for sentence in sentences])
        order = np.random.default_rng(0).permutation(np.flatnonzero(is_long))
        held, rest = order[: self.held], order[self.held :]
        short = np.flatnonzero(~is_long)
        self._short = self._tokens([sentences[i] for i in short], labels[short])
        return (
            self._tokens([sentences[i] for i in rest], labels[rest]),
            self._tokens([sentences[i] for i in held], labels[held]),
            self._tokens(*minilm.read_glue(folder, "dev")),
        )

    def _tokens(self, sentences: list[str], labels: np.ndarray) -> Split:
        tokens = minilm.tokenize(sentences, self._folder, self.lengths[-1])
        return Split(tokens, labels.astype(np.int32))

    def _hold_out(self, train: Split) -> tuple[Split, Split]:
        train, held = super()._hold_out(train)
        by_length = np.argsort(_lengths(held.x), kind="stable").reshape(CALIBRATION, -1)
        order = np.random.default_rng(0).permutation(by_length).ravel()
        return train, Split(held.x[order], held.y[order])

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        return self._by_length(self.train, seed, size)

    def batches_of_training(self, seed: int, size: int) -> Iterator[Batch]:
        both = [np.concatenate(parts) for parts in zip(self.train, self._short, strict=True)]
        return self._by_length(Split(*both), seed, size)

    def _by_length(self, split: Split, seed: int, size: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        x, y = split
        which = np.searchsorted(self.lengths, _lengths(x))
        while True:
            found = []
            for i, length in enumerate(self.lengths):
                order = rng.permutation(np.flatnonzero(which == i))
                starts = range(0, len(order) - size + 1, size)
                found += [(order[start : start + size], length) for start in starts]
            if not found:
                raise ValueError(f"{self.name}: too few training examples for batches of {size}.")
            for i in rng.permutation(len(found)):
                part, length = found[i]
                yield self.inputs(self.augment(rng, x[part, :length])), y[part]

    def augment(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        is_word = (x != minilm.PAD) & (x != minilm.FIRST) & (x != minilm.LAST)
        is_hidden = is_word & (rng.random(x.shape) < self.hidden)
        return np.where(is_hidden, 1 if self.smoke else minilm.MASK, x).astype(x.dtype)

    def inputs(self, x: np.ndarray) -> np.ndarray:
        longest = _lengths(x).max()
        length = next(length for length in self.lengths if length >= longest)
        return np.asarray(self._embed(self._embeddings, x[:, :length]))

    def is_pruned(self, path: str, leaf: Any) -> bool:
        """The kernels of the layers, not that of the classifier."""
        del leaf
        return "kernel" in path and "layers" in path

    def is_channel(self, path: str, leaf: Any) -> bool:
        """The kernels whose outputs are the channels of the feed-forward parts."""
        del leaf
        return "kernel" in path and "up" in path


def _lengths(x: np.ndarray) -> np.ndarray:
    """The numbers of tokens of sentences."""
    return np.sum(x != minilm.PAD, axis=1)


def _cut(x: np.ndarray, y: np.ndarray, count: int | None = None) -> tuple[Split, Split]:
    """The first ``count`` examples, nine tenths by default, and the others."""
    count = 9 * len(y) // 10 if count is None else count
    return Split(x[:count], y[:count]), Split(x[count:], y[count:])


def _existing(files: Files, name: str) -> Path:
    if files.data_dir is None or not (files.data_dir / name).exists():
        raise FileNotFoundError(f"no {name} in {files.data_dir}: name its folder by --data-dir.")
    return files.data_dir / name


CLASSES: dict[str, type[Network]] = {
    kind.name: kind for kind in (ResNet20, Akamaster, Squeeze, Mlp, Characters, MiniLM)
}
NETWORKS = tuple(CLASSES)
PRETRAINED = ("resnet20", "akamaster")
# Choices are made on validation data of these; the others only verify them.
DEVELOPED_ON = ("resnet20", "squeezenet", "mlp", "minilm")


def network(name: str, files: Files) -> Network:
    """A network with its data; it is trained if it is not kept yet.

    Args:
        name: one of ``NETWORKS``.
        files: where everything is.

    Raises:
        FileNotFoundError: data or weights are missing.
        ValueError: no network has this name, or a kept one does not fit.
    """
    if name not in CLASSES:
        raise ValueError(f"expected one of {', '.join(NETWORKS)}, got {name}.")
    found = CLASSES[name](files)
    found.prepare()
    return found
