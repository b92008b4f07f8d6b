"""Blocks wherever their columns lie, in pieces and padded to few sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import rows
from mfac_jax.inverse import BlockRun, _map, map_blocks

RUNS = (BlockRun(0, 7, 3), BlockRun(21, 1, 2), BlockRun(23, 11, 5), BlockRun(78, 2, 1))
D = 80


def held(permuted):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4, D)).astype(np.float32)
    order = rng.permutation(D)
    if not permuted:
        return rows.as_rows(jnp.asarray(matrix)), matrix
    view = rows.PermutedRows.of(rows.as_rows(jnp.asarray(matrix)), jnp.asarray(order, jnp.int32))
    return view, matrix[:, order]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("entries", [1, 4 * 5 * 2, 2**21])
@pytest.mark.parametrize("free", [0, 2**26])
def test_results_are_those_of_each_block(permuted, entries, free, monkeypatch):
    monkeypatch.setattr(_map, "_FEWEST_ENTRIES", entries)  # one block a piece, a few, all
    monkeypatch.setattr(_map, "_FREE_WORK", free)
    monkeypatch.setattr(_map, "_MOST_PIECES", 2)
    view, matrix = held(permuted)
    vector = np.random.default_rng(1).normal(size=D).astype(np.float32)
    mask = np.arange(D) % 3 > 0

    def of_coordinates(batch, part, here):
        assert batch.shape == (part.shape[0], 4, part.shape[1])
        kept = jnp.where(here[:, None], batch, jnp.zeros_like(batch))
        return jnp.einsum("bnj,bnk,bk->bj", kept, kept, part)

    def of_blocks(batch, part, here):
        return jnp.sum(of_coordinates(batch, part, here), axis=1, keepdims=True)

    found = {
        function: jax.jit(lambda view, *vectors, f=function: map_blocks(view, RUNS, f, *vectors))(
            view, jnp.asarray(vector), jnp.asarray(mask)
        )
        for function in (of_coordinates, of_blocks)
    }
    kept = (matrix * mask).astype(np.float64)
    want = []
    for run in RUNS:
        for i in range(run.count):
            here = slice(run.start + i * run.size, run.start + (i + 1) * run.size)
            want.append(kept[:, here].T @ kept[:, here] @ vector[here])
    np.testing.assert_allclose(found[of_coordinates], np.concatenate(want), rtol=1e-4, atol=1e-4)
    sums = [part.sum() for part in want]
    np.testing.assert_allclose(found[of_blocks], sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        # Many blocks of 144, and few smaller ones that cost next to nothing as 144.
        ([(16, 27), (1800, 144), (10, 64)], [[1, 2, 0]]),
        # As many of 16 would take nine hundred times the work.
        ([(100_000, 16), (100_000, 150)], [[1], [0]]),
        # Little work in all.
        ([(16, 8), (1, 16)], [[1, 0]]),
        ([], []),
    ],
)
def test_which_sizes_are_padded_to_one(sizes, groups):
    runs = tuple(BlockRun(0, *size) for size in sizes)
    assert _map._of_like_size(runs) == groups
