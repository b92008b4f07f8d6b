"""Saliencies and updates against dense float64 linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import pruning, rows

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 3, 2)}
SIZES = (12, 5, 12)
D = sum(SIZES)


def as_tree(vector, dtype=None):
    parts = np.split(np.asarray(vector), np.cumsum(SIZES)[:-1])
    leaves = {
        k: jnp.asarray(p.reshape(SHAPES[k]), dtype) for k, p in zip("abc", parts, strict=True)
    }
    return leaves | {"none": None}


def flat(tree):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


class Problem:
    """Weights, gradients, and who is alive before and after; in float64 NumPy."""

    def __init__(self, n, seed=0, gradients=None, prune=9):
        rng = np.random.default_rng(seed)
        self.w = rng.normal(size=D)
        self.g = rng.normal(size=(n, D)) if gradients is None else gradients
        order = rng.permutation(D)
        self.alive = np.ones(D, bool)
        self.alive[order[:6]] = False
        self.kept = self.alive.copy()
        self.kept[order[6 : 6 + prune]] = False

    def rows(self, packing="flat", dtype=None):
        stacked = [as_tree(g, dtype) for g in self.g]
        return rows.as_rows(
            jax.tree.map(lambda *x: jnp.stack(x), *stacked), storage=rows.Dense(packing=packing)
        )

    def args(self, packing="flat", dtype=None):
        return as_tree(self.w, dtype), self.rows(packing, dtype)

    @property
    def masks(self):
        return as_tree(self.alive), as_tree(self.kept)

    def fisher(self, damping, blocks=None):
        g = self.g * self.alive
        block = np.repeat(np.arange(len(sizes := block_sizes(blocks))), sizes)
        fisher = g.T @ g / len(g) * (block[:, None] == block[None, :])
        return fisher + damping * np.eye(D)

    def joint(self, damping, blocks=None):
        fisher, gone, kept = self.fisher(damping, blocks), self.alive & ~self.kept, self.kept
        delta = np.where(gone, -self.w, 0)
        rhs = fisher[np.ix_(kept, gone)] @ self.w[gone]
        delta[kept] = np.linalg.solve(fisher[np.ix_(kept, kept)], rhs)
        return delta

    def reference(self, damping, blocks=None):
        inverse = np.linalg.inv(self.fisher(damping, blocks))
        delta = np.zeros(D)
        for q in np.flatnonzero(self.alive & ~self.kept):
            delta -= self.w[q] / inverse[q, q] * inverse[:, q]
        return np.where(self.kept, delta, np.where(self.alive, -self.w, 0))


def block_sizes(blocks):
    if blocks is None:
        return [D]
    if blocks == "leaf":
        return list(SIZES)
    if isinstance(blocks, int):
        return [blocks] * (D // blocks) + [D % blocks]
    return list(blocks)


UPDATES = {"joint": pruning.joint_update, "reference": pruning.reference_update}

# n below and above the block and the whole, in each packing.
CASES = [
    (6, None, "flat"),
    (6, None, "leaf"),
    (6, 4, "leaf"),
    (6, 10, "flat"),
    (6, "leaf", "flat"),
    (6, (20, 9), "leaf"),
    (1, 10, "flat"),
    (40, None, "flat"),
    (40, 10, "flat"),
    (8, "leaf", "leaf"),
]


@pytest.mark.x64
@pytest.mark.parametrize(("n", "blocks", "packing"), CASES)
def test_all_agree_with_dense_algebra(n, blocks, packing):
    p, damping = Problem(n), 0.3
    (w, g), (alive, kept) = p.args(packing), p.masks
    fisher = p.fisher(damping, blocks)

    scores = pruning.saliency(w, g, damping, mask=alive, blocks=blocks)
    expected = p.alive * p.w**2 / (2 * np.diag(np.linalg.inv(fisher)))
    np.testing.assert_allclose(flat(scores), expected, rtol=1e-9)
    assert scores["none"] is None

    for name, update in UPDATES.items():
        delta = update(w, g, damping, alive, kept, blocks=blocks)
        expected = getattr(p, name)(damping, blocks)
        np.testing.assert_allclose(flat(delta), expected, rtol=1e-9, atol=1e-12)
        rise = pruning.predicted_loss_increase(delta, g, damping, blocks=blocks)
        np.testing.assert_allclose(rise, expected @ fisher @ expected / 2, rtol=1e-9)


@pytest.mark.x64
@pytest.mark.parametrize(("n", "blocks"), [(6, None), (40, None), (6, 10), (6, 4)])
def test_no_other_update_is_better_than_the_joint_one(n, blocks):
    p, damping = Problem(n, seed=1), 1e-2
    delta = flat(pruning.joint_update(*p.args(), damping, *p.masks, blocks=blocks))
    fisher = p.fisher(damping, blocks)
    best = delta @ fisher @ delta / 2
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            other = delta + p.kept * rng.normal(size=D) * scale
            assert other @ fisher @ other / 2 > best
    reference = p.reference(damping, blocks)
    assert reference @ fisher @ reference / 2 > best
    # The same by constrained least squares: |F^1/2 delta| with delta_Q fixed.
    root = np.linalg.cholesky(fisher).T
    gone = p.alive & ~p.kept
    solved = np.linalg.lstsq(root[:, p.kept], root[:, gone] @ p.w[gone], rcond=None)[0]
    np.testing.assert_allclose(delta[p.kept], solved, rtol=1e-7, atol=1e-9)


@pytest.mark.x64
@pytest.mark.parametrize("blocks", [None, 10])
def test_for_one_weight_both_updates_are_the_classic_one(blocks):
    p, damping = Problem(6, seed=2, prune=1), 0.1
    q = np.flatnonzero(p.alive & ~p.kept)[0]
    inverse = np.linalg.inv(p.fisher(damping, blocks))
    classic = p.alive * (-p.w[q] / inverse[q, q] * inverse[:, q])
    (w, g), masks = p.args(), p.masks
    for update in UPDATES.values():
        delta = update(w, g, damping, *masks, blocks=blocks)
        np.testing.assert_allclose(flat(delta), classic, rtol=1e-9, atol=1e-12)
        # Then the rise is what the saliency said.
        rise = pruning.predicted_loss_increase(delta, g, damping, blocks=blocks)
        scores = flat(pruning.saliency(w, g, damping, mask=masks[0], blocks=blocks))
        np.testing.assert_allclose(rise, scores[q], rtol=1e-9)


def hard_gradients(kind):
    rng = np.random.default_rng(3)
    if kind == "duplicated":
        return np.repeat(rng.normal(size=(4, D)), 3, axis=0)
    if kind == "tiny":
        return 1e-12 * rng.normal(size=(12, D))
    if kind == "huge":
        return 1e12 * rng.normal(size=(12, D))
    if kind == "mixed sizes":
        return rng.normal(size=(12, D)) * np.logspace(-6, 3, 12)[:, None]
    return rng.normal(size=(12, 3)) @ rng.normal(size=(3, D)) + 1e-3 * rng.normal(size=(12, D))


@pytest.mark.parametrize("blocks", [None, 10])
@pytest.mark.parametrize("kind", ["duplicated", "tiny", "huge", "mixed sizes", "nearly dependent"])
def test_single_precision_on_hard_gradients(kind, blocks):
    """The loss increase that is reached, against the least one there is."""
    gradients = hard_gradients(kind)
    damping = 1e-5 * np.mean(np.sum(gradients**2, axis=1)) / D
    p = Problem(12, gradients=gradients.astype(np.float32).astype(np.float64))
    p.w = p.w.astype(np.float32).astype(np.float64)
    (w, g), masks = p.args(dtype=jnp.float32), p.masks
    fisher = p.fisher(damping, blocks)
    best = p.joint(damping, blocks)
    for name, update in UPDATES.items():
        delta = flat(update(w, g, float(damping), *masks, blocks=blocks))
        assert np.all(np.isfinite(delta))
        np.testing.assert_array_equal(delta[~p.kept], np.where(p.alive, -p.w, 0)[~p.kept])
        rise, least = delta @ fisher @ delta, best @ fisher @ best
        assert rise >= least * (1 - 1e-6)
        if name == "joint":
            assert rise <= least * (1 + 1e-3)


def test_what_comes_back_of_a_mask():
    """Nothing dead is touched or revived, whatever the new mask says of it."""
    p = Problem(6)
    everything = as_tree(np.ones(D, bool))
    w, g = p.args()
    for update in UPDATES.values():
        delta = flat(update(w, g, 0.1, p.masks[0], everything))
        np.testing.assert_array_equal(delta, 0)
    scores = flat(pruning.magnitude(w, mask=p.masks[0]))
    np.testing.assert_array_equal(scores, np.abs(p.w.astype(np.float32)) * p.alive)
    removed = flat(pruning.removal(w, *p.masks))
    np.testing.assert_array_equal(removed, np.where(p.alive & ~p.kept, -p.w, 0).astype(np.float32))


def test_the_caller_s_arrays_are_left_alone():
    p = Problem(6)
    (w, g), masks = p.args(), p.masks
    before = [np.array(leaf) for leaf in jax.tree.leaves((w, g, masks))]
    pruning.saliency(w, g, 0.1, mask=masks[0])
    for update in UPDATES.values():
        update(w, g, 0.1, *masks)
    for old, new in zip(before, jax.tree.leaves((w, g, masks)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"params": as_tree(np.ones(D)) | {"b": jnp.ones(4)}},
            ValueError,
            r"params\['b'\].*\(5,\)",
        ),
        ({"params": {"a": jnp.ones((3, 4))}}, ValueError, r"params does not have the structure"),
        (
            {"params": as_tree(np.ones(D)) | {"b": jnp.ones(5, int)}},
            TypeError,
            r"params\['b'\] must be a real floating-point array, got int32",
        ),
        ({"mask": as_tree(np.ones(D))}, TypeError, r"mask\['a'\] must be boolean"),
        ({"new_mask": as_tree(np.ones(D))}, TypeError, r"new_mask\['a'\] must be boolean"),
        ({"new_mask": jnp.ones(D, bool)}, ValueError, r"new_mask does not have the structure"),
        ({"damping": 0.0}, ValueError, r"damping must be finite and greater than 0, got 0.0"),
        ({"damping": None}, TypeError, r"damping"),
        ({"blocks": (20, 8)}, ValueError, r"blocks must cover .* d = 29.* add up to 28"),
        ({"blocks": 0}, ValueError, r"blocks must be at least 1, got 0"),
        ({"blocks": "layer"}, ValueError, r"blocks must be one of 'leaf'; got 'layer'"),
        ({"rows": jnp.ones((6, D))}, TypeError, r"rows"),
    ],
)
@pytest.mark.parametrize("function", ["saliency", "joint_update", "reference_update"])
def test_bad_input(function, change, error, message):
    p = Problem(6)
    (w, g), (alive, kept) = p.args(), p.masks
    inputs = {"params": w, "rows": g, "damping": 0.1, "mask": alive, "new_mask": kept} | change
    if function == "saliency":
        if "new_mask" in change:
            return
        del inputs["new_mask"]
    with pytest.raises(error, match=message):
        getattr(pruning, function)(**inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: pruning.magnitude(jnp.ones(3), mask=m), r"mask\b.*expected \(3,\) or \(\)"),
        (lambda m: pruning.removal(jnp.ones(3), m, m), r"mask\b.*expected \(3,\) or \(\)"),
        (
            lambda m: pruning.predicted_loss_increase(m.astype(float), Problem(2).rows(), 0.1),
            r"update does not have the structure",
        ),
    ],
)
def test_bad_trees(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(4, bool))
