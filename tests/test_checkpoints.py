"""Work that is killed at any moment goes on with the same result."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import collect_gradients
from mfac_jax.rows import Dense, Files, TopK, _files

D, M = 7, 10
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.float32(0.5)}
DATA = [
    (np.random.default_rng(i).normal(size=(3, 2)).astype("float32"), np.float32(i) * np.ones(3))
    for i in range(4)
]


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"].sum(axis=1) + params["b"] - y.astype(jnp.float32)) ** 2)


class Interrupted(Exception):
    """Takes the place of a kill."""


def interrupted(batches, after):
    """Batches that can be iterated over again, and end in an exception after some of them."""

    class Batches:
        given = 0

        def __iter__(self):
            for batch in batches:
                if self.given == after:
                    raise Interrupted
                self.given += 1
                yield batch

    return Batches()


STORAGES = {
    "flat": lambda folder: Dense(),
    "bfloat16": lambda folder: Dense(jnp.bfloat16),
    "largest, with errors": lambda folder: TopK(0.5, block=4),
    "files": lambda folder: Files(folder / "rows", columns=3),
}


@pytest.mark.parametrize("make", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("per_example", [False, True])
def test_an_interrupted_collection_goes_on(tmp_path, make, per_example):
    storage = make(tmp_path)
    options = {"storage": storage, "per_example": per_example}
    if not isinstance(storage, Files):
        options["checkpoint"] = tmp_path / "kept"
    with pytest.raises(Interrupted):
        collect_gradients(loss_fn, PARAMS, interrupted(DATA, 3), M, **options)
    got = collect_gradients(loss_fn, PARAMS, DATA, M, **options)
    straight = collect_gradients(
        loss_fn, PARAMS, DATA, M, storage=make(tmp_path / "other"), per_example=per_example
    )
    np.testing.assert_array_equal(got.columns(0, D), straight.columns(0, D))
    # Complete by now, so nothing is computed.
    again = collect_gradients(failing, PARAMS, DATA, M, **options)
    np.testing.assert_array_equal(again.columns(0, D), got.columns(0, D))


def failing(params, batch):
    raise AssertionError("computed again")


KILLED = textwrap.dedent(
    """
    import sys, time
    import jax, jax.numpy as jnp, numpy as np
    from mfac_jax import collect_gradients
    from mfac_jax.rows import Files

    def loss_fn(params, batch):
        return jnp.sum(jnp.sin(params * batch[0]))

    def batches():
        for i in range(200):
            time.sleep(0.002)
            yield np.full((1, 40_000), i, np.float32)

    folder = sys.argv[1]
    storage = Files(folder, columns=1000)
    params = jnp.linspace(0.0, 1.0, 40_000)
    rows = collect_gradients(loss_fn, params, batches(), 200, storage=storage)
    print(float(rows.dots(jnp.ones(40_000)).sum()), float(rows.gram().sum()), flush=True)
    """
)


@pytest.mark.slow
def test_a_collection_killed_at_20_moments(tmp_path):
    def run(folder, **options):
        command = [sys.executable, "-c", KILLED, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)

    want, _ = run(tmp_path / "whole").communicate()
    random = np.random.default_rng(0)
    folder = tmp_path / "killed"

    def finished():
        marks = folder / "finished"
        return marks.read_bytes().count(1) if marks.exists() else 0

    for wait in random.integers(0, 9, 20):
        before = finished()
        process = run(folder)
        while finished() < before + wait and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.005))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert before <= finished() < 200
    got, _ = run(folder).communicate()
    assert got == want
    assert want


def test_a_torn_row_is_computed_again(tmp_path):
    storage = Files(tmp_path, columns=3)
    collect_gradients(loss_fn, PARAMS, DATA, M, storage=storage)
    # As a kill while row 4 was written leaves it.
    marks = bytearray((tmp_path / "finished").read_bytes())
    assert marks == b"\x01" * M
    marks[4] = 0
    (tmp_path / "finished").write_bytes(bytes(marks))
    with (tmp_path / "gradients").open("r+b") as file:
        file.seek(4 * 3 * 4)
        file.write(b"\xff" * 6)
    got = collect_gradients(loss_fn, PARAMS, DATA, M, storage=storage)
    want = collect_gradients(loss_fn, PARAMS, DATA, M)
    np.testing.assert_array_equal(got.columns(0, D), want.columns(0, D))


def collect(folder, params=PARAMS, m=M, columns=3, **options):
    return collect_gradients(
        loss_fn, params, DATA, m, storage=Files(folder, columns=columns), **options
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 9}, "expected rows 9, got 10"),
        ({"columns": 4}, "expected columns 4, got 3"),
        ({"params": {**PARAMS, "b": jnp.float32(0.6)}}, "expected digest of the parameters"),
        ({"per_example": True}, "expected per_example True, got False"),
        ({"mask": {"w": True, "b": False}}, "expected digest of the mask"),
    ],
)
def test_gradients_of_another_run_are_an_error(tmp_path, changes, message):
    collect(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        collect(tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_another_version_are_an_error(tmp_path, monkeypatch):
    collect(tmp_path)
    monkeypatch.setattr(_files, "_VERSION", 2)
    with pytest.raises(ValueError, match="expected version 2, got 1"):
        collect(tmp_path)


def test_a_folder_of_something_else_is_an_error(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must be empty or hold gradients .* thesis\.txt"):
        collect(tmp_path)
    with pytest.raises(ValueError, match=r"must be empty or hold gradients .* thesis\.txt"):
        collect_gradients(loss_fn, PARAMS, DATA, M, checkpoint=tmp_path)


def test_a_manifest_that_is_none_is_an_error(tmp_path):
    collect(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not a manifest of gradients"):
        collect(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        collect(tmp_path / "file" / "folder")


def test_a_full_disk_shows_before_any_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"gradients need \d+ bytes of disk, but [\d,]+ are free"):
        collect_gradients(failing, PARAMS, DATA, M, storage=Files(tmp_path))


def test_rows_written_since_cannot_be_read(tmp_path):
    rows = Files(tmp_path).empty(PARAMS, M)
    new, _ = rows.write_rows(0, jax.tree.map(lambda x: x[None], PARAMS), 1)
    with pytest.raises(RuntimeError, match="written to since"):
        rows.gram()
    assert float(new.gram()[0, 0]) > 0
    assert not list(tmp_path.iterdir())  # files without a name
