"""ResNet-20 in Flax, CIFAR-10, and the weights of the M-FAC paper's pretrained network.

``prune_resnet20.py`` imports this module.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
CACHE = Path.home() / ".cache" / "mfac_jax" / "cifar-10-python.tar.gz"
WEIGHTS = "resnet20/mfac_resnet20.npz"


class Residual(nnx.Module):
    """Two 3 x 3 convolutions beside an identity or a 1 x 1 convolution."""

    def __init__(self, width_in: int, width: int, rngs: nnx.Rngs):
        strides = 1 if width_in == width else 2
        self.conv1 = _conv(width_in, width, 3, strides, rngs)
        self.norm1 = _norm(width, rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.norm2 = _norm(width, rngs)
        if width_in == width:
            self.shortcut = None
        else:
            self.shortcut = _conv(width_in, width, 1, strides, rngs)
            self.norm3 = _norm(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = nnx.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return nnx.relu(out + (x if self.shortcut is None else self.norm3(self.shortcut(x))))


class ResNet(nnx.Module):
    """Three stages of ``depth`` residual blocks; ResNet-20 by default."""

    def __init__(self, rngs: nnx.Rngs, width: int = 16, depth: int = 3):
        self.conv = _conv(3, width, 3, 1, rngs)
        self.norm = _norm(width, rngs)
        widths = [width, *[w for w in (width, 2 * width, 4 * width) for _ in range(depth)]]
        blocks = [Residual(a, b, rngs) for a, b in itertools.pairwise(widths)]
        self.blocks = nnx.Sequential(*blocks)
        self.dense = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.blocks(nnx.relu(self.norm(self.conv(x))))
        return self.dense(x.mean((1, 2)))


def _conv(width_in: int, width: int, size: int, strides: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        width_in,
        width,
        (size, size),
        strides=strides,
        padding=size // 2,
        use_bias=False,
        rngs=rngs,
    )


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)


def load_weights(model: ResNet, path: Path) -> None:
    """Puts the paper's weights, with PyTorch's names and axes, into the model."""
    with np.load(path) as file:
        arrays = dict(file)

    def put(variable: nnx.Variable, name: str, axes: tuple[int, ...] | None = None) -> None:
        array = jnp.asarray(arrays[name])
        variable.set_value(array if axes is None else jnp.transpose(array, axes))

    def conv(module: nnx.Conv, name: str) -> None:
        put(module.kernel, f"{name}.weight", (2, 3, 1, 0))

    def norm(module: nnx.BatchNorm, name: str) -> None:
        put(module.scale, f"{name}.weight")
        put(module.bias, f"{name}.bias")
        put(module.mean, f"{name}.running_mean")
        put(module.var, f"{name}.running_var")

    conv(model.conv, "conv1")
    norm(model.norm, "bn1")
    for i, block in enumerate(model.blocks.layers):
        name = f"layer{i // 3 + 1}.{i % 3}"
        conv(block.conv1, f"{name}.conv1")
        norm(block.norm1, f"{name}.bn1")
        conv(block.conv2, f"{name}.conv2")
        norm(block.norm2, f"{name}.bn2")
        if block.shortcut is not None:
            conv(block.shortcut, f"{name}.downsample.0")
            norm(block.norm3, f"{name}.downsample.1")
    put(model.dense.kernel, "fc.weight", (1, 0))
    put(model.dense.bias, "fc.bias")


def is_pruned(path: str, leaf: Any) -> bool:
    """The kernels that the paper's experiments prune: all but the 1 x 1 shortcuts."""
    del leaf
    return "kernel" in path and "shortcut" not in path


class Data(NamedTuple):
    """Images as bytes, (n, 32, 32, 3), and labels."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def normalize(images: np.ndarray) -> np.ndarray:
    """Normalizes bytes for the paper's network: mean and deviation 0.5."""
    return (images.astype(np.float32) / 255.0 - 0.5) / 0.5


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Random crops of images padded to 40 x 40 with black margins; half are mirrored."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (y, x) in enumerate(rng.integers(0, 9, (len(images), 2))):
        crop = padded[i, y : y + images.shape[1], x : x + images.shape[2]]
        out[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return out


def load_cifar10(data_dir: Path | None) -> Data:
    """CIFAR-10 from ``data_dir``, or downloaded without a ``data_dir``.

    Two layouts are supported: ``cifar-10-batches-py`` with the batches of the standard archive,
    and ``cifar10`` with sheets of 500 images, ``train_NNN.webp``, and ``train_labels.npz``.

    Raises:
        FileNotFoundError: ``data_dir`` contains no CIFAR-10.
        OSError: the download failed.
    """
    if data_dir is None:
        return _from_archive(_downloaded())
    folder = data_dir / "cifar10"
    if (data_dir / "cifar-10-batches-py").is_dir():
        return _from_batches(lambda name: (data_dir / "cifar-10-batches-py" / name).read_bytes())
    if not list(folder.glob("train_*.webp")):
        raise FileNotFoundError(
            f"no CIFAR-10 in {data_dir}: expected cifar-10-batches-py/ or cifar10/train_NNN.webp; "
            "without --data-dir it is downloaded."
        )
    return Data(*_from_sheets(folder, "train"), *_from_sheets(folder, "test"))


def _from_sheets(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    sheets = [
        np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3)
        for path in sorted(folder.glob(f"{part}_*.webp"))
    ]
    with np.load(folder / f"{part}_labels.npz") as file:
        return np.concatenate(sheets), file["y"].astype(np.int32)


def _from_archive(path: Path) -> Data:
    with tarfile.open(path) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"cifar-10-batches-py/{name}")
            assert member is not None
            return member.read()

        return _from_batches(read)


def _from_batches(read: Any) -> Data:
    def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
        content = pickle.loads(read(name), encoding="bytes")
        images = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, np.asarray(content[b"labels"], np.int32)

    train = [batch(f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Data(images, labels, *batch("test_batch"))


def _downloaded() -> Path:
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        part = CACHE.with_suffix(".part")
        print(f"Downloading CIFAR-10 (163 MiB) from {URL} to {CACHE}.")
        try:
            urllib.request.urlretrieve(URL, part)
        except OSError as error:
            raise OSError(
                f"CIFAR-10 could not be downloaded from {URL}: {error}. Put it into a folder "
                "yourself and name that by --data-dir."
            ) from error
        if hashlib.md5(part.read_bytes()).hexdigest() != MD5:
            part.unlink()
            raise OSError(f"the file from {URL} is not the CIFAR-10 archive (its MD5 differs).")
        part.rename(CACHE)
    return CACHE


def made_up(seed: int = 0, count: int = 256) -> Data:
    """Small noisy pictures of ten patterns, for a quick test without data."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (10, 32, 32, 3))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 10, count).astype(np.int32)
        noisy = 0.5 * patterns[labels] + 0.5 * rng.integers(0, 256, (count, 32, 32, 3))
        return noisy.astype(np.uint8), labels

    return Data(*draw(count), *draw(count))
