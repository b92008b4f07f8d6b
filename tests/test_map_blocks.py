"""Blocks are mapped in pieces, unrolled or looped, and padded to few sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import rows
from mfac_jax.rows import BlockRun, Partition, _map, partition

RUNS = (BlockRun(0, 7, 3), BlockRun(21, 1, 2), BlockRun(23, 11, 5), BlockRun(78, 2, 1))
D = 80


@pytest.mark.parametrize("packing", ["flat", "leaf"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("entries", [1, 4 * 5 * 2, 2**21])
@pytest.mark.parametrize("free", [0, 2**26])
def test_results_are_those_of_each_block(packing, permuted, entries, free, monkeypatch):
    monkeypatch.setattr(_map, "PIECE_ENTRIES", entries)  # one block a piece, a few, all
    monkeypatch.setattr(_map, "_FREE_WORK", free)
    monkeypatch.setattr(_map, "_MOST_PIECES", 2)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4, D)).astype(np.float32)
    vector = rng.normal(size=D).astype(np.float32)
    mask = np.arange(D) % 3 > 0
    order = rng.permutation(D).astype(np.int32) if permuted else np.arange(D)
    held = rows.as_rows(jnp.asarray(matrix), storage=rows.Dense(packing=packing))

    # Functions of this test alone: others are compiled with other pieces.
    def of_coordinates(batch, part, here):
        assert batch.shape == (part.shape[0], 4, part.shape[1])
        kept = jnp.where(here[:, None], batch, jnp.zeros_like(batch))
        return jnp.einsum("bnj,bnk,bk->bj", kept, kept, part)

    def of_blocks(batch, part, here):
        return jnp.sum(of_coordinates(batch, part, here), axis=1)

    blocks = Partition(jnp.asarray(order) if permuted else None, RUNS)
    found = {
        function: held.map_blocks(blocks, function, jnp.asarray(vector), jnp.asarray(mask))
        for function in (of_coordinates, of_blocks)
    }
    kept = (matrix * mask).astype(np.float64)
    want, sums = np.zeros(D), []
    for run in RUNS:
        for i in range(run.count):
            here = order[run.start + i * run.size : run.start + (i + 1) * run.size]
            want[here] = kept[:, here].T @ kept[:, here] @ vector[here]
            sums.append(want[here].sum())
    np.testing.assert_allclose(found[of_coordinates], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[of_blocks], sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "groups", "n"),
    [
        # Many blocks of 144, and few smaller ones that cost next to nothing as 144.
        ([(16, 27), (1800, 144), (10, 64)], [[1, 2, 0]], 256),
        # As many of 16 would take nine hundred times the work.
        ([(100_000, 16), (100_000, 150)], [[1], [0]], 256),
        # Little work in all.
        ([(16, 8), (1, 16)], [[1, 0]], 256),
        # Blocks of at most n coordinates are worked on differently from larger ones.
        ([(16, 8), (1, 16)], [[1], [0]], 12),
        ([], [], 256),
    ],
)
def test_which_sizes_are_padded_to_one(sizes, groups, n):
    runs = tuple(BlockRun(0, *size) for size in sizes)
    assert _map._of_like_size(runs, n) == groups


PARAMS = {"a": jnp.zeros((4, 2)), "none": None, "b": jnp.zeros(15), "c": jnp.zeros((3,))}
SIZES = {
    None: [26],
    4: [4] * 6 + [2],
    10: [10, 10, 6],
    13: [13, 13],
    100: [26],
    1: [1] * 26,
    "leaf": [8, 15, 3],
    (1, 15, 6, 2, 2): [1, 15, 6, 2, 2],
}


@pytest.mark.parametrize("blocks", SIZES)
def test_partition(blocks):
    cut = partition(rows.Layout(PARAMS), blocks)
    assert cut.order is None
    np.testing.assert_array_equal(cut.sizes, SIZES[blocks])
    assert cut.num_blocks == len(SIZES[blocks])
    assert cut.is_whole == (len(SIZES[blocks]) == 1)
    assert sum(run.width for run in cut.runs) == 26
    places = [run.start for run in cut.runs]
    assert places == sorted(places)


@pytest.mark.parametrize("blocks", [None, 3, "leaf", ()])
def test_no_coordinates_are_no_blocks(blocks):
    cut = partition(rows.Layout({"a": None, "z": jnp.zeros((0, 2))}), blocks)
    assert cut.runs == ()
    assert cut.num_blocks == 0
    assert not cut.is_whole
