"""The networks to prune, in small and on made-up data."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_tasks
import pruning_network
import pytest
from flax import nnx
from pruning_recipes import averaged
from pruning_tasks import NETWORKS, Files, network

from mfac_jax import collect_gradients, mfac, mfacw, pruning
from mfac_jax._layout import Layout
from mfac_jax.pruning import Scope, Slices

# Flax and optax mix dtypes and ranks.
pytestmark = pytest.mark.jax_defaults

# The others take seconds to make.
FAST = ("resnet20", "mlp")
TRAINED = ("squeezenet", "mlp", "characters", "minilm")
NORMALISED = ("resnet20", "akamaster", "squeezenet")


def cases(every):
    """Parameters that are, or begin with, the name of a network."""
    values = [case if isinstance(case, tuple) else (case,) for case in every]
    return [pytest.param(*v, marks=() if v[0] in FAST else pytest.mark.slow) for v in values]


@functools.cache
def small(name, folder):
    return network(name, Files(None, {}, None, folder, smoke=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("networks")
    small.cache_clear()


@pytest.fixture(scope="module", params=cases(NETWORKS))
def net(request, folder):
    return small(request.param, folder)


def equal(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def examples(batches):
    """The examples of some batches, as bytes."""
    return {x.tobytes() for inputs, _ in batches for x in inputs}


def test_a_network_has_a_loss_and_accuracies(net):
    assert len(net.calibration) == 8
    loss = jax.jit(net.loss)
    assert all(np.isfinite(loss(net.params, batch)) for batch in net.calibration)
    for part in ("validation", "test"):
        assert 0 <= net.accuracy(net.params, part) <= 100
    with pytest.raises(KeyError):
        net.accuracy(net.params, "train")


def test_accuracy_counts_all_examples(folder, monkeypatch):
    net = small("mlp", folder)
    logits = nnx.merge(net._graph, net.params)(net.inputs(net.test.x))
    expected = 100 * np.mean(np.argmax(logits, -1) == net.test.y)
    assert net.accuracy(net.params, "test") == pytest.approx(expected)
    assert len(net.test.y) > 250  # more than one batch


def test_batches_depend_on_the_seed_only(net):
    first, again, other = (list(itertools.islice(net.batches(seed, 4), 3)) for seed in (0, 0, 1))
    assert equal(first, again)
    assert not equal([x for x, _ in first], [x for x, _ in other])
    assert all(len(x) == 4 == len(y) for x, y in first)


@pytest.mark.parametrize("name", cases(["resnet20", "squeezenet", "mlp", "minilm"]))
def test_no_batch_has_an_example_of_another_part(name, folder, monkeypatch):
    net = small(name, folder)
    monkeypatch.setattr(net, "augment", lambda rng, x: x)
    count = len(net.train.y)
    trained = examples([next(net.batches(0, count))])
    assert len(trained) == count
    held = examples(net.calibration)
    assert len(held) == sum(len(y) for _, y in net.calibration) >= 16
    validation = examples([(net.inputs(net.validation.x), net.validation.y)])
    test = examples([(net.inputs(net.test.x), net.test.y)])
    for one, two in itertools.combinations((trained, held, validation, test), 2):
        assert not one & two


@pytest.mark.slow
def test_characters_are_calibrated_on_text_that_no_batch_reads(folder, monkeypatch):
    net = small("characters", folder)
    text = optimizer_tasks.Characters(None, smoke=True).text
    before = net._task.text
    held = np.concatenate([np.append(x[:, 0], y[:, -1])[None] for x, y in net.calibration])
    length, count = net._task.length, len(held)
    assert len(before) + count * length < len(text)
    windows = text[len(before) :][: count * length].reshape(count, length)
    assert equal([x[0] for x, _ in net.calibration], list(windows))
    # Every character of a batch comes from the text before.
    monkeypatch.setattr(net._task, "text", np.arange(len(before)))
    for x, y in itertools.islice(net.batches(0, 8), 50):
        assert max(x.max(), y.max()) < len(before)


def test_a_batch_is_not_larger_than_the_data(folder):
    net = small("mlp", folder)
    with pytest.raises(ValueError, match=r"mlp has 206 training examples, got batches of 207"):
        next(net.batches(0, 207))


@pytest.mark.parametrize(
    ("name", "expected"),
    cases(
        [
            ("resnet20", {"conv", "conv1", "conv2", "dense"}),
            ("akamaster", {"conv", "conv1", "conv2", "dense"}),
            ("squeezenet", {"conv", "head"}),
            ("mlp", {"0", "1", "2"}),
            ("characters", {"qkv", "out", "up", "down", "head"}),
            ("minilm", {"query", "key", "value", "out", "up", "down"}),
        ]
    ),
)
def test_kernels_are_pruned(name, expected, folder):
    net = small(name, folder)
    paths = Layout(net.params).paths
    leaves = zip(paths, jax.tree.leaves(net.params), strict=True)
    names = [re.findall(r"\w+", path) for path, leaf in leaves if net.is_pruned(path, leaf)]
    assert {name[-1] for name in names} == {"kernel"}
    assert {name[-2] for name in names} == expected
    if name == "minilm":  # in both layers
        assert len(names) == 2 * len(expected)


@pytest.mark.slow
def test_channels_of_the_feed_forward_parts_can_be_pruned(folder):
    net = small("minilm", folder)
    rows = collect_gradients(net.loss, net.params, net.batches(0, 4), 2, progress=False)
    params, mask, _ = pruning.prune_step(
        net.params,
        pruning.initial_mask(net.params),
        rows,
        0.5,
        damping=1e-3,
        score="magnitude",
        update="none",
        scope=Scope(net.is_channel, Slices()),
    )
    for layer in range(2):
        alive = mask["layers"][layer]["up"]["kernel"][...]
        assert alive.shape == (8, 32)
        assert equal(alive, np.broadcast_to(alive[:1], alive.shape))
        assert mask["layers"][layer]["down"]["kernel"][...].all()
    assert not equal(params, net.params)


def test_recalibration_renews_statistics_only(net, monkeypatch):
    monkeypatch.setattr(pruning_network, "RECALIBRATION", (2, 8))
    new = net.recalibrate(net.params)
    assert net.has_statistics == (net.name in NORMALISED)
    if not net.has_statistics:
        assert new is net.params
        return
    assert jax.tree.structure(new) == jax.tree.structure(net.params)
    assert equal(nnx.filter_state(new, nnx.Param), nnx.filter_state(net.params, nnx.Param))
    statistics = [jax.tree.leaves(nnx.filter_state(p, nnx.BatchStat)) for p in (new, net.params)]
    assert not any(map(np.array_equal, *statistics))
    # The old statistics do not matter.
    assert equal(net.recalibrate(new), new)


def test_new_statistics_are_means_over_batches(folder, monkeypatch):
    monkeypatch.setattr(pruning_network, "RECALIBRATION", (3, 20))
    net = small("resnet20", folder)
    new = net.recalibrate(net.params)
    conv = nnx.merge(net._graph, net.params).conv
    batches = itertools.islice(net.batches(2026, 20), 3)
    values = [np.asarray(conv(x), np.float64) for x, _ in batches]
    mean = np.mean([v.mean((0, 1, 2)) for v in values], axis=0)
    var = np.mean([v.var((0, 1, 2)) for v in values], axis=0)
    np.testing.assert_allclose(new["norm"]["mean"][...], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["norm"]["var"][...], var, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        pytest.param("resnet20", optax.sgd(0.01, momentum=0.9), id="sgd"),
        pytest.param("mlp", optax.adam(1e-3), id="adam"),
        pytest.param("mlp", mfac(0.01, window_size=4), id="mfac", marks=pytest.mark.slow),
        pytest.param("minilm", mfacw(1e-3, 0.1, window_size=4), id="mfacw", marks=pytest.mark.slow),
    ],
)
def test_training_keeps_pruned_weights_at_zero(name, tx, folder):
    net = small(name, folder)
    rng = np.random.default_rng(0)

    def half(path, leaf):
        is_pruned = net.is_pruned(jax.tree_util.keystr(path), leaf)
        return (rng.random(leaf.shape) < 0.5) | np.full(leaf.shape, not is_pruned)

    mask = jax.tree_util.tree_map_with_path(half, net.params)
    params = jax.tree.map(lambda alive, leaf: np.where(alive, leaf, 0), mask, net.params)
    new = net.trainer(tx, 0, 8)(params, mask, 2)
    assert jax.tree.structure(new) == jax.tree.structure(net.params)
    assert all(
        not np.asarray(leaf)[~alive].any()
        for leaf, alive in zip(jax.tree.leaves(new), jax.tree.leaves(mask), strict=True)
    )
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True)
    changed = [not np.array_equal(*pair) for pair in pairs]
    assert sum(changed) >= 0.8 * len(changed)


def test_training_continues_from_call_to_call(folder):
    net = small("mlp", folder)
    mask = pruning.initial_mask(net.params)
    tune = net.trainer(optax.adam(1e-3), 3, 8)
    params = tune(tune(net.params, mask, 2), mask, 3)
    assert equal(params, net.trainer(optax.adam(1e-3), 3, 8)(net.params, mask, 5))
    assert not equal(params, net.trainer(optax.adam(1e-3), 4, 8)(net.params, mask, 5))


@pytest.mark.parametrize("name", cases(TRAINED))
def test_a_trained_network_is_kept(name, folder, monkeypatch):
    net = small(name, folder)
    assert (folder / f"smoke_{name}.npz").exists()
    assert not list(folder.glob("*.part*"))
    monkeypatch.setattr(pruning_network.Trained, "_train", None)
    again = network(name, Files(None, {}, None, folder, smoke=True))
    assert jax.tree.structure(again.params) == jax.tree.structure(net.params)
    assert equal(again.params, net.params)
    assert again.training_seconds == pytest.approx(net.training_seconds)
    assert net.training_seconds > 0


def test_an_interrupted_training_resumes_exactly(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning_network, "KEEP_EVERY", 2)
    written = pruning_network._write

    def interrupted(path, tree):
        written(path, tree)
        raise KeyboardInterrupt

    files = Files(None, {}, None, tmp_path, smoke=True)
    with monkeypatch.context() as patch:
        patch.setattr(pruning_network, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            network("mlp", files)
    [part] = tmp_path.iterdir()
    assert part.name == "smoke_mlp.part.npz"
    with np.load(part) as file:
        kept = dict(file)
    kept["3"] += 1000  # seconds
    np.savez(part, **kept)
    resumed = network("mlp", files)
    assert 1000 < resumed.training_seconds < 1100
    assert equal(resumed.params, small("mlp", folder).params)
    assert [path.name for path in tmp_path.iterdir()] == ["smoke_mlp.npz"]


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "missing"])
def test_a_damaged_network_is_an_error(damage, folder, tmp_path):
    small("mlp", folder)
    content = (folder / "smoke_mlp.npz").read_bytes()
    path = tmp_path / "smoke_mlp.npz"
    path.write_bytes(content)
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "shape":
        np.savez(path, **arrays | {"0.layers.1.kernel": np.zeros((2, 3), np.float32)})
    else:
        del arrays["0.layers.1.kernel"]
        np.savez(path, **arrays)
    expected = {
        "cut": r"smoke_mlp.npz cannot be read",
        "empty": r"smoke_mlp.npz cannot be read",
        "shape": r"expected shape \(6, 4\) for 0.layers.1.kernel, got \(2, 3\)",
        "missing": r"expected shape \(6, 4\) for 0.layers.1.kernel, got None",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        network("mlp", Files(None, {}, None, tmp_path, smoke=True))


@pytest.mark.parametrize(
    ("name", "missing"),
    cases(
        [
            ("resnet20", r"resnet20/mfac_resnet20.npz .* or resnet20=FILE; got .*no.npz"),
            ("akamaster", r"resnet20/akamaster_resnet20.npz"),
            ("squeezenet", r"no CIFAR-10 in"),
            ("mlp", r"no mnist.npz in .*: name its folder by --data-dir"),
            ("characters", r"no tinyshakespeare.txt in"),
            ("minilm", r"model.safetensors and tokenizer.json"),
        ]
    ),
)
def test_missing_files_are_named(name, missing, tmp_path):
    files = Files(tmp_path, {"resnet20": tmp_path / "no.npz"}, tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=missing):
        network(name, files)


def test_unknown_networks_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of resnet20, .*minilm, got lenet"):
        network("lenet", Files(None, {}, None, tmp_path))


def test_training_batches_of_sentences_hide_some_words(folder):
    net = small("minilm", folder)
    tokens = np.tile(np.array([101, 7, 8, 9, 102, 0, 0], np.int32), (2000, 1))
    found = net.augment(np.random.default_rng(0), tokens)
    assert found.dtype == tokens.dtype
    changed = found != tokens
    assert not changed[:, [0, 4, 5, 6]].any()
    assert changed[:, 1:4].mean() == pytest.approx(0.1, abs=0.015)
    assert len(np.unique(found[changed])) == 1


def test_sentences_of_a_batch_have_similar_lengths(folder):
    net = small("minilm", folder)
    rng = np.random.default_rng(0)
    counts = np.repeat([3, 8, 9, 20, 40], 7)
    x = np.where(np.arange(64) < counts[:, None], rng.integers(1, 50, (35, 64)), 0)
    net.train = optimizer_tasks.Split(x.astype(np.int32), np.arange(35, dtype=np.int32))
    net._short = optimizer_tasks.Split(x[:4].astype(np.int32), np.arange(-4, 0))
    epoch = list(itertools.islice(net.batches(0, 3), 10))
    assert sorted({x.shape[1] for x, _ in epoch}) == [8, 16, 24, 48]
    for states, labels in epoch:
        lengths = states[..., -1].sum(1)
        np.testing.assert_array_equal(lengths, counts[labels])  # no word is cut
    seen = np.concatenate([labels for _, labels in epoch])
    assert len(set(seen)) == len(seen) == 30
    # The shortest sentences serve to train the network, before it is pruned.
    seen = np.concatenate([y for _, y in itertools.islice(net.batches_of_training(0, 3), 12)])
    assert set(range(-4, 0)) & set(seen)
    with pytest.raises(ValueError, match="minilm: too few training examples for batches of 20"):
        next(net.batches(0, 20))


def test_sentences_for_calibration_are_ordered_by_length(folder):
    net = small("minilm", folder)
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 64, 512)
    x = np.where(np.arange(64) < counts[:, None], 7, 0).astype(np.int32)
    _, held = net._hold_out(optimizer_tasks.Split(x, np.arange(512, dtype=np.int32)))
    assert len(held.y) == 64
    lengths = counts[held.y].reshape(8, 8)
    low, high = np.sort(lengths.min(1)), np.sort(lengths.max(1))
    assert (high[:-1] <= low[1:]).all()
    assert not (np.diff(lengths[:, 0]) >= 0).all()  # the batches come in another order


def test_an_averaged_optimizer_ends_at_the_mean():
    tx = averaged(optax.sgd(0.5), [2, 3, 5])
    weights, state = jnp.float32(1.0), tx.init(jnp.float32(1.0))
    seen = []
    for _ in range(5):
        updates, state = tx.update(weights, state, weights)  # halves the weight
        weights = optax.apply_updates(weights, updates)
        seen.append(float(weights))
    np.testing.assert_allclose(seen, [1 / 2, 1 / 4, 1 / 8, 1 / 16, (1 / 4 + 1 / 8 + 1 / 32) / 3])
