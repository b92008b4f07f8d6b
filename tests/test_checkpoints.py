"""Work that is killed at any moment goes on with the same result."""

import contextlib
import errno
import functools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest

from mfac_jax import _durable, collect_gradients, fisher_inverse
from mfac_jax.pruning import Gradients, NofM, Scope, Search, Setting, prune
from mfac_jax.pruning import _prune as pruning_prune
from mfac_jax.pruning import _record as pruning_record
from mfac_jax.rows import Dense, Files, TopK, _files, _page_file, as_rows

pytestmark = pytest.mark.once

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
    again = collect_gradients(loss_fn, PARAMS, DATA, M, **options)  # complete by now
    np.testing.assert_array_equal(again.columns(0, D), got.columns(0, D))


def failing(params, batch):
    raise AssertionError("computed again")


COLLECT = """
import sys, time
import jax.numpy as jnp, numpy as np
from mfac_jax import collect_gradients, fisher_inverse
from mfac_jax.rows import Files

def loss_fn(params, batch):
    return jnp.sum(jnp.sin(params * batch[0]))

def batches():
    for i in range(200):
        time.sleep(0.002)
        yield np.full((1, 40_000), i, np.float32)

options = OPTIONS
params = jnp.linspace(0.0, 1.0, 40_000)
rows = collect_gradients(loss_fn, params, batches(), 200, **options)
print(float(rows.dots(jnp.ones(40_000)).sum()), float(rows.gram().sum()))
"""
KEPT = {
    "collect": COLLECT.replace("OPTIONS", "{'storage': Files(sys.argv[1], columns=1000)}"),
    "collect in memory": COLLECT.replace("OPTIONS", "{'checkpoint': sys.argv[1]}"),
}
PRUNE = """
import sys, time
import jax.numpy as jnp, numpy as np
from mfac_jax.pruning import _prune as pruning_prune
from mfac_jax.pruning import _record as pruning_record
from mfac_jax.pruning import Gradients, prune

def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch[0] @ params) - batch[1]) ** 2)

random = np.random.default_rng(0)
weights = jnp.asarray(random.normal(size=(50, 40)), jnp.float32)
class Batches:
    held = [(random.normal(size=(8, 50)).astype("f"), np.ones((8, 40), "f")) for _ in range(7)]

    def __iter__(self):
        for batch in self.held:
            time.sleep(0.02)  # a kill that comes late is still early enough
            yield batch

gradients = Gradients(6)
pruned = prune(weights, loss_fn, Batches(), 0.9, gradients=gradients, checkpoint=sys.argv[1])
print(float(pruned.params.sum()), [step.loss_after for step in pruned.report.steps])
"""


KEPT["prune"] = PRUNE


def finished(folder):
    """The number of rows that are marked as finished."""
    try:
        return sum(path.read_bytes().count(1) for path in folder.glob("**/finished"))
    except FileNotFoundError:  # removed meanwhile
        return 0


def watched(process, folder, wanted=math.inf):
    """How many rows were finished when that is enough, or the process has ended."""
    before, seen = finished(folder), 0
    while seen < wanted and process.poll() is None:
        now = finished(folder)
        seen, before = seen + max(now - before, 0), now
        time.sleep(0.001)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("program", KEPT.values(), ids=KEPT)
def test_a_run_killed_at_7_moments(tmp_path, program):
    def run(folder):
        command = [sys.executable, "-c", program, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    process = run(whole)
    total = watched(process, whole)
    want, _ = process.communicate()
    random = np.random.default_rng(0)
    moments = np.sort(random.uniform(1, total, 7))
    kills, steps = 0, 0
    for wait in np.diff(moments, prepend=0):
        process = run(folder)
        watched(process, folder, wait)
        time.sleep(random.uniform(0, 0.005))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)  # an error would hide in the others
        steps += (folder / "step.npz").exists()
    assert kills >= 5
    assert steps >= 3 or program != PRUNE
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
    version = _files._VERSION
    monkeypatch.setattr(_files, "_VERSION", version + 1)
    with pytest.raises(ValueError, match=f"expected version {version + 1}, got {version}"):
        collect(tmp_path)


def test_a_folder_of_something_else_is_an_error(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"must be empty or come from an earlier run, .* thesis\.txt"
    ):
        collect(tmp_path)
    with pytest.raises(
        ValueError, match=r"must be empty or come from an earlier run, .* thesis\.txt"
    ):
        collect_gradients(loss_fn, PARAMS, DATA, M, checkpoint=tmp_path)


def test_a_gradient_that_was_kept_and_cannot_be_held_is_an_error(tmp_path):
    """As in the first run, in which the files hold it and float16 does not."""

    def large(params, batch):
        return 1e5 * loss_fn(params, batch)

    options = {"storage": outside.Half(), "checkpoint": tmp_path}
    with pytest.raises(FloatingPointError, match="row 0"):
        collect_gradients(large, PARAMS, DATA, M, **options)
    with pytest.raises(FloatingPointError, match="row 0 of the gradients that were kept"):
        collect_gradients(large, PARAMS, DATA, M, **options)


def test_a_loss_that_has_become_nan_is_another_loss(tmp_path):
    collect_gradients(loss_fn, PARAMS, DATA, M, checkpoint=tmp_path)

    def nan(params, batch):
        return jnp.nan * loss_fn(params, batch)

    with pytest.raises(ValueError, match="from another loss"):
        collect_gradients(nan, PARAMS, DATA, M, checkpoint=tmp_path)


def test_files_need_no_checkpoint(tmp_path):
    options = {"storage": Files(tmp_path / "a"), "checkpoint": tmp_path / "b"}
    with pytest.raises(ValueError, match=r"checkpoint is for gradients in memory: .*Files"):
        collect_gradients(failing, PARAMS, DATA, M, **options)
    assert not list(tmp_path.iterdir())


def test_numbers_of_a_run_may_differ_by_rounding(tmp_path):
    _durable.claim(tmp_path, "run.json", {"loss": 1.23455})
    _durable.claim(tmp_path, "run.json", {"loss": 1.23456})
    for other in ({"loss": 1.3}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match="expected loss"):
            _durable.claim(tmp_path, "run.json", other)


def test_a_manifest_that_is_none_is_an_error(tmp_path):
    collect(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        collect(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        collect(tmp_path / "file" / "folder")


def test_a_system_without_such_files_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    for use in (lambda: collect(tmp_path), lambda: Files(tmp_path).empty(PARAMS, M)):
        with pytest.raises(OSError, match="need a POSIX system"):
            use()


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("of a user")
    runs = [
        lambda: collect_gradients(failing, PARAMS, DATA, M, checkpoint=file),
        lambda: collect_gradients(failing, PARAMS, DATA, M, storage=Files(file)),
        lambda: as_rows(jnp.ones((2, 4)), storage=Files(file)),
    ]
    for run in runs:
        with pytest.raises(NotADirectoryError, match=r"expected a folder, got a file: .*file"):
            run()
    assert file.read_text() == "of a user"


@pytest.mark.wrong_types
def test_paths_are_checked_first(tmp_path):
    def never(params, batch):
        raise AssertionError("read")

    for wrong, error in ((5, TypeError), (b"folder", TypeError), ("", ValueError)):
        with pytest.raises(error, match="checkpoint must"):
            collect_gradients(never, PARAMS, DATA, M, checkpoint=wrong)
        with pytest.raises(error, match="checkpoint must"):
            prune(PARAMS, never, DATA, 0.5, checkpoint=wrong)
        with pytest.raises(error, match="directory must"):
            Files(wrong)
    rows = Files(tmp_path).empty(PARAMS, 4)
    one = jax.tree.map(lambda leaf: jnp.ones((1, *jnp.shape(leaf))), PARAMS)
    for row in (-1, 4):
        with pytest.raises(ValueError, match=rf"must lie in 0 to 3, got 1 from {row} on"):
            rows.write_rows(row, one, 1)
    np.testing.assert_array_equal(rows.columns(0, D), np.zeros((4, D)))


def test_finished_rows_of_named_files_are_not_written_over(tmp_path):
    rows = collect(tmp_path)
    before = rows.columns(0, D)
    one = jax.tree.map(lambda leaf: jnp.full((1, *jnp.shape(leaf)), 100.0), PARAMS)
    changed, _ = rows.write_rows(2, one, 1)
    np.testing.assert_array_equal(changed.columns(0, D)[2], 100)
    np.testing.assert_array_equal(rows.columns(0, D), before)
    np.testing.assert_array_equal(collect(tmp_path).columns(0, D), before)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_shows_before_any_work(tmp_path, monkeypatch, code):
    def full(*_):
        raise OSError(getattr(errno, code), "no room")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r": gradients need \d+ bytes, and [\d,]+ are free on"):
        collect_gradients(failing, PARAMS, DATA, M, storage=Files(tmp_path))
    monkeypatch.undo()
    assert collect(tmp_path, m=M // 2).num_finished == M // 2  # what may fit


def test_the_diagonal_reads_the_files_once_or_twice(tmp_path, monkeypatch):
    """In blocks of more columns than gradients, too; beside it the Gram matrix needs a scan."""
    read, own = [], _page_file.PageFile._read
    monkeypatch.setattr(
        _page_file.PageFile,
        "_read",
        lambda file, out, at: read.append(out.size) or own(file, out, at),
    )
    rows = as_rows(jnp.ones((2, 2**21 + 2**20)), storage=Files(tmp_path, columns=2**20))
    size = math.prod(rows.pages.shape)
    for blocks, scans in ((None, 2), (64, 1)):
        read.clear()
        fisher_inverse(rows, 0.1, blocks=blocks).diagonal()
        assert size * scans <= sum(read) < 1.1 * size * scans


def test_rows_written_since_cannot_be_read(tmp_path):
    rows = Files(tmp_path).empty(PARAMS, M)
    new, _ = rows.write_rows(0, jax.tree.map(lambda x: x[None], PARAMS), 1)
    with pytest.raises(RuntimeError, match="written to since"):
        rows.gram()
    assert float(new.gram()[0, 0]) > 0
    assert not list(tmp_path.iterdir())  # files without a name


# -- Pruning --
WEIGHTS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.bfloat16),
}
EXAMPLES = [
    (np.random.default_rng(i).normal(size=(8, 6)).astype("float32"), np.ones((8, 8), "float32"))
    for i in range(5)
]


def weights_loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"].astype(jnp.float32)[None] - y) ** 2)


def pruned(batches=EXAMPLES, loss_fn=weights_loss, **options):
    options = {"gradients": Gradients(6, history=2), "steps": 4, "progress": False, **options}
    sparsity = 0.5 if "scope" in options else 0.8
    return prune(WEIGHTS, loss_fn, batches, sparsity, **options)


GREEDY = Setting("greedy", "joint", 6, 0.01)


def shrink(params, mask):
    return jax.tree.map(lambda w: w * jnp.asarray(0.99, w.dtype), params)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])
    for a, b in zip(got.report.steps, want.report.steps, strict=True):
        for name in ("tried", "chosen", "loss_after", "loss_tuned", "damping", "update_norm"):
            np.testing.assert_equal(getattr(a, name), getattr(b, name))


class Stopped(pruning_record.Record):
    """Stops in the place of writing down a step."""

    def save(self, state, num_kept):
        if len(state.reports) == 2:
            raise Interrupted
        super().save(state, num_kept)


def test_a_step_whose_gradients_were_finished_goes_on(tmp_path, monkeypatch):
    """Its batches count as read, so that the next step gets its own."""
    options = {"gradients": Gradients(4, history=2)}  # 5 batches do not come round in a step
    want = pruned(**options)
    with monkeypatch.context() as patched:
        patched.setattr(pruning_prune, "Record", Stopped)
        with pytest.raises(Interrupted):
            pruned(checkpoint=tmp_path, **options)
    assert (tmp_path / "gradients-1" / "finished").read_bytes() == b"\x01" * 4
    assert_same(pruned(checkpoint=tmp_path, **options), want)


class OnAFullDisk(pruning_record.Record):
    """The disk is full when the third step is to be written down."""

    def save(self, state, num_kept):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(state.reports) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            super().save(state, num_kept)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_no_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(pruning_prune, "Record", OnAFullDisk)
        with pytest.raises(OSError, match=r"[\d,]+ bytes\): '.*step\.npz'"):
            pruned(checkpoint=tmp_path)
    assert not list(tmp_path.glob("*.new"))
    assert (tmp_path / "step.npz").exists()  # that of the second step
    assert (tmp_path / "gradients-2" / "finished").read_bytes() == b"\x01" * 6
    assert_same(pruned(checkpoint=tmp_path), whole_pruning(None))


# In the calibration, in the gradients of each step, and between two of them.
@pytest.mark.parametrize("after", [5, 13, 14, 20, 31])
@pytest.mark.parametrize("fine_tune", [None, shrink])
def test_an_interrupted_pruning_goes_on(tmp_path, after, fine_tune):
    want = whole_pruning(fine_tune)
    options = {"checkpoint": tmp_path, "fine_tune": fine_tune}
    with pytest.raises(Interrupted):
        pruned(interrupted(EXAMPLES, after), **options)
    assert_same(pruned(**options), want)
    finished = {path.name for path in tmp_path.iterdir()}
    assert finished == {"run.json", "lock", "step.npz", "gradients-2", "gradients-3"}


@pytest.mark.parametrize("bits", [0, 4, 16])
def test_an_interrupted_pruning_with_compressed_gradients_goes_on(tmp_path, bits):
    """After the rows of the first step were used again, by those of the third."""
    options = {"gradients": Gradients(6, storage=TopK(0.2, error_bits=bits)), "steps": 5}
    want = pruned(**options)
    with pytest.raises(Interrupted):
        pruned(interrupted(EXAMPLES, 29), checkpoint=tmp_path, **options)
    assert (tmp_path / "gradients-3").exists()
    assert_same(pruned(checkpoint=tmp_path, **options), want)


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_record_makes_no_more_rows(tmp_path, interrupt):
    """Those of two steps, whether the run begins or goes on."""
    made = []

    class Counting(Dense):
        def empty(self, params, num_rows):
            rows = super().empty(params, num_rows)
            if not isinstance(rows.blocks, jax.core.Tracer):  # plans trace it
                made.append(num_rows)
            return rows

    options = {"gradients": Gradients(6, storage=Counting()), "checkpoint": tmp_path}
    if interrupt:
        with pytest.raises(Interrupted):
            pruned(interrupted(EXAMPLES, 22), **options)
        assert (tmp_path / "step.npz").exists()
        made.clear()
    pruned(**options)
    assert made.count(6) == 2


@functools.cache
def whole_pruning(fine_tune):
    return pruned(fine_tune=fine_tune)


def test_sums_in_blocks_go_on_from_the_last_step(tmp_path):
    gradients = Gradients(6, in_blocks=True)
    want = pruned(gradients=gradients)
    with pytest.raises(Interrupted):
        pruned(interrupted(EXAMPLES, 22), gradients=gradients, checkpoint=tmp_path)
    assert_same(pruned(gradients=gradients, checkpoint=tmp_path), want)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "lock", "step.npz"}


def test_a_finished_pruning_is_read(tmp_path):
    want = pruned(checkpoint=tmp_path)
    assert_same(pruned(interrupted(EXAMPLES, 30), checkpoint=tmp_path), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "digest of the targets"),
        (
            {"gradients": Gradients(7, history=2)},
            "expected gradients 7, and those of 2 earlier steps, got 6",
        ),
        ({"search": Search(descents=())}, r"expected descents \[\], got"),
        ({"mask": {"w": np.arange(48).reshape(6, 8) > 3, "b": True}}, "digest of"),
        ({"fine_tune": shrink}, "expected fine_tune True, got False"),
        ({"search": Search(num_calibration=2)}, "expected loss on the calibration batches"),
        ({"search": Search([GREEDY._replace(scales=(0.5,))])}, "expected settings"),
        ({"scope": Scope(pattern=NofM(2, 4, axis=1))}, "expected pattern"),
        ({"gradients": Gradients(6, history=2, storage=Dense("bfloat16"))}, "expected storage"),
        ({"loss_fn": lambda *a: 2 * weights_loss(*a)}, "expected loss on the calibration batches"),
    ],
)
def test_the_record_of_another_run_is_an_error(tmp_path, changes, message):
    first = {"scope": Scope()} if "scope" in changes else {}
    if message == "expected settings":
        first["search"] = Search([GREEDY])
    pruned(checkpoint=tmp_path, **first)
    with pytest.raises(ValueError, match=message):
        pruned(checkpoint=tmp_path, **changes)


def test_missing_gradients_of_an_earlier_step_are_an_error(tmp_path):
    with pytest.raises(Interrupted):
        pruned(interrupted(EXAMPLES, 22), checkpoint=tmp_path)
    shutil.rmtree(tmp_path / "gradients-1")
    with pytest.raises(ValueError, match="gradients of step 2 are missing: expected 6, got 0"):
        pruned(checkpoint=tmp_path)


def test_a_torn_record_is_an_error(tmp_path):
    pruned(checkpoint=tmp_path)
    content = (tmp_path / "step.npz").read_bytes()
    (tmp_path / "step.npz").write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"step\.npz cannot be read"):
        pruned(checkpoint=tmp_path)


# -- Gradients again --
@pytest.mark.parametrize("done", [1, 7, M])
def test_gradients_of_another_loss_are_an_error(tmp_path, done):
    with contextlib.suppress(Interrupted):
        collect_gradients(loss_fn, PARAMS, interrupted(DATA, done), M, storage=Files(tmp_path))

    def other(params, batch):
        return 1.1 * loss_fn(params, batch)

    with pytest.raises(ValueError, match="come from another loss or from other data"):
        collect_gradients(other, PARAMS, DATA, M, storage=Files(tmp_path))
    collect_gradients(loss_fn, PARAMS, DATA, M, storage=Files(tmp_path))


@pytest.mark.parametrize("per_example", [False, True])
def test_other_data_after_the_first_batch_are_an_error(tmp_path, per_example):
    options = {"per_example": per_example, "storage": Files(tmp_path)}
    with pytest.raises(Interrupted):
        collect_gradients(loss_fn, PARAMS, interrupted(DATA, 3), M, **options)
    changed = [DATA[0], *((2 * x, y) for x, y in DATA[1:])]
    with pytest.raises(ValueError, match=r"expected the gradient of batch 2 in row [28]"):
        collect_gradients(loss_fn, PARAMS, changed, M, **options)


def test_an_interrupted_collection_goes_on_in_smaller_chunks(tmp_path):
    options = {"per_example": True, "storage": TopK(0.5, block=4)}
    want = collect_gradients(loss_fn, PARAMS, DATA, M, **options)
    with pytest.raises(Interrupted):
        collect_gradients(
            loss_fn, PARAMS, interrupted(DATA, 2), M, checkpoint=tmp_path, chunk_size=2, **options
        )
    got = collect_gradients(loss_fn, PARAMS, DATA, M, checkpoint=tmp_path, chunk_size=3, **options)
    np.testing.assert_array_equal(got.columns(0, D), want.columns(0, D))


@pytest.mark.parametrize("damage", ["short", "gone"])
def test_damaged_files_are_an_error(tmp_path, damage):
    collect(tmp_path)
    if damage == "short":
        os.truncate(tmp_path / "gradients", 20)
    else:
        (tmp_path / "gradients").unlink()
    with pytest.raises(ValueError, match=r"are incomplete: expected 360 bytes, got (20|0)"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["gradients", "finished.txt"])
def test_files_of_the_user_are_kept(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"it holds {name}"):
        collect(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_a_rejected_call_claims_no_folder(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match="mask does not have the structure"):
        collect(folder, mask={"w": True})
    assert not folder.exists()
    collect(folder)


LOCK = """
import sys
from pathlib import Path
from mfac_jax._durable import claim
kept = claim(Path(sys.argv[1]), "manifest.json", {})
print("mine", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_use_one_folder(tmp_path):
    collect(tmp_path)
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(OSError, match="another process uses this folder"):
            collect(tmp_path)
        other.kill()
    held = collect(tmp_path)
    with pytest.raises(ValueError, match="expected rows 3"):
        collect(tmp_path, m=3)  # this process may use it twice; the error leaves it claimed
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as other:
        assert "another process uses this folder" in other.communicate()[1]
    assert held.num_finished == M
