"""Pruning in one call."""

import first_call
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from mfac_jax import collect_gradients, pruning, rows
from mfac_jax.pruning import Gradients, Scope, Search, _prune, _trials
from mfac_jax.pruning._gradients import History

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


def few(count=32, history=0, **options):
    return Gradients(count, history=history, **options)


def among(*settings, descents=(), **options):
    return Search(settings or SETTINGS, descents, **options)


def run(params, sparsity=0.6, batches=BATCHES, **options):
    plain = {"steps": 3, "gradients": few(), "search": among(), "progress": False}
    return pruning.prune(params, loss_fn, batches, sparsity, **{**plain, **options})


def full_loss(params):
    return float(loss_fn(params, (X, Y)))


def test_a_percentage_is_all_it_takes(params):
    before = jax.tree.map(np.array, params)
    pruned = run(params, gradients=few(per_example=True))
    kernels = [pruned.mask["a"]["kernel"], pruned.mask["b"]["kernel"]]
    assert sum(int(jnp.sum(~m)) for m in kernels) == round(0.6 * 240)
    assert bool(pruned.mask["a"]["bias"].all())
    for w, m in zip(jax.tree.leaves(pruned.params), jax.tree.leaves(pruned.mask), strict=True):
        assert np.all(np.asarray(w)[~np.asarray(m)] == 0)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    magnitude = run(params, search=among(*SETTINGS[2:]))
    assert full_loss(pruned.params) < full_loss(magnitude.params)


def test_every_step_takes_the_setting_of_least_measured_loss(params):
    report = run(params, gradients=few(per_example=True)).report
    assert len(report.steps) == 3
    for step in report.steps:
        assert len(step.tried) == 4
        losses = [trial.loss for trial in step.tried if trial.num_batches == len(BATCHES)]
        assert step.loss_after == min(losses) == step.tried[step.chosen].loss
        assert 0 < step.degrees_of_freedom <= 32
        assert step.seconds > step.gradient_seconds > 0
        assert step.peak_memory is None or step.peak_memory > 2**20
    for one, next_ in zip(report.steps, report.steps[1:], strict=False):
        assert next_.loss_before == one.loss_after
    assert [step.num_pruned for step in report.steps] == [
        round(240 * s) for s in pruning.sparsity_schedule(0.6, 3)
    ]
    assert sum(layer.num_pruned for layer in report.layers) == report.steps[-1].num_pruned


def test_the_worse_trials_end_after_a_quarter_and_half_of_the_batches(params):
    descents = [pruning.Descent(0.02, rate) for rate in (1e-3, 1e-2, 1e2, 1e3)]
    step = run(params, steps=1, search=among(descents=descents)).report.steps[0]
    updates, moved = step.tried[:4], step.tried[4:]
    assert sorted(trial.num_batches for trial in updates) == [2, 2, 4, 8]
    assert sorted(trial.num_batches for trial in moved[:2]) == [4, 8]
    assert [trial.num_batches for trial in moved[2:]] == [2, 2]
    # What a trial that ends says is its loss on the batches that it saw.
    magnitude = run(params, steps=1, search=among(SETTINGS[2]))
    on_first = np.mean([float(loss_fn(magnitude.params, batch)) for batch in BATCHES[:2]])
    assert updates[3].setting == SETTINGS[2]
    assert updates[3].num_batches == 2
    assert updates[3].loss == pytest.approx(on_first, rel=1e-5)
    one_batch = run(params, steps=1, search=among(num_calibration=1)).report.steps[0]
    assert {trial.num_batches for trial in one_batch.tried} == {1}


@pytest.mark.parametrize(
    ("losses", "want"),
    [
        ([[1.0] * 2 + [np.inf] * 6, [2.0] * 4 + [np.nan] * 4, [4.0] * 8, [3.0] * 8], 3),
        ([[1.0] * 2 + [np.inf] * 6, [2.0] * 8, [3.0] * 8, [0.5] * 7 + [np.inf]], 1),
        ([[1.0] * 7 + [np.inf]] * 4, None),
        ([[np.inf] * 8], None),
    ],
)
def test_trials_that_were_given_up_return_if_the_others_are_not_finite(losses, want):
    class Calibration(_trials.CalibrationLoss):
        def __init__(self):
            super().__init__(loss_fn, BATCHES)

        def on(self, params, batches):
            return losses[params][batches]

    searcher = object.__new__(_trials.Searcher)
    searcher._loss = Calibration()
    candidates = [
        _trials._Candidate(SETTINGS[2], 1.0, None, lambda i=i: (i, True))
        for i in range(len(losses))
    ]
    assert searcher._race(candidates) == want


def test_a_trial_that_is_not_finite_sees_no_batch(params):
    far = pruning.Descent(1e-3, 1e38)
    step = run(params, steps=1, search=among(descents=[far])).report.steps[0]
    assert np.isnan(step.tried[-1].loss)
    assert step.tried[-1].num_batches == 0


def test_score_and_update_may_have_their_own_dampings(params, monkeypatch):
    setting = pruning.Setting("mfac", "joint", None, 0.3, score_damping=1e-4)
    search = among(setting, calibration=BATCHES[:1], num_calibration=1)
    pruned = run(params, steps=1, search=search)
    g = collect_gradients(loss_fn, params, BATCHES, 32, progress=False)
    alive = pruning.initial_mask(params)
    _, mask, _ = pruning.prune_step(params, alive, g, 0.6, damping=1e-4)
    jax.tree.map(np.testing.assert_array_equal, pruned.mask, mask)
    prunable = jax.tree.map(lambda w: jnp.full(w.shape, w.ndim > 1), params)
    kept = jax.tree.map(jnp.logical_and, mask, prunable)
    delta = pruning.joint_update(params, g, 0.3, prunable, kept)
    want = jax.tree.map(lambda w, d, m: jnp.where(m, w + d, 0), params, delta, mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), pruned.params, want
    )
    made = []
    new_mask = _trials.new_mask

    def counted(*args, **options):
        made.append(args)
        return new_mask(*args, **options)

    monkeypatch.setattr(_trials, "new_mask", counted)
    same = [setting, setting._replace(damping=1e-4, score_damping=None)]
    step = run(params, steps=1, search=among(*same)).report.steps[0]
    assert len(made) == 1
    assert "damping 0.3 (score: 0.0001), scale" in str(step.tried[0])
    assert "damping 0.0001, scale" in str(step.tried[1])
    with pytest.raises(ValueError, match="score_damping must be finite and greater than 0, got 0"):
        among(setting._replace(score_damping=0.0))


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        (lambda p: {"a": p["a"]}, "from fine_tune does not have the structure of the parameters"),
        (
            lambda p: p | {"b": {"kernel": p["b"]["kernel"][:4]}},
            "wrong shape: expected \\(16, 3\\)",
        ),
        (
            lambda p: jax.tree.map(lambda w: w.astype(jnp.bfloat16), p),
            "another dtype: expected float32, got bfloat16",
        ),
    ],
)
def test_parameters_of_fine_tune_that_do_not_fit(params, tmp_path, monkeypatch, tune, words):
    made = []

    def fine_tune(params, mask):
        made.append(mask)
        return params if len(made) == 1 else tune(params)

    with pytest.raises(ValueError, match=words):
        run(params, fine_tune=fine_tune, checkpoint=tmp_path / "run")
    # Only fine-tuning is done again: the first step was tuned, the second is kept as it was.
    made.clear()
    searched = []
    step = _trials.Searcher.step
    monkeypatch.setattr(
        _trials.Searcher, "step", lambda *a, **k: searched.append(a) or step(*a, **k)
    )
    again = run(params, fine_tune=lambda p, m: made.append(m) or p, checkpoint=tmp_path / "run")
    assert (len(made), len(searched)) == (2, 1)
    want = run(params, fine_tune=lambda p, _: p)
    jax.tree.map(np.testing.assert_array_equal, again.params, want.params)
    assert [x.loss_tuned for x in again.report.steps] == [x.loss_tuned for x in want.report.steps]
    assert all(x.seconds > x.gradient_seconds for x in again.report.steps)


@pytest.mark.parametrize("last", [2, 3])
def test_an_interrupted_fine_tuning_is_done_again(params, tmp_path, last):
    """With the gradients of earlier steps; in a middle step and in the last one."""
    done = []

    def fine_tune(params, mask):
        done.append(mask)
        if len(done) == last:
            raise KeyboardInterrupt
        return jax.tree.map(lambda w: 0.9 * w, params)

    options = {"gradients": Gradients(16), "fine_tune": fine_tune}
    with pytest.raises(KeyboardInterrupt):
        run(params, checkpoint=tmp_path, **options)
    found = run(params, checkpoint=tmp_path, **options)
    assert len(done) == 4
    want = run(params, **options)
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)
    jax.tree.map(np.testing.assert_array_equal, found.mask, want.mask)
    for one, other in zip(found.report.steps, want.report.steps, strict=True):
        assert (one.loss_before, one.loss_after, one.loss_tuned) == (
            other.loss_before,
            other.loss_after,
            other.loss_tuned,
        )


def test_a_step_is_that_of_prune_step(params):
    setting = pruning.Setting("mfac", "joint", 24, 1e-3, (0.5,))
    search = among(setting, calibration=BATCHES[:1], num_calibration=1)
    pruned = run(params, steps=1, search=search)
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
    given = run(params, steps=1, search=among(setting), gradients=few(given=g))
    jax.tree.map(np.testing.assert_array_equal, given.mask, mask)
    jax.tree.map(close, given.params, want)
    several = run(params, 0.6, steps=2, search=among(setting), gradients=few(given=g, history=1))
    assert [step.num_pruned for step in several.report.steps][-1] == 144
    with pytest.raises(ValueError, match="given must be count=8 gradients, got 32"):
        few(8, given=g)
    assert (Gradients().count, Gradients(given=g).count) == (128, 32)
    with pytest.raises(
        ValueError, match=r"^given must be gradients of params: expected \{\['bias'"
    ):
        run(params["a"], gradients=few(given=g))


def test_a_descent_is_the_optimizer_s_direction_at_the_gradients_of_the_step(params):
    setting, descent = pruning.Setting("mfac", "joint", 24, 1e-3), pruning.Descent(0.02, 1e-3)
    before = run(params, steps=1, search=among(setting))
    after = run(params, steps=1, search=among(setting, descents=[descent]))
    assert after.report.steps[0].tried[-1].descent == descent
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
    plain, tried = run(params), run(params, search=among(descents=far))
    jax.tree.map(np.testing.assert_array_equal, plain.params, tried.params)
    assert len(tried.report.steps[0].tried) == len(plain.report.steps[0].tried) + 2


def test_the_gradients_of_earlier_steps_are_used_as_well(params):
    options = {"steps": 4, "search": among(pruning.Setting("mfac", "joint", 24, 1e-12))}
    with_history, without = (
        run(params, gradients=few(8, history=history), **options) for history in (1, 0)
    )
    freedom = [[s.degrees_of_freedom for s in p.report.steps] for p in (with_history, without)]
    assert freedom[0][0] == pytest.approx(freedom[1][0], rel=1e-3)
    assert max(freedom[1]) <= 8 < min(freedom[0][1:]) <= 16
    assert with_history.report.steps[-1].num_pruned == 144


def test_history_holds_the_newest_steps_at_one_level():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(3, 10)).astype(np.float32) * 4.0**i for i in range(5)]
    sets[3][:] = 0
    alive = jnp.asarray(np.arange(10) < 7)
    past = History(Gradients(3, history=1), jnp.zeros(10), 5)
    for i, new in enumerate(sets):
        past.take(lambda rows, g=new: rows.write_rows(0, jnp.asarray(g), 3)[0], alive)
        matrix = np.asarray(past.rows.columns(0, 10))
        assert matrix.shape == (6, 10)
        masked = matrix[:, :7].astype(np.float64)
        oracles.assert_close(past.grams.of(alive), masked @ masked.T, length=7)
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


@pytest.mark.parametrize("history", [0, 1])
def test_given_gradients_are_used_as_they_are(history):
    """No copy is made of them, in whatever storage they are, and nothing is written into them."""
    g = oracles.gradients("correlated", 3, 10)
    given = rows.as_rows(jnp.asarray(g), storage=rows.Dense("bfloat16", "leaf"))
    before = np.array(given.columns(0, 10))
    past = History(Gradients(3, given=given, history=history), jnp.zeros(10), 5)
    alive = jnp.ones(10, bool)
    for i in range(4):
        past.take(lambda rows: rows.write_rows(0, jnp.asarray(g), 3)[0], alive)
        parts = past.rows.parts if history else (past.rows,)
        assert [part is given for part in parts] == [
            j == 0 and i <= history for j in range(len(parts))
        ]
    np.testing.assert_array_equal(given.columns(0, 10), before)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_given_gradients_may_be_of_another_dtype_than_the_parameters(params, dtype):
    held = jax.tree.map(lambda *g: jnp.stack(g), *[jax.grad(loss_fn)(params, b) for b in BATCHES])
    low = jax.tree.map(lambda g: g.astype(dtype), held)
    given = rows.as_rows(low)  # whose layout says so, too
    pruned = run(params, steps=2, gradients=few(8, 1, given=given), search=among(SETTINGS[0]))
    wide = rows.as_rows(jax.tree.map(lambda g: g.astype(jnp.float32), low))
    same = run(params, steps=2, gradients=few(8, 1, given=wide), search=among(SETTINGS[0]))
    jax.tree.map(np.testing.assert_array_equal, pruned.mask, same.mask)
    pairs = zip(jax.tree.leaves(pruned.params), jax.tree.leaves(same.params), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)


@pytest.mark.parametrize("storage", [rows.Dense(), rows.Dense("bfloat16", "leaf")], ids=str)
def test_room_for_later_gradients_changes_nothing(params, storage):
    descents = [pruning.Descent(0.02, 1e-2)]
    relative = SETTINGS[0]._replace(damping=0.1, relative=True)
    for setting in (relative, SETTINGS[1]):
        one, other = (
            run(
                params,
                steps=2,
                gradients=few(8, history=history, storage=storage),
                search=among(setting, descents=descents),
            ).report.steps[0]
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
    pruned = run(params, sparsity, scope=Scope(pattern=pattern), search=among(*settings))
    done = pruned.report.steps[-1].num_pruned
    assert done <= 120
    assert done > 120 - 16
    if isinstance(pattern, pruning.NofM):
        kernel = np.asarray(pruned.mask["a"]["kernel"])
        assert np.all(kernel.reshape(3, 4, 16).sum(1) == 2)


def test_schedules_masks_and_sparsities_of_leaves(params):
    given = run(params, steps=(0.3, 0.6)).report
    assert [step.num_pruned for step in given.steps] == [72, 144]
    per_leaf = {"a": {"bias": 0.0, "kernel": 0.5}, "b": {"kernel": 0.25}}
    pruned = run(params, per_leaf)
    assert [layer.num_pruned for layer in pruned.report.layers] == [96, 12]
    again = pruning.prune(
        pruned.params, loss_fn, BATCHES, 0.6, steps=2, gradients=Gradients(8),
        search=Search(SETTINGS[2:]), mask=pruned.mask, progress=False,
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
        params, loss_fn, Loader(), 0.3, steps=2, gradients=Gradients(5),
        search=Search(SETTINGS[2:], num_calibration=2), progress=False,
    )  # fmt: skip
    # Two to calibrate on, five and five for gradients; a pass ends after eight.
    assert seen[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    once = pruning.prune(
        params, loss_fn, iter(BATCHES), 0.3, steps=2, gradients=Gradients(5),
        search=Search(SETTINGS[2:], num_calibration=2), progress=False,
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
def test_defaults_fit_every_pattern_and_include_no_update(params, pattern):
    settings = pruning.default_settings(pattern)
    assert any(s.update == "none" for s in settings)
    kernel = lambda path, leaf: path == "a/kernel"  # noqa: E731
    if pattern == pruning.BlocksOf(3):
        pattern = pruning.BlocksOf(3, axis=0)
    scope = Scope(path_filter=kernel, pattern=pattern)
    pruned = run(params, 0.4, scope=scope, search=Search(descents=()), steps=2)
    assert pruned.report.steps[-1].sparsity == pytest.approx(0.4, abs=0.07)


@pytest.mark.wrong_types
@pytest.mark.parametrize("steps", [None, 0.5, "cubic", True, jnp.asarray(4)])
def test_steps_of_the_wrong_type(params, steps):
    with pytest.raises(TypeError, match=r"steps must be a number of steps, or .* got"):
        run(params, steps=steps)


@pytest.mark.wrong_types
def test_scalars_of_numpy_and_jax_are_numbers(params):
    plain = run(
        params,
        steps=(0.4, 0.6),
        search=among(
            pruning.Setting("greedy", "joint", 24, 0.25), descents=[pruning.Descent(0.25, 0.125)]
        ),
    )
    given = run(
        params,
        np.float32(0.6),
        steps=np.array([0.4, 0.6]),
        search=among(
            pruning.Setting("greedy", "joint", np.int64(24), jnp.float32(0.25)),
            descents=[pruning.Descent(jnp.float32(0.25), np.float32(0.125))],
        ),
    )
    jax.tree.map(np.testing.assert_array_equal, plain.mask, given.mask)
    jax.tree.map(np.testing.assert_array_equal, plain.params, given.params)


def test_groups_too_large_for_greedy_masks_are_pruned_by_default():
    settings = pruning.default_settings(pruning.NofM(1024, 4096))
    assert all(setting.score != "greedy" for setting in settings)


def test_a_relative_damping_follows_the_scale_of_the_loss(params):
    setting = pruning.Setting("greedy", "joint", 24, 1e-2, relative=True)
    options = {"steps": 2, "gradients": Gradients(16), "search": among(setting)}
    plain = pruning.prune(params, loss_fn, BATCHES, 0.5, **options)
    scaled = pruning.prune(
        params, lambda params, batch: 100 * loss_fn(params, batch), BATCHES, 0.5, **options
    )
    jax.tree.map(np.testing.assert_array_equal, plain.mask, scaled.mask)
    for one, other in zip(plain.report.steps, scaled.report.steps, strict=True):
        assert other.damping == pytest.approx(1e4 * one.damping, rel=1e-2)
        assert other.degrees_of_freedom == pytest.approx(one.degrees_of_freedom, rel=1e-2)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Search(num_calibration=0), ValueError, "num_calibration must be at least 1"),
        (lambda: Search(()), ValueError, "settings is empty"),
        (lambda: Search(SETTINGS[0]), TypeError, r"give \[setting\]"),
        (lambda: Search(["mfac"]), TypeError, "settings must be Setting, got str"),
        (lambda: Search(3), TypeError, "settings must be a sequence of Setting, got int"),
        (
            lambda: Search(descents=pruning.Descent(0.1, 0.1)),
            TypeError,
            r"descents must be a sequence of Descent, got one: give \[descent\]",
        ),
        (lambda: Search(descents=None), TypeError, "sequence of Descent, got NoneType"),
        (lambda: pruning.default_settings("2:4"), TypeError, "pattern must be a Pattern.*'2:4'"),
        (
            lambda: Search([SETTINGS[0]._replace(scales=0.5)]),
            TypeError,
            "scales must be a sequence of numbers, got float",
        ),
        (lambda: Search([SETTINGS[0]._replace(scales=())]), ValueError, "scales is empty"),
        (
            lambda: Search([SETTINGS[0]._replace(score="best")]),
            ValueError,
            "score must be one of 'mfac', .*; got 'best'",
        ),
        (
            lambda: Search([SETTINGS[0]._replace(update=3)]),
            TypeError,
            "update must be one of 'joint', .* or a function, got 3",
        ),
        (lambda: Search([SETTINGS[0]._replace(damping=-1.0)]), ValueError, "damping must be"),
        (lambda: among(descents=[pruning.Descent(0.0, 1.0)]), ValueError, "relative_damping"),
        (lambda: among(descents=[(0.1, 0.1)]), TypeError, "descents must be Descent, got tuple"),
        (lambda: Search(calibration=X), TypeError, "calibration must be an iterable"),
        (lambda: Gradients(0), ValueError, "count must be at least 1, got 0"),
        (lambda: Gradients(history=-1), ValueError, "history must be at least 0, got -1"),
        (lambda: Gradients(storage="flat"), TypeError, "storage must be a storage"),
        (lambda: Gradients(per_example=1), TypeError, "per_example must be a bool, got int"),
        (lambda: Gradients(given={"w": X}), TypeError, "^given must be gradient rows .* got dict"),
        (lambda: among(SETTINGS[0]._replace(blocks=2.5)), TypeError, "blocks must be .* got float"),
        (lambda: among(SETTINGS[0]._replace(blocks="all")), ValueError, "blocks must be .* 'all'"),
        (lambda: among(SETTINGS[0]._replace(blocks=(8, 0))), ValueError, "blocks must be .* got 0"),
        (lambda: Scope(3), TypeError, "path_filter must be None, .* got int"),
        (lambda: Scope("("), ValueError, "path_filter must be a regular expression, got '\\('"),
        (lambda: Scope(pattern="2:4"), TypeError, "pattern must be a Pattern.* got '2:4'"),
        (lambda: Scope(budget="equal"), ValueError, "budget must be one of 'global', .* 'equal'"),
        (lambda: Scope(budget=3), TypeError, "budget must be one of .* or a function, got 3"),
        (lambda: Scope(budget="erk", costs=[1]), ValueError, "costs need budget='global', got"),
        (lambda: Scope(allow_empty_layers=1), TypeError, "allow_empty_layers must be a bool, got"),
        (lambda: Scope(output_axis=None), TypeError, "output_axis must be a Python int, got None"),
    ],
)
def test_a_value_is_looked_at_as_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.2}, ValueError, r"sparsity must lie in \[0, 1\]"),
        ({"search": among(calibration=[])}, ValueError, "calibration is empty"),
        ({"steps": (0.5, 0.4, 0.6)}, ValueError, "rise"),
        ({"steps": (0.1, 0.5)}, ValueError, "must end at sparsity=0.6"),
        ({"steps": ()}, ValueError, "rise"),
        (
            {"sparsity": 1.0, "scope": Scope(allow_empty_layers=True)},
            ValueError,
            "expected 'cubic' or 'linear'",
        ),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"scope": Scope("nothing")}, ValueError, "at least one parameter"),
        ({"scope": Scope(pattern=pruning.NofM(2, 5))}, ValueError, "multiple of 5"),
        ({"sparsity": {"a": 0.5}}, ValueError, "structure"),
        (
            {"sparsity": {"a": {"bias": 0, "kernel": 0.5}, "b": {"kernel": 1.2}}},
            ValueError,
            r"sparsity\['b'\]\['kernel'\] must lie in",
        ),
        (
            {"scope": Scope(costs={"a": {"bias": 1, "kernel": 0}, "b": {"kernel": 1}})},
            ValueError,
            r"costs\['a'\]\['kernel'\] must be at least 1",
        ),
        (
            {
                "search": among(pruning.Setting("greedy", "joint", None, 1e-3)),
                "scope": Scope(pattern=pruning.Slices()),
            },
            ValueError,
            "score='greedy' needs a pattern whose groups have one size, got Slices.*use score='mf",
        ),
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
    with pytest.raises(
        FloatingPointError, match=r"row 0 \(the gradient of batch 0\) must be finite"
    ):
        run(params, 0.5, batches=batches, search=among(calibration=BATCHES))


def test_calibration_batches_that_are_not_finite(params, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(_prune, "fill_rows", fail)
    with pytest.raises(
        FloatingPointError, match="loss of params on the calibration batches is nan"
    ):
        run(params, search=among(calibration=[(X, Y * jnp.nan)]))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_another_sparsity_compiles_nothing_anew(setting, params):
    options = {"gradients": few(history=1)}
    run(params, 0.5, search=among(setting, descents=[pruning.Descent(0.02, 1e-3)]), **options)
    with first_call.measured(figures := {}):
        run(
            params,
            0.7,
            steps=pruning.sparsity_schedule(0.7, 4, kind="cubic"),
            search=among(setting, descents=[pruning.Descent(0.03, 1e-2)]),
            **options,
        )
    assert figures["programs"] == 0


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
        start, loss, BATCHES, 0.5, steps=3, gradients=Gradients(16), fine_tune=fine_tune,
        search=among(*SETTINGS[2:]), scope=Scope("kernel"), progress=False,
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
    pruned = run(params, mask=mask, search=among(calibration=BATCHES), steps=8)
    assert pruned.report.steps[0].loss_before == pytest.approx(
        np.mean([float(loss_fn(masked, batch)) for batch in BATCHES]), rel=1e-5
    )
    assert float(pruned.params["a"]["bias"][3]) == 0
    assert not pruned.mask["a"]["bias"][3]
    assert pruned.report.steps[-1].num_pruned == 144
    assert pruned.report.steps[0].num_pruned > 96
    search, scope = among(*SETTINGS[2:]), Scope(budget="uniform")
    even = run(params, 0.7, mask=mask, scope=scope, search=search, steps=4)
    assert [layer.num_pruned for layer in even.report.layers] == [134, 34]


def test_a_loss_after_fine_tuning_that_is_not_finite(params):
    with pytest.raises(FloatingPointError, match="after fine_tune is nan"):
        run(params, steps=1, fine_tune=lambda p, _: jax.tree.map(lambda w: w * jnp.nan, p))


def test_given_gradients_that_are_not_finite(params):
    held = jax.tree.map(lambda w: jnp.ones((32, *w.shape)), params)
    for i, (leaf, value) in {5: ("a", jnp.inf), 3: ("b", jnp.nan), 7: ("b", 1e30)}.items():
        held[leaf]["kernel"] = held[leaf]["kernel"].at[i, 0, 0].set(value)
    words = r"^gradient 5 of given must be .*\['a'\]\['kernel'\]"
    with pytest.raises(FloatingPointError, match=words):
        run(params, gradients=few(given=rows.as_rows(held)))


def test_values_that_hold_arrays_compare_by_identity(params):
    """An array is not simply equal to another, or different."""
    held = jax.tree.map(lambda w: jnp.ones((32, *w.shape)), params)
    one, other = (few(given=rows.as_rows(held)) for _ in range(2))
    assert one == one != other
    one, other = (among(calibration=list(BATCHES)) for _ in range(2))
    assert one == one != other
    assert len({one, other, Scope(), Scope()}) == 3


@pytest.mark.wrong_types
def test_wrong_types(params):
    with pytest.raises(TypeError, match="loss_fn must be a function, got NoneType"):
        pruning.prune(params, None, BATCHES, 0.5)
    with pytest.raises(TypeError, match="scalar and nothing else"):
        pruning.prune(params, lambda p, b: (loss_fn(p, b), 1.0), BATCHES, 0.5)
    with pytest.raises(TypeError, match="fine_tune must be a function, got int"):
        run(params, fine_tune=3)
    with pytest.raises(TypeError, match=r"got DenseRows; give rows as Gradients\(given=rows\)"):
        run(params, gradients=rows.Dense().empty(params, 32))
    with pytest.raises(TypeError, match="search must be a Search, got Setting"):
        run(params, search=SETTINGS[0])
    with pytest.raises(TypeError, match="scope must be a Scope, got NofM"):
        run(params, scope=pruning.NofM(2, 4))
    with pytest.raises(TypeError, match=r"\[batch\]"):
        pruning.prune(params, loss_fn, X, 0.5)
