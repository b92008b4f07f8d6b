"""ResNet-20 in Flax with either kind of shortcut, pretrained weights for it, and CIFAR-10.

Two pretrained networks are public: that of the M-FAC paper, whose shortcuts are 1 x 1
convolutions, and that of akamaster's repository, whose shortcuts have no parameters.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import tarfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import Place, put
from flax import nnx

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
CACHE = Path.home() / ".cache" / "mfac_jax" / "cifar-10-python.tar.gz"

Colors = float | tuple[float, float, float]
Shortcut = Literal["conv", "pad"]

# The mean and the deviation of the colours by which each pretrained network normalizes.
MFAC_MEAN: Colors = 0.5
MFAC_STD: Colors = 0.5
AKAMASTER_MEAN: Colors = (0.485, 0.456, 0.406)
AKAMASTER_STD: Colors = (0.229, 0.224, 0.225)


class Residual(nnx.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    The shortcut is the identity, unless the width changes: then it is a 1 x 1 convolution
    (``conv``), or every second pixel with channels of zeros around its own (``pad``).
    """

    def __init__(self, width_in: int, width: int, rngs: nnx.Rngs, shortcut: Shortcut = "conv"):
        strides = 1 if width_in == width else 2
        self.conv1 = _conv(width_in, width, 3, strides, rngs)
        self.norm1 = _norm(width, rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.norm2 = _norm(width, rngs)
        if width_in == width or shortcut == "pad":
            self.shortcut = None
        else:
            self.shortcut = _conv(width_in, width, 1, strides, rngs)
            self.norm3 = _norm(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = nnx.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.shortcut is not None:
            x = self.norm3(self.shortcut(x))
        elif x.shape != out.shape:
            added = out.shape[-1] - x.shape[-1]
            margins = ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2))
            x = jnp.pad(x[:, ::2, ::2], margins)
        return nnx.relu(out + x)


class ResNet(nnx.Module):
    """Three stages of ``depth`` residual blocks; ResNet-20 by default.

    Args:
        rngs: the source of the initial parameters.
        width: the channels of the first stage; each later stage doubles them.
        depth: the residual blocks of a stage.
        shortcut: what stands where the width changes, see :class:`Residual`.
    """

    def __init__(
        self, rngs: nnx.Rngs, width: int = 16, depth: int = 3, shortcut: Shortcut = "conv"
    ):
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"expected shortcut conv or pad, got {shortcut!r}.")
        self.conv = _conv(3, width, 3, 1, rngs)
        self.norm = _norm(width, rngs)
        widths = [width, *[w for w in (width, 2 * width, 4 * width) for _ in range(depth)]]
        blocks = [Residual(a, b, rngs, shortcut) for a, b in itertools.pairwise(widths)]
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


def _places(model: ResNet, head: str) -> dict[str, Place]:
    """The place of every array, by PyTorch's name."""
    places = {
        f"{head}.weight": Place(model.dense.kernel, (1, 0)),
        f"{head}.bias": Place(model.dense.bias, (0,)),
    }

    def add(name: str, conv: nnx.Conv, name_of_norm: str, norm: nnx.BatchNorm) -> None:
        places[f"{name}.weight"] = Place(conv.kernel, (2, 3, 1, 0))
        fields = (norm.scale, norm.bias, norm.mean, norm.var)
        for field, variable in zip(
            ("weight", "bias", "running_mean", "running_var"), fields, strict=True
        ):
            places[f"{name_of_norm}.{field}"] = Place(variable, (0,))

    add("conv1", model.conv, "bn1", model.norm)
    depth = len(model.blocks.layers) // 3
    for i, block in enumerate(model.blocks.layers):
        name = f"layer{i // depth + 1}.{i % depth}"
        add(f"{name}.conv1", block.conv1, f"{name}.bn1", block.norm1)
        add(f"{name}.conv2", block.conv2, f"{name}.bn2", block.norm2)
        if block.shortcut is not None:
            add(f"{name}.downsample.0", block.shortcut, f"{name}.downsample.1", block.norm3)
    return places


def load_weights(model: ResNet, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts arrays with PyTorch's names and axes into the model.

    Args:
        model: the network, of either kind of shortcut.
        arrays: the arrays by name, as ``checkpoints.read`` returns them. The last layer may be
            named ``fc``, as in the M-FAC paper's network, or ``linear``, as in akamaster's.

    Raises:
        ValueError: the arrays are those of another architecture. The model is unchanged then.
    """
    put(arrays, _places(model, "linear" if "linear.weight" in arrays else "fc"))


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


def normalize(images: np.ndarray, mean: Colors, std: Colors) -> np.ndarray:
    """Bytes as float32 between 0 and 1, less the mean, over the deviation of each colour."""
    scaled = images.astype(np.float32) / 255.0
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


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
