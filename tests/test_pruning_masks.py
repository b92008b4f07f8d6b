"""Scores to masks: exact counts, ties, and what is pruned stays pruned."""

from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import pruning, rows
from mfac_jax.pruning import _masks

NAN, INF = float("nan"), float("inf")
T, F = True, False


def traced_count(sparsity, total):
    """Of a traced sparsity, without compiling for every total."""
    return jax.vmap(lambda s: _masks.pruned_count(s, total))(sparsity[None])[0]


def mask_of(scores, count, alive=None):
    scores = jnp.asarray(scores, jnp.float32)
    alive = jnp.ones(scores.shape, bool) if alive is None else jnp.asarray(alive)
    return pruning.mask_to_count(scores, alive, count).tolist()


@pytest.mark.parametrize(
    ("scores", "alive", "count", "expected"),
    [
        ([3, 1, 2, 4], [T, T, T, T], 0, [T, T, T, T]),
        ([3, 1, 2, 4], [T, T, T, T], 2, [T, F, F, T]),
        ([3, 1, 2, 4], [T, T, T, T], 4, [F, F, F, F]),
        # Ties go in order of coordinates, and no more of them than are wanted.
        ([1, 1, 1, 1], [T, T, T, T], 3, [F, F, F, T]),
        ([2, 1, 2, 1], [T, T, T, T], 1, [T, F, T, T]),
        ([2, 1, 2, 1], [T, T, T, T], 3, [F, F, T, F]),
        ([0.0, -0.0, 0.0, -0.0], [T, T, T, T], 2, [F, F, T, T]),
        # What is pruned already counts, whatever its score, and stays pruned.
        ([9, 1, 2, 3], [F, T, T, T], 1, [F, T, T, T]),
        ([9, 1, 2, 3], [F, T, T, T], 2, [F, F, T, T]),
        ([0, 0, 0, 0], [T, T, F, T], 2, [F, T, F, T]),
        # Scores that are not finite go last.
        ([NAN, 1e38, -INF, 0], [T, T, T, T], 2, [T, F, T, F]),
        ([NAN, INF, NAN, 0], [T, T, T, T], 2, [F, T, T, F]),
        ([NAN, 5, 6, 7], [F, T, T, T], 2, [F, F, T, T]),
        ([-3, 2, -1, -2], [T, T, T, T], 2, [F, T, T, F]),
    ],
)
def test_small_masks(scores, alive, count, expected):
    assert mask_of(scores, count, alive) == expected


def test_ties_run_through_the_leaves_in_order():
    scores = {"a": jnp.ones((1, 2)), "b": jnp.ones(3, jnp.bfloat16), "c": None}
    mask = pruning.mask_to_count(scores, pruning.initial_mask(scores), 3)
    assert mask["a"].tolist() == [[F, F]]
    assert mask["b"].tolist() == [F, T, T]
    assert mask["c"] is None


@pytest.mark.parametrize("output_axis", [0, -1])
@pytest.mark.parametrize("blocks", [None, 4])
def test_ties_go_in_the_order_of_the_caller_s_coordinates(output_axis, blocks):
    """Wherever outputs and blocks lie."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    _, mask, _ = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        rows.as_rows({"a": jnp.ones((2, 2, 3)), "b": jnp.ones((2, 3, 2))}),
        8 / 12,
        damping=0.1,
        score="magnitude",
        blocks=blocks,
        scope=pruning.Scope("", output_axis=output_axis, allow_empty_layers=True),
    )
    assert mask["a"].tolist() == [[F, F, F], [F, F, F]]
    assert mask["b"].tolist() == [[F, F], [T, T], [T, T]]


FEW_SCORES = st.sampled_from([0.0, 1.0, 1.5, -2.0, NAN, INF, 1e-30])


@hypothesis.given(
    scores=hnp.arrays(np.float32, 12, elements=FEW_SCORES),
    alive=hnp.arrays(bool, 12),
    sparsity=st.floats(0, 1),
)
def test_exactly_the_wanted_count_is_pruned(scores, alive, sparsity):
    wanted = round(sparsity * 12)
    already = int(np.sum(~alive))
    if wanted < already:
        with pytest.raises(ValueError, match=r"sparsity must not lie below"):
            pruning.mask_to_sparsity(jnp.asarray(scores), jnp.asarray(alive), sparsity)
        return
    new = np.asarray(pruning.mask_to_sparsity(jnp.asarray(scores), jnp.asarray(alive), sparsity))
    assert np.sum(~new) == wanted
    assert not np.any(new & ~alive)
    finite = np.where(np.isfinite(scores), scores, INF)
    gone = alive & ~new
    if gone.any() and new.any():
        assert finite[gone].max() <= finite[new].min()


def test_many_scores_agree_with_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 50, 5000).astype(np.float32) * np.float32(1e-3)
    expected = np.ones(5000, bool)
    expected[np.argsort(scores, kind="stable")[:3333]] = False
    assert mask_of(scores, 3333) == expected.tolist()


@pytest.mark.x64
def test_double_precision_scores_are_not_rounded():
    scores = jnp.asarray([1 + 1e-12, 1.0, 1 + 2e-12])
    mask = pruning.mask_to_count(scores, jnp.ones(3, bool), 1)
    assert mask.tolist() == [T, F, T]


@hypothesis.given(
    quanta=st.integers(0, 2**24), total=st.integers(0, 2**31 - 1), exponent=st.integers(0, 6)
)
def test_the_count_of_a_traced_sparsity_is_exact(quanta, total, exponent):
    sparsity = np.float32(quanta / 2**24 / 2**exponent)
    count = int(traced_count(jnp.asarray(sparsity), total))
    q = round(Fraction(float(sparsity)) * 2**24)
    assert count == round(Fraction(q, 2**24) * total)


@pytest.mark.parametrize("total", [5, 2**24 + 3, 2**31 - 1])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 1.0])
def test_traced_and_known_sparsities_count_alike(sparsity, total):
    known = int(_masks.pruned_count(sparsity, total))
    assert known == round(Fraction(sparsity) * total)
    assert int(_masks.pruned_count(jnp.asarray(sparsity), total)) == known
    assert int(traced_count(jnp.asarray(sparsity), total)) == known


@pytest.mark.x64
def test_a_double_precision_sparsity_counts_as_the_number_does():
    total = 2**31 - 1
    assert int(traced_count(jnp.asarray(0.123456789), total)) == round(0.123456789 * total)


@pytest.mark.parametrize(("value", "count"), [(-1.0, 0), (2.0, 10), (NAN, 0), (INF, 10)])
def test_a_traced_sparsity_outside_its_range_is_clipped(value, count):
    traced = jax.jit(lambda sparsity: _masks.pruned_count(sparsity, 10))
    assert int(traced(jnp.asarray(value))) == count


def test_a_traced_sparsity_below_what_is_pruned_revives_nothing():
    mask = jnp.asarray([F, F, T, T])
    step = jax.jit(pruning.mask_to_sparsity)
    assert step(jnp.arange(4.0), mask, 0.25).tolist() == mask.tolist()
    assert step(jnp.arange(4.0), mask, 0.75).tolist() == [F, F, F, T]


@pytest.mark.parametrize(
    ("scores", "mask", "sparsity", "error", "message"),
    [
        (
            jnp.ones(3),
            jnp.ones(3, bool),
            1.5,
            ValueError,
            r"sparsity must lie in \[0, 1\], got 1.5",
        ),
        (jnp.ones(3), jnp.ones(3, bool), -0.1, ValueError, r"sparsity must lie in"),
        (jnp.ones(3), jnp.ones(3, bool), NAN, ValueError, r"sparsity must lie in"),
        (jnp.ones(3), jnp.ones(3, bool), True, TypeError, r"sparsity must be a number"),
        (jnp.ones(3), jnp.ones(3, bool), jnp.ones(2), ValueError, r"sparsity must be a scalar"),
        (jnp.ones(3), jnp.ones(4, bool), 0.5, ValueError, r"expected \(3,\) or \(\), got \(4,\)"),
        (jnp.ones(3), {"a": jnp.ones(3, bool)}, 0.5, ValueError, r"mask does not have the struc"),
        (jnp.ones(3), jnp.ones(3), 0.5, TypeError, r"mask must be boolean, got float32"),
        (
            jnp.ones(3, int),
            jnp.ones(3, bool),
            0.5,
            TypeError,
            r"scores must be a real .* int32\[3\]\. Convert it to float32\.$",
        ),
        (jnp.ones(3), jnp.asarray([F, F, T]), 0.5, None, None),
        (jnp.ones(3), jnp.asarray([F, F, T]), 0.4, ValueError, r"at least 2 of 3 .*\(1 weights\)"),
        (jnp.ones(3), jnp.asarray([F, F, T]), jnp.float32(0.4), ValueError, r"at least 2 of 3"),
    ],
)
def test_bad_sparsity(scores, mask, sparsity, error, message):
    if error is None:
        pruning.mask_to_sparsity(scores, mask, sparsity)
        return
    with pytest.raises(error, match=message):
        pruning.mask_to_sparsity(scores, mask, sparsity)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (4, ValueError, r"count must lie in 0\.\.3, got 4"),
        (-1, ValueError, r"count must lie in"),
        (0, ValueError, r"count must not lie below .* at least 1 of 3"),
        (1.0, TypeError, r"count must be an integer"),
        (jnp.asarray([1, 2]), ValueError, r"count must be a scalar"),
    ],
)
def test_bad_count(count, error, message):
    with pytest.raises(error, match=message):
        pruning.mask_to_count(jnp.ones(3), jnp.asarray([T, F, T]), count)


@pytest.mark.parametrize("prune", [pruning.mask_to_count, pruning.mask_to_sparsity])
def test_more_weights_than_int32_counts(prune):
    scores, mask = (jax.ShapeDtypeStruct((2**31,), dtype) for dtype in (jnp.float32, bool))
    with pytest.raises(
        ValueError, match="at most 2147483647 weights can be counted, got 2147483648"
    ):
        jax.eval_shape(lambda scores, mask: prune(scores, mask, 1), scores, mask)
