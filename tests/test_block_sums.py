"""Sums in blocks against float64, and against dense rows of the same gradients."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import outside
import pytest

from mfac_jax import algebra, collect_gradients, fisher_inverse, pruning, rows
from mfac_jax.pruning import Gradients, Scope, Search, Setting, WithinOutputs, _block_curvature
from mfac_jax.pruning._scope import select
from mfac_jax.rows import _sum_programs

SIZES = [12, 12, 12, 4]
D = sum(SIZES)


def as_sums(matrix, blocks=12, **options):
    return rows.as_rows(jnp.asarray(matrix), storage=rows.InBlocks(blocks, **options))


# Square roots.


@pytest.mark.parametrize(
    ("kind", "n", "allowed"),
    [
        ("independent", 300, 1e-5),
        ("correlated", 300, 1e-5),
        ("correlated", 40, 1e-4),
        ("duplicated", 40, 1e-4),
        ("low rank", 300, 1e-4),
        ("one row 1e6", 300, 1e-4),
        ("all 1e8", 40, 1e-4),
    ],
)
def test_square_roots_keep_every_coordinate(kind, n, allowed):
    g = oracles.gradients(kind, n, 60).astype(np.float64)
    g[:, :3] *= 1e-5
    g[:, 7] = 0
    for scale in (1, 1e-13, 1e7):
        want = (g * scale).T @ (g * scale)
        root = algebra.square_root(jnp.asarray(want, jnp.float32))
        got = np.asarray(root, np.float64)
        assert not np.tril(got, -1).any()
        assert not got[:, 7].any()
        size = np.sqrt(np.diag(want))
        size[7] = 1
        assert np.max(np.abs(got.T @ got - want) / np.outer(size, size)) < allowed
        batch = algebra.square_root(jnp.asarray(np.stack([want, np.eye(60)]), jnp.float32))
        np.testing.assert_allclose(batch[0], root, rtol=allowed, atol=allowed * np.max(size))


# What the inverse answers.


def of_groups(blocks, weights):
    return jnp.broadcast_to(blocks.inverse_quadratic_form(weights)[..., None], weights.shape)


@pytest.mark.parametrize("n", [5, 150])
@pytest.mark.parametrize("kind", ["correlated", "duplicated", "low rank", "all 1e-12", "all 1e8"])
def test_answers_agree_with_float64(kind, n):
    g, rng = oracles.gradients(kind, n, D), np.random.default_rng(1)
    damping, v = oracles.damping_for(g, 0.03), rng.normal(size=D).astype(np.float32)
    keep = rng.random(D) < 0.8
    want = oracles.block_inverse(g * keep, damping, SIZES)
    condition = np.linalg.cond(want)

    def close(got, want):
        oracles.assert_close(got, want, length=D, condition=condition)

    sums = as_sums(g)
    inverse = fisher_inverse(sums, damping, blocks=12, mask=jnp.asarray(keep))
    close(inverse.ihvp(v), want @ v)
    close(inverse.ihvp(sums.mean), want @ g.astype(np.float64).mean(0))
    close(inverse.diagonal(), np.diag(want))
    close(inverse.quadratic_form(v), v @ want @ v)
    close(inverse.submatrix(np.arange(D)), want)
    np.testing.assert_allclose(inverse.log_det(), oracles.log_det(want), rtol=1e-3, atol=D * 1e-3)
    quads = np.arange(D).reshape(-1, 4)
    costs = [v[q] @ np.linalg.solve(want[np.ix_(q, q)], v[q]) for q in quads]
    close(inverse.group_blocks(4, of_groups, v), np.repeat(costs, 4))
    close(inverse.compensate(v * ~keep), compensated(g, keep, v * ~keep, damping))


def compensated(g, keep, v, damping):
    """The compensation in blocks, in float64."""
    g, out = g.astype(np.float64), np.zeros(D)
    for start, size in zip(np.cumsum([0, *SIZES[:-1]]), SIZES, strict=True):
        part = slice(start, start + size)
        inside = g[:, part] * keep[part]
        fisher = damping * np.eye(size) + inside.T @ inside / len(g)
        out[part] = np.linalg.solve(fisher, inside.T @ (g[:, part] @ v[part]) / len(g))
    return out * keep


@pytest.mark.x64
def test_float64_sums_are_float64():
    g = jnp.asarray(oracles.gradients("correlated", 30, D), jnp.float64)
    sums = as_sums(g)
    assert sums.dtype == jnp.float64
    want = oracles.block_inverse(g, 0.1, SIZES)
    got = fisher_inverse(sums, 0.1, blocks=12).diagonal()
    np.testing.assert_allclose(got, np.diag(want), rtol=1e-11)


@pytest.mark.parametrize("storage", [rows.Dense("bfloat16"), rows.Dense(packing="leaf")], ids=str)
def test_partitions_with_an_order_and_gradients_as_stored(storage):
    rng = np.random.default_rng(0)
    g = {"a": rng.normal(size=(31, 5, 6)), "b": rng.normal(size=(31, 9))}
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    held = rows.as_rows(g, storage=storage)
    order = jnp.asarray(rng.permutation(39)[:37].astype(np.int32))
    runs = (rows.BlockRun(0, 2, 10), rows.BlockRun(22, 3, 5))
    partition = rows.Partition(order, runs)
    sums = rows.as_rows(g, storage=rows.InBlocks(partition, storage))
    vector = jax.tree.map(lambda x: x[0], g)
    for function in (rayleigh, image):
        got, want = (r.map_blocks(partition, function, vector) for r in (sums, held))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            oracles.assert_close(one, other, length=31, condition=30)
    squares = held.column_square_sums()
    inside = np.isin(np.arange(39), np.asarray(order)[np.r_[0:20, 22:37]])
    oracles.assert_close(
        oracles.flat(sums.column_square_sums()), oracles.flat(squares) * inside, length=31
    )
    # The same blocks in a new array are the same; under jit that shows in the results.
    answer = jax.jit(lambda sums, order: sums.map_blocks(
        rows.Partition(order, runs), rayleigh, vector
    ))  # fmt: skip
    assert np.isfinite(answer(sums, jnp.array(order))).all()
    assert np.isnan(answer(sums, order[::-1])).all()
    with pytest.raises(ValueError, match="serve the blocks that they were made for"):
        sums.map_blocks(rows.Partition(order[::-1], runs), rayleigh, vector)


def rayleigh(batch, vector):
    return jnp.mean(jnp.einsum("bnj,bj->bn", batch, vector, precision="highest") ** 2, axis=1)


def image(batch, vector):
    dots = jnp.einsum("bnj,bj->bn", batch, vector, precision="highest")
    return jnp.einsum("bnj,bn->bj", batch, dots, precision="highest") / batch.shape[1]


# Writing.


def test_gradients_are_added_in_any_portions():
    g = jnp.asarray(oracles.gradients("correlated", 29, D))
    whole, empty = as_sums(g), rows.InBlocks(12).empty(jnp.zeros(D), 29)
    assert empty.buffer.num_rows == 5
    sums, first = empty, 0
    for count in (1, 2, 13, 0, 4):
        sums, accepted = sums.write_rows(first, g[first : first + 14], count)
        assert accepted.all()
        first += count
    while first < 29:
        sums, accepted = sums.write(jnp.int32(first), g[first])
        assert accepted.shape == ()
        first += 1
    assert (sums.buffer, sums.held) == (None, None)
    square = oracles.flat(sums.column_square_sums())
    oracles.assert_close(square, oracles.flat(whole.column_square_sums()), length=29)
    oracles.assert_close(square, (np.asarray(g, np.float64) ** 2).sum(0), length=29)
    oracles.assert_close(sums.mean, np.asarray(g, np.float64).mean(0), length=29)


def test_what_is_rejected_adds_nothing():
    g = np.array(oracles.gradients("correlated", 14, D))
    g[3, 5], g[8, 1] = np.nan, np.inf
    g[9] = 3e18  # its square is finite, the sum of squares that could come is not
    empty = rows.InBlocks(12).empty(jnp.zeros(D), 14)
    sums, accepted = empty.write_rows(0, jnp.asarray(g), 14)
    assert np.flatnonzero(~np.asarray(accepted)).tolist() == [3, 8, 9]
    good = np.delete(g, [3, 8, 9], axis=0).astype(np.float64)
    oracles.assert_close(sums.column_square_sums(), (good**2).sum(0), length=14)
    oracles.assert_close(sums.mean, good.sum(0) / 14, length=14)
    with pytest.raises(FloatingPointError, match="row 3 of gradients"):
        as_sums(g)


def loss_fn(params, batch):
    return jnp.mean(batch[0] @ params)


@pytest.mark.parametrize("per_example", [False, True])
def test_an_error_names_the_row_and_the_batch(per_example):
    batches = [(jnp.ones((4, D)) * (jnp.nan if i == 2 else 1),) for i in range(8)]
    example = ", example 0" if per_example else ""
    row = 8 if per_example else 2
    with pytest.raises(FloatingPointError, match=rf"row {row} \(the gradient of batch 2{example}"):
        collect_gradients(
            loss_fn, jnp.zeros(D), batches, 30, per_example=per_example,
            storage=rows.InBlocks(12), progress=False,
        )  # fmt: skip


def test_what_sums_cannot_do_is_said():
    g = jnp.asarray(oracles.gradients("correlated", 9, D))
    sums, empty = as_sums(g), rows.InBlocks(12).empty(jnp.zeros(D), 9)
    v, row = jnp.zeros(D), jnp.int32(0)
    for name, call in {
        "dots": lambda: sums.dots(v),
        "combine": lambda: sums.combine(jnp.zeros(9)),
        "gram": sums.gram,
        "take": lambda: sums.take(jnp.zeros(1, jnp.int32)),
        "put": lambda: empty.put(row, v),
        "clear": lambda: empty.clear(row),
        "restrict": lambda: empty.restrict(v > 0),
        "products with a matrix": lambda: sums.both_column_square_sums(jnp.eye(9)),
    }.items():
        with pytest.raises(TypeError, match=f"keeps sums in blocks .* so it has no {name}:"):
            call()
    with pytest.raises(TypeError, match="has no products with a matrix"):
        sums.column_square_sums(jnp.eye(9))
    inverse = fisher_inverse(sums, 0.1, blocks=12)
    with pytest.raises(TypeError, match=r"combination needs products .* got BlockSums"):
        inverse.combination(jnp.ones(9))
    message = "expected blocks 3 of 12, 1 of 4 coordinates, in order, got blocks 1 of 40"
    with pytest.raises(ValueError, match=message):
        fisher_inverse(sums, 0.1).ihvp(v)
    with pytest.raises(ValueError, match="expected 9 gradients, got 0"):
        fisher_inverse(empty, 0.1, blocks=12).ihvp(v)
    with pytest.raises(ValueError, match="expected 9 gradients, got 0"):
        _ = empty.mean
    with pytest.raises(ValueError, match="in order, each once: expected row 0 of 9, got rows 1 to"):
        empty.write_rows(1, g, 2)
    with pytest.raises(ValueError, match="expected row 9 of 9, got rows 0 to 0"):
        sums.write_rows(0, g, 1)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(empty.write)(row, v)
    with pytest.raises(TypeError, match=r"InBlocks with storage=Host.* needs rows that jit"):
        rows.InBlocks(12, outside.Host()).empty(v, 9)
    with pytest.raises(ValueError, match="at least one block"):
        rows.InBlocks(12).empty(jnp.zeros(0), 9)


# Pruning.

SHAPES = {"a": {"bias": (8,), "kernel": (12, 8)}, "b": {"kernel": (8, 4)}}
FOURS, TWO_OF_FOUR = pruning.BlocksOf(4), pruning.NofM(2, 4)
CASES = {
    "mfac, joint": ("mfac", "joint", pruning.Unstructured()),
    "mfac, joint, 2 of 4": ("mfac", "joint", TWO_OF_FOUR),
    "mfac, reference, fours": ("mfac", "reference", FOURS),
    "greedy, joint": ("greedy", "joint", pruning.Unstructured()),
    "greedy, none, fours": ("greedy", "none", FOURS),
    "obd, one from outside": ("obd", outside.bounded_joint, pruning.Unstructured()),
    "magnitude, none, 2 of 4": ("magnitude", "none", TWO_OF_FOUR),
}


def draw(*leading, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.mask, want.mask)
    for one, other in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("score", "update", "pattern"), CASES.values(), ids=CASES)
def test_a_step_is_that_of_dense_rows(score, update, pattern):
    params, gradients = draw(seed=1), draw(50)
    gradients["a"]["kernel"] = gradients["a"]["kernel"].at[10:].mul(0.1)
    held, scope = rows.as_rows(gradients), Scope(pattern=pattern)
    mask = pruning.initial_mask(params)
    options = {"damping": 1e-2, "blocks": WithinOutputs(12), "score": score, "update": update}
    for sparsity in (0.25, 0.5):
        blocks = pruning.step_blocks(params, mask, options["blocks"], scope=scope)
        sums = rows.as_rows(gradients, storage=rows.InBlocks(blocks))
        (got, other, info), (want, kept, expected) = (
            pruning.prune_step(params, mask, r, sparsity, scope=scope, **options)
            for r in (sums, held)
        )
        jax.tree.map(np.testing.assert_array_equal, other, kept)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
        assert bool(info.accepted)
        np.testing.assert_allclose(info[3:], expected[3:], rtol=1e-3)
        params, mask = want, kept
    if pattern is CASES["mfac, joint"][2]:
        with pytest.raises(ValueError, match="serve the blocks that they were made for"):
            pruning.prune_step(params, mask, sums, 0.7, scope=scope, **options | {"score": "mfac"})


X = jax.random.normal(jax.random.key(0), (96, 12))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (12, 4)))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 96, 8)]


def regression(params, batch):
    hidden = jnp.tanh(batch[0] @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean((hidden @ params["b"]["kernel"] - batch[1]) ** 2)


def among(*settings, descents=(), **options):
    return Search(settings or None, descents, **options)


def run(gradients, search, sparsity=0.5, **options):
    options = {"steps": 1, "gradients": gradients, "search": search, "progress": False} | options
    return pruning.prune(draw(seed=1), regression, BATCHES, sparsity, **options)


WITHIN = Setting("greedy", "joint", WithinOutputs(12), 0.1, (1.0, 0.5), relative=True)
NOTHING = Setting("magnitude", "none", None, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 3, "gradients": {"per_example": True}},
        {"steps": 2, "mask": 0},
        {"steps": 2, "scope": Scope(pattern=TWO_OF_FOUR), "sparsity": 0.4},
        {"steps": 2, "scope": Scope(pattern=FOURS), "gradients": {"count": 7}},
    ],
    ids=["one-shot", "3 steps, per example", "a mask", "2 of 4", "fours, n < B"],
)
def test_runs_are_those_of_dense_rows(options):
    given = {"count": 43} | options.get("gradients", {})
    options = {k: v for k, v in options.items() if k != "gradients"}
    if "mask" in options:
        options["mask"] = jax.tree.map(lambda w: jnp.abs(w) > 0.2, draw(seed=1))
    reference = WITHIN._replace(score="mfac", update="reference", damping=1.0)
    runs = [
        run(Gradients(**given, history=0, in_blocks=choice), search, **options)
        for choice, search in (
            (True, among(WITHIN, reference, NOTHING)),
            (False, among(WITHIN, reference, NOTHING._replace(blocks=WithinOutputs(12)))),
        )
    ]
    assert_same(*runs)
    for got, want in zip(*(r.report.steps for r in runs), strict=True):
        assert got.chosen == want.chosen
        assert got.damping == pytest.approx(want.damping, rel=1e-4)
        assert got.predicted_loss_increase == pytest.approx(want.predicted_loss_increase, rel=2e-3)
        for one, other in zip(got.tried, want.tried, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_descents_and_the_degrees_of_freedom_are_those_of_the_blocks():
    setting, descent = Setting("mfac", "joint", 24, 1e-3), pruning.Descent(0.02, 1e-3)
    gradients = Gradients(40, in_blocks=True)
    before, after = (
        run(gradients, among(setting, descents=d, num_calibration=4)) for d in ((), [descent])
    )
    assert after.report.steps[0].tried[-1].descent == descent
    # Four batches went into the calibration; the gradients are those after them.
    held = collect_gradients(regression, draw(seed=1), BATCHES * 4, 44, progress=False)
    matrix = [jax.tree.map(lambda g, i=i: g, held.combine(jnp.eye(44)[i])) for i in range(4, 44)]

    def by_output(tree):
        return np.concatenate([np.ravel(np.transpose(tree[k]["kernel"])) for k in "ab"])

    g = np.stack([by_output(tree) for tree in matrix]).astype(np.float64)
    cut = np.arange(128) // 24
    blocks = cut[:, None] == cut[None, :]
    fisher = g.T @ g / 40 * blocks
    eigenvalues = np.linalg.eigvalsh(fisher)
    want = np.sum(eigenvalues / (eigenvalues + 1e-3))
    assert after.report.steps[0].degrees_of_freedom == pytest.approx(want, rel=1e-3)
    kept = by_output(before.mask)
    fisher = fisher * np.outer(kept, kept)
    fisher += 0.02 * np.trace(fisher) * np.eye(128)
    want = -1e-3 * np.linalg.solve(fisher, g.mean(0)) * kept
    moved = by_output(after.params).astype(np.float64) - by_output(before.params)
    np.testing.assert_allclose(moved, want, rtol=1e-3, atol=2e-6)
    assert np.linalg.norm(want) > 1e-3


def test_sums_are_taken_if_gradients_would_take_too_much(monkeypatch):
    blocks, whole = WITHIN, Setting("mfac", "reference", None, 1e-5)
    selection = select(Scope(), draw())

    def shared(gradients, settings=None, steps=1):
        return _block_curvature.settings_in_blocks(gradients, selection, settings, steps)[1]

    many = Gradients(4096)
    assert shared(many) is None  # 2 MiB
    monkeypatch.setattr(_block_curvature, "_MOST_KEPT", 1000)
    assert shared(many, [blocks, NOTHING]).given == WithinOutputs(12)
    assert shared(Gradients(4096, history=0)).given == WithinOutputs(144)
    assert shared(Gradients(12)) is shared(Gradients(20), steps=1) is None  # less than the sums
    assert shared(Gradients(20), steps=2)
    for gradients, settings in (
        (Gradients(4096, history=1), None),
        (Gradients(4096, in_blocks=False), None),
        (Gradients(4096, storage=rows.Dense("bfloat16")), None),
        (Gradients(given=rows.as_rows(draw(40))), None),
        (many, [blocks, whole]),
        (many, [NOTHING]),
        (many, [blocks._replace(update=outside.bounded_joint)]),
    ):
        assert shared(gradients, settings) is None
    tried = [str(trial) for trial in run(Gradients(40), among()).report.steps[0].tried]
    assert [name.split(",")[0] for name in tried] == [
        "greedy + joint", "greedy + joint", "magnitude + none",
    ]  # fmt: skip


def never(*_):
    raise AssertionError("work began")


@pytest.mark.parametrize(
    ("settings", "pattern", "storage", "error", "match"),
    [
        ([WITHIN, Setting("mfac", "reference", None, 1e-5)], None, None, ValueError,
         r"in_blocks=True needs settings that share .* mfac \+ reference inverts the whole Fisher"),
        ([WITHIN, WITHIN._replace(blocks=24)], None, None, ValueError,
         "greedy .* has blocks=24, another has blocks=WithinOutputs"),
        ([NOTHING], None, None, ValueError, "no setting inverts blocks"),
        ([], pruning.Slices(), None, ValueError, "has groups of several sizes with Slices"),
        ([WITHIN], None, outside.Host(), TypeError, "InBlocks with storage=Host"),
    ],
    ids=["whole", "two kinds of blocks", "no inverse", "slices", "host"],
)  # fmt: skip
def test_errors_come_before_any_work(settings, pattern, storage, error, match):
    scope = Scope(pattern=pattern or pruning.Unstructured())
    gradients = Gradients(40, in_blocks=True, storage=storage or rows.Dense())
    with pytest.raises(error, match=match):
        pruning.prune(
            draw(), never, BATCHES, 0.5, scope=scope, gradients=gradients,
            search=among(*settings), progress=False,
        )  # fmt: skip


def test_options_that_exclude_sums_are_refused():
    with pytest.raises(ValueError, match="expected history=0, got history=2"):
        Gradients(in_blocks=True, history=2)
    with pytest.raises(ValueError, match="expected given=None, got DenseRows"):
        Gradients(in_blocks=True, given=rows.as_rows(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match=r"expected in_blocks=True, got storage=InBlocks"):
        Gradients(storage=rows.InBlocks(8))
    with pytest.raises(TypeError, match=r"Gradients\(given=...\) needs products"):
        Gradients(given=rows.as_rows(jnp.ones((2, 8)), storage=rows.InBlocks(2)))
    # Whether a function of the caller needs products shows when it is called.
    taylor = WITHIN._replace(score=outside.taylor)
    with pytest.raises(TypeError, match=r"BlockSums keeps sums in blocks .* has no combine"):
        run(Gradients(40, in_blocks=True), among(taylor))


@pytest.mark.wrong_types
def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="storage must keep single gradients, got InBlocks"):
        rows.InBlocks(4, rows.InBlocks(4))
    with pytest.raises(TypeError, match="storage must be a storage"):
        rows.InBlocks(12, "dense")
    with pytest.raises(TypeError, match="in_blocks must be bool or None, got int"):
        Gradients(in_blocks=1)


def test_memory_is_that_of_the_sums():
    """Two steps with 160 gradients: at no batch do arrays take 3 d B numbers."""
    size, found = 40, []
    params = {"w": jax.random.normal(jax.random.key(0), (size, 60))}
    batch = jax.random.normal(jax.random.key(1), (4, size))
    loss = lambda params, batch: jnp.mean(jnp.tanh(batch @ params["w"]) ** 2)  # noqa: E731
    gc.collect()

    class Batches:
        def __iter__(self):
            for i in range(50):
                if i % 7 == 0:
                    found.append(sum(array.nbytes for array in jax.live_arrays()))
                yield batch

    settings = among(WITHIN._replace(blocks=size), NOTHING, descents=[pruning.Descent(0.3, 0.1)])
    pruning.prune(
        params, loss, Batches(), 0.5, steps=2, search=settings, progress=False,
        gradients=Gradients(160, in_blocks=True),
    )  # fmt: skip
    sums = 4 * size * params["w"].size
    assert sums < max(found) - found[0] < 1.7 * sums


@pytest.mark.on_cpu
@pytest.mark.wrong_types  # shapes stand for arrays
def test_sums_and_roots_are_changed_in_place():
    """For ResNet-20, beside the sums and the buffer there are only some pieces of blocks."""
    runs = (rows.BlockRun(0, 16, 27), rows.BlockRun(432, 1856, 144), rows.BlockRun(267696, 10, 64))
    partition = rows.Partition(jnp.arange(268336, dtype=jnp.int32), runs)
    sums = jax.eval_shape(lambda: rows.InBlocks(partition).empty(jnp.zeros(268336), 4096))
    total = 4 * 144 * 268336
    parts = sums.blocks, sums.total, sums.held, sums.buffer, partition
    for compiled in (
        _sum_programs.added.lower(*parts).compile(),
        _sum_programs.square_roots.lower(sums.blocks, partition, num_rows=4096).compile(),
    ):
        memory = compiled.memory_analysis()
        assert memory.argument_size_in_bytes < 1.55 * total
        assert memory.alias_size_in_bytes > 0.98 * total
        assert memory.temp_size_in_bytes < 0.3 * total
