"""The tasks of ``optimizers.py``: networks in Flax with their data.

Every task splits its training data into a part to train on and a part to choose on. Test data are
a third part, which only the last table uses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import minilm as minilm_module
import numpy as np
import optax
from flax import nnx
from resnet20 import ResNet, load_cifar10

Batch = tuple[np.ndarray, np.ndarray]


class Split(NamedTuple):
    """Inputs and labels of one part of the data."""

    x: np.ndarray
    y: np.ndarray

    def batches(self, size: int) -> Iterator[Batch]:
        """All of it in order; the last batch may be smaller."""
        for i in range(0, len(self.x), size):
            yield self.x[i : i + size], self.y[i : i + size]


class Task:
    """A network, its data and the length of its training.

    Attributes:
        name: the name in tables.
        steps: the number of training steps.
        batch: the number of examples in a step.
        train: the data to train on.
        validation: the data to choose on.
        test: the data of the last table.
    """

    name: str
    steps: int
    batch: int
    train: Split
    validation: Split
    test: Split

    def network(self, rngs: nnx.Rngs) -> nnx.Module:
        """A new network."""
        raise NotImplementedError

    def augment(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        """The inputs of a training batch; as they are by default."""
        del rng
        return x

    def init(self, seed: int) -> tuple[Any, Any]:
        """Initial parameters, and the variables that training does not change by gradients."""
        graph, params, rest = nnx.split(self.network(nnx.Rngs(seed)), nnx.Param, ...)
        del graph
        return params, rest

    @functools.cached_property
    def graphs(self) -> tuple[Any, Any]:
        """The network in training and in evaluation mode."""
        model = self.network(nnx.Rngs(0))
        model.train()
        training = nnx.split(model, nnx.Param, ...)[0]
        model.eval()
        return training, nnx.split(model, nnx.Param, ...)[0]

    def loss(self, params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """The mean loss of a training batch, and the other variables after it."""
        model = nnx.merge(self.graphs[0], params, rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1])
        return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

    def examples(self, params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
        """The mean loss, the squared gradients of the logits, and the gradients of all examples."""

        def one(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            (logits,) = nnx.merge(self.graphs[0], params, rest, copy=True)(x[None])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            wrong = jax.nn.softmax(logits) - jax.nn.one_hot(y, len(logits))
            return loss, jnp.sum(wrong**2)

        of_each = jax.vmap(jax.value_and_grad(one, has_aux=True), (None, 0, 0))
        (losses, squares), rows = of_each(params, *batch)
        return losses.mean(), squares, rows

    @functools.cached_property
    def _evaluate(self) -> Any:
        @jax.jit
        def evaluate(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
            logits = nnx.merge(self.graphs[1], params, rest)(x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), jnp.mean(logits.argmax(-1) == y)

        return evaluate

    def evaluate(self, params: Any, rest: Any, split: Split) -> tuple[float, float]:
        """The mean loss and the error in per cent."""
        found = [self._evaluate(params, rest, *batch) for batch in split.batches(256)]
        sizes = [len(y) for _, y in split.batches(256)]
        losses, hits = np.average(np.asarray(found, np.float64), axis=0, weights=sizes)
        return float(losses), float(100 * (1 - hits))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        rng = np.random.default_rng(seed)
        size = min(self.batch, len(self.train.x))
        while True:
            order = rng.permutation(len(self.train.x))
            for i in range(0, len(order) - size + 1, size):
                part = order[i : i + size]
                yield self.augment(rng, self.train.x[part]), self.train.y[part]


class Block(nnx.Module):
    """A layer of a transformer that looks back only; normalization comes first."""

    def __init__(self, width: int, heads: int, layers: int, rngs: nnx.Rngs):
        last = nnx.initializers.variance_scaling(0.5 / layers, "fan_in", "normal")
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, kernel_init=last, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=last, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        count, length, width = h.shape
        parts = self.qkv(self.norm1(h)).reshape(count, length, 3, self.heads, -1)
        q, k, v = jnp.moveaxis(parts, 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.reshape(count, length, width))
        return h + self.down(jax.nn.gelu(self.up(self.norm2(h))))


class CharacterTransformer(nnx.Module):
    """Predicts the next character."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(vocabulary, width, embedding_init=small, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List([Block(width, 4, layers, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.embed(x) + self.place[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Characters(Task):
    """Two layers of width 128 on the works of Shakespeare."""

    name = "character transformer"
    length = 64

    def __init__(self, data_dir: Path | None, smoke: bool = False):
        self.steps, self.batch = (6, 4) if smoke else (800, 32)
        self.width = 16 if smoke else 128
        if smoke:
            text = "to be or not to be, that is the question. " * 200
        else:
            text = (_folder(data_dir, "tinyshakespeare.txt") / "tinyshakespeare.txt").read_text()
        letters = np.array(list(text))
        self.vocabulary, ids = np.unique(letters, return_inverse=True)
        ids = ids.astype(np.int32)
        cuts = np.split(ids, [int(0.8 * len(ids)), int(0.9 * len(ids))])
        self.text = cuts[0]
        self.train = self.windows(cuts[0][: 100 * self.length])
        self.validation, self.test = self.windows(cuts[1]), self.windows(cuts[2])

    def windows(self, ids: np.ndarray) -> Split:
        """Windows that do not overlap."""
        starts = np.arange(0, len(ids) - self.length - 1, self.length)[:1024]
        both = ids[starts[:, None] + np.arange(self.length + 1)]
        return Split(both[:, :-1], both[:, 1:])

    def network(self, rngs: nnx.Rngs) -> nnx.Module:
        return CharacterTransformer(len(self.vocabulary), self.length, self.width, 2, rngs)

    def batches(self, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            starts = rng.integers(0, len(self.text) - self.length, self.batch)
            both = self.text[starts[:, None] + np.arange(self.length + 1)]
            yield both[:, :-1], both[:, 1:]


class Cifar(Task):
    """A narrow ResNet-8 (three stages of one residual block) with batch normalization."""

    name = "ResNet-8 on CIFAR-10"

    def __init__(self, data_dir: Path | None, smoke: bool = False):
        self.steps, self.batch = (6, 8) if smoke else (1600, 64)
        self.width = 4 if smoke else 8
        self.train, self.validation, self.test = _cifar10(data_dir, smoke)

    def network(self, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(_normalize, ResNet(rngs, self.width, depth=1))

    def augment(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        """Random crops of images padded to 40 x 40; half are mirrored."""
        size = x.shape[1]
        padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        top, left = rng.integers(0, 9, (2, len(x)))
        rows = top[:, None] + np.arange(size)
        columns = left[:, None] + np.arange(size)
        columns = np.where(rng.random(len(x))[:, None] < 0.5, columns[:, ::-1], columns)
        return padded[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]


class Dense(nnx.Module):
    """Two hidden layers on the pixels."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.hidden1 = nnx.Linear(3072, width, kernel_init=init, rngs=rngs)
        self.hidden2 = nnx.Linear(width, width, kernel_init=init, rngs=rngs)
        self.head = nnx.Linear(width, 10, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.hidden1(_normalize(x).reshape(len(x), -1)))
        return self.head(nnx.relu(self.hidden2(x)))


class Mlp(Task):
    """3072-256-256-10 with ReLU on CIFAR-10, without augmentation."""

    name = "MLP on CIFAR-10"

    def __init__(self, data_dir: Path | None, smoke: bool = False):
        self.steps, self.batch = (6, 8) if smoke else (1400, 64)
        self.width = 8 if smoke else 256
        self.train, self.validation, self.test = _cifar10(data_dir, smoke)

    def network(self, rngs: nnx.Rngs) -> nnx.Module:
        return Dense(self.width, rngs)


def _normalize(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) / 127.5 - 1.0


@functools.cache
def _cifar10(data_dir: Path | None, smoke: bool) -> tuple[Split, Split, Split]:
    if smoke:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (64, 32, 32, 3), np.uint8), rng.integers(0, 10, 64, np.int32)
        return Split(x, y), Split(x[:16], y[:16]), Split(x[16:32], y[16:32])
    data = load_cifar10(data_dir)
    return (
        Split(data.train[:45_000], data.train_labels[:45_000]),
        Split(data.train[45_000:], data.train_labels[45_000:]),
        Split(data.test, data.test_labels),
    )


def _folder(data_dir: Path | None, name: str) -> Path:
    if data_dir is None or not (data_dir / name).exists():
        raise FileNotFoundError(f"no {name} in {data_dir}: name its folder by --data-dir.")
    return data_dir


class Glue(Task):
    """Fine-tunes the last layers of MiniLM-L6 on a task of GLUE; the others stay as they are.

    The states before these layers are computed once. The validation data are a part of the training
    data; the task's own dev set is the test data.
    """

    trained_layers = 2
    most = 12_000  # examples

    def __init__(
        self,
        name: str,
        data_dir: Path | None,
        minilm: Path | None = None,
        cache: Path | None = None,
        smoke: bool = False,
    ):
        self.name, self.smoke = f"MiniLM-L6 on {name}", smoke
        if smoke:
            self.steps, self.batch = 4, 4
            rng = np.random.default_rng(0)
            x, y = rng.integers(1, 50, (64, 8), np.int32), rng.integers(0, 2, 64, np.int32)
            states = self._states(x)
            self.train = self.test = Split(states, y)
            self.validation = Split(states[:16], y[:16])
            return
        pairs = name == "MRPC"
        self.steps, self.batch = 300, 16 if pairs else 32
        self._folder = minilm_module.model_folder(minilm)
        folder = _folder(data_dir, "glue") / "glue" / name
        parts = []
        for part in ("train", "dev"):
            sentences, labels = minilm_module.read_glue(folder, part)
            order = np.random.default_rng(0).permutation(len(labels))[: self.most]
            chosen = [sentences[i] for i in order]
            stem = f"{name}-{part}-{self.most}-{self.trained_layers}"
            path = None if cache is None else cache / f"{stem}.npy"
            if path is None or not path.exists():
                tokens = minilm_module.tokenize(chosen, self._folder, 64 if pairs else 32)
                states = self._states(tokens)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path.with_suffix(".part.npy"), states)
                    path.with_suffix(".part.npy").replace(path)
            else:
                states = np.load(path, mmap_mode="r")
            parts.append(Split(states, labels[order].astype(np.int32)))
        held = min(len(parts[0].x) // 6, 2_000)
        self.validation = Split(parts[0].x[:held], parts[0].y[:held])
        self.train = Split(parts[0].x[held:], parts[0].y[held:])
        self.test = parts[1]

    def _encoder(self, rngs: nnx.Rngs) -> minilm_module.MiniLM:
        if self.smoke:
            return minilm_module.MiniLM(rngs, width=8, layers=3, heads=2, vocabulary=50)
        model = minilm_module.MiniLM(rngs)
        minilm_module.load_weights(model, self._folder)
        return model

    def _states(self, tokens: np.ndarray) -> np.ndarray:
        """The states of all examples before the trained layers, in float16."""
        graph, state = nnx.split(self._encoder(nnx.Rngs(0)))
        hidden = jax.jit(lambda t: nnx.merge(graph, state).hidden(t, self.trained_layers))
        found = []
        for part in np.array_split(tokens, max(len(tokens) // 200, 1)):
            padded = np.pad(part, [(0, -len(part) % 256), (0, 0)])
            found.append(np.asarray(hidden(padded)[: len(part)], np.float16))
        return np.concatenate(found)

    def network(self, rngs: nnx.Rngs) -> nnx.Module:
        return minilm_module.Top(self._encoder(rngs), self.trained_layers)
