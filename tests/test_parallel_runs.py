"""Experiments of many runs, on several cores."""

import json
import os

import parallel
import prune_networks
import pytest
from pruning_runs import SMOKE, test_runs

test_runs.__test__ = False  # pytest takes its name for that of a test
pytestmark = [pytest.mark.jax_defaults, pytest.mark.once]


@pytest.mark.parametrize(("available", "want"), [({4}, [4] * 3), ({7, 2}, [2, 7, 2])])
def test_more_workers_than_cores_share_them(monkeypatch, available, want):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: available, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", None, raising=False)
    assert parallel.cores(3) == want


def test_workers_run_where_they_may_on_a_system_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert parallel.cores(2) == [None, None]


def test_results_of_other_versions_are_refused(tmp_path):
    path = tmp_path / "results.json"
    here = {"device": "a", "cores": 2, "code": "new", "sizes": (1, 2), "jax": "1"}
    results = parallel.open_results(path, here)
    assert results["runs"] == {}
    path.write_text(json.dumps(results))
    elsewhere = parallel.open_results(path, here | {"device": "b", "cores": 4})
    assert elsewhere == json.loads(path.read_text())
    with pytest.raises(SystemExit, match=r"expected {'code': 'old'}, got {'code': 'new'}\.$"):
        parallel.open_results(path, here | {"code": "old"})


@pytest.mark.slow
def test_runs_of_several_processes_on_one_core(tmp_path, monkeypatch, request):
    if hasattr(os, "sched_getaffinity"):
        own = os.sched_getaffinity(0)
        request.addfinalizer(lambda: os.sched_setaffinity(0, own))
        core = min(own)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {core})
    # Programs that compile quickly are kept as well.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    setup = prune_networks.Setup(None, (), None, tmp_path, True)
    prune_networks.network_of(setup, "mlp")  # is trained
    todo = [run for run in test_runs("mlp", SMOKE["mlp"]) if run.method in ("magnitude", "OBD")]
    arguments = {run: (setup, run) for run in todo}
    done = dict(parallel.outcomes(prune_networks.measure, arguments, tmp_path / "compiled", 2))
    assert set(done) == set(todo)
    assert len(todo) == 4
    for run, got in done.items():
        want = parallel.timed(prune_networks.measure, (setup, run))
        assert got.keys() == want.keys()
        assert got["seconds"] > 0
        one, other = (r.get("0.8", r)["accuracy"] for r in (got, want))
        assert one == other
    assert any((tmp_path / "compiled").iterdir())
