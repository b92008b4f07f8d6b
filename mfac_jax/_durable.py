"""Files that survive a process that is killed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mfac_jax._layout import PyTree


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def digest(tree: PyTree) -> str:
    """A short text that tells trees of other values apart."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def claim(folder: Path, manifest: str, wanted: Mapping[str, Any], own: Collection[str]) -> bool:
    """Makes a folder if it does not exist, and checks that it is empty or of the same run.

    Args:
        folder: the folder.
        manifest: the name of the file that says what is in it.
        wanted: the content of that file, by name.
        own: the beginnings of the names of other files of such a folder, which are there without
            the manifest if a process was killed early.

    Returns:
        Whether the manifest is there. If not, the caller writes it when the folder is ready.

    Raises:
        ValueError: the folder holds something else, or what another run has left.
        OSError: the folder cannot be made or read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    if manifest not in names:
        other = [name for name in names if not name.startswith((manifest, *own))]
        if other:
            raise ValueError(
                f"{folder} must be empty or come from an earlier run, but it holds "
                f"{', '.join(other[:3])}."
            )
        return False
    try:
        found = json.loads((folder / manifest).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / manifest} cannot be read.") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} comes from another run: expected {name} {value}, "
                f"got {found.get(name)}. Use another folder, or empty it."
            )
    return True
