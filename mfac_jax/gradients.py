"""Collects the gradients of a Fisher matrix from a loss and data.

A row is the gradient of one mini-batch or of one example; :func:`collect_gradients` says how the
two differ. It stores the rows. :func:`implicit_rows` computes them whenever they are needed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import Array

from mfac_jax import _checks
from mfac_jax._collect import (
    LabelSampler,
    LossFn,
    check_batches,
    check_functions,
    chunk_size_of,
    fill_rows,
)
from mfac_jax._durable import digest
from mfac_jax._implicit import ImplicitRows, rows_of
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows import Dense, Files, Storage, WritableRows
from mfac_jax.rows._room import require_room
from mfac_jax.rows._storage import check_storage

__all__ = ["ImplicitRows", "collect_gradients", "implicit_rows"]


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
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> WritableRows:
    """Collects ``num_gradients`` gradients of a loss as rows.

    Let ``l_i`` be the loss of example ``i``.

    - By default a row is the gradient of the mean loss of one mini-batch, as in the paper's
      experiments. The cost is that of ordinary training steps.
    - With ``per_example=True`` a row is the gradient of one ``l_i``. These rows make the
      empirical Fisher in the strict sense, ``mean_i grad l_i grad l_i^T``.

    The two matrices differ. For random batches of B examples, the mini-batch Fisher is on
    average ``1/B`` of the per-example Fisher plus ``(1 - 1/B)`` of the outer product of the
    full gradient with itself. Near a minimum it is B times smaller, so a damping that suits one
    does not suit the other.

    By default the labels come from the data (empirical Fisher). With ``sample_labels`` they
    are drawn from the model, independently for every row. The rows then give a Monte-Carlo
    estimate: of the true Fisher with ``per_example=True``, and of ``1/B`` of the true Fisher
    with mini-batches. For a classifier::

        def sample_labels(params, batch, key):
            return batch[0], jax.random.categorical(key, logits(params, batch[0]))

    If the data run out before all rows are filled, they are read again from the start.

    Args:
        loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch; a scalar. It is
            compiled once for every shape of batch. Later calls with the same function use
            the compiled program.
        params: the parameters, any tree of real floating-point arrays.
        batches: an iterable of batches, each a tree of arrays with one leading axis of the
            same length. A list or a data loader restarts whenever it is iterated over, so it is
            read as needed. An iterator does not restart: the batches that are used are copied
            to host memory, so that they can be read again.
        num_gradients: ``m``, the number of rows.
        per_example: whether a row is the gradient of one example instead of one batch. The
            example reaches ``loss_fn`` as a batch of length 1.
        chunk_size: the number of examples that are differentiated at a time; only with
            ``per_example``. By default their gradients take 64 MiB; at most 128 examples.
        sample_labels: ``sample_labels(params, batch, key)`` returns a batch for ``loss_fn``
            with labels drawn from the model's own distribution. It is not differentiated. The
            batches then need no labels.
        key: the random key for ``sample_labels``. Each row gets its own key, so the rows do not
            depend on ``chunk_size``.
        mask: a tree of booleans with the structure of the parameters. The rows are zero where
            it is false. All true by default.
        storage: how the rows are stored; see :class:`mfac_jax.rows.Dense`.
        checkpoint: a folder that keeps finished gradients. After an interruption, even by
            ``kill -9``, the same call goes on where it stopped, with the same result: the loader
            must give the same batches again. The folder may be removed afterwards. It is for
            parameters of one process. :class:`mfac_jax.rows.Files` keep finished gradients
            without it.
        progress: whether to show a progress bar if there is a terminal or notebook.

    Returns:
        The rows, in the order of the data. No array of the caller is changed or donated.

    Raises:
        TypeError: an argument has the wrong type, a parameter is not real floating point,
            gradients cannot be written into the rows of ``storage``, or ``loss_fn`` does not
            return a real number.
        ValueError: ``batches`` is empty or a batch is malformed, ``num_gradients`` or
            ``chunk_size`` is below 1, ``loss_fn`` does not return a scalar, an option is
            given without the option that it needs, ``checkpoint`` holds something else than
            gradients of these parameters, comes with parameters that several processes share or
            with a storage that keeps finished gradients itself,
            the mesh of ``params`` has explicit axes, or processes
            that share ``params`` do not ask for the same number of gradients of the same batches.
        OSError: the folder of ``checkpoint`` cannot be written, or the disk is full.
        FloatingPointError: a gradient has NaN or Inf in it or is too large to square. The
            message names the row, the batch and the example.
        MemoryError: the rows cannot fit.

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
        Frantar, Kurtic, Alistarh, NeurIPS 2021, section 2 (the empirical Fisher of mini-batch
        gradients). Kunstner, Balles, Hennig, "Limitations of the empirical Fisher
        approximation", NeurIPS 2019 (the empirical Fisher against the true one).
    """
    m = _checks.positive_int(num_gradients, "num_gradients")
    check_functions(loss_fn, sample_labels, key)
    check_batches(batches, "batches")
    layout = Layout(params)
    _checks.automatic_axes(params, "params")
    chunk_size_of(chunk_size, per_example, layout.size, m)
    if mask is not None:
        layout.check_mask(mask)
    if checkpoint is not None:
        _checks.folder(checkpoint, "checkpoint")
        if check_storage(storage).keeps_gradients:
            raise ValueError(
                f"checkpoint is for gradients in memory: storage={storage!r} keeps finished "
                "gradients itself."
            )
    require_room(check_storage(storage), params, m, "num_gradients")
    origin = functools.partial(_origin, params, mask, key, per_example)
    rows, done = storage.resume(params, m, origin)
    copy = None
    if checkpoint is not None:
        copy, _ = Files(checkpoint).resume(params, m, origin)
    return fill_rows(
        rows,
        loss_fn,
        params,
        batches,
        per_example=per_example,
        chunk_size=chunk_size,
        sample_labels=sample_labels,
        key=key,
        mask=mask,
        progress=progress,
        done=done,
        copy=copy,
    )


def _origin(params: PyTree, mask: PyTree, key: Array | None, per_example: Any) -> dict[str, str]:
    """What decides the gradients, apart from the loss and the data."""
    random = None if key is None else jax.random.key_data(key)
    return {
        "digest of the parameters": digest(params),
        "digest of the mask": digest(mask),
        "digest of the key": digest(random),
        "per_example": str(per_example),
    }


def implicit_rows(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[PyTree],
    num_gradients: int | None = None,
    *,
    per_example: bool = False,
    chunk_size: int | None = None,
    sample_labels: LabelSampler | None = None,
    key: Array | None = None,
) -> ImplicitRows:
    """The rows of :func:`collect_gradients`, computed whenever they are needed and never stored.

    They take the memory of the parameters, a few batches, a few vectors of ``d`` numbers and up to
    three chunks of gradients, whatever ``m`` is. In exchange every product differentiates the loss
    of all data again:

    - ``dots`` takes a forward pass with tangents over all data, ``combine`` a forward and a
      backward pass. :meth:`~mfac_jax.inverse.FisherInverse.ihvp`,
      :meth:`~mfac_jax.inverse.FisherInverse.quadratic_form` and
      :meth:`~mfac_jax.inverse.FisherInverse.sample` take one of each,
      :meth:`~mfac_jax.inverse.FisherInverse.combination` takes ``combine`` alone, and the
      log-determinant nothing.
    - ``gram``, and so :func:`mfac_jax.fisher_inverse`, computes about
      ``m^2 / (2 chunk_size) + m / 2`` gradients: each chunk again for every chunk after it. The
      diagonal of the inverse computes ``m`` more.

    A larger ``chunk_size`` therefore saves time. With ``chunk_size >= m`` every gradient is
    computed once.

    Args:
        loss_fn: ``loss_fn(params, batch)``, as in :func:`collect_gradients`. It must have
            derivatives in forward and in reverse mode.
        params: the parameters. The rows hold them without a copy. Products are as precise as the
            loss, so parameters of low precision give products of low precision.
        batches: the batches, as in :func:`collect_gradients`. The rows keep a copy of NumPy arrays
            in host memory, which every product moves to the device batch by batch; JAX arrays stay
            where they are. A product takes all examples of a batch at a time.
        num_gradients: ``m``; by default one row for each batch or for each example.
        per_example: whether a row is the gradient of one example instead of one batch.
        chunk_size: the number of gradients of a chunk. By default they take 64 MiB; at most 128.
        sample_labels: draws labels, as in :func:`collect_gradients`; once for each row.
        key: the random key for ``sample_labels``.

    Returns:
        The rows, in the order of the data. They answer products and whatever follows from
        products: the whole inverse and its diagonal. They cannot be written, their columns cannot
        be read, and ``jit`` cannot trace them. If a gradient has NaN or Inf in it, ``dots`` and
        ``combine`` return NaN or Inf. What computes gradients in chunks, such as
        :func:`mfac_jax.fisher_inverse`, raises a ``FloatingPointError`` that names the row, the
        batch and the example.

    Raises:
        TypeError: an argument has the wrong type, a parameter is not real floating point, or
            ``loss_fn`` does not return a real number.
        ValueError: ``batches`` is empty or a batch is malformed, ``num_gradients`` or
            ``chunk_size`` is below 1, ``loss_fn`` does not return a scalar, or an option is given
            without the option that it needs.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse
        >>> from mfac_jax.gradients import implicit_rows
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> data = [(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), jnp.array([-1.0, 1.0]))]
        >>> rows = implicit_rows(loss, {"w": jnp.zeros(3)}, data, per_example=True)
        >>> rows.dots({"w": jnp.ones(3)})
        Array([ 2., -4.], dtype=float32)
        >>> fisher_inverse(rows, damping=1.0).ihvp({"w": jnp.ones(3)})["w"]
        Array([0.333, 0.111, 1.   ], dtype=float32)
    """
    return rows_of(
        loss_fn,
        params,
        batches,
        num_gradients,
        per_example=per_example,
        chunk_size=chunk_size,
        sample_labels=sample_labels,
        key=key,
    )
