"""Files that survive a process that is killed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

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
    """A short text that tells trees of other values apart.

    Raises:
        ValueError: a leaf is spread over several processes.
    """
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                "files of gradients and checkpoints are for arrays of one process, got an array "
                "that is spread over several."
            )
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def claim(folder: Path, manifest: str, wanted: Mapping[str, Any]) -> IO[bytes]:
    """Makes a folder if it does not exist, and checks that it is empty or of the same run.

    Args:
        folder: the folder.
        manifest: the name of the file that says what is in it; it is written first.
        wanted: the content of that file, by name.

    Returns:
        The open manifest. No other process can claim the folder before it is closed.

    Raises:
        ValueError: the folder holds something else, or what another run has left.
        OSError: the folder cannot be made or read, another process uses it, or the system lacks
            what files need.
    """
    check_system()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / manifest
    if not path.exists():
        other = sorted(file.name for file in folder.iterdir() if file.name != manifest + ".new")
        if other:
            raise ValueError(
                f"{folder} must be empty or come from an earlier run, but it holds "
                f"{', '.join(other[:3])}."
            )
        write_whole(path, json.dumps(wanted, indent=1).encode())
    file = path.open("r+b", buffering=0)
    try:
        _lock(file, folder)
        _compare(file.read(), path, wanted)
    except BaseException:
        file.close()
        raise
    return file


def check_system() -> None:
    """Checks that this system can read and write at a place of a file.

    Raises:
        OSError: it cannot, as Windows.
    """
    if not hasattr(os, "preadv"):
        raise OSError("files of gradients and checkpoints need a POSIX system with os.preadv.")


def _lock(file: IO[bytes], folder: Path) -> None:
    import fcntl  # does not exist on Windows

    try:
        # The lock is the process's own and ends with it, however that ends; or when the process
        # closes the file, opened here or anywhere else.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OSError(error.errno, "another process uses this folder", str(folder)) from error


def _compare(content: bytes, path: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: expected a JSON object, got {found!r:.40}.")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path.parent} comes from another run: expected {name} {value}, "
                f"got {found.get(name)}. Use another folder, or empty it."
            )
