"""Rows in leaf packing, and rows by output, follow the sharding of their parameters."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax import collect_gradients, fisher_inverse, mfac_precondition, mfacw
from mfac_jax.optimizer import SecondMoments
from mfac_jax.pruning import Gradients, prune
from mfac_jax.rows import Dense, Int8, Paged, TopK, _compressed, _dense, _int8, as_rows

NAMES = "all-reduce|all-gather|all-to-all|collective-permute"
SPECS = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("y"), "scale": PartitionSpec()}


@pytest.fixture(scope="module")
def shardings():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(auto, auto))
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def gradient(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"kernel": (8, 6), "bias": (6,), "scale": (3,)}
    return {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def test_steps_on_shards_equal_steps_on_one_device(shardings):
    tx = mfac_precondition(4, damping=0.1, storage=Dense(packing="leaf"))
    step = jax.jit(tx.update, donate_argnums=1)
    plain = tx.init(gradient(0))
    spread = tx.init(jax.device_put(gradient(0), shardings))
    for seed in range(6):
        want, plain = step(gradient(seed), plain)
        got, spread = step(jax.device_put(gradient(seed), shardings), spread)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
        for name, sharding in shardings.items():
            rows = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
            block = spread.window.rows.blocks[name]
            assert block.sharding.is_equivalent_to(rows, block.ndim)


@pytest.mark.once
@pytest.mark.parametrize(
    "storage", [Dense(packing="leaf"), Int8(16), Paged()], ids=["leaf", "int8", "paged"]
)
def test_pruning_on_shards_equals_pruning_on_one_device(shardings, storage):
    def loss(params, batch):
        hidden = jnp.tanh(batch @ params["kernel"] + params["bias"][None])
        return jnp.mean(jnp.sum(hidden, axis=1) ** 2) + jnp.mean(params["scale"] ** 2)

    params = gradient(0)
    batches = [jax.random.normal(jax.random.key(i), (4, 8)) for i in range(12)]
    options = {"steps": 2, "gradients": Gradients(12, storage=storage), "progress": False}
    want = prune(params, loss, batches, 0.5, **options)
    got = prune(jax.device_put(params, shardings), loss, batches, 0.5, **options)
    chex.assert_trees_all_equal(got.mask, want.mask)
    chex.assert_trees_all_close(got.params, want.params, rtol=1e-3, atol=1e-4)
    for name, sharding in shardings.items():
        assert got.params[name].sharding.is_equivalent_to(sharding, params[name].ndim)


@pytest.mark.once
@pytest.mark.parametrize("storage", [Dense(packing="leaf"), Paged()], ids=["leaf", "paged"])
def test_an_interrupted_pruning_on_shards_goes_on(shardings, storage, tmp_path):
    def loss(params, batch):
        return jnp.mean(jnp.sum(batch @ params["kernel"], axis=1) ** 2) + jnp.sum(params["bias"])

    def fine_tune(params, mask):
        del mask
        calls.append(1)
        if len(calls) == stops_at:
            raise KeyboardInterrupt
        return jax.tree.map(lambda leaf: 0.99 * leaf, params)

    params = jax.device_put(gradient(0), shardings) | {"scale": gradient(0)["scale"]}
    batches = [jax.random.normal(jax.random.key(i), (4, 8)) for i in range(8)]
    options = {"steps": 3, "gradients": Gradients(8, storage=storage), "fine_tune": fine_tune}
    calls, stops_at = [], None
    want = prune(params, loss, batches, 0.5, progress=False, **options)
    calls, stops_at = [], 2
    with pytest.raises(KeyboardInterrupt):
        prune(params, loss, batches, 0.5, progress=False, checkpoint=tmp_path, **options)
    got = prune(params, loss, batches, 0.5, progress=False, checkpoint=tmp_path, **options)
    chex.assert_trees_all_equal(got.mask, want.mask)
    chex.assert_trees_all_close(got.params, want.params, rtol=1e-5, atol=1e-6)
    kernel = got.params["kernel"]
    assert kernel.sharding.is_equivalent_to(shardings["kernel"], kernel.ndim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gram_matrices_and_diagonals_of_leaves_gather_nothing(shardings, dtype):
    grads = [gradient(seed) for seed in range(5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(dtype), *grads)
    plain = as_rows(stacked, storage=Dense(packing="leaf"))
    blocks = {
        name: jax.device_put(
            stacked[name], NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
        )
        for name, where in shardings.items()
    }
    spread = dataclasses.replace(plain, blocks=blocks)
    keep = jax.tree.map(lambda leaf: leaf > 0, grads[0])
    lower = jnp.tril(jnp.ones((5, 5)))
    questions = [
        lambda rows: rows.gram(),
        lambda rows: rows.gram(keep),
        lambda rows: rows.products(rows, keep),
        lambda rows: rows.column_square_sums(),
        lambda rows: rows.both_column_square_sums(lower, lower=True),
        lambda rows: fisher_inverse(rows, 0.1).diagonal(),
    ]
    for ask in questions:
        chex.assert_trees_all_close(ask(spread), ask(plain), rtol=1e-5, atol=1e-6)
    masks = tuple(jax.tree.leaves(keep))
    for program in (
        _dense._products_of_shards.lower(spread, spread, masks),
        _dense._column_square_sums_of_shards.lower(spread, lower),
    ):
        found = set(re.findall(NAMES, program.compile().as_text()))
        assert found <= {"all-reduce"}


def test_rows_by_output_follow_the_sharding(shardings):
    tx = mfacw(0.1, window_size=4)
    step = jax.jit(tx.update, donate_argnums=1)
    plain = tx.init(gradient(0))
    spread = tx.init(jax.device_put(gradient(0), shardings))
    for seed in range(6):
        want, plain = step(gradient(seed), plain, gradient(9))
        sharded = (jax.device_put(gradient(i), shardings) for i in (seed, 9))
        got, spread = step(next(sharded), spread, next(sharded))
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
        outputs = spread[0].window.rows[1].outputs
        rows = NamedSharding(shardings["kernel"].mesh, PartitionSpec("y", None, "x"))
        assert outputs.shape == (6, 4, 8)
        assert outputs.sharding.is_equivalent_to(rows, 3)


def test_devices_share_pages(shardings):
    """Each holds a part of the columns of every page, whatever the sharding of the parameters."""
    tx = mfac_precondition(4, damping=0.1, storage=Paged(columns=8))
    step = jax.jit(tx.update, donate_argnums=1)
    plain = mfac_precondition(4, damping=0.1).init(gradient(0))
    spread = tx.init(jax.device_put(gradient(0), shardings))
    for seed in range(6):
        want, plain = mfac_precondition(4, damping=0.1).update(gradient(seed), plain)
        got, spread = step(jax.device_put(gradient(seed), shardings), spread)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
        pages = spread.window.rows.pages
        assert pages.shape == (8, 1, 4, 8)
        assert pages.sharding.memory_kind == "pinned_host"
        assert {shard.data.shape for shard in pages.addressable_shards} == {(8, 1, 4, 2)}


@pytest.mark.parametrize(
    "use",
    [
        lambda rows, vector: rows.put(jnp.int32(1), vector),
        lambda rows, vector: rows.combine(rows.dots(vector)),
        lambda rows, vector: rows.gram(),
        lambda rows, vector: rows.transform(jnp.ones((3, 16))),
    ],
    ids=["put", "dots and combine", "gram", "transform"],
)
def test_no_page_is_gathered(use):
    """Vectors are, if they are cut in another way."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    vector = jax.device_put(jnp.ones(80_000), NamedSharding(mesh, PartitionSpec("x")))
    held = Paged(columns=40_000).empty(vector, 16)
    assert held.pages.shape[:2] == (2, 5)
    assert np.prod(held.pages.shape[2:]) > vector.size  # of a tile
    compiled = jax.jit(use, donate_argnums=0).lower(held, vector).compile().as_text()
    moved = re.findall(r"f32\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled)
    assert all(np.prod([int(n) for n in shape.split(",")]) <= vector.size for shape in moved)


@pytest.mark.parametrize(
    "tx",
    [
        mfac_precondition(4, damping=0.1, storage=Dense(packing="leaf")),
        mfac_precondition(4, blocks="output", metric=SecondMoments()),
    ],
    ids=["whole", "output"],
)
def test_no_parameter_and_no_row_is_gathered(shardings, tx):
    grads = jax.device_put(gradient(0), shardings)
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
    assert "all-reduce" in compiled
    # What is exchanged is of the size of the products: m numbers for each of five blocks at most.
    for results in re.findall(rf"= (.*?) (?:{NAMES})\(", compiled):
        for shape in re.findall(r"\w\[([\d,]*)\]", results):
            assert np.prod([int(n) for n in shape.split(",") if n]) <= 5 * 4


@pytest.mark.parametrize(
    "storage", [Int8(), TopK(0.2, block=8, error_bits=4)], ids=["int8", "largest"]
)
def test_compressed_rows_by_output_follow_the_sharding_of_the_outputs(
    shardings, storage, monkeypatch
):
    """Outputs on all devices or on pairs of them, and parameters that are on every device."""
    for module in (_compressed, _int8):
        monkeypatch.setattr(module, "_ENTRIES_AT_A_TIME", 32)  # a loop over tiles
    mesh, outputs = shardings["bias"].mesh, {"kernel": ("x", "y"), "conv": "y", "same": None}
    shapes = {"kernel": (48, 12), "conv": (5, 8, 6), "bias": (12,), "same": (60, 4)}
    specs = {"kernel": (None, outputs["kernel"]), "conv": (None, None, "y"), "bias": (), "same": ()}
    spread = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}

    def gradient(seed):
        rng = np.random.default_rng(seed)
        return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}

    def sharded(seed):
        return jax.device_put(gradient(seed), spread)

    tx = mfacw(1e-3, window_size=2, storage=storage)
    plain, state = tx.init(gradient(0)), tx.init(sharded(0))
    on_one = jax.jit(tx.update)
    step = jax.jit(tx.update).lower(sharded(0), state, sharded(9)).compile()
    # At most the Gram matrices of 23 blocks, padded for four devices. A device has 144 numbers of
    # the kernel, 120 of the convolution and 240 of the last.
    for results in re.findall(rf"= (.*?) (?:{NAMES})(?:-start)?\(", step.as_text()):
        for shape in re.findall(r"\w\[([\d,]*)\]", results):
            assert np.prod([int(n) for n in shape.split(",") if n]) <= 24 * 2**2
    for seed in range(4):
        want, plain = on_one(gradient(seed), plain, gradient(9))
        got, state = step(sharded(seed), state, sharded(9))
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-7)
    for rows, name in zip(state[0].window.rows[1:], ("conv", "kernel", "same"), strict=True):
        for part in jax.tree.leaves((rows.code, rows.error)):
            want = NamedSharding(mesh, PartitionSpec(outputs[name]))
            assert part.sharding.is_equivalent_to(want, part.ndim)


def test_abstract_parameters_carry_their_sharding(shardings):
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=shardings[name])
        for name, leaf in gradient(0).items()
    }
    state = mfac_precondition(4, damping=0.1, storage=Dense(packing="leaf")).init(abstract)
    assert state.window.rows.blocks["kernel"].sharding.spec == PartitionSpec(None, "x", "y")


@pytest.mark.parametrize("mask", [False, True])
def test_the_whole_inverse_multiplies_shards(shardings, mask):
    """Products exchange n numbers; only the Gram matrix, computed before, gathers."""
    stacked = {name: jnp.stack([gradient(seed)[name] for seed in range(4)]) for name in shardings}
    keep = jax.tree.map(lambda x: x > 0, gradient(9)) if mask else None
    spread = {
        name: jax.device_put(leaf, NamedSharding(shardings[name].mesh, rows_spec(name)))
        for name, leaf in stacked.items()
    }
    params = gradient(0)
    vector = jax.device_put(gradient(7), shardings)
    held = as_rows(spread, params, storage=Dense(packing="leaf"))
    for name in shardings:
        assert held.blocks[name].sharding.spec == rows_spec(name)
    inverse = fisher_inverse(held, 0.1, mask=keep)
    got = inverse.ihvp(vector)
    plain = fisher_inverse(as_rows(stacked, params), 0.1, mask=keep)
    chex.assert_trees_all_close(got, plain.ihvp(gradient(7)), rtol=1e-4, atol=1e-5)
    leaves, treedef = jax.tree.flatten(inverse)  # lowering puts no arrays in place of leaves
    ihvp = jax.jit(lambda leaves, v: jax.tree.unflatten(treedef, leaves).ihvp(v))
    compiled = ihvp.lower(leaves, vector).compile().as_text()
    assert "all-reduce" in compiled
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled


def rows_spec(name):
    return PartitionSpec(None, *SPECS[name])


ON_EXPLICIT_AXES = {
    "flat": mfac_precondition(4, damping=0.1),
    "leaf": mfac_precondition(4, damping=0.1, storage=Dense(packing="leaf")),
    "paged": mfac_precondition(4, damping=0.1, storage=Paged()),
    "output": mfacw(0.1, window_size=4),
    "output, int8": mfacw(0.1, window_size=4, storage=Int8()),
}


@pytest.mark.parametrize("tx", ON_EXPLICIT_AXES.values(), ids=ON_EXPLICIT_AXES)
def test_a_mesh_with_explicit_axes(tx):
    """A step gives what it gives on one device, and no array changes its type."""
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=explicit)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params, plain = gradient(9), tx.init(gradient(0))
    wanted = []
    for seed in range(3):
        want, plain = jax.jit(tx.update)(gradient(seed), plain, params)
        wanted.append(want)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings)
        state = tx.init(spread)
        types = jax.tree.map(jax.typeof, (spread, state))
        step = jax.jit(lambda *arguments: tx.update(*arguments))  # no program of the plain steps
        for seed, want in enumerate(wanted):
            got, state = step(jax.device_put(gradient(seed), shardings), state, spread)
            assert jax.tree.map(jax.typeof, (got, state)) == types
            chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-4, atol=1e-5)
    # JAX writes P() as P(None), which it takes for another sharding once.
    assert step._cache_size() <= 2


def test_a_long_vector_is_not_gathered():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    vector = jax.device_put(jnp.ones(40_000), NamedSharding(mesh, PartitionSpec("x")))
    held = Dense(packing="leaf").empty(vector, 4)
    compiled = jax.jit(lambda rows, v: rows.dots(v)).lower(held, vector).compile()
    assert "all-reduce" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()


def test_gradients_and_pruning_need_automatic_axes():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec()))}
    batches = [jnp.ones((4, 8))]

    def loss_fn(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2)

    for call in (
        lambda: collect_gradients(loss_fn, params, batches, 4),
        lambda: prune(params, loss_fn, batches, 0.5),
    ):
        with pytest.raises(ValueError, match="mesh of params must have automatic axes, got"):
            call()


def test_a_mesh_with_explicit_axes_that_is_not_set():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=explicit)
    tx = mfacw(0.1, window_size=4)
    params = gradient(9)
    spread = jax.device_put(params, {n: NamedSharding(mesh, s) for n, s in SPECS.items()})
    step = jax.jit(lambda *arguments: tx.update(*arguments, value_fn=len))  # others may ask for it
    got, _ = step(spread, tx.init(spread), spread)
    want, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, spread)
    chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-4, atol=1e-5)
