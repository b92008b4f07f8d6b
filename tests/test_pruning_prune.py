"""Pruning in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from mfac_jax import gradients, pruning, rows
from mfac_jax.pruning import _prune, _step
from mfac_jax.pruning._history import History
from mfac_jax.rows import FlatRows, as_rows

X = jax.random.normal(jax.random.key(0), (128, 12))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (12, 3)))
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 128, 16)]
SETTINGS = (
    pruning.Setting("greedy", "joint", 24, 1e-4, (1.0, 0.5)),
    pruning.Setting("mfac", "reference", None, 1e-4),
    pruning.Setting("magnitude", "none", None, 1e-4),
)


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean((hidden @ params["b"]["kernel"] - y) ** 2)


@pytest.fixture(scope="module")
def params():
    key = jax.random.key(2)
    params = {
        "a": {"bias": jnp.zeros(16), "kernel": jax.random.normal(key, (12, 16)) / 4},
        "b": {"kernel": jax.random.normal(key, (16, 3)) / 4},
    }
    tx = optax.sgd(0.3, momentum=0.9)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, (X, Y)), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(300):
        params, state = step(params, state)
    return params


def run(params, sparsity=0.6, batches=BATCHES, **options):
    chosen = {"steps": 3, "num_gradients": 32, "settings": SETTINGS, "progress": False}
    plain = {"history": 0, "descents": ()}
    return pruning.prune(params, loss_fn, batches, sparsity, **{**chosen, **plain, **options})


def full_loss(params):
    return float(loss_fn(params, (X, Y)))


def test_a_percentage_is_all_it_takes(params):
    before = jax.tree.map(np.array, params)
    pruned = run(params, per_example=True)
    kernels = [pruned.mask["a"]["kernel"], pruned.mask["b"]["kernel"]]
    assert sum(int(jnp.sum(~m)) for m in kernels) == round(0.6 * 240)
    assert bool(pruned.mask["a"]["bias"].all())
    for w, m in zip(jax.tree.leaves(pruned.params), jax.tree.leaves(pruned.mask), strict=True):
        assert np.all(np.asarray(w)[~np.asarray(m)] == 0)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    magnitude = run(params, settings=SETTINGS[2:])
    assert full_loss(pruned.params) < full_loss(magnitude.params)


def test_every_step_takes_the_setting_of_least_measured_loss(params):
    report = run(params, per_example=True).report
    assert len(report.steps) == 3
    for step in report.steps:
        assert len(step.tried) == 4
        losses = [trial.loss for trial in step.tried]
        assert step.loss_after == min(losses) == losses[step.chosen]
        assert 0 < step.degrees_of_freedom <= 32
        assert step.seconds > step.gradient_seconds > 0
        assert step.peak_memory is None or step.peak_memory > 2**20
    for one, next_ in zip(report.steps, report.steps[1:], strict=False):
        assert next_.loss_before == one.loss_after
    assert [step.num_pruned for step in report.steps] == [
        round(240 * s) for s in pruning.sparsity_schedule(0.6, 3)
    ]
    assert sum(layer.num_pruned for layer in report.layers) == report.steps[-1].num_pruned


def test_a_step_is_that_of_prune_step(params):
    setting = pruning.Setting("mfac", "joint", 24, 1e-3, (0.5,))
    pruned = run(params, steps=1, settings=[setting], calibration=BATCHES[:1], num_calibration=1)
    from mfac_jax import collect_gradients

    g = collect_gradients(loss_fn, params, BATCHES, 32, progress=False)
    want, mask, info = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        g,
        0.6,
        damping=1e-3,
        blocks=24,
        step_scale=0.5,
    )
    jax.tree.map(np.testing.assert_array_equal, pruned.mask, mask)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, pruned.params, want)
    close(pruned.report.steps[0].update_norm, info.update_norm)
    given = run(params, steps=1, settings=[setting], gradients=g)
    jax.tree.map(np.testing.assert_array_equal, given.mask, mask)
    jax.tree.map(close, given.params, want)
    several = run(params, 0.6, steps=2, settings=[setting], gradients=g, history=1)
    assert [step.num_pruned for step in several.report.steps][-1] == 144
    with pytest.raises(ValueError, match="num_gradients=8 rows, got 32"):
        run(params, gradients=g, num_gradients=8)
    with pytest.raises(ValueError, match="structure"):
        run(params["a"], gradients=g)
    with pytest.raises(ValueError, match="dtype is that of the gradients"):
        run(params, gradients=g, dtype=jnp.bfloat16)


def test_a_descent_is_the_optimizer_s_direction_at_the_gradients_of_the_step(params):
    from mfac_jax import collect_gradients

    setting, way = pruning.Setting("mfac", "joint", 24, 1e-3), pruning.Descent(0.02, 1e-3)
    before = run(params, steps=1, settings=[setting])
    after = run(params, steps=1, settings=[setting], descents=[way])
    assert after.report.steps[0].tried[-1].descent == way
    assert "descent 0.001" in str(after.report.steps[0].tried[-1])
    assert after.report.steps[0].loss_after < before.report.steps[0].loss_after
    jax.tree.map(np.testing.assert_array_equal, before.mask, after.mask)
    held = collect_gradients(loss_fn, params, BATCHES * 2, 40, progress=False)
    kept = np.concatenate([np.ravel(before.mask[k]["kernel"]) for k in "ab"])
    # Eight batches went into the calibration; the gradients are those after them.
    g = np.asarray(held.columns(0, held.layout.size), np.float64)[8:]
    g = np.concatenate([g[:, 16:208], g[:, 208:]], axis=1) * kept
    fisher = g.T @ g / 32
    fisher += 0.02 * np.trace(fisher) * np.eye(240)
    want = -1e-3 * np.linalg.solve(fisher, g.mean(0))
    moved = [after.params[k]["kernel"] - before.params[k]["kernel"] for k in "ab"]
    oracles.assert_close(
        np.concatenate([np.ravel(m) for m in moved]),
        want,
        length=240,
        condition=np.linalg.cond(fisher),
    )


def test_no_descent_is_taken_that_does_not_help(params):
    far = [pruning.Descent(1e-3, 1e6), pruning.Descent(1e-3, 1e30)]
    plain, tried = run(params), run(params, descents=far)
    jax.tree.map(np.testing.assert_array_equal, plain.params, tried.params)
    assert len(tried.report.steps[0].tried) == len(plain.report.steps[0].tried) + 2


def test_the_gradients_of_earlier_steps_are_used_as_well(params):
    options = {
        "num_gradients": 8,
        "steps": 4,
        "settings": [pruning.Setting("mfac", "joint", 24, 1e-12)],
    }
    with_history, without = run(params, history=1, **options), run(params, **options)
    freedom = [[s.degrees_of_freedom for s in p.report.steps] for p in (with_history, without)]
    assert freedom[0][0] == pytest.approx(freedom[1][0], rel=1e-3)
    assert max(freedom[1]) <= 8 < min(freedom[0][1:]) <= 16
    assert with_history.report.steps[-1].num_pruned == 144


def test_history_holds_the_newest_steps_at_one_level():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(3, 10)).astype(np.float32) * 4.0**i for i in range(5)]
    sets[3][:] = 0
    alive = [jnp.asarray(np.arange(10) < 7)]
    past = History(2, 3)
    for i, new in enumerate(sets):

        def fill(rows, first, new=new):
            if rows is None:
                rows = as_rows(jnp.zeros((past.num_rows, 10)))
            matrix = np.array(rows.columns(0, 10))
            matrix[first : first + 3] = new
            return FlatRows.of(jnp.asarray(matrix), rows.layout, rows.implementation)

        matrix = np.asarray(past.take(fill, alive).columns(0, 10))
        assert matrix.shape == (6, 10)
        fresh, slot = past.mean != 0, i % 2
        assert np.flatnonzero(fresh).tolist() == [3 * slot, 3 * slot + 1, 3 * slot + 2]
        assert past.filled == (0.5 if i == 0 else 1)
        np.testing.assert_array_equal(matrix[fresh], new)
        np.testing.assert_allclose(past.mean @ matrix, new.mean(0), rtol=1e-5, atol=1e-6)
        old = matrix[~fresh]
        if i == 0:
            assert not old.any()
        elif i < 3:
            level = [np.sum(x[:, :7].astype(np.float64) ** 2) for x in (old, new)]
            assert level[0] == pytest.approx(level[1], rel=1e-5)
            ratio = old / sets[i - 1]
            np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
        else:  # a step without any gradient sets no level, nor has one
            np.testing.assert_array_equal(old, sets[i - 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_room_for_later_gradients_changes_nothing(params, dtype):
    options = {"steps": 2, "num_gradients": 8, "dtype": dtype}
    options["descents"] = [pruning.Descent(0.02, 1e-2)]
    relative = SETTINGS[0]._replace(damping=0.1, relative=True)
    for setting in (relative, SETTINGS[1]):
        one, other = (
            run(params, settings=[setting], history=history, **options).report.steps[0]
            for history in (0, 3)
        )
        # A window of two steps, since there are no more.
        assert one.damping == pytest.approx(other.damping, rel=1e-4)
        for trial, same in zip(one.tried, other.tried, strict=True):
            assert trial.loss == pytest.approx(same.loss, rel=1e-4)
        for name in ("predicted_loss_increase", "degrees_of_freedom", "update_norm"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3)


@pytest.mark.parametrize(
    ("pattern", "settings", "sparsity"),
    [
        (pruning.NofM(2, 4), SETTINGS, 0.5),
        (pruning.BlocksOf(4, axis=0), SETTINGS, 0.5),
        (pruning.Slices(axis=0), SETTINGS[1:], 0.5),
    ],
)
def test_patterns_in_several_steps(params, pattern, settings, sparsity):
    pruned = run(params, sparsity, pattern=pattern, settings=settings)
    done = pruned.report.steps[-1].num_pruned
    assert done <= 120
    assert done > 120 - 16
    if isinstance(pattern, pruning.NofM):
        kernel = np.asarray(pruned.mask["a"]["kernel"])
        assert np.all(kernel.reshape(3, 4, 16).sum(1) == 2)


def test_schedules_masks_and_sparsities_of_leaves(params):
    given = run(params, schedule=(0.3, 0.6)).report
    assert [step.num_pruned for step in given.steps] == [72, 144]
    per_leaf = {"a": {"bias": 0.0, "kernel": 0.5}, "b": {"kernel": 0.25}}
    pruned = run(params, per_leaf)
    assert [layer.num_pruned for layer in pruned.report.layers] == [96, 12]
    again = pruning.prune(
        pruned.params, loss_fn, BATCHES, 0.6, steps=2, num_gradients=8,
        settings=SETTINGS[2:], mask=pruned.mask, schedule="cubic", progress=False,
    )  # fmt: skip
    gone = [~np.asarray(m) for m in jax.tree.leaves(pruned.mask)]
    for old, new in zip(gone, jax.tree.leaves(again.mask), strict=True):
        assert not np.any(np.asarray(new)[old])


def test_fine_tuning_in_between(params):
    tx = optax.sgd(0.3, momentum=0.9)

    def fine_tune(params, mask):
        wrapped = pruning.sparse(tx, mask)
        state = wrapped.init(params)
        for _ in range(5):
            updates, state = wrapped.update(jax.grad(loss_fn)(params, (X, Y)), state, params)
            params = optax.apply_updates(params, updates)
        return params

    tuned = run(params, 0.8, fine_tune=fine_tune)
    plain = run(params, 0.8)
    assert full_loss(tuned.params) < full_loss(plain.params)
    assert all(step.loss_tuned is not None for step in tuned.report.steps)
    # A careless function revives nothing.
    careless = run(
        params, 0.8, fine_tune=lambda params, mask: jax.tree.map(lambda w: w + 1, params)
    )
    assert all(
        np.all(np.asarray(w)[~np.asarray(m)] == 0)
        for w, m in zip(
            jax.tree.leaves(careless.params), jax.tree.leaves(careless.mask), strict=True
        )
    )


def test_data_goes_on_from_step_to_step(params):
    seen = []

    class Loader:
        def __iter__(self):
            for i, batch in enumerate(BATCHES):
                seen.append(i)
                yield batch

    pruning.prune(
        params, loss_fn, Loader(), 0.3, steps=2, num_gradients=5, settings=SETTINGS[2:],
        num_calibration=2, progress=False,
    )  # fmt: skip
    # Two to calibrate on, five and five for gradients; a pass ends after eight.
    assert seen[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    once = pruning.prune(
        params, loss_fn, iter(BATCHES), 0.3, steps=2, num_gradients=5, settings=SETTINGS[2:],
        num_calibration=2, progress=False,
    )  # fmt: skip
    assert once.report.steps[-1].num_pruned == 72


def test_the_report_is_a_table_and_a_picture(params, tmp_path):
    report = run(params, 0.5).report
    text = str(report)
    assert "50.00%" in text
    assert "['a']['kernel']" in text
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "pattern", [pruning.Unstructured(), pruning.NofM(2, 4), pruning.BlocksOf(3), pruning.Slices()]
)
def test_defaults_fit_every_pattern_and_include_the_papers_setting_and_none(params, pattern):
    settings = pruning.default_settings(pattern)
    assert any(s.score == "mfac" and s.update == "reference" for s in settings)
    assert any(s.update == "none" for s in settings)
    kernel = lambda path, leaf: path == "a/kernel"  # noqa: E731
    if pattern == pruning.BlocksOf(3):
        pattern = pruning.BlocksOf(3, axis=0)
    pruned = run(params, 0.4, settings=None, pattern=pattern, path_filter=kernel, steps=2)
    assert pruned.report.steps[-1].sparsity == pytest.approx(0.4, abs=0.07)


@pytest.mark.wrong_types
@pytest.mark.parametrize("schedule", [None, 0.5])
def test_a_schedule_of_the_wrong_type(params, schedule):
    with pytest.raises(TypeError, match=r"schedule must be the name of one, .* got"):
        run(params, schedule=schedule)


@pytest.mark.wrong_types
def test_scalars_of_numpy_and_jax_are_numbers(params):
    plain = run(
        params,
        settings=[pruning.Setting("greedy", "joint", 24, 0.25)],
        schedule=(0.4, 0.6),
        descents=[pruning.Descent(0.25, 0.125)],
    )
    given = run(
        params,
        np.float32(0.6),
        settings=[pruning.Setting("greedy", "joint", np.int64(24), jnp.float32(0.25))],
        schedule=np.array([0.4, 0.6]),
        descents=[pruning.Descent(jnp.float32(0.25), np.float32(0.125))],
    )
    jax.tree.map(np.testing.assert_array_equal, plain.mask, given.mask)
    jax.tree.map(np.testing.assert_array_equal, plain.params, given.params)


def test_groups_too_large_for_greedy_masks_are_pruned_by_default():
    settings = pruning.default_settings(pruning.NofM(1024, 4096))
    assert all(setting.score != "greedy" for setting in settings)


def test_a_relative_damping_follows_the_scale_of_the_loss(params):
    setting = pruning.Setting("greedy", "joint", 24, 1e-2, relative=True)
    options = {"steps": 2, "num_gradients": 16, "settings": [setting], "descents": ()}
    plain = pruning.prune(params, loss_fn, BATCHES, 0.5, **options)
    scaled = pruning.prune(
        params, lambda params, batch: 100 * loss_fn(params, batch), BATCHES, 0.5, **options
    )
    jax.tree.map(np.testing.assert_array_equal, plain.mask, scaled.mask)
    for one, other in zip(plain.report.steps, scaled.report.steps, strict=True):
        assert other.damping == pytest.approx(1e4 * one.damping, rel=1e-2)
        assert other.degrees_of_freedom == pytest.approx(one.degrees_of_freedom, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.2}, ValueError, r"sparsity must lie in \[0, 1\]"),
        ({"calibration": []}, ValueError, "calibration is empty"),
        ({"num_calibration": 0}, ValueError, "num_calibration must be at least 1"),
        ({"settings": []}, ValueError, "settings is empty"),
        ({"schedule": (0.5, 0.4, 0.6)}, ValueError, "rise"),
        ({"schedule": (0.1, 0.5)}, ValueError, "must end at sparsity=0.6"),
        ({"schedule": "square"}, ValueError, "'geometric', 'cubic', 'linear'"),
        ({"sparsity": 1.0, "allow_empty_layers": True}, ValueError, "expected 'cubic' or 'linear'"),
        (
            {"settings": [pruning.Setting("mfac", "joint", 8, 1e-3, scales=0.5)]},
            TypeError,
            "scales must be a sequence of numbers, got float",
        ),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"path_filter": "nothing"}, ValueError, "at least one parameter"),
        ({"pattern": pruning.NofM(2, 5)}, ValueError, "multiple of 5"),
        ({"sparsity": {"a": 0.5}}, ValueError, "structure"),
        (
            {"sparsity": {"a": {"bias": 0, "kernel": 0.5}, "b": {"kernel": 1.2}}},
            ValueError,
            r"sparsity\['b'\]\['kernel'\] must lie in",
        ),
        (
            {"costs": {"a": {"bias": 1, "kernel": 0}, "b": {"kernel": 1}}},
            ValueError,
            r"costs\['a'\]\['kernel'\] must be at least 1",
        ),
        ({"budget": "equal"}, ValueError, "budget must be one of"),
        (
            {"settings": [pruning.Setting("best", "joint", 8, 1e-3)]},
            ValueError,
            "score must be one of",
        ),
        (
            {
                "settings": [pruning.Setting("greedy", "joint", None, 1e-3)],
                "pattern": pruning.Slices(),
            },
            ValueError,
            "inside blocks",
        ),
        ({"settings": [pruning.Setting("mfac", "joint", 8, -1.0)]}, ValueError, "damping"),
        ({"settings": [SETTINGS[0]._replace(scales=())]}, ValueError, "scales is empty"),
        ({"num_gradients": 0}, ValueError, "num_gradients must be at least 1"),
        ({"history": -1}, ValueError, "history must be at least 0"),
        ({"descents": [pruning.Descent(0.0, 1.0)]}, ValueError, "relative_damping"),
        (
            {"mask": {"a": {"bias": True, "kernel": False}, "b": {"kernel": True}}},
            ValueError,
            "below",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(params, options, error, words, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(_prune, "fill_rows", fail)
    with pytest.raises(error, match=words):
        run(params, **options)


def test_numbers_that_are_not_finite(params):
    bad = jax.tree.map(lambda w: w.at[0].set(jnp.nan), params)
    with pytest.raises(FloatingPointError, match=r"params\['a'\]\['bias'\]"):
        run(bad)
    batches = [(x, y.at[0].set(jnp.inf)) for x, y in BATCHES]
    with pytest.raises(FloatingPointError, match="not finite"):
        run(params, 0.5, batches=batches, calibration=BATCHES)


def test_calibration_batches_that_are_not_finite(params, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(_prune, "fill_rows", fail)
    with pytest.raises(
        FloatingPointError, match="loss of params on the calibration batches is nan"
    ):
        run(params, calibration=[(X, Y * jnp.nan)])


def test_another_sparsity_compiles_nothing_anew(params):
    run(params, 0.5, history=1, descents=[pruning.Descent(0.02, 1e-3)])
    compiled = (
        _step._scores,
        _step._select,
        _step.work_out,
        gradients._write_gradients,
    )
    before = [function._cache_size() for function in compiled]
    run(params, 0.7, history=1, descents=[pruning.Descent(0.03, 1e-2)], schedule="cubic", steps=4)
    assert [function._cache_size() for function in compiled] == before


def test_state_beside_the_weights_may_be_trained_as_well():
    """Normalisation statistics in the parameters: the next step's loss sees them."""

    def loss(params, batch):
        x, y = batch
        out = x @ params["kernel"] - params["mean"][None]
        return jnp.mean((out - y) ** 2)

    start = {"kernel": jax.random.normal(jax.random.key(3), (12, 3)), "mean": jnp.zeros(3)}

    def fine_tune(params, mask):
        assert mask["mean"].all()
        return params | {"mean": jnp.mean(X @ params["kernel"] - Y, axis=0)}

    pruned = pruning.prune(
        start, loss, BATCHES, 0.5, steps=3, num_gradients=16, fine_tune=fine_tune,
        settings=SETTINGS[2:], descents=(), path_filter="kernel", progress=False,
    )  # fmt: skip
    assert np.any(pruned.params["mean"])
    for one, after in zip(pruned.report.steps, pruned.report.steps[1:], strict=False):
        assert one.loss_tuned < one.loss_after
        assert after.loss_before == one.loss_tuned


def test_a_mask_that_is_given_is_applied_at_once(params):
    mask = pruning.initial_mask(params)
    mask["a"]["bias"] = mask["a"]["bias"].at[3].set(False)  # not prunable
    mask["a"]["kernel"] = mask["a"]["kernel"].at[:, ::2].set(False)
    masked = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, mask)
    pruned = run(params, mask=mask, calibration=BATCHES, steps=8)
    assert pruned.report.steps[0].loss_before == pytest.approx(
        np.mean([float(loss_fn(masked, batch)) for batch in BATCHES]), rel=1e-5
    )
    assert float(pruned.params["a"]["bias"][3]) == 0
    assert not pruned.mask["a"]["bias"][3]
    assert pruned.report.steps[-1].num_pruned == 144
    assert pruned.report.steps[0].num_pruned > 96
    even = run(params, 0.7, mask=mask, budget="uniform", settings=SETTINGS[2:], steps=4)
    assert [layer.num_pruned for layer in even.report.layers] == [134, 34]


def test_a_loss_after_fine_tuning_that_is_not_finite(params):
    with pytest.raises(FloatingPointError, match="after fine_tune is nan"):
        run(params, steps=1, fine_tune=lambda p, _: jax.tree.map(lambda w: w * jnp.nan, p))


def test_given_gradients_that_are_not_finite(params):
    g = rows.as_rows(jax.tree.map(lambda w: jnp.full((32, *w.shape), jnp.nan), params))
    with pytest.raises(FloatingPointError, match=r"squared gradients of params\['a'\]\['bias'\]"):
        run(params, gradients=g)


@pytest.mark.wrong_types
def test_wrong_types(params):
    with pytest.raises(TypeError, match="loss_fn must be a function, got NoneType"):
        pruning.prune(params, None, BATCHES, 0.5)
    with pytest.raises(TypeError, match="scalar and nothing else"):
        pruning.prune(params, lambda p, b: (loss_fn(p, b), 1.0), BATCHES, 0.5)
    with pytest.raises(TypeError, match="fine_tune must be a function, got int"):
        run(params, fine_tune=3)
    with pytest.raises(TypeError, match="calibration must be an iterable"):
        run(params, calibration=X)
    with pytest.raises(TypeError, match=r"give \[setting\]"):
        run(params, settings=SETTINGS[0])
    with pytest.raises(TypeError, match="descents must be Descent, got tuple"):
        run(params, descents=[(0.1, 0.1)])
    with pytest.raises(TypeError, match="settings must be Setting, got str"):
        run(params, settings=["mfac"])
    with pytest.raises(TypeError, match=r"\[batch\]"):
        pruning.prune(params, loss_fn, X, 0.5)
