"""The static inverse, whole and in blocks, against the dense matrix."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_jax import fisher_inverse, inverse_diagonal, reference, rows
from mfac_jax.inverse import BlockInverse, WholeInverse, block_runs

N, D = 6, 26
LAM = 0.1
PARAMS = {"a": jnp.zeros((4, 2)), "none": None, "b": jnp.zeros(15), "c": jnp.zeros((3,))}

# Block sizes for each way of asking: on the whitened side, the direct side and both.
BLOCKS = {
    "whole": (None, [D]),
    "fours": (4, [4] * 6 + [2]),
    "tens": (10, [10, 10, 6]),
    "leaf": ("leaf", [8, 15, 3]),
    "given": ((1, 15, 6, 2, 2), [1, 15, 6, 2, 2]),
    "ones": (1, [1] * D),
}


def tree(v):
    v = jnp.asarray(v)
    return {
        "a": v[..., :8].reshape(*v.shape[:-1], 4, 2),
        "none": None,
        "b": v[..., 8:23],
        "c": v[..., 23:],
    }


def gradient_rows(g, storage="flat"):
    return rows.as_rows(tree(g), PARAMS, storage=storage)


def some(count, seed=0, d=D):
    return np.random.default_rng(seed).normal(size=(count, d)).astype(np.float32)


def build(g, blocks, storage="flat", damping=LAM):
    return jax.jit(lambda held: fisher_inverse(held, damping, blocks=blocks))(
        gradient_rows(g, storage)
    )


ROW, COLUMN = np.array([[0, 7, 25], [8, 22, 3]]), np.array([1, 7, 23])


@functools.partial(jax.jit, static_argnums=2)
def answers(held, v, blocks):
    inverse = fisher_inverse(held, LAM, blocks=blocks)
    return inverse, {
        "flat": inverse.ihvp(v),
        "tree": inverse.ihvp(tree(v)),
        "submatrix": inverse.submatrix(jnp.arange(D)),
        "entries": inverse.entries(ROW, COLUMN),
        "diagonal": inverse.diagonal(),
        "alone": inverse_diagonal(held, LAM, blocks=blocks),
        "quadratic": inverse.quadratic_form(tree(v)),
        "log_det": inverse.log_det(),
    }


@pytest.mark.parametrize(
    ("name", "storage"),
    [*((name, "flat") for name in BLOCKS), ("whole", "per_leaf"), ("tens", "per_leaf")],
)
def test_every_answer_is_that_of_the_dense_matrix(name, storage):
    blocks, sizes = BLOCKS[name]
    g, v = some(N), some(1, 1)[0]
    inverse, got = answers(gradient_rows(g, storage), jnp.asarray(v), blocks)
    assert isinstance(inverse, WholeInverse if blocks is None else BlockInverse)
    dense = oracles.block_inverse(g, LAM, sizes)
    condition = oracles.condition(g, LAM)
    close = {"length": D, "condition": condition}
    loose = {"length": D, "condition": condition * oracles.cancellation(v, dense @ v, LAM)}
    for key in ("tree", "diagonal", "alone"):
        assert jax.tree.structure(got[key]) == jax.tree.structure(PARAMS)
    oracles.assert_close(got["flat"], dense @ v, **loose)
    oracles.assert_close(oracles.flat(got["tree"]), dense @ v, **loose)
    oracles.assert_close(got["submatrix"], dense, **close)
    oracles.assert_close(got["entries"], dense[ROW, COLUMN], **close)
    oracles.assert_close(oracles.flat(got["diagonal"]), np.diag(dense), **close)
    oracles.assert_close(oracles.flat(got["alone"]), np.diag(dense), **close)
    oracles.assert_close(got["quadratic"], v @ dense @ v, **loose)
    oracles.assert_close(got["log_det"], oracles.log_det(dense), **close)


@pytest.mark.parametrize("kind", ["correlated", "zero rows", "duplicated"])
def test_the_paper_and_the_dense_matrix_agree_with_it(kind):
    g, v = oracles.gradients(kind, N, D), some(1, 1)[0]
    got = build(g, None)
    recursion = reference.static_recursion(jnp.asarray(g), LAM)
    dense = np.linalg.inv(np.asarray(reference.dense_fisher(jnp.asarray(g), LAM), np.float64))
    condition = oracles.condition(g, LAM) * oracles.cancellation(v, dense @ v, LAM)
    for want in (reference.static_ihvp(recursion, jnp.asarray(v)), dense @ v):
        oracles.assert_close(got.ihvp(jnp.asarray(v)), want, length=D, condition=condition)
    for want in (reference.static_diagonal(recursion), np.diag(dense)):
        oracles.assert_close(oracles.flat(got.diagonal()), want, length=D, condition=condition)


@pytest.mark.parametrize("n", [1, 15, 16, 60])
def test_both_sides_of_n_and_b(n):
    g, v = some(n), some(1, 1)[0]
    for blocks, sizes in ((None, [D]), (15, [15, 11])):
        got = build(g, blocks)
        if n >= D:
            assert isinstance(got, BlockInverse)
        want = oracles.block_inverse(g, LAM, sizes) @ v
        condition = np.linalg.cond(oracles.fisher(g, LAM))
        oracles.assert_close(got.ihvp(jnp.asarray(v)), want, length=D, condition=condition)


def test_more_gradients_than_coordinates_take_the_direct_side():
    got = build(some(D), None)
    assert type(got.parts[0]).__name__ == "_DirectBlocks"
    got = build(some(D - 1), None)
    assert isinstance(got, WholeInverse)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["whole", "tens", "fours"]))
def test_laws(seed, name):
    _, sizes = BLOCKS[name]
    g, (u, v) = some(N, seed), some(2, seed + 1)
    got = BUILD[name](jnp.asarray(g))
    fisher = np.zeros((D, D))
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        fisher[part, part] = oracles.fisher(g[:, part], LAM)
        start += size
    condition = np.linalg.cond(fisher)
    solved = np.asarray(IHVP(got, jnp.asarray(v)), np.float64)
    oracles.assert_close(fisher @ solved, v, length=D, condition=condition)
    other = np.asarray(IHVP(got, jnp.asarray(u)), np.float64)
    scale = np.linalg.norm(u) * np.linalg.norm(solved)
    assert abs(u @ solved - v @ other) <= oracles.tolerance(np.float32, D, condition) * scale
    assert solved @ v > 0


BUILD = {
    name: jax.jit(lambda g, blocks=blocks: fisher_inverse(gradient_rows(g), LAM, blocks=blocks))
    for name, (blocks, _) in BLOCKS.items()
}
IHVP = jax.jit(lambda inverse, v: inverse.ihvp(v))


@pytest.mark.parametrize("name", ["whole", "leaf"])
def test_the_order_of_gradients_does_not_matter(name):
    g, v = some(N), some(1, 1)[0]
    one = IHVP(BUILD[name](jnp.asarray(g)), jnp.asarray(v))
    two = IHVP(BUILD[name](jnp.asarray(g[::-1])), jnp.asarray(v))
    oracles.assert_close(one, two, length=D, condition=oracles.condition(g, LAM) ** 2)


@pytest.mark.parametrize("name", ["whole", "fours", "leaf"])
def test_entries_traced_and_out_of_range(name):
    g = some(N)
    got = build(g, BLOCKS[name][0])
    dense = oracles.block_inverse(g, LAM, BLOCKS[name][1])
    i, j = np.array([0, 9, 25]), np.array([3, 9, 0])
    traced = jax.jit(lambda inverse, i, j: inverse.entries(i, j))(got, i, j)
    oracles.assert_close(traced, dense[i, j], length=D, condition=oracles.condition(g, LAM))
    with pytest.raises(ValueError, match=r"rows must lie in 0..25, got 26"):
        got.entries(26, 0)
    with pytest.raises(ValueError, match=r"columns must lie in 0..25, got -1"):
        got.entries(0, np.array([2, -1]))
    with pytest.raises(TypeError, match="rows must be an integer index, got float32"):
        got.entries(jnp.ones(2), 0)


@functools.partial(jax.jit, static_argnums=2)
def diagonals(held, damping, blocks):
    whole = fisher_inverse(held, damping, blocks=blocks).diagonal()
    return whole, inverse_diagonal(held, damping, blocks=blocks)


@pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("kind", ["duplicated", "one row 1e6", "correlated"])
def test_the_diagonal_is_positive_and_above_its_bound(kind, damping):
    g = oracles.gradients(kind, N, D)
    bound = 1 / np.diag(oracles.fisher(g, damping))
    for name in ("whole", "tens"):
        for diagonal in diagonals(gradient_rows(g), damping, BLOCKS[name][0]):
            assert np.all(oracles.flat(diagonal) >= bound * (1 - 1e-5))


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("kind", ["independent", "correlated", "duplicated"])
def test_the_single_precision_diagonal_is_within_a_thousandth_from_damping_1e_8_on(kind, scale):
    """Entry by entry: whole, blocks with B < n, and blocks with B > n."""
    n, d = 64, 512
    g = oracles.gradients(kind, n, d)
    g = (scale * g / np.sqrt(np.mean(np.square(g, dtype=np.float64)))).astype(np.float32)
    held = rows.as_rows(jnp.asarray(g))
    for damping in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        for blocks, size in ((None, d), (32, 32), (128, 128)):
            want = np.diag(oracles.block_inverse(g, damping, [size] * (d // size)))
            for got in diagonals(held, jnp.float32(damping), blocks):
                assert np.all(np.asarray(got) > 0)
                np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize(("name", "storage"), [("whole", "per_leaf"), ("tens", "flat")])
def test_the_diagonal_of_a_masked_fisher(name, storage):
    g = some(N)
    keep = np.arange(D) % 3 > 0
    mask = jax.tree.map(lambda x: x > 0, tree(keep.astype(np.float32)))
    blocks, sizes = BLOCKS[name]
    got = jax.jit(lambda held: inverse_diagonal(held, LAM, blocks=blocks, mask=mask))(
        gradient_rows(g, storage)
    )
    want = np.diag(oracles.block_inverse(g * keep, LAM, sizes))
    oracles.assert_close(
        oracles.flat(got), want, length=D, condition=oracles.condition(g * keep, LAM)
    )


@pytest.mark.parametrize("name", ["whole", "tens", "fours"])
def test_samples_have_the_covariance_of_the_inverse(name):
    blocks, sizes = BLOCKS[name]
    g, count = some(N), 20_000
    got = build(g, blocks)
    assert got.entries(2, 2).shape == ()
    draws = jax.jit(jax.vmap(got.sample))(jax.random.split(jax.random.key(0), count))
    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(count, -1) for x in jax.tree.leaves(draws)], axis=1
    )
    want = oracles.block_inverse(g, LAM, sizes)
    size = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    # An entry of a sample covariance has a standard error of at most sqrt(2 / count).
    np.testing.assert_array_less(
        np.abs(flat.T @ flat / count - want) / size, 6 * np.sqrt(2 / count)
    )
    np.testing.assert_array_less(np.abs(flat.mean(0)) / np.sqrt(np.diag(want)), 6 / np.sqrt(count))


@pytest.mark.parametrize("name", ["whole", "tens"])
def test_an_inverse_is_a_pytree(name):
    got = build(some(N), BLOCKS[name][0])
    leaves, treedef = jax.tree.flatten(got)
    again = jax.tree.unflatten(treedef, leaves)
    assert jax.tree.structure(again) == treedef
    v = jnp.asarray(some(1, 1)[0])
    np.testing.assert_array_equal(again.ihvp(v), got.ihvp(v))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["whole", "tens"])
def test_float64(name):
    blocks, sizes = BLOCKS[name]
    rng = np.random.default_rng(0)
    g, v = rng.normal(size=(N, D)), rng.normal(size=D)
    _, got = answers(gradient_rows(g), jnp.asarray(v), blocks)
    want = oracles.block_inverse(g, LAM, sizes)
    assert got["flat"].dtype == jnp.float64
    np.testing.assert_allclose(got["flat"], want @ v, 1e-10)
    np.testing.assert_allclose(oracles.flat(got["diagonal"]), np.diag(want), 1e-10)
    np.testing.assert_allclose(got["log_det"], oracles.log_det(want), 1e-10)


def test_low_precision_gradients():
    g = jnp.asarray(some(N), jnp.bfloat16)
    stored = np.asarray(g, np.float64)
    for name in ("whole", "fours", "tens"):
        blocks, sizes = BLOCKS[name]
        got, _ = diagonals(gradient_rows(g), LAM, blocks)
        want = np.diag(oracles.block_inverse(stored, LAM, sizes))
        oracles.assert_close(
            oracles.flat(got), want, length=D, condition=oracles.condition(stored, LAM)
        )


def test_damping_may_be_traced():
    g, v = some(N), some(1, 1)[0]
    solve = jax.jit(lambda held, lam: fisher_inverse(held, lam).ihvp(jnp.asarray(v)))
    for lam in (0.05, 2.0):
        want = oracles.inverse(g, lam) @ v
        condition = oracles.condition(g, lam) * oracles.cancellation(v, want, lam)
        oracles.assert_close(solve(gradient_rows(g), lam), want, length=D, condition=condition)


def test_partition():
    layout = gradient_rows(some(1)).layout
    for blocks, sizes in BLOCKS.values():
        runs = block_runs(layout, blocks)
        assert [run.size for run in runs for _ in range(run.count)] == sizes
        assert sum(run.width for run in runs) == D
    assert len(block_runs(layout, 13)) == 1
    assert len(block_runs(layout, 100)) == 1


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (0, ValueError, "blocks must be at least 1, got 0"),
        ((3, 4), ValueError, r"add up to d = 26, got 2 sizes that add up to 7"),
        ((30, -4), ValueError, "blocks must be at least 1, got -4"),
        ("layer", ValueError, "blocks must be one of 'leaf'; got 'layer'"),
    ],
)
def test_impossible_blocks_are_refused(blocks, error, message):
    for entry in (fisher_inverse, inverse_diagonal):
        with pytest.raises(error, match=message):
            entry(gradient_rows(some(N)), LAM, blocks=blocks)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_impossible_damping_is_refused(damping):
    for entry in (fisher_inverse, inverse_diagonal):
        with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
            entry(gradient_rows(some(N)), damping)


def test_a_vector_that_does_not_fit_is_refused():
    for name in ("whole", "tens"):
        got = build(some(N), BLOCKS[name][0])
        with pytest.raises(ValueError, match="vector does not have the structure"):
            got.ihvp({"a": PARAMS["a"]})
        with pytest.raises(ValueError, match=r"vector\['b'\].*expected \(15,\), got \(14,\)"):
            got.quadratic_form(PARAMS | {"b": jnp.zeros(14)})


MANY_BLOCKS = """
import jax, jax.numpy as jnp, numpy as np
from mfac_jax import fisher_inverse, inverse_diagonal, rows

sizes = (128,) * 500 + (100,) * 500 + (64,) * 500
gradients = np.random.default_rng(0).standard_normal((256, sum(sizes)), np.float32)
held = rows.as_rows(jnp.asarray(gradients))
inverse = jax.jit(lambda held: fisher_inverse(held, 0.01, blocks=sizes).diagonal())
for _ in range(3):
    whole = jax.block_until_ready(inverse(held))
    pieces = jax.jit(lambda held: inverse_diagonal(held, 0.01, blocks=sizes))(held)
np.testing.assert_allclose(whole, pieces, rtol=1e-5)
"""


@pytest.mark.usefixtures("as_users_compile")
def test_many_blocks_of_several_sizes_do_not_wait_for_one_another():
    """A process of its own, which can be stopped: XLA would let them wait forever."""
    subprocess.run([sys.executable, "-c", MANY_BLOCKS], check=True, timeout=240)
