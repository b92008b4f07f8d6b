"""Fills rows with gradients: the loop behind ``collect_gradients`` and ``prune``.

One program computes a chunk of gradients. Another program writes the chunk into the rows in place.
Memory therefore holds the rows, one chunk of gradients and a few batches. The host runs ahead of
the device. Every few steps it reads which of the older rows are finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from tqdm.auto import tqdm

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree, where
from mfac_jax._processes import Agreement
from mfac_jax.rows import FileRows, WritableRows

LossFn = Callable[[PyTree, PyTree], Any]
LabelSampler = Callable[[PyTree, PyTree, Array], PyTree]
Rows = TypeVar("Rows", bound=WritableRows)

# A chunk of per-example gradients takes at most 64 MiB, which is small beside any window whose
# memory matters. More than 128 examples a chunk gain no speed.
_CHUNK_BYTES = 2**26
_MAX_CHUNK = 128

NO_BATCH = "batches is empty: expected at least one batch."

# The flags of this many steps are read together, while as many later steps still run. The device
# therefore never waits for the host, and at most twice as many batches are in use at a time.
_STEPS_PER_READ = 4

# A gradient that is computed again differs by rounding, and by that of the files.
_SAME = 0.02

# As many gradients of files are read at a time.
_ROWS_AT_A_TIME = 16


def fill_rows(
    rows: Rows,
    loss_fn: Any,
    params: PyTree,
    batches: Any,
    *,
    per_example: Any = False,
    chunk_size: Any = None,
    sample_labels: Any = None,
    key: Any = None,
    mask: PyTree | None = None,
    progress: bool = True,
    done: int = 0,
    copy: FileRows | None = None,
) -> Rows:
    """Fills ``rows``, which are donated; see :func:`mfac_jax.collect_gradients`.

    The first ``done`` rows hold their gradients already. Those that ``copy`` holds are read from
    it, and others are written to it as well.
    """
    agreement = Agreement(params, rows.num_rows)
    if copy is not None:
        rows = read_rows(rows, copy, done)
        done = max(done, copy.num_finished)
    count = rows.num_rows
    chunk = chunk_size_of(chunk_size, per_example, Layout(params).size, count)
    keep = None if mask is None else tuple(rows.layout.check_mask(mask))

    pending = Pending()
    # With disable=None tqdm stays silent unless its output goes to a terminal.
    hidden = None if progress else True
    with tqdm(total=count, initial=done, unit="row", desc="gradients", disable=hidden) as bar:
        for step, batch in _steps(agreement.watch(cycle(batches)), count, chunk, done):
            gradients = _gradients(
                params,
                batch,
                step.row,
                step.example,
                step.num_rows,
                key,
                keep,
                loss_fn=loss_fn,
                sample_labels=sample_labels,
                chunk=chunk,
            )
            if step.row < done:
                _check_kept(step, gradients, rows if copy is None else copy)
                continue
            rows, accepted = rows.write_rows(step.row, gradients, step.num_rows)
            if copy is not None:
                copy, _ = copy.write_rows(step.row, gradients, step.num_rows)
            del gradients  # frees them before the next ones are computed
            bar.update(pending.add(step, accepted))
        bar.update(pending.check_all())
    return rows


def _check_kept(step: Step, gradients: PyTree, kept: Any) -> None:
    """Checks that a row that was kept is the gradient that is computed now.

    Raises:
        ValueError: it is not.
    """
    own = kept.gradients(step.row, 1)
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(gradients), strict=True)
    leaves = [(np.asarray(x, np.float64), np.asarray(g, np.float64)) for x, g in pairs]
    missing = sum(np.sum((x - g[:1]) ** 2) for x, g in leaves)
    # NaN is not the same either.
    if not missing <= _SAME**2 * sum(np.sum(x**2) for x, _ in leaves):
        raise ValueError(
            "the gradients that were kept come from another loss or from other data: expected the "
            f"gradient of batch {step.batch} in row {step.row}, got one that differs. Use another "
            "folder."
        )


def read_rows(rows: Rows, copy: FileRows, first: int = 0) -> Rows:
    """Reads the finished rows of ``copy``, from ``first`` on, into ``rows``, which are donated.

    Raises:
        FloatingPointError: ``rows`` cannot hold one of them.
    """
    for row in range(first, copy.num_finished, _ROWS_AT_A_TIME):
        count = min(_ROWS_AT_A_TIME, copy.num_finished - row)
        rows, accepted = rows.write_rows(row, copy.gradients(row, count), count)
        if not np.all(accepted):
            raise FloatingPointError(
                f"row {row + int(np.argmin(accepted))} of the gradients that were kept is too "
                f"large for {type(rows).__name__}."
            )
    return rows


@functools.partial(jax.jit, static_argnames=("loss_fn", "sample_labels", "chunk"))
def _gradients(
    params: PyTree,
    batch: PyTree,
    row: Int[Array, ""],
    example: Int[Array, ""] | None,
    count: Int[Array, ""],
    key: Array | None,
    mask: tuple[Array, ...] | None,
    *,
    loss_fn: LossFn,
    sample_labels: LabelSampler | None,
    chunk: int | None,
) -> PyTree:
    """The stacked gradients for ``rows[row : row + count]``; further ones are padding."""

    def scalar_loss(params: PyTree, batch: PyTree) -> Array:
        return check_scalar(loss_fn(params, batch))

    def gradient(batch: PyTree, row: Int[Array, ""]) -> PyTree:
        if sample_labels is not None and key is not None:
            batch = sample_labels(params, batch, jax.random.fold_in(key, row))
        return jax.grad(scalar_loss)(params, batch)

    if chunk is None or example is None:
        gradients = jax.tree.map(lambda g: g[None], gradient(batch, row))
    else:
        # A chunk that is not full is padded with its last example.
        offsets = jnp.arange(chunk)
        picked = example + jnp.minimum(offsets, count - 1)
        examples = jax.tree.map(lambda leaf: leaf[picked][:, None], batch)
        gradients = jax.vmap(gradient)(examples, row + offsets)
    if mask is None:
        return gradients
    return where([keep[None] for keep in mask], gradients)


class Step(NamedTuple):
    """One step, which fills ``rows[row : row + num_rows]``.

    Attributes:
        row: the first row.
        num_rows: the number of rows.
        batch: the number of the batch.
        example: the number of the first example in the batch; None for rows of mini-batches.
    """

    row: int
    num_rows: int
    batch: int
    example: int | None

    def part(self, row: int, num_rows: int) -> Step:
        """The step for some of the rows."""
        example = None if self.example is None else self.example + row - self.row
        return Step(row, num_rows, self.batch, example)

    def check(self, accepted: np.ndarray) -> None:
        """Raises an error that names the first rejected row, if a row was rejected."""
        rejected = np.flatnonzero(~accepted)
        if rejected.size:
            first = int(rejected[0])
            example = "" if self.example is None else f", example {self.example + first}"
            raise FloatingPointError(
                f"row {self.row + first} (the gradient of batch {self.batch}{example}) must be "
                "finite and small enough to square; got NaN, Inf or numbers too large to square."
            )


class Pending:
    """Steps whose flags are not read yet, because reading would wait for the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[Step, Bool[Array, " k"]]] = []

    def add(self, step: Step, accepted: Bool[Array, " k"]) -> int:
        """Adds a step; returns the number of rows that this call checked."""
        self._steps.append((step, accepted))
        return self._check(_STEPS_PER_READ) if len(self._steps) == 2 * _STEPS_PER_READ else 0

    def check_all(self) -> int:
        """Checks all remaining rows; returns their number."""
        return self._check(len(self._steps))

    def _check(self, count: int) -> int:
        steps, self._steps = self._steps[:count], self._steps[count:]
        flags = jax.device_get([accepted for _, accepted in steps])
        for (step, _), accepted in zip(steps, flags, strict=True):
            step.check(accepted)
        return sum(step.num_rows for step, _ in steps)


def _steps(
    batches: Iterator[tuple[int, PyTree]], m: int, chunk: int | None, done: int
) -> Iterator[tuple[Step, PyTree]]:
    """The steps that fill m rows, each with its batch, without those of the first ``done`` rows.

    Of such rows the first and the last are steps of their own, so that they can be compared. All
    batches are read even so: the data of the next step of pruning begin after them.
    """
    row = 0
    for number, batch in batches:
        length = length_of_batch(batch, number)
        device_batch: PyTree = None
        pieces: list[tuple[int | None, int]] = [(None, 1)]
        if chunk is not None:
            pieces = [(i, min(chunk, length - i)) for i in range(0, length, chunk)]
        for example, count in pieces:
            count = min(count, m - row)
            for kept in sorted({0, done - 1}):
                if row <= kept < min(row + count, done):
                    yield Step(row, count, number, example).part(kept, 1), on_device(batch)
            first = max(row, done)
            if first < row + count:
                device_batch = on_device(batch) if device_batch is None else device_batch
                yield (
                    Step(row, count, number, example).part(first, row + count - first),
                    device_batch,
                )
            row += count
            if row == m:
                return


def cycle(batches: Iterable[PyTree]) -> Iterator[tuple[int, PyTree]]:
    """Repeats the batches without end; numbers those of each pass from 0."""
    first_pass = iter(batches)
    is_iterator = first_pass is batches
    kept = []
    number = -1
    for number, batch in enumerate(first_pass):
        if is_iterator:
            # A copy, because an iterator may fill the same buffer every time.
            batch = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), batch)
            kept.append(batch)
        yield number, batch
    if number < 0:
        raise ValueError(NO_BATCH)
    again = kept if is_iterator else batches
    while True:
        number = -1
        for number, batch in enumerate(again):
            yield number, batch
        if number < 0:
            raise ValueError(
                "batches is too short for num_gradients and gave nothing when iterated over "
                "again; pass a list, or an object whose __iter__ restarts."
            )


def length_of_batch(batch: PyTree, number: int) -> int:
    """The length of the leading axes of a batch, which are checked."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    described = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
    lengths = {shape[0] if shape else 0 for shape in described.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"batch {number} must be a tree of arrays with one leading axis of the same length "
            f">= 1, got shapes {described}."
        )
    return lengths.pop()


def on_device(batch: PyTree) -> PyTree:
    """The batch as JAX arrays that no other code writes to."""
    # jnp.array copies arrays that are not JAX's: otherwise the device might read them only after
    # the caller has filled them with the next batch.
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), batch
    )


def check_batches(batches: Any, name: str) -> None:
    """Checks that ``batches`` is an iterable of batches and not one array."""
    if isinstance(batches, jax.Array | np.ndarray) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches, got {type(batches).__name__}; "
            "a single batch is given as [batch]."
        )


def check_functions(loss_fn: Any, sample_labels: Any, key: Any) -> None:
    """Checks the functions and the key, and that a sampler and a key come together."""
    for value, name in ((loss_fn, "loss_fn"), (sample_labels, "sample_labels")):
        if name == "sample_labels" and value is None:
            continue
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {type(value).__name__}.")
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"{name} must be hashable, since its compiled program is kept; got "
                f"{type(value).__name__}, which is not. Wrap it in a function."
            ) from error
    if sample_labels is None and key is not None:
        raise ValueError("key is for sample_labels, which is not given.")
    if sample_labels is not None and key is None:
        raise ValueError("sample_labels needs a key, such as jax.random.key(0); got key=None.")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(
            f"key must be a JAX random key, such as jax.random.key(0), got {type(key).__name__}."
        )


def chunk_size_of(chunk_size: Any, per_example: Any, d: int, m: int) -> int | None:
    """The number of examples that are differentiated at a time; None for mini-batches."""
    if not isinstance(per_example, bool):
        raise TypeError(f"per_example must be a bool, got {type(per_example).__name__}.")
    if not per_example:
        if chunk_size is not None:
            raise ValueError(
                f"chunk_size is for per_example=True, got chunk_size={chunk_size} without it."
            )
        return None
    return gradients_at_a_time(chunk_size, d, m)


def gradients_at_a_time(chunk_size: Any, d: int, m: int) -> int:
    """The number of gradients of d entries in a chunk, by default as many as fit; at most m."""
    if chunk_size is None:
        chunk_size = min(_MAX_CHUNK, max(1, _CHUNK_BYTES // (4 * max(d, 1))))
    return min(_checks.positive_int(chunk_size, "chunk_size"), m)


def check_scalar(loss: Any) -> Array:
    """Checks that a loss function returned one real number, and returns it as an array."""
    if not jax.tree_util.all_leaves([loss]):
        raise TypeError(
            f"loss_fn must return a scalar and nothing else, got {jax.tree.structure(loss)}."
        )
    dtype, shape = jnp.result_type(loss), np.shape(loss)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a real floating-point number, got {dtype.name}.")
    if shape != ():
        raise ValueError(
            f"loss_fn must return a scalar, the mean loss of the batch; got shape {shape}."
        )
    return jnp.asarray(loss)
