"""Reads files of weights: NumPy's ``.npz`` and the checkpoints that PyTorch writes.

A file holds arrays under the names of PyTorch's modules. ``DataParallel`` puts ``module.`` before
every name, and training programs keep the arrays under ``state_dict`` or ``model``, beside the
epoch and the state of the optimizer. :func:`read` returns the arrays alone, under plain names.
It never runs code from a file: a pickle can contain any program. :func:`put` gives arrays to a
model in Flax.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

TORCH = (".pth", ".th", ".pt", ".tar")
SOURCES = (
    "Two pretrained ResNet-20 are public: checkpoints/resnet20_cifar10.pth.tar in "
    "github.com/IST-DASLab/M-FAC and github.com/IST-DASLab/WoodFisher, and "
    "pretrained_models/resnet20-12fca82f.th in github.com/akamaster/pytorch_resnet_cifar10."
)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of weights, by name.

    ``num_batches_tracked``, a counter of batch normalization, is left out.

    Args:
        path: a ``.npz`` file, or a file that ``torch.save`` wrote (``.pth``, ``.pth.tar``, ``.th``
            or ``.pt``), which needs PyTorch. PyTorch's tensors are converted to float32.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file needs PyTorch, which is not installed.
        ValueError: the file is damaged, holds no arrays, or holds objects that are rebuilt by code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, there is no file {path}. {SOURCES}")
    if path.suffix not in (".npz", *TORCH):
        raise ValueError(f"{path}: expected a name in .npz, {', '.join(TORCH)}.")
    try:
        content = _load_npz(path) if path.suffix == ".npz" else _load_torch(path)
    except (OSError, ImportError):
        raise
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        # PyTorch advises to run the code in the file; the error before that names the object.
        is_refused = isinstance(error, pickle.UnpicklingError) and error.__context__
        cause = error.__context__ if is_refused else error
        raise ValueError(
            f"{path} cannot be read: expected a whole file with nothing but arrays, numbers and "
            f"texts (a state_dict alone has no other objects); the cause is {cause!r}."
        ) from cause
    arrays = {str(name): x for name, x in content.items() if isinstance(x, np.ndarray)}
    if not arrays:
        raise ValueError(
            f"{path} has no arrays: expected them by name, alone or under state_dict or model; "
            f"got {', '.join(map(str, content)) or 'nothing'}."
        )
    prefix = "module."
    if all(name.startswith(prefix) for name in arrays):
        arrays = {name.removeprefix(prefix): x for name, x in arrays.items()}
    return {name: x for name, x in arrays.items() if not name.endswith("num_batches_tracked")}


class Place(NamedTuple):
    """Where an array goes: a variable, and the array's axes in the order of the variable's."""

    variable: nnx.Variable
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array in PyTorch's order."""
        return tuple(self.variable.shape[i] for i in np.argsort(self.axes))


def put(
    arrays: Mapping[str, np.ndarray], places: Mapping[str, Place], unused: Collection[str] = ()
) -> None:
    """Puts every array into its place.

    Args:
        arrays: the arrays by name.
        places: their places by name.
        unused: names that may be there and have no place.

    Raises:
        ValueError: a name is missing or unknown, or an array has another shape. No variable has
            changed then.
    """
    differ = [
        f"{name} (expected {place.shape}, got {arrays[name].shape})"
        for name, place in places.items()
        if name in arrays and arrays[name].shape != place.shape
    ]
    problems = {
        "missing": [name for name in places if name not in arrays],
        "not known": [name for name in arrays if name not in {*places, *unused}],
        "of another shape": differ,
    }
    found = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights are those of another architecture; {'; '.join(found)}.")
    for name, (variable, axes) in places.items():
        array = jnp.asarray(arrays[name], variable.dtype)
        variable.set_value(jnp.transpose(array, axes))


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _load_npz(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as stream:  # NumPy leaves a damaged archive open
        content = np.load(stream, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("a single array, as in a .npy file")
        return dict(content)


def _load_torch(path: Path) -> Mapping[Any, Any]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is read by PyTorch, which is not installed: pip install torch, or give the "
            "weights as a .npz file."
        ) from error
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} instead of a dictionary")
    return {
        name: x.detach().float().numpy() if torch.is_tensor(x) else x for name, x in content.items()
    }
