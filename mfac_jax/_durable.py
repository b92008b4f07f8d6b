"""Files that survive the end of a process at any moment, and folders that one process has."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mfac_jax._layout import PyTree

_LOCK = "lock"

# The relative difference of a number that is computed again, on other devices perhaps.
_ROUNDING = 1e-4


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a loss of power.

    Raises:
        OSError: it cannot be written; the disk is full, perhaps. An older file is as it was.
    """
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror} ({len(content):,} bytes)", str(path)
        ) from error
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


class Claim:
    """A lock on a folder, which ends with this object or with the process.

    Closing any descriptor of a file drops the process's locks on it, so one object holds the file
    for all of a process.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)
        weakref.finalize(self, self.file.close)

    def is_of(self, path: Path) -> bool:
        """Whether this is the file there; it may be another one that was made since."""
        return path.exists() and os.path.samestat(os.fstat(self.file.fileno()), path.stat())


_claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()


def claim(folder: Path, manifest: str, wanted: Mapping[str, Any]) -> Claim:
    """Makes a folder if it does not exist, and checks that it is empty or of the same run.

    Args:
        folder: the folder.
        manifest: the name of the file that says what is in it; it is written first.
        wanted: the content of that file, by name. Numbers that are float may differ by rounding.

    Returns:
        What has to live as long as the folder is used. No other process can claim it meanwhile;
        this process can.

    Raises:
        ValueError: the folder holds something else, or what another run has left.
        OSError: the folder cannot be made or read, another process uses it, or the system lacks
            what files need.
    """
    check_system()
    make_folder(folder)
    path = folder / manifest
    _check_own(folder, path)  # leaves the folders of others as they are
    held = _locked(folder)
    try:
        if not path.exists():
            write_whole(path, json.dumps(wanted, indent=1).encode())
        _compare(path.read_bytes(), path, wanted)
    except BaseException:
        del held  # the traceback would keep the lock
        raise
    return held


def make_folder(folder: Path) -> None:
    """Makes a folder, if it does not exist.

    Raises:
        NotADirectoryError: a file has its name.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, "expected a folder, got a file", str(folder)
        ) from error


def _check_own(folder: Path, manifest: Path) -> None:
    own = {manifest.name + ".new", _LOCK}
    other = sorted(file.name for file in folder.iterdir() if file.name not in own)
    if other and not manifest.exists():
        raise ValueError(
            f"{folder} must be empty or come from an earlier run, but it holds "
            f"{', '.join(other[:3])}."
        )


def check_system() -> None:
    """Checks that this system can read and write at a place of a file.

    Raises:
        OSError: it cannot, as Windows.
    """
    if not hasattr(os, "preadv"):
        raise OSError("files of gradients and checkpoints need a POSIX system with os.preadv.")


def _locked(folder: Path) -> Claim:
    import fcntl  # does not exist on Windows

    path = folder.resolve() / _LOCK
    held = _claims.get(path)
    if held is not None and held.is_of(path):
        return held
    made = Claim(path)
    try:
        fcntl.lockf(made.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        made.file.close()
        raise OSError(error.errno, "another process uses this folder", str(folder)) from error
    _claims[path] = made
    return made


def _is_same(found: Any, wanted: Any) -> bool:
    """Whether two values are equal, numbers up to the rounding of other machines."""
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=_ROUNDING)
    return bool(found == wanted)


def _compare(content: bytes, path: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {found!r:.40}")
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Use another folder, or empty it."
        ) from error
    for name, value in wanted.items():
        if not _is_same(found.get(name), value):
            raise ValueError(
                f"{path.parent} comes from another run: expected {name} {value}, "
                f"got {found.get(name)}. Use another folder, or empty it."
            )
