"""The one inverse, whole and in blocks, as it is and whitened, against the dense matrix."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import outside
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_jax import fisher_inverse, reference, rows
from mfac_jax.inverse._inverse import inverse_of, products_suffice, whole_inverse
from mfac_jax.rows import BlockRun, Dense, Partition, partition

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


def gradient_rows(g, packing="flat"):
    storage = outside.Host() if packing == "host" else Dense(packing=packing)
    return rows.as_rows(tree(g), PARAMS, storage=storage)


def some(count, seed=0, d=D):
    return np.random.default_rng(seed).normal(size=(count, d)).astype(np.float32)


def unchecked(held, mask, blocks):
    """The inverse in blocks of any coordinates."""
    return inverse_of(held, mask, jnp.float32(LAM), blocks, lambda: held.gram(mask))


def build(g, blocks, packing="flat", damping=LAM):
    return jax.jit(lambda held: fisher_inverse(held, damping, blocks=blocks))(
        gradient_rows(g, packing)
    )


KEEP = np.arange(D) % 3 > 0
MASKS = {"all": np.ones(D, bool), "some": KEEP, "none": np.zeros(D, bool)}
# Not int64: while it traces, JAX keeps an array's dtype from before x64 was switched off.
ROW = np.array([[0, 7, 25], [8, 22, 3]], np.int32)
COLUMN = np.array([1, 7, 23], np.int32)
COEFFICIENTS = np.random.default_rng(9).normal(size=N).astype(np.float32)


def answers(held, v, coefficients, mask, *, blocks, whitened):
    inverse = fisher_inverse(held, LAM, mask=mask, blocks=blocks)
    inverse = inverse.whiten() if whitened else inverse
    gone = v if mask is None else jax.tree.map(lambda k, x: jnp.where(k, 0, x), mask, v)
    return {
        "flat": inverse.ihvp(jnp.concatenate([x.ravel() for x in jax.tree.leaves(v)])),
        "tree": inverse.ihvp(v),
        "combination": inverse.combination(coefficients),
        "compensate": inverse.compensate(gone),
        "submatrix": inverse.submatrix(jnp.arange(D)),
        "entries": inverse.entries(ROW, COLUMN),
        "diagonal": inverse.diagonal(),
        "quadratic": inverse.quadratic_form(v),
        "log_det": inverse.log_det(),
    }


jitted_answers = jax.jit(answers, static_argnames=("blocks", "whitened"))


def block_diagonal_fisher(g, sizes, damping=LAM):
    fisher, start = np.zeros((D, D)), 0
    for size in sizes:
        part = slice(start, start + size)
        fisher[part, part] = oracles.fisher(g[:, part], damping)
        start += size
    return fisher


CASES = [
    *((name, "flat", "all", whitened) for name in BLOCKS for whitened in (False, True)),
    *((name, "flat", "some", whitened) for name in BLOCKS for whitened in (False, True)),
    *(("whole", "leaf", mask, whitened) for mask in MASKS for whitened in (False, True)),
    *(("tens", "leaf", mask, whitened) for mask in MASKS for whitened in (False, True)),
    *((name, "host", "some", whitened) for name in BLOCKS for whitened in (False, True)),
]


@pytest.mark.parametrize(("name", "packing", "mask", "whitened"), CASES)
def test_every_answer_is_that_of_the_dense_matrix(name, packing, mask, whitened):
    blocks, sizes = BLOCKS[name]
    g, v, keep = some(N), some(1, 1)[0], MASKS[mask]
    chosen = None if mask == "all" else tree(keep)
    held = gradient_rows(g, packing)
    got = (jitted_answers if held.is_traceable else answers)(
        held, tree(v), COEFFICIENTS, chosen, blocks=blocks, whitened=whitened
    )
    dense = oracles.block_inverse(g * keep, LAM, sizes)
    condition = oracles.condition(g * keep, LAM)
    close = {"length": D, "condition": condition}
    loose = {"length": D, "condition": condition * oracles.cancellation(v, dense @ v, LAM)}
    for key in ("tree", "combination", "compensate", "diagonal"):
        assert jax.tree.structure(got[key]) == jax.tree.structure(PARAMS)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[key]))
    oracles.assert_close(got["flat"], dense @ v, **loose)
    oracles.assert_close(oracles.flat(got["tree"]), dense @ v, **loose)
    want = dense @ (g * keep).T @ COEFFICIENTS
    oracles.assert_close(oracles.flat(got["combination"]), want, **close)
    gone = v if mask == "all" else np.where(keep, 0, v)
    within = block_diagonal_fisher(g, sizes, 0.0) * keep[:, None]  # 0 between two blocks
    oracles.assert_close(oracles.flat(got["compensate"]), dense @ within @ gone, **close)
    oracles.assert_close(got["submatrix"], dense, **close)
    oracles.assert_close(got["entries"], dense[ROW, COLUMN], **close)
    oracles.assert_close(oracles.flat(got["diagonal"]), np.diag(dense), **close)
    oracles.assert_close(got["quadratic"], v @ dense @ v, **loose)
    oracles.assert_close(got["log_det"], oracles.log_det(dense), **close)


@pytest.mark.parametrize("name", ["whole", "tens", "fours"])
def test_weights_that_stay_compensate_as_well_as_they_can(name):
    """No other change of them lowers ``delta^T F delta``."""
    g, gone = some(N), np.where(KEEP, 0, some(1, 1)[0])
    inverse = fisher_inverse(gradient_rows(g), LAM, mask=tree(KEEP), blocks=BLOCKS[name][0])
    change = oracles.flat(inverse.compensate(tree(gone)))
    np.testing.assert_array_equal(change[~KEEP], 0)
    fisher = block_diagonal_fisher(g, BLOCKS[name][1])
    slope = (fisher @ (change - gone))[KEEP]
    assert np.max(np.abs(slope)) < 1e-5 * np.max(np.abs(fisher @ gone))


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
        assert got.is_whole == (n < D and blocks is None)
        want = oracles.block_inverse(g, LAM, sizes) @ v
        condition = np.linalg.cond(oracles.fisher(g, LAM))
        oracles.assert_close(got.ihvp(jnp.asarray(v)), want, length=D, condition=condition)


@pytest.mark.parametrize(("n", "blocks"), [(D - 1, "whole"), (D, "direct"), (5, "whitened")])
def test_the_cheaper_side_is_factored(n, blocks):
    inverse = build(some(n), 10 if blocks == "whitened" else None)
    assert products_suffice(n, inverse.blocks) == (blocks == "whole")
    assert inverse.is_whole == (blocks == "whole")
    if blocks == "whole":
        assert inverse.factor.lower.shape == (n, n)
        assert inverse.whiten().whitened.blocks.shape == (1, n, D)
    else:
        shapes = {"direct": [(1, D, D)], "whitened": [(2, 5, 10), (1, 5, 6)]}[blocks]
        first = [jax.tree.leaves(part)[0].shape for part in inverse.whiten().inverted]
        assert first == shapes


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["whole", "tens", "fours"]))
def test_laws(seed, name):
    _, sizes = BLOCKS[name]
    g, (u, v) = some(N, seed), some(2, seed + 1)
    got = BUILD[name](jnp.asarray(g))
    fisher = block_diagonal_fisher(g, sizes)
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
    inverse = fisher_inverse(held, damping, blocks=blocks)
    return inverse.diagonal(), inverse.whiten().diagonal()


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


@pytest.mark.parametrize("mask", ["all", "some"])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("name", ["whole", "tens", "fours"])
def test_samples_have_the_covariance_of_the_inverse(name, whitened, mask, monkeypatch):
    """A draw is linear in its noise: unit vectors of noise give its matrix ``M``, ``M M^T``."""
    blocks, sizes = BLOCKS[name]
    g, keep = some(N), MASKS[mask]
    inverse = fisher_inverse(gradient_rows(g), LAM, mask=tree(keep), blocks=blocks)
    inverse = inverse.whiten() if whitened else inverse
    count = D + (N if blocks is None else D)

    def draw(unit):
        left = iter([unit[:D], unit[D:]])
        monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: next(left))
        return inverse.sample(jax.random.key(0))

    draws = jax.vmap(draw)(jnp.eye(count))
    monkeypatch.undo()
    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(count, -1) for x in jax.tree.leaves(draws)], axis=1
    )
    want = oracles.block_inverse(g * keep, LAM, sizes)
    condition = oracles.condition(g * keep, LAM)
    oracles.assert_close(flat.T @ flat, want, length=count, condition=condition)


def test_scattered_blocks_on_both_sides_of_n_have_the_right_samples():
    """A small block that was padded to more than n would have too little noise."""
    g = some(8)[:, :16]
    order = jnp.asarray(np.random.default_rng(1).permutation(16).astype(np.int32))
    blocks = Partition(order, (BlockRun(0, 1, 12), BlockRun(12, 1, 4)))
    inverse = unchecked(rows.as_rows(jnp.asarray(g, jnp.float32)), None, blocks)
    draws = jax.vmap(inverse.sample)(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(np.var(draws, axis=0), inverse.diagonal(), rtol=0.1)


def test_coordinates_in_no_block():
    g = some(N)
    blocks = Partition(None, (BlockRun(4, 2, 3),))
    lone = unchecked(gradient_rows(g), None, blocks)
    inside = np.zeros(D, bool)
    inside[4:10] = True
    want = np.diag(oracles.block_inverse(g * inside, LAM, [4, 3, 3, D - 10]))
    for inverse in (lone, lone.whiten()):
        diagonal = oracles.flat(inverse.diagonal())
        np.testing.assert_allclose(diagonal, want, 1e-4)
        np.testing.assert_allclose(diagonal[~inside], 1 / LAM, 1e-6)


@pytest.mark.parametrize("name", ["whole", "tens"])
def test_samples_of_two_keys_differ(name):
    inverse = build(some(N), BLOCKS[name][0])
    one, again, other = (oracles.flat(inverse.sample(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.all(one != other)


@pytest.mark.parametrize("name", ["whole", "tens"])
def test_an_inverse_is_a_pytree(name):
    got = build(some(N), BLOCKS[name][0])
    for inverse in (got, got.whiten()):
        same = jax.jit(lambda inverse: inverse)(inverse)
        assert jax.tree.structure(same) == jax.tree.structure(inverse)
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
    c = np.asarray(COEFFICIENTS, np.float64)
    got = jitted_answers(gradient_rows(g), tree(v), c, None, blocks=blocks, whitened=False)
    want = oracles.block_inverse(g, LAM, sizes)
    assert got["flat"].dtype == jnp.float64
    np.testing.assert_allclose(got["flat"], want @ v, 1e-10)
    np.testing.assert_allclose(oracles.flat(got["diagonal"]), np.diag(want), 1e-10)
    np.testing.assert_allclose(oracles.flat(got["combination"]), want @ g.T @ c, 1e-10)
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
    with pytest.raises(error, match=message):
        fisher_inverse(gradient_rows(some(N)), LAM, blocks=blocks)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_impossible_damping_is_refused(damping):
    with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
        fisher_inverse(gradient_rows(some(N)), damping)


def test_a_vector_that_does_not_fit_is_refused():
    for name in ("whole", "tens"):
        got = build(some(N), BLOCKS[name][0])
        with pytest.raises(ValueError, match="vector does not have the structure"):
            got.ihvp({"a": PARAMS["a"]})
        with pytest.raises(ValueError, match=r"vector\['b'\].*expected \(15,\), got \(14,\)"):
            got.quadratic_form(PARAMS | {"b": jnp.zeros(14)})


@pytest.mark.parametrize("name", ["whole", "tens"])
def test_vmap_over_dampings(name):
    g, v = some(N), some(1, 1)[0]
    held, dampings = gradient_rows(g), np.array([0.05, 0.3, 2.0], np.float32)

    def ask(damping):
        inverse = fisher_inverse(held, damping, blocks=BLOCKS[name][0])
        return inverse.ihvp(jnp.asarray(v)), inverse.diagonal()

    got, diagonals = jax.vmap(ask)(dampings)
    for i, damping in enumerate(dampings):
        want = oracles.block_inverse(g, damping, BLOCKS[name][1])
        condition = np.linalg.cond(block_diagonal_fisher(g, BLOCKS[name][1], damping))
        close = {"length": D, "condition": condition}
        oracles.assert_close(got[i], want @ v, **close)
        own = [leaf[i] for leaf in jax.tree.leaves(diagonals)]
        oracles.assert_close(oracles.flat(own), np.diag(want), **close)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["whole", "tens"])
def test_vectors_come_back_in_their_dtype(name, dtype):
    inverse = fisher_inverse(gradient_rows(some(N)), LAM, mask=tree(KEEP), blocks=BLOCKS[name][0])
    v = jnp.asarray(some(1, 1)[0], dtype)
    want = oracles.block_inverse(some(N) * KEEP, LAM, BLOCKS[name][1]) @ np.asarray(v, np.float64)
    got = inverse.ihvp(tree(v))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    oracles.assert_close(oracles.flat(got), want, length=1, dtype=dtype)
    assert inverse.ihvp(v).dtype == dtype
    assert inverse.quadratic_form(tree(v)).dtype == jnp.float32


@pytest.mark.parametrize("damping", [1e-6, 1e-3])
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_combinations_of_gradients_of_every_kind(kind, damping):
    """Relative to the gradients' own scale; blocks on both sides of n."""
    g = oracles.gradients(kind, N, D)
    lam = oracles.damping_for(g, damping)
    for name in ("whole", "tens", "fours"):
        blocks, sizes = BLOCKS[name]
        got = oracles.flat(build(g, blocks, damping=lam).combination(COEFFICIENTS))
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            here, start = g[:, part], start + size
            want = oracles.ihvp_combination(here, COEFFICIENTS, lam)
            if size > N:
                condition = oracles.condition(here, lam)
            else:
                condition = np.linalg.cond(oracles.fisher(here, lam))
            oracles.assert_close(got[part], want, length=D, condition=condition)


@pytest.mark.parametrize("name", ["whole", "tens"])
def test_a_gradient_that_is_there_three_times(name):
    """Its coefficients are shared: without, their rounding errors are over the damping."""
    n, d, lam = 16, 40, 1e-7
    rng = np.random.default_rng(0)
    g = rng.normal(size=(n, d)).astype(np.float32) / np.sqrt(np.float32(d))
    g[5] = g[11] = g[0]
    coefficients = np.zeros(n, np.float32)
    coefficients[0] = 1
    blocks, sizes = (None, [d]) if name == "whole" else (20, [20, 20])
    inverse = fisher_inverse(rows.as_rows(jnp.asarray(g)), lam, blocks=blocks)
    got = np.asarray(inverse.combination(coefficients), np.float64)
    start = 0
    for size in sizes:
        want = oracles.ihvp_combination(g[:, start : start + size], coefficients, lam)
        assert oracles.relative_error(got[start : start + size], want) < 1e-3
        start += size


def test_coefficients_must_be_one_a_gradient():
    for name in ("whole", "tens"):
        with pytest.raises(ValueError, match=r"shape \(6,\), one for each gradient; got \(7,\)"):
            build(some(N), BLOCKS[name][0]).combination(jnp.ones(7))


@pytest.mark.parametrize("name", ["whole", "tens"])
def test_a_mask_that_does_not_fit_is_refused(name):
    held, blocks = gradient_rows(some(N)), BLOCKS[name][0]
    with pytest.raises(TypeError, match=r"mask\['a'\] must be boolean, got float32"):
        fisher_inverse(held, LAM, mask=PARAMS, blocks=blocks)
    with pytest.raises(ValueError, match="mask does not have the structure"):
        fisher_inverse(held, LAM, mask={"a": True}, blocks=blocks)
    # One boolean stands for a whole parameter.
    mask = {"a": True, "none": None, "b": False, "c": np.array([True, False, True])}
    keep = np.concatenate([np.ones(8, bool), np.zeros(15, bool), mask["c"]])
    inverse = fisher_inverse(held, LAM, mask=mask, blocks=blocks)
    same = fisher_inverse(held, LAM, mask=tree(keep), blocks=blocks)
    np.testing.assert_array_equal(oracles.flat(inverse.diagonal()), oracles.flat(same.diagonal()))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["whole", "tens"])
def test_gradients_must_be_finite_where_the_mask_is_false_too(name, bad):
    g = some(N)
    g[2, 9] = bad
    message = r"finite, also where mask is false; got NaN or Inf in those of params\['b'"
    with pytest.raises(FloatingPointError, match=message):
        fisher_inverse(gradient_rows(g), LAM, mask=tree(KEEP), blocks=BLOCKS[name][0])


def test_parameters_without_coordinates():
    held = Dense().empty({"a": None, "z": jnp.zeros((0, 2))}, 3)
    empty = {"a": None, "z": jnp.zeros((0, 2))}
    for inverse in (fisher_inverse(held, LAM), fisher_inverse(held, LAM, blocks=4).whiten()):
        for got in (
            inverse.ihvp(empty),
            inverse.combination(jnp.ones(3)),
            inverse.compensate(empty),
            inverse.diagonal(),
            inverse.sample(jax.random.key(0)),
        ):
            assert jax.tree.map(jnp.shape, got) == {"a": None, "z": (0, 2)}
        assert inverse.log_det() == 0
        assert inverse.quadratic_form(empty) == 0


# Groups of coordinates.


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a function of groups finds in them, as a number a coordinate."""

    what: str

    def __call__(self, groups, weights, alive, factor):
        assert alive.dtype == bool
        assert groups.floor.shape == weights.shape
        if self.what == "matrix":
            found = jnp.einsum("...ij,...j->...i", groups.matrix, weights, precision="highest")
        elif self.what == "floor":
            found = groups.floor
        else:
            cost = groups.inverse_quadratic_form(weights)
            found = jnp.broadcast_to(cost[..., None], weights.shape)
        return jnp.where(alive, factor * found, jnp.zeros_like(found))


ORDER = np.random.default_rng(3).permutation(D).astype(np.int32)
# Pieces of places; groups of more than 16 are factored, of more than n = 6 are wide.
GROUPS = {
    "ones": (BlockRun(0, D, 1),),
    "threes": (BlockRun(0, 8, 3),),
    "wide": (BlockRun(0, 2, 8), BlockRun(16, 1, 10)),
    "several": (BlockRun(0, 3, 2), BlockRun(6, 1, 4), BlockRun(12, 1, 7)),
}


def groups_of(runs, order):
    places = np.arange(D) if order is None else order
    for run in runs:
        for i in range(run.count):
            yield places[run.start + i * run.size : run.start + (i + 1) * run.size]


def assert_groups(found, dense, fisher, groups, weights, keep, condition):
    want = {name: np.zeros(D) for name in found}
    for q in groups:
        block = dense[np.ix_(q, q)]
        want["matrix"][q] = block @ weights[q]
        want["floor"][q] = 1 / np.diag(fisher)[q]
        want["cost"][q] = weights[q] @ np.linalg.solve(block, weights[q])
    for name, got in found.items():
        assert jax.tree.structure(got) == jax.tree.structure(PARAMS)
        close = {"length": D, "condition": condition}
        oracles.assert_close(oracles.flat(got), -2 * want[name] * keep, **close)


@pytest.mark.parametrize("order", ["as they are", "permuted"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_the_whole_inverse(groups, order):
    g, keep, runs = some(N), KEEP, GROUPS[groups]
    weights = np.where(keep, some(1, 1)[0], 0)
    places = None if order == "as they are" else ORDER
    inverse = fisher_inverse(gradient_rows(g), LAM, mask=tree(keep))
    cut = Partition(None if places is None else jnp.asarray(places), runs)
    found = {
        what: inverse.group_blocks(
            cut, Ask(what), tree(weights), tree(keep), constants=(jnp.float32(-2),)
        )
        for what in ("matrix", "floor", "cost")
    }
    dense, fisher = oracles.inverse(g * keep, LAM), oracles.fisher(g * keep, LAM)
    condition = np.linalg.cond(fisher)
    assert_groups(found, dense, fisher, groups_of(runs, places), weights, keep, condition)


@pytest.mark.parametrize(
    ("blocks", "size"), [(4, 2), (4, None), (12, 2), (12, 1), (20, None), (13, 13), (None, None)]
)
@pytest.mark.parametrize("order", ["as they are", "permuted"])
@pytest.mark.parametrize("n", [N, 13])
def test_groups_in_blocks(blocks, size, order, n):
    """Blocks on both sides of n; their groups are neighbours in them."""
    g, keep = some(n), KEEP
    weights = np.where(keep, some(1, 1)[0], 0)
    places = None if order == "as they are" else ORDER
    held = gradient_rows(g)
    runs = partition(held.layout, blocks).runs
    cut = Partition(None if places is None else jnp.asarray(places), runs)
    inverse = unchecked(held, tree(keep), cut)
    found = {
        what: inverse.group_blocks(
            size, Ask(what), tree(weights), tree(keep), constants=(jnp.float32(-2),)
        )
        for what in ("matrix", "floor", "cost")
    }
    dense, fisher, groups = np.zeros((D, D)), np.zeros((D, D)), []
    for q in groups_of(runs, places):
        dense[np.ix_(q, q)] = oracles.inverse((g * keep)[:, q], LAM)
        fisher[np.ix_(q, q)] = oracles.fisher((g * keep)[:, q], LAM)
        groups += np.split(q, len(q) // (size or len(q)))
    condition = np.linalg.cond(fisher)
    assert_groups(found, dense, fisher, groups, weights, keep, condition)


@pytest.mark.on_cpu
def test_the_matrix_of_a_wide_group_is_not_computed_unless_it_is_asked_for():
    n, d = 4, 2**14
    held = Dense().empty(jnp.zeros(d), n)
    runs = (BlockRun(0, 2, d // 2),)

    def memory(what):
        def ask(held, weights):
            inverse = fisher_inverse(held, 0.1)
            ones = jnp.ones(d, bool)
            constants = (jnp.float32(1),)
            return inverse.group_blocks(
                Partition(None, runs), Ask(what), weights, ones, constants=constants
            )

        compiled = jax.jit(ask).lower(held, jnp.zeros(d)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory("cost") < 32 * n * d
    assert memory("matrix") > (d // 2) ** 2


def test_groups_of_neighbours_under_the_whole_inverse():
    """A number of neighbours means what the partition into them means."""
    inverse, weights, keep = build(some(N), None), tree(some(1, 1)[0]), tree(np.ones(D, bool))
    pairs = partition(inverse.rows.layout, 2)
    one = (jnp.float32(1),)
    got, want = (
        inverse.group_blocks(groups, Ask("cost"), weights, keep, constants=one)
        for groups in (2, pairs)
    )
    np.testing.assert_array_equal(oracles.flat(got), oracles.flat(want))


@pytest.mark.wrong_types
def test_groups_of_the_wrong_kind_are_refused():
    whole, blocks = (build(some(N), BLOCKS[name][0]) for name in ("whole", "fours"))
    for inverse, size in ((whole, D), (blocks, 2)):
        for groups, error, message in (
            (0, ValueError, "groups must be at least 1, got 0"),
            (1.5, TypeError, "groups must be a Python int, got float"),
            (5, ValueError, rf"groups of 5 in blocks of .*{size}"),
        ):
            with pytest.raises(error, match=message):
                inverse.group_blocks(groups, Ask("floor"))
    with pytest.raises(ValueError, match=f"got a block that ends at {D + 1}"):
        whole.group_blocks(Partition(None, (BlockRun(0, 1, D + 1),)), Ask("floor"))
    with pytest.raises(TypeError, match="must be an int or None, got a Partition"):
        blocks.group_blocks(Partition(None, ()), Ask("floor"))
    with pytest.raises(ValueError, match=r"groups of 4 in blocks of \[2, 4\]"):
        blocks.group_blocks(4, Ask("floor"))


def test_a_gram_matrix_that_is_known_is_not_computed_again():
    held, cut = gradient_rows(some(N)), partition(gradient_rows(some(N)).layout, None)
    gram = 4 * held.gram()
    inverse = inverse_of(held, None, jnp.float32(LAM), cut, lambda: gram)
    assert inverse.gram is gram

    def refuse():
        raise AssertionError("blocks need no Gram matrix")

    inverse_of(held, None, jnp.float32(LAM), partition(held.layout, 4), refuse)


def test_one_block_is_whole_where_that_is_asked_for():
    """Of fewer coordinates than gradients, by an n x n factor all the same."""
    g, v = some(D + 4), some(1, 1)[0]
    held = gradient_rows(g)
    cut = partition(held.layout, None)
    inverse = whole_inverse(held, None, jnp.float32(LAM), cut, held.gram())
    assert inverse.is_whole
    want = oracles.inverse(g, LAM) @ v
    condition = oracles.condition(g, LAM) * oracles.cancellation(v, want, LAM)
    oracles.assert_close(inverse.ihvp(jnp.asarray(v)), want, length=D, condition=condition)


def test_blocks_of_scattered_coordinates_are_not_stored():
    cut = Partition(jnp.asarray(ORDER), (BlockRun(0, 13, 2),))
    inverse = unchecked(gradient_rows(some(N)), None, cut)
    for ask in (inverse.whiten, lambda: inverse.entries(0, 0)):
        with pytest.raises(ValueError, match="blocks of consecutive coordinates only"):
            ask()


def test_scattered_blocks_are_answered_where_they_lie():
    g, v = some(N), some(1, 1)[0]
    cut = Partition(jnp.asarray(ORDER), (BlockRun(0, 2, 10), BlockRun(20, 1, 6)))
    inverse = unchecked(gradient_rows(g), None, cut)
    dense = np.zeros((D, D))
    for q in groups_of(cut.runs, ORDER):
        dense[np.ix_(q, q)] = oracles.inverse(g[:, q], LAM)
    close = {"length": D, "condition": np.linalg.cond(dense)}
    oracles.assert_close(inverse.ihvp(jnp.asarray(v)), dense @ v, **close)
    oracles.assert_close(oracles.flat(inverse.diagonal()), np.diag(dense), **close)
    oracles.assert_close(inverse.log_det(), oracles.log_det(dense), **close)
    oracles.assert_close(inverse.quadratic_form(jnp.asarray(v)), v @ dense @ v, **close)


MANY_BLOCKS = """
import jax, jax.numpy as jnp, numpy as np
from mfac_jax import fisher_inverse, rows

sizes = (128,) * 500 + (100,) * 500 + (64,) * 500
gradients = np.random.default_rng(0).standard_normal((256, sum(sizes)), np.float32)
held = rows.as_rows(jnp.asarray(gradients))
stored = jax.jit(lambda held: fisher_inverse(held, 0.01, blocks=sizes).whiten().diagonal())
for _ in range(3):
    whole = jax.block_until_ready(stored(held))
    pieces = jax.jit(lambda held: fisher_inverse(held, 0.01, blocks=sizes).diagonal())(held)
np.testing.assert_allclose(whole, pieces, rtol=1e-5)
"""


@pytest.mark.once
@pytest.mark.usefixtures("as_users_compile")
def test_many_blocks_of_several_sizes_do_not_wait_for_one_another():
    """A process of its own, which can be stopped: XLA would let them wait forever."""
    subprocess.run([sys.executable, "-c", MANY_BLOCKS], check=True, timeout=240)
