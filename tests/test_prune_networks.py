"""The pruning experiment, in small."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain_call
import prune_networks
import prune_tables
import pruning_network
import pruning_results
import pruning_tasks
import pytest
from prune_tables import (
    CHITA,
    CHITA_BLOCKS,
    DEFAULT,
    MAGNITUDE,
    METHODS,
    OBD,
    REFERENCE_BLOCKS,
)
from pruning_methods import CHOICES, first_order
from pruning_runs import (
    AUTHORS,
    AUTHORS_WITHOUT,
    FULL,
    MFACW,
    ONE_STEP,
    ONE_STEP_WITHOUT,
    PARTS,
    RATES,
    SEVERAL_STEPS,
    SEVERAL_STEPS_WITHOUT,
    SGD,
    SMOKE,
    Run,
    filled,
    test_runs,
    tried_dampings,
    validation_runs,
)

from mfac_jax import pruning, rows

test_runs.__test__ = False  # pytest takes its name for that of a test
pytestmark = [pytest.mark.jax_defaults, pytest.mark.once]


def every_run(scales):
    return [
        run
        for name, scale in scales.items()
        for kind in (validation_runs, test_runs)
        for run in kind(name, scale)
    ]


@pytest.mark.slow
def test_every_run_is_measured_and_shown_once(tmp_path, monkeypatch, capsys):
    several = (SEVERAL_STEPS, SEVERAL_STEPS_WITHOUT, AUTHORS, AUTHORS_WITHOUT)
    for grids in (ONE_STEP, ONE_STEP_WITHOUT, *several):
        for method, grid in grids.items():
            monkeypatch.setitem(grids, method, grid[:1])
    for tx, rates in RATES.items():
        monkeypatch.setitem(RATES, tx, rates[:1])
    left = [kind for kind in CHOICES if "blocks" in kind or "dampings" in kind]
    for kind in left:
        monkeypatch.delitem(CHOICES, kind)
    names = ["resnet20", "minilm"]
    arguments = ["--smoke", "--out", str(tmp_path), "--networks", *names]
    results = prune_networks.main(arguments)
    todo = every_run({name: SMOKE[name] for name in names})
    assert results["runs"].keys() == {run.key for run in todo}
    assert all(run["seconds"] > 0 for run in results["runs"].values())
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "tables.md").read_text()
    assert all(f"| {method} |" in text for method in METHODS)
    assert all(f"| {kind} |" in text for kind in CHOICES)
    assert "| channels, 1 x | 25.0% |" in text
    assert "default, trained by mfacw" in text
    assert "waits for" not in capsys.readouterr().out

    lost = next(key for key in results["runs"] if key.startswith("patterns"))
    del results["runs"][lost]
    path = tmp_path / "smoke.json"
    path.write_text(json.dumps(results))
    measured = []
    monkeypatch.setattr(
        prune_networks, "measure", lambda _, run: measured.append(run.key) or {"sparsity": 0.5}
    )
    monkeypatch.setattr(prune_networks.parallel, "write_up", lambda *_: None)
    prune_networks.main(arguments)
    assert measured == [lost]
    for wrong, words in (
        (("environment", "code"), r"comes from elsewhere: expected {'code': .*got .*'another'"),
        (("environment", "experiment"), r"expected {'experiment': .*got .*'another'"),
        (("dense", "resnet20", "digest"), "those of other weights of resnet20"),
    ):
        changed = json.loads(json.dumps(results))
        place = changed
        for key in wrong[:-1]:
            place = place[key]
        place[wrong[-1]] = "another"
        path.write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=words):
            prune_networks.main(arguments)


def test_full_size_covers_what_is_compared():
    todo = every_run(FULL)
    assert set(FULL) == set(SMOKE) == set(pruning_tasks.NETWORKS)
    keys = [run.key for run in todo]
    assert len(set(keys)) == len(keys)
    for run in todo:
        key = prune_tables.parsed(run.key)
        assert (key.part, key.network, key.method) == (run.part, run.network, run.method)
        assert (key.steps, key.sparsity, key.seed) == (run.steps, run.sparsity, run.seed)
    # Only networks that serve for choices are tried on validation data.
    chosen_on = {run.network for run in todo if run.part in ("choices", "dampings", "rates")}
    assert chosen_on == set(pruning_tasks.DEVELOPED_ON)
    for name in FULL:
        for method in (MAGNITUDE, REFERENCE_BLOCKS, CHITA_BLOCKS, DEFAULT):
            assert any(
                (r.part, r.network, r.method, r.steps) == ("recomputation", name, method, 8)
                for r in todo
            )
    trained = {(r.method, r.what) for r in todo if r.part == "gradual"}
    assert trained == {(MAGNITUDE, SGD), (REFERENCE_BLOCKS, SGD), (DEFAULT, SGD), (DEFAULT, MFACW)}
    authors = [run for run in todo if run.part == "authors"]
    assert {r.network for r in authors} == {"resnet20"}
    assert [r.method for r in authors] == [CHITA, CHITA_BLOCKS, DEFAULT]
    assert {(r.count, r.batch, r.steps) for r in authors} == {(500, 16, 16)}
    assert {r.what for r in todo if r.part == "patterns" and r.network == "minilm"} == {
        "2:4",
        "1 x 4",
        "channels",
    }


def accuracies(planned, values):
    return {run.key: {"accuracy": v} for run, v in zip(planned, values, strict=True)}


@pytest.mark.parametrize(
    ("network", "method", "part", "steps", "of", "of_steps"),
    [
        ("resnet20", CHITA, "recomputation", 8, "resnet20", 8),
        ("resnet20", CHITA, "authors", 16, "resnet20", 4),
        ("akamaster", CHITA, "recomputation", 8, "resnet20", 8),
        ("characters", REFERENCE_BLOCKS, "one_shot", 1, "resnet20", 1),
        ("minilm", REFERENCE_BLOCKS, "recomputation", 16, "minilm", 4),
        ("resnet20", CHITA_BLOCKS, "recomputation", 8, "resnet20", 8),
        ("resnet20", CHITA_BLOCKS, "authors", 16, "resnet20", 4),
        ("minilm", CHITA_BLOCKS, "recomputation", 8, "minilm", 4),
        ("minilm", CHITA, "one_shot", 1, "minilm", 1),
        ("squeezenet", CHITA, "recomputation", 8, "resnet20", 8),  # not planned
    ],
)
def test_a_damping_is_the_best_on_validation_data(network, method, part, steps, of, of_steps):
    run = Run(part, network, method, steps, FULL[network].middle)
    tried = tried_dampings(run, FULL)
    assert {(r.part, r.network, r.method, r.steps) for r in tried} == {
        ("dampings", of, method, of_steps)
    }
    of_several = (FULL[of].tuned, FULL[of].tuned_without)
    grids = (ONE_STEP, ONE_STEP_WITHOUT) if of_steps == 1 else of_several
    grids = (AUTHORS, AUTHORS_WITHOUT) if part == "authors" else grids
    choices = [
        (x, first)
        for grid, first in zip(grids, (True, False), strict=True)
        for x in grid.get(method, ())
    ]
    assert [(r.damping, r.first_order) for r in tried] == choices

    def chosen():
        run_ = filled(run, runs, FULL)
        return run_.damping, run_.first_order

    runs = accuracies(tried, range(len(tried)))
    assert chosen() == choices[-1]
    runs[tried[0].key]["recalibrated"] = 99.0
    assert chosen() == choices[0]
    runs[tried[0].key] |= {"accuracy": math.nan, "recalibrated": math.nan}  # it failed
    assert chosen() == choices[-1]
    del runs[tried[-1].key]
    with pytest.raises(LookupError, match=f"waits for --networks {of} --only dampings"):
        filled(run, runs, FULL)


def test_a_learning_rate_is_the_best_on_validation_data():
    scale = FULL["resnet20"]
    run = next(r for r in test_runs("resnet20", scale) if r.part == "gradual")
    rates = [r for r in validation_runs("resnet20", scale) if r.part == "rates"]
    runs = accuracies(rates, [100 * r.rate for r in rates])
    assert filled(run, runs, FULL).rate == max(RATES[run.what])
    del runs[rates[0].key]
    with pytest.raises(LookupError, match="SGD: waits for --networks resnet20 --only rates"):
        filled(run, runs, FULL)


def test_a_method_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("no setting gives a finite loss")

    monkeypatch.setattr(prune_networks.pruning, "prune", fail)
    setup = prune_networks.Setup(None, (), None, tmp_path, True)
    run = Run("recomputation", "resnet20", MAGNITUDE, 2, 0.8, count=8)
    found = prune_networks.measure(setup, run)
    assert found["failed"] == "no setting gives a finite loss"
    times = {"seconds": 1.0, "processor_seconds": 1.0, "device": "a", "date": "2026-11-28"}
    shown = prune_tables.tables(results_of({run.key: found | times}))["resnet20-recomputation"]
    assert "| magnitude | failed / failed |  |" in shown


def outcome(accuracy, **more):
    times = {"seconds": 2.0, "processor_seconds": 7200.0, "device": "a", "date": "2026-11-28"}
    return {"accuracy": accuracy, "step_seconds": [9.0, 9.0, 1.0]} | times | more


def results_of(runs):
    dense = {"validation": 99.0, "test": 91.0, "weights": 1000, "processor_seconds": 7200.0}
    names = {prune_tables.parsed(key).network for key in runs}
    at = {"mfac_jax": "1", "code": "c", "jax": "2", "date": "2026-11-28"}
    return {"environment": at, "dense": dict.fromkeys(sorted(names), dense), "runs": runs}


def test_tables_show_stored_and_recalibrated_statistics():
    def run(method, accuracy, seed=0, **more):
        key = Run("recomputation", "resnet20", method, 8, 0.9, seed).key
        return {key: outcome(accuracy, **more)}

    runs = run(DEFAULT, 80.0, recalibrated=84.0) | run(DEFAULT, 82.0, 1, recalibrated=85.0)
    runs |= run(REFERENCE_BLOCKS, 60.0, recalibrated=84.0)
    runs |= run(MAGNITUDE, 10.0, recalibrated=20.0)
    runs |= run(CHITA, 20.0, recalibrated=30.0)
    results = results_of(runs)
    shown = prune_tables.tables(results)["resnet20-recomputation"]
    assert "| default | 81.0 (80.0-82.0) / 84.5 (84.0-85.0) | 1.0 s |" in shown
    assert "| magnitude | 10.0 / 20.0 | 1.0 s |" in shown
    bars = pruning_results.bars(results)
    at = "8 steps, stored statistics"
    within = ">= 80.0 within the spread"
    assert f"| resnet20, default, 90%, {at} | {within} | 81.0 (80.0-82.0) | met |" in bars
    assert f"| resnet20, default, 90%, {at} | >= 82.0 | 81.0 | **not met** |" in bars
    assert f"| resnet20, default, 80%, {at} | >= 87.5 within the spread | not yet |" in bars
    # Half a point ahead of the best rival, at a spread of one point.
    assert "> 1.0, the spread there | +0.5 (90%, 8 steps, reference, blocks) | **not met**" in bars
    assert (
        "| resnet20, default, a step beside its gradients, one core | < 6.65 s | 1.0 s | met |"
        in bars
    )
    parts = ("resnet20, akamaster, characters", "mlp, squeezenet, minilm")
    for part, took in zip(parts, ("6.0", "0.0"), strict=True):
        assert f"| {part}, on two cores | <= 2 h | {took} h | not all runs are measured |" in bars
    assert "akamaster, 90%, 8 steps, default less CHITA, whole | > the spread | not yet |" in bars
    assert "| default | 81.0 (80.0-82.0) / 84.5 (84.0-85.0) |" in pruning_results.summary(results)
    # Rows have the order of the methods.
    assert shown.index("magnitude") < shown.index("reference") < shown.index("default")
    made = pruning_results.tables(results)
    assert made["pruning-minilm-recomputation"] == pruning_results.MISSING
    assert (
        "5 runs and the training before them took 6.0 hours of two cores" in made["pruning-where"]
    )


def test_the_time_of_a_step_is_that_of_the_fastest_run():
    def runs(part, *seconds):
        keys = [Run(part, "mlp", CHITA, 8, 0.9, seed).key for seed in range(len(seconds))]
        return dict(zip(keys, seconds, strict=True))

    several = [outcome(80.0) | {"step_seconds": [9.0, 9.0, x, x + 2]} for x in (5.0, 3.0)]
    one = {"0.5": outcome(80.0), "0.8": outcome(80.0) | {"step_seconds": [2.0]}}
    one |= {"seconds": 1.0, "processor_seconds": 1.0}
    both = runs("recomputation", *several) | runs("one_shot", one)
    assert prune_tables.step_seconds(both, "mlp", CHITA) == 4.0
    assert prune_tables.step_seconds(both, "mlp", CHITA, "one_shot") == 1.5
    assert prune_tables.step_seconds(both, "mlp", DEFAULT) is None
    assert (
        prune_tables.step_seconds(
            runs("recomputation", outcome(80.0) | {"step_seconds": [9.0]}), "mlp", CHITA
        )
        is None
    )  # only steps that compile
    shown = prune_tables.tables(results_of(both))
    assert shown["mlp-one_shot"].endswith("| 1.5 s |")
    assert shown["mlp-recomputation"].endswith("| 4.0 s |")


def test_times_are_added_up_by_network_and_part():
    runs = {Run("one_shot", "mlp", x, 1, 0.0).key: outcome(80.0) for x in (CHITA, DEFAULT)}
    runs |= {Run("choices", "minilm", DEFAULT, 4, 0.9).key: outcome(80.0)}
    shown = prune_tables.tables(results_of(runs))["times"].splitlines()
    assert shown[0] == "| minutes of one core | training | choices | one_shot | all |"
    assert shown[2:] == ["| minilm | 120 | 120 |  | 240 |", "| mlp | 120 |  | 240 | 360 |"]


def test_every_part_of_the_experiment_has_a_column_of_times():
    assert ("training", *PARTS) == prune_tables._TIMED


def test_sets_of_gradients_of_the_plain_call_share_a_row():
    runs = {
        str(seed): {"name": "akamaster", "seed": seed, "accuracy": x, "recalibrated": x + 1}
        for seed, x in enumerate((70.0, 72.0))
    }
    at = {"device": "cpu", "jax": "1", "date": "2026-11-28"}
    shown = plain_call.table({"runs": runs, "environment": at})
    assert "| 90%, 8 x |" in shown
    assert "CIFAR-10 | 71.0 (70.0-72.0) / 72.0 (71.0-73.0) |" in shown


def test_the_bar_of_the_authors_setting_compares_recalibrated_statistics():
    def run(method, stored, recalibrated):
        key = Run("authors", "resnet20", method, 16, 0.9).key
        return {key: outcome(stored, recalibrated=recalibrated)}

    chita = run(CHITA, 10.0, 60.0) | run(CHITA_BLOCKS, 90.0, 40.0)
    bars = pruning_results.bars(results_of(chita | run(DEFAULT, 80.0, 59.0)))
    assert "at the setting of its authors | > 0 | -1.0 (CHITA, whole) | **not met** |" in bars
    bars = pruning_results.bars(results_of(chita | run(DEFAULT, 5.0, 61.5)))
    assert "at the setting of its authors | > 0 | +1.5 (CHITA, whole) | met |" in bars
    bars = pruning_results.bars(results_of(chita | run(DEFAULT, math.nan, math.nan)))
    assert "at the setting of its authors | > 0 | -inf (CHITA, whole) | **not met** |" in bars


def test_bars_look_where_the_default_fails():
    def run(method, accuracy, sparsity=0.9, seed=0):
        run = Run("recomputation", "akamaster", method, 8, sparsity, seed)
        return {run.key: outcome(accuracy, recalibrated=accuracy)}

    runs = run(DEFAULT, 80.5, 0.8) | run(REFERENCE_BLOCKS, 80.0, 0.8) | run(CHITA, 10.0, 0.8)
    runs |= run(DEFAULT, 72.0) | run(DEFAULT, 70.0, seed=1)
    runs |= run(REFERENCE_BLOCKS, 69.8) | run(CHITA, 10.0)
    bars = pruning_results.bars(results_of(runs))
    # One seed with a gap of 0.5 says less than two with one of 1.2 and a spread of 2.
    assert "spread there | +1.2 (90%, 8 steps, reference, blocks) | **not met**" in bars
    assert "less reference, blocks | > 2.0, the spread there | +1.2 | **not met**" in bars
    assert "less CHITA, whole | > 2.0, the spread there | +61.0 | met" in bars
    failed = pruning_results.bars(results_of(runs | run(DEFAULT, math.nan, 0.8)))
    assert "-inf (80%, 8 steps, reference, blocks) | **not met**" in failed


def test_results_of_several_files_are_joined():
    def of(network):
        return results_of({Run("one_shot", network, DEFAULT, 1, 0.0).key: outcome(80.0)})

    first, other = of("mlp"), of("minilm")
    both = pruning_results.joined([first, other])
    assert both["runs"] == first["runs"] | other["runs"]
    assert sorted(both["dense"]) == ["minilm", "mlp"]
    assert len(first["runs"]) == 1
    other["environment"] = other["environment"] | {"date": "2026-11-29"}
    assert pruning_results.joined([first, other])["environment"] == first["environment"]
    with pytest.raises(SystemExit, match=r"\['mlp'\] are in both"):
        pruning_results.joined([first, first])
    other["environment"] = other["environment"] | {"code": "d"}
    with pytest.raises(SystemExit, match=r"\['code'\] differ"):
        pruning_results.joined([first, other])


def test_results_of_another_plan_or_choice_are_left_out():
    (run,) = (
        r
        for r in test_runs("mlp", FULL["mlp"])
        if (r.part, r.method, r.sparsity, r.seed) == ("recomputation", CHITA, 0.98, 0)
    )
    tried = tried_dampings(run, FULL)
    more = {"first_order": False}
    runs = {
        r.key: {"accuracy": i, "damping": r.damping} | ({} if r.first_order else more)
        for i, r in enumerate(tried)
    }
    best = tried[-1]
    assert not best.first_order
    runs[run.key] = {"accuracy": 1.0, "damping": best.damping} | more
    assert pruning_results.stale(results_of(runs)) == {}
    other = {run.key: f"of another choice than ({best.damping}, 0.0, False)"}
    for change in ({"damping": tried[0].damping}, {"first_order": True}, {"rate": 1.0}):
        changed = runs | {run.key: runs[run.key] | change}
        assert pruning_results.stale(results_of(changed)) == other
    del runs[tried[0].key]
    assert "waits for --networks mlp" in pruning_results.stale(results_of(runs))[run.key]
    old = run._replace(steps=7).key
    assert pruning_results.stale(results_of({old: runs[run.key]})) == {old: "not planned"}


def test_tables_show_runs_that_failed():
    def run(part, method, what, **done):
        return {Run(part, "minilm", method, 4, 0.5, what=what).key: outcome(**done)}

    runs = run("patterns", MAGNITUDE, "2:4", accuracy=math.nan)
    assert "| 2:4, 4 x |  | failed |" in prune_tables.tables(results_of(runs))["minilm-patterns"]
    runs |= run("patterns", DEFAULT, "2:4", accuracy=80.0, sparsity=0.5)
    runs |= run("gradual", DEFAULT, MFACW, accuracy=math.nan)
    shown = prune_tables.tables(results_of(runs))
    assert "| 2:4, 4 x | 50.0% | failed |  | 80.0 |" in shown["minilm-patterns"]
    assert "| default, trained by mfacw | failed |" in shown["minilm-gradual"]
    runs |= run("gradual", MAGNITUDE, SGD, accuracy=70.0, training=1.5)
    assert (
        "| gradual, 1.5 epochs a run | 50% |"
        in (prune_tables.tables(results_of(runs))["minilm-gradual"])
    )


def test_runs_of_one_step_share_their_gradients(tmp_path, monkeypatch):
    collected, given = [], []
    collect, prune = prune_networks.collect_gradients, pruning.prune

    def counted(*args, **options):
        collected.append(args)
        return collect(*args, **options)

    def noted(*args, **options):
        given.append(options["gradients"].given)
        return prune(*args, **options)

    monkeypatch.setattr(prune_networks, "collect_gradients", counted)
    monkeypatch.setattr(prune_networks.pruning, "prune", noted)
    prune_networks._gradients.cache_clear()
    setup = prune_networks.Setup(None, (), None, tmp_path, True)
    one = Run("dampings", "resnet20", REFERENCE_BLOCKS, 1, 0.8, 0, 0.3, 8)
    first = prune_networks.measure(setup, one)
    prune_networks.measure(setup, one._replace(method=OBD))
    assert len(collected) == 1
    assert given[0] is given[1] is not None
    for other in (one._replace(seed=1), one._replace(count=7), one._replace(batch=4)):
        prune_networks.measure(setup, other)
        assert given[-1].num_rows == other.count
    assert len(collected) == 4
    prune_networks.measure(setup, one._replace(steps=2))
    assert given[-1] is None
    assert prune_networks._gradients.cache_info().currsize == 0
    # The gradients are those that prune takes.
    monkeypatch.setattr(prune_networks.Experiment, "_given", lambda _: None)
    assert prune_networks.measure(setup, one)["loss"] == first["loss"]


def test_a_run_of_another_choice_is_measured_again(tmp_path, monkeypatch):
    planned = [
        Run("recomputation", "mlp", REFERENCE_BLOCKS, 2, 0.8, count=8),
        Run("recomputation", "mlp", DEFAULT, 2, 0.8, count=8),
    ]
    monkeypatch.setitem(prune_networks.PARTS, "recomputation", lambda *_: planned)
    monkeypatch.setattr(prune_networks, "test_runs", lambda *_: planned)
    monkeypatch.setattr(prune_networks, "validation_runs", lambda *_: [])
    monkeypatch.setattr(
        prune_networks, "filled", lambda run, *_: run._replace(damping=best.get(run.method))
    )
    measured = []
    monkeypatch.setattr(
        prune_networks,
        "measure",
        lambda _, run: (
            measured.append(run.method)
            or outcome(50.0) | ({} if run.damping is None else {"damping": run.damping})
        ),
    )
    arguments = ["--smoke", "--out", str(tmp_path), "--networks", "mlp", "--only", "recomputation"]
    best = {REFERENCE_BLOCKS: 0.3}
    prune_networks.main(arguments)
    prune_networks.main(arguments)
    assert sorted(measured) == sorted([REFERENCE_BLOCKS, DEFAULT])
    best = {REFERENCE_BLOCKS: 3.0}
    prune_networks.main(arguments)
    assert measured[2:] == [REFERENCE_BLOCKS]


def test_the_first_order_term():
    rng = np.random.default_rng(0)
    g, w = rng.normal(size=(12, 6)), rng.normal(size=(6, 1))
    damping, factor = 0.3, 0.05
    setting = first_order(factor, in_mask=False)
    params, alive = jnp.asarray(w, jnp.float32), jnp.ones((6, 1), bool)
    gradients = rows.as_rows(jnp.asarray(g[..., None], jnp.float32), params)
    options = {"damping": damping, "blocks": 6, "update": setting.update}
    found, mask, _ = pruning.prune_step(params, alive, gradients, 0.5, score="greedy", **options)
    kept = np.asarray(mask)[:, 0]
    fisher = g.T @ g / 12 + damping * np.eye(6)
    force = fisher[np.ix_(kept, ~kept)] @ w[~kept, 0] - factor * g.mean(0)[kept]
    want = w[kept, 0] + np.linalg.solve(fisher[np.ix_(kept, kept)], force)
    np.testing.assert_allclose(np.asarray(found)[kept, 0], want, rtol=1e-4)
    # In the mask it is as if the weights had moved.
    own = first_order(factor, in_mask=True).score
    _, mask, _ = pruning.prune_step(params, alive, gradients, 0.5, score=own, **options)
    moved = jnp.asarray(w[:, 0] - factor * np.linalg.solve(fisher, g.mean(0)), jnp.float32)
    options["update"] = "joint"
    _, want, _ = pruning.prune_step(
        moved[:, None], alive, gradients, 0.5, score="greedy", **options
    )
    np.testing.assert_array_equal(mask, want)
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_what_is_missing_is_said(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    cases = {
        "resnet20": r"resnet20 needs its pretrained weights: .*got None\..*public: .*IST-DASLab",
        "mlp": r"no mnist.npz in None: name its folder by --data-dir",
        "characters": r"no tinyshakespeare.txt in None",
    }
    for name, words in cases.items():
        with pytest.raises(SystemExit, match=words):
            prune_networks.main([*out, "--networks", name])
    wrong = tmp_path / "wrong.npz"
    wrong.write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=r"wrong\.npz"):
        prune_networks.main([*out, "--networks", "resnet20", "--weights", f"resnet20={wrong}"])
    with pytest.raises(SystemExit):
        prune_networks.main([*out, "--weights", "resnet=x.npz"])
    assert (
        "--weights takes NAME=FILE with a NAME of resnet20, akamaster;" in capsys.readouterr().err
    )


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    images = {"x_train": np.zeros((64, 28, 28), np.uint8), "y_train": np.zeros(64, np.int32)}
    images |= {"x_test": images["x_train"], "y_test": images["y_train"]}
    np.savez(tmp_path / "mnist.npz", **images)
    monkeypatch.setattr(pruning_network.Trained, "_train", None)  # cannot be called
    with pytest.raises(SystemExit, match=r"no tinyshakespeare.txt in"):
        prune_networks.main(
            ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--networks", "mlp", "characters"]
        )
