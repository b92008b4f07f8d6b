"""CHITA, a rival of M-FAC in pruning, written from its paper.

CHITA prunes by a least-squares problem with at most k weights. Let G (n x d) hold n gradients of
mini-batches of B examples at the weights w0, and F = G^T G / n, the empirical Fisher of M-FAC. A
stage looks for::

    min_w  f(w) = |G (w - w0)|^2 / (2 n) + gbar . (w - w0) / B + lambda |w - w0|^2 / 2
    subject to |w|_0 <= k,    gbar = the mean of the rows of G.

With r = G (w - w0), the first two terms are (|r|^2 / 2 + sum(r) / B) / n, so the first-order term
is a shift of the target of the least squares. The paper's problem is n times this one: it has
X = G, the target y = X w0 - alpha e with e all ones, and the ridge n lambda / 2 |w - w0|^2; here
alpha = 1 / B, as in the authors' code, or 0 without the first-order term. With it, the minimiser
lowers the linear model of every mini-batch's loss by 1 / B if lambda is small. For a trained
network that may be as much as the loss itself, and the step goes too far.

Iterative hard thresholding (IHT) chooses the weights. It starts at the k largest weights of w0.
Each iteration steps along -grad f and keeps the k largest. Of several steps the one with the least
f is taken; f never rises. At the end the kept weights get the exact minimiser (the back-solve). In
the block form, F is block-diagonal; one threshold serves all blocks. Several stages with growing
sparsity, each with new gradients, are the paper's CHITA++.

Departures from the paper and its code: pruned weights do not return in later stages. IHT works on
all alive weights, not on an active set, because each of its passes over G is cheap. Trial steps are
fixed multiples of the best step on the present support; the authors' code searches from the step at
which the support changes. The block form repeats IHT; the authors' code takes one step. Blocks are
cut from the alive weights, output by output (last axis); theirs stay the same when weights are
pruned.

References:
    Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder, "Fast as CHITA: Neural Network
    Pruning with Combinatorial Optimization", ICML 2023.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax import collect_gradients
from mfac_jax.rows import ColumnRows

# The trial steps, as multiples of the best step on the present support. A short one changes fewer
# weights of the support: in blocks, IHT would stop early without.
_TRIALS = (1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
# IHT stops if an iteration lowers the objective by less than this fraction of its first value.
_LEAST_FALL = 1e-6
# The back-solve converts as many columns to float64 at a time.
_PART = 8192


class Chita(NamedTuple):
    """The settings of a stage.

    Attributes:
        damping: lambda, as a multiple of the mean of the diagonal of F over the alive weights.
        block: the number of alive weights in a block of F; None for the whole F.
        iterations: the largest number of iterations of IHT.
        first_order: whether f has its first-order term.
    """

    damping: float
    block: int | None = None
    iterations: int = 50
    first_order: bool = True


def prune(
    params: Any,
    loss: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    sparsities: Sequence[float],
    *,
    count: int,
    batch: int,
    config: Chita,
    is_pruned: Callable[[str, Any], bool],
    given: ColumnRows | None = None,
) -> tuple[Any, Any, list[float]]:
    """Prunes in stages, each with new gradients.

    Args:
        params: any tree of float32 arrays.
        loss: ``loss(params, batch)``, the mean loss of a batch.
        batches: the batches; an iterator continues from stage to stage.
        sparsities: the pruned fraction of the prunable weights after each stage.
        count: n, the number of gradients of a stage.
        batch: B, the number of examples in a batch.
        config: the settings.
        is_pruned: ``is_pruned(path, leaf)``, as for ``mfac_jax.pruning.Scope``. Other leaves
            never move.
        given: gradients for the first stage, of all of ``params``.

    Returns:
        The parameters, the mask (true for all weights of leaves that are not pruned), and for each
        stage the seconds it took after its gradients were there.

    Raises:
        ValueError: no leaf is pruned, or the sparsities are not rising in [0, 1).
    """
    if list(sparsities) != sorted(sparsities) or not all(0 <= s < 1 for s in sparsities):
        raise ValueError(f"sparsities must rise within [0, 1), got {list(sparsities)}.")
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in with_paths]
    chosen = [
        i
        for i, (path, leaf) in enumerate(with_paths)
        if is_pruned(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    ]
    if not chosen:
        raise ValueError("is_pruned must select at least one leaf, got none.")

    def merge(values: Sequence[Any]) -> Any:
        replaced = dict(zip(chosen, values, strict=True))
        return jax.tree.unflatten(treedef, [replaced.get(i, x) for i, x in enumerate(leaves)])

    def loss_of_chosen(values: Sequence[Any], batch: Any) -> Any:
        return loss(merge(values), batch)

    shapes = [leaves[i].shape for i in chosen]
    w = np.concatenate([np.asarray(leaves[i]).ravel() for i in chosen])
    order = _by_output(shapes)
    alive = np.ones(w.size, bool)
    seconds = []
    for number, sparsity in enumerate(sparsities):
        rows: Any
        if given is not None and number == 0:
            rows, parts = given, _ranges(leaves, chosen)
        else:
            values = [jnp.asarray(x) for x in _split(w, shapes)]
            rows = collect_gradients(loss_of_chosen, values, batches, count, progress=False)
            parts = _ranges(values, range(len(values)))
        begin = time.perf_counter()
        k = w.size - round(sparsity * w.size)
        matrix = [_matrix(rows, parts, w.size)]
        del rows  # A stage needs memory for copies of the matrix, and frees the matrix itself.
        w, alive, _ = stage(w, alive, matrix.pop(), k, config, batch, order)
        seconds.append(time.perf_counter() - begin)

    every = [jnp.ones(np.shape(leaf), bool) for leaf in leaves]
    for i, kept in zip(chosen, _split(alive, shapes), strict=True):
        every[i] = jnp.asarray(kept)
    pruned = merge([jnp.asarray(x) for x in _split(w, shapes)])
    return pruned, jax.tree.unflatten(treedef, every), seconds


def stage(
    w: np.ndarray,
    alive: np.ndarray,
    rows: np.ndarray,
    k: int,
    config: Chita,
    batch: int,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Prunes to exactly k weights and moves them to the minimiser.

    Args:
        w: the weights w0, (d,) float32; 0 where they are not alive.
        alive: the weights that are not pruned yet, (d,) bool.
        rows: the gradients G at ``w``, (n, d) float32.
        k: the number of weights that stay.
        config: the settings.
        batch: B, the number of examples behind each gradient.
        order: the order of the weights for the blocks, (d,) int; by default their own.

    Returns:
        The weights, which of them are alive, and the objective f at the start, after each
        iteration of IHT, and at the end.

    Raises:
        ValueError: k, the damping or a shape is not as expected.
    """
    d, n = int(np.count_nonzero(alive)), len(rows)
    if rows.shape[1:] != w.shape or alive.shape != w.shape:
        raise ValueError(
            f"expected w (d,), alive (d,) and rows (n, d), got {w.shape}, {alive.shape} and "
            f"{rows.shape}."
        )
    if not 1 <= k <= d:
        raise ValueError(f"k must lie between 1 and the {d} weights that are alive, got {k}.")
    if not config.damping > 0:
        raise ValueError(f"damping must be positive, got {config.damping}.")

    coordinates = np.flatnonzero(alive) if order is None else order[alive[order]]
    size = d if config.block is None else min(config.block, d)
    count = -(-d // size)
    # Padding has no gradients and no weights, so it stays zero.
    start = _padded(w[coordinates], count, size)
    blocks = np.empty((count, n, size), np.float32)
    squares = 0.0
    for i, row in enumerate(rows):
        blocks[:, i] = _padded(row[coordinates], count, size)
        squares += float(np.vdot(blocks[:, i], blocks[:, i]))
    ridge = config.damping * squares / (n * d)
    del rows

    on_device = jnp.asarray(blocks), jnp.asarray(start)
    blocks = np.asarray(on_device[0])  # which is no copy on a CPU
    alpha = 1 / batch if config.first_order else 0.0
    scalars = jnp.float32(ridge), jnp.float32(alpha)
    found, values, length = _iterate(*on_device, jnp.int32(k), *scalars, config.iterations)
    kept = _exactly(k, np.asarray(found).ravel()[:d] != 0, start.ravel()[:d])
    masks = np.zeros(start.shape, bool)
    masks.ravel()[:d] = kept
    solved = np.stack(
        [_back_solve(*block, ridge, alpha) for block in zip(blocks, start, masks, strict=True)]
    )
    objectives = [float(x) for x in values[: int(length)]]
    objectives.append(float(_objective(*on_device, jnp.asarray(solved), *scalars)))

    new, still = np.zeros_like(w), np.zeros_like(alive)
    new[coordinates] = solved.ravel()[:d]
    still[coordinates] = kept
    return new, still, objectives


@functools.partial(jax.jit, static_argnames="iterations")
def _iterate(
    rows: jax.Array,
    start: jax.Array,
    k: jax.Array,
    ridge: jax.Array,
    alpha: jax.Array,
    iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """IHT from the k largest weights of ``start``.

    Returns:
        The weights (b, s), the objectives (iterations + 1,), and the number of those that are set.
    """
    n = rows.shape[1]

    def at(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        r = _product(rows, w - start)
        return w, r, _value(r, w - start, ridge, alpha)

    def improve(carry: Any) -> Any:
        i, state, values, _ = carry
        w, r, value = state
        gradient = _transposed_product(rows, r + alpha) / n + ridge * (w - start)
        inside = jnp.where(w != 0, gradient, 0)
        square = jnp.sum(inside**2)
        curvature = jnp.sum(_product(rows, inside) ** 2) / n + ridge * square
        best_inside = jnp.where(square > 0, square / curvature, 1 / ridge)

        def attempt(best: Any, multiple: jax.Array) -> tuple[Any, None]:
            found = at(_largest(w - multiple * best_inside * gradient, k))
            better = found[-1] < best[-1]
            return jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best), None

        state, _ = jax.lax.scan(attempt, state, jnp.asarray(_TRIALS, jnp.float32))
        return i + 1, state, values.at[i].set(state[-1]), value - state[-1]

    def goes_on(carry: Any) -> jax.Array:
        i, _, values, fall = carry
        return (i <= iterations) & (fall > _LEAST_FALL * jnp.abs(values[0]))

    first = at(_largest(start, k))
    values = jnp.zeros(iterations + 1).at[0].set(first[-1])
    carry = jnp.int32(1), first, values, jnp.float32(jnp.inf)
    length, state, values, _ = jax.lax.while_loop(goes_on, improve, carry)
    return state[0], values, length


def _largest(w: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k largest weights, or fewer if the k-th has equals.

    Bisection finds the level. On a CPU its passes, which only count, take less time than a sort.
    """
    # The bits of floats that are not negative are in the order of the floats.
    bits = jax.lax.bitcast_convert_type(jnp.abs(w), jnp.int32)

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        above = jnp.sum(bits > middle, dtype=jnp.int32)
        low = jnp.where(above > k, middle, jnp.where(above == k, middle - 1, low))
        return low, jnp.where(above > k, high, middle)

    # More than k weights lie above low, at most k above high.
    bracket = jnp.int32(-1), jnp.max(bits)
    _, level = jax.lax.while_loop(lambda b: b[1] - b[0] > 1, halve, bracket)
    return jnp.where((bits > level) | (k >= w.size), w, 0)


@jax.jit
def _objective(
    rows: jax.Array, start: jax.Array, w: jax.Array, ridge: jax.Array, alpha: jax.Array
) -> jax.Array:
    return _value(_product(rows, w - start), w - start, ridge, alpha)


def _value(r: jax.Array, move: jax.Array, ridge: jax.Array, alpha: jax.Array) -> jax.Array:
    """The objective f, with r = G move in each block."""
    return jnp.sum(r * (r / 2 + alpha)) / r.shape[1] + ridge / 2 * jnp.sum(move**2)


def _product(rows: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bns,bs->bn", rows, v, precision=jax.lax.Precision.HIGHEST)


def _transposed_product(rows: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.einsum("bns,bn->bs", rows, r, precision=jax.lax.Precision.HIGHEST)


def _exactly(k: int, kept: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Adds the largest weights of ``start`` to those that are kept, until there are k."""
    missing = k - int(kept.sum())
    if missing == 0:
        return kept
    sizes = np.where(kept, -1, np.abs(start))
    added = np.argpartition(-sizes, missing - 1)[:missing]
    kept = kept.copy()
    kept[added] = True
    return kept


def _back_solve(
    rows: np.ndarray, start: np.ndarray, kept: np.ndarray, ridge: float, alpha: float
) -> np.ndarray:
    """The minimiser over the kept weights of one block, in float64.

    Let S be the kept weights and c the residual, alpha included, at w0 with the others zero. The
    minimiser is w0_S - G_S^T (G_S G_S^T + n lambda)^-1 c, an n x n system.
    """
    n, d = rows.shape
    gram, c = np.zeros((n, n)), np.full(n, alpha)
    parts = [slice(i, i + _PART) for i in range(0, d, _PART)]
    for part in parts:
        g = rows[:, part].astype(np.float64)
        c -= g @ np.where(kept[part], 0, start[part])
        g = g[:, kept[part]]
        gram += g @ g.T
    z = np.linalg.solve(gram + n * ridge * np.eye(n), c)
    moves = [rows[:, part].T.astype(np.float64) @ z for part in parts]
    return np.where(kept, start - np.concatenate(moves), 0).astype(np.float32)


def _by_output(shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The coordinates of some leaves, leaf by leaf and output by output."""
    places = _split(np.arange(sum(int(np.prod(shape)) for shape in shapes)), shapes)
    return np.concatenate([np.moveaxis(x, -1, 0).ravel() if x.ndim else x.ravel() for x in places])


def _padded(vector: np.ndarray, count: int, size: int) -> np.ndarray:
    """The vector cut into blocks, with zeros at the end of the last."""
    return np.pad(vector, (0, count * size - vector.size)).reshape(count, size)


def _ranges(leaves: Sequence[Any], chosen: Iterable[int]) -> list[tuple[int, int]]:
    """Where the chosen leaves lie among the columns: first column and size of each."""
    sizes = [int(np.size(leaf)) for leaf in leaves]
    return [(sum(sizes[:i]), sizes[i]) for i in chosen]


def _matrix(rows: ColumnRows, parts: Sequence[tuple[int, int]], d: int) -> np.ndarray:
    """The columns of some leaves, leaf by leaf to save memory."""
    matrix = np.empty((rows.num_rows, d), np.float32)
    first = 0
    for start, size in parts:
        matrix[:, first : first + size] = rows.columns(start, size)
        first += size
    return matrix


def _split(vector: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [x.reshape(s) for x, s in zip(np.split(vector, ends), shapes, strict=True)]
