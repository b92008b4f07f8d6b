"""Collecting the gradients a Fisher matrix is made of, from a loss and data.

A row is the gradient of one mini-batch or of one example; :func:`collect_gradients`
says how the two differ. Rows are computed in chunks and written in place, so the
memory in use is the rows themselves, one chunk of gradients and a few batches. The
host runs ahead of the device and reads back, now and then, whether the rows it has
left behind are finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int
from tqdm.auto import tqdm

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows import GradientRows, empty_rows

LossFn = Callable[[PyTree, PyTree], Any]
Rows = TypeVar("Rows", bound=GradientRows)
LabelSampler = Callable[[PyTree, PyTree, Array], PyTree]

# A chunk of per-example gradients takes 64 MiB at most, which is small beside any
# window worth bounding the memory of. Beyond 128 examples a chunk gains no speed.
_CHUNK_BYTES = 2**26
_MAX_CHUNK = 128

# Steps between two looks at the rows' flags. Each look is at steps as many again in
# the past, so the device never waits for the host, and no more than twice as many
# batches are on their way at a time.
_STEPS_PER_LOOK = 4


def collect_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[PyTree],
    num_gradients: int,
    *,
    per_example: bool = False,
    chunk_size: int | None = None,
    sample_labels: LabelSampler | None = None,
    key: Array | None = None,
    mask: PyTree | None = None,
    storage: str = "flat",
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> GradientRows:
    """Exactly ``num_gradients`` gradients of a loss, as rows.

    With ``l_i`` the loss of example ``i``, a row is

    - by default the gradient of a mini-batch's mean loss, one row a batch, as in the
      paper's experiments. The cost is that of ordinary training steps.
    - with ``per_example=True`` the gradient of one ``l_i``, one row an example. These
      rows make the empirical Fisher in the strict sense, ``mean_i grad l_i grad l_i^T``.

    The two are different matrices. For batches of B examples drawn at random, the
    mini-batch Fisher is on average ``(1/B)`` of the per-example Fisher plus
    ``(1 - 1/B)`` of the outer product of the full gradient with itself: it is B times
    smaller near a minimum, and a damping that suits one does not suit the other.

    Labels are those of the data by default (the empirical Fisher). With
    ``sample_labels`` they are drawn from the model anew for every row, which makes the
    rows a Monte-Carlo estimate of the true Fisher: of the Fisher itself with
    ``per_example=True``, of ``1/B`` of it with mini-batches. For a classifier::

        def sample_labels(params, batch, key):
            return batch[0], jax.random.categorical(key, logits(params, batch[0]))

    Data that run out before all rows are there are gone through again from the start.

    Args:
        loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch; a scalar. It is
            compiled once for every shape of batch, and not again in later calls with
            the same function.
        params: the parameters, any tree of real floating-point arrays.
        batches: an iterable of batches, each a tree of arrays with one leading axis
            of the same length. An object that starts afresh each time it is iterated
            over (a list, a data loader) is read as needed. An iterator, which can be
            gone through once, is copied in host memory as far as it is used, in case
            it is short.
        num_gradients: ``m``, the number of rows.
        per_example: one row an example instead of one a batch. The example reaches
            ``loss_fn`` as a batch of length 1.
        chunk_size: how many examples are differentiated at a time; only with
            ``per_example``. By default as many as make 64 MiB of gradients, 128 at most.
        sample_labels: ``sample_labels(params, batch, key)``, a batch for ``loss_fn``
            whose labels are drawn from the model's own distribution. No derivative is
            taken of it, and the batches need no labels of their own.
        key: the random key ``sample_labels`` draws from, split by row; the rows do
            not depend on ``chunk_size``.
        mask: a tree of booleans with the structure of the parameters; the rows are
            zero where it is false. All true by default.
        storage: ``"flat"`` or ``"per_leaf"``; see :func:`mfac_jax.rows.empty_rows`.
        dtype: what the rows are stored in; float32 by default, float64 for float64
            parameters.
        progress: show a progress bar, if there is a terminal or notebook to show it.

    Returns:
        The rows, in the order of the data. No array of the caller's is changed or
        donated.

    Raises:
        TypeError: an argument has the wrong type, a parameter is not real floating
            point, or ``loss_fn`` does not return a real number.
        ValueError: ``batches`` is empty or a batch malformed, ``num_gradients`` or
            ``chunk_size`` is below 1, ``loss_fn`` does not return a scalar, an option
            is unknown or is given without the one it belongs to.
        FloatingPointError: a gradient has NaN or Inf in it or is too large to square;
            the row, the batch and the example are named.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import collect_gradients
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> data = [(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([-1.0, 1.0]))]
        >>> rows = collect_gradients(loss, {"w": jnp.zeros(2)}, data, 3, per_example=True)
        >>> rows.columns(0, 2)
        Array([[ 2.,  4.],
               [-6., -8.],
               [ 2.,  4.]], dtype=float32)

    References:
        Frantar, Kurtic, Alistarh, NeurIPS 2021, section 2 (the empirical Fisher of
        mini-batch gradients). Kunstner, Balles, Hennig, "Limitations of the empirical
        Fisher approximation", NeurIPS 2019 (empirical against true Fisher).
    """
    m = _checks.positive_int(num_gradients, "num_gradients")
    return fill_rows(
        empty_rows(params, m, storage=storage, dtype=dtype),
        0,
        m,
        loss_fn,
        params,
        batches,
        per_example=per_example,
        chunk_size=chunk_size,
        sample_labels=sample_labels,
        key=key,
        mask=mask,
        progress=progress,
    )


def fill_rows(
    rows: Rows,
    first: int,
    count: int,
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
) -> Rows:
    """:func:`collect_gradients` into the rows from ``first`` on of ``rows``, which are used up."""
    check_functions(loss_fn, sample_labels, key)
    check_batches(batches, "batches")
    chunk = _chunk_size(chunk_size, per_example, Layout(params).size, count)
    if mask is not None:
        rows.layout.check_mask(mask)

    unread = _Unread()
    # On disable=None tqdm stays silent where its output would land in a file.
    with tqdm(total=count, unit="row", desc="gradients", disable=None if progress else True) as bar:
        for place, batch in _places(batches, count, chunk):
            rows, accepted = _write_gradients(
                rows,
                params,
                batch,
                first + place.row,
                place.example,
                place.num_rows,
                key,
                mask,
                loss_fn=loss_fn,
                sample_labels=sample_labels,
                chunk=chunk,
            )
            bar.update(unread.add(place, accepted))
        bar.update(unread.read_all())
    return rows


@functools.partial(
    jax.jit, static_argnames=("loss_fn", "sample_labels", "chunk"), donate_argnames=("rows",)
)
def _write_gradients(
    rows: Rows,
    params: PyTree,
    batch: PyTree,
    row: Int[Array, ""],
    example: Int[Array, ""] | None,
    count: Int[Array, ""],
    key: Array | None,
    mask: PyTree | None,
    *,
    loss_fn: LossFn,
    sample_labels: LabelSampler | None,
    chunk: int | None,
) -> tuple[Rows, Bool[Array, " k"]]:
    """Writes rows ``row .. row + count - 1``; returns which gradients are finite."""

    def scalar_loss(params: PyTree, batch: PyTree) -> Array:
        return check_scalar(loss_fn(params, batch))

    def gradient(batch: PyTree, row: Int[Array, ""]) -> PyTree:
        if sample_labels is not None and key is not None:
            batch = sample_labels(params, batch, jax.random.fold_in(key, row))
        return jax.grad(scalar_loss)(params, batch)

    if chunk is None or example is None:
        gradients = jax.tree.map(lambda g: g[None], gradient(batch, row))
    else:
        # A chunk that is not full repeats its last example and does not write it again.
        offsets = jnp.arange(chunk)
        picked = example + jnp.minimum(offsets, count - 1)
        examples = jax.tree.map(lambda leaf: leaf[picked][:, None], batch)
        gradients = jax.vmap(gradient)(examples, row + offsets)
    if mask is not None:
        leaves, treedef = jax.tree.flatten(gradients)
        kept = [
            jnp.where(keep[None], leaf, jnp.zeros_like(leaf))
            for keep, leaf in zip(rows.layout.check_mask(mask), leaves, strict=True)
        ]
        gradients = jax.tree.unflatten(treedef, kept)

    def put(
        i: Int[Array, ""], carry: tuple[Rows, Bool[Array, " k"]]
    ) -> tuple[Rows, Bool[Array, " k"]]:
        rows, finite = carry
        rows, accepted = rows.write(row + i, jax.tree.map(lambda g: g[i], gradients))
        return rows, finite.at[i].set(accepted)

    return jax.lax.fori_loop(0, count, put, (rows, jnp.ones(chunk or 1, bool)))


class _Place(NamedTuple):
    """What one step writes: ``num_rows`` rows from ``row`` on, and where they come from."""

    row: int
    num_rows: int
    batch: int
    example: int | None

    def check(self, accepted: np.ndarray) -> None:
        rejected = np.flatnonzero(~accepted)
        if rejected.size:
            first = int(rejected[0])
            example = "" if self.example is None else f", example {self.example + first}"
            raise FloatingPointError(
                f"row {self.row + first} is not finite: the gradient of batch "
                f"{self.batch}{example} has NaN or Inf in it, or is too large to square."
            )


class _Unread:
    """Steps on their way, whose flags have not been read."""

    def __init__(self) -> None:
        self._steps: list[tuple[_Place, Bool[Array, " k"]]] = []

    def add(self, place: _Place, accepted: Bool[Array, " k"]) -> int:
        """Takes a step in; returns how many more rows are known to be good."""
        self._steps.append((place, accepted))
        return self._read(_STEPS_PER_LOOK) if len(self._steps) == 2 * _STEPS_PER_LOOK else 0

    def read_all(self) -> int:
        """Reads what is left; returns how many more rows are known to be good."""
        return self._read(len(self._steps))

    def _read(self, count: int) -> int:
        steps, self._steps = self._steps[:count], self._steps[count:]
        flags = jax.device_get([accepted for _, accepted in steps])
        for (place, _), accepted in zip(steps, flags, strict=True):
            place.check(accepted)
        return sum(place.num_rows for place, _ in steps)


def _places(
    batches: Iterable[PyTree], m: int, chunk: int | None
) -> Iterator[tuple[_Place, PyTree]]:
    """The steps that fill m rows, each with the batch it reads."""
    row = 0
    for number, batch in cycle(batches):
        on_device, length = _on_device(batch, number)
        pieces: list[tuple[int | None, int]] = [(None, 1)]
        if chunk is not None:
            pieces = [(i, min(chunk, length - i)) for i in range(0, length, chunk)]
        for example, count in pieces:
            count = min(count, m - row)
            yield _Place(row, count, number, example), on_device
            row += count
            if row == m:
                return


def cycle(batches: Iterable[PyTree]) -> Iterator[tuple[int, PyTree]]:
    """The batches, numbered from 0, over and over."""
    first_pass = iter(batches)
    once = first_pass is batches
    kept = []
    number = -1
    for number, batch in enumerate(first_pass):
        if once:
            # A copy: an iterator is free to fill one buffer over and over.
            batch = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), batch)
            kept.append(batch)
        yield number, batch
    if number < 0:
        raise ValueError("batches is empty: expected at least one batch.")
    again = kept if once else batches
    while True:
        number = -1
        for number, batch in enumerate(again):
            yield number, batch
        if number < 0:
            raise ValueError(
                "batches is too short for num_gradients and gave nothing when iterated over "
                "again; pass a list, or an object whose __iter__ starts afresh."
            )


def _on_device(batch: PyTree, number: int) -> tuple[PyTree, int]:
    """The batch as JAX arrays of its own, and its length."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    described = {f"{jax.tree_util.keystr(path)}": np.shape(leaf) for path, leaf in leaves}
    lengths = {shape[0] if shape else 0 for shape in described.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"batch {number} must be a tree of arrays with one leading axis of the same length "
            f">= 1, got shapes {described}."
        )
    return on_device(batch), lengths.pop()


def on_device(batch: PyTree) -> PyTree:
    """The batch as JAX arrays of its own."""
    # jnp.array copies what is not JAX's: the device may read it after the caller has
    # filled it with the next batch.
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), batch
    )


def check_batches(batches: Any, name: str) -> None:
    """``batches`` is an iterable of them, and not one array."""
    if isinstance(batches, jax.Array | np.ndarray) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches, got {type(batches).__name__}; "
            "a single batch is given as [batch]."
        )


def check_functions(loss_fn: Any, sample_labels: Any, key: Any) -> None:
    """What is to be a function is one, and what goes together does."""
    for value, name in ((loss_fn, "loss_fn"), (sample_labels, "sample_labels")):
        if name == "sample_labels" and value is None:
            continue
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {type(value).__name__}.")
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"{name} must be hashable, since its compiled form is kept: got "
                f"{type(value).__name__}, which is not; wrap it in a function."
            ) from error
    if sample_labels is None and key is not None:
        raise ValueError("key is for sample_labels, which is not given.")
    if sample_labels is not None and key is None:
        raise ValueError("sample_labels needs a key, such as jax.random.key(0); got key=None.")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(
            f"key must be a JAX random key, such as jax.random.key(0), got {type(key).__name__}."
        )


def _chunk_size(chunk_size: Any, per_example: Any, d: int, m: int) -> int | None:
    if not isinstance(per_example, bool):
        raise TypeError(f"per_example must be a bool, got {type(per_example).__name__}.")
    if not per_example:
        if chunk_size is not None:
            raise ValueError(
                f"chunk_size is for per_example=True, got chunk_size={chunk_size} without it."
            )
        return None
    if chunk_size is None:
        chunk_size = min(_MAX_CHUNK, max(1, _CHUNK_BYTES // (4 * max(d, 1))))
    return min(_checks.positive_int(chunk_size, "chunk_size"), m)


def check_scalar(loss: Any) -> Array:
    """What a loss function returns, once it is known to be one real number."""
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
