"""The demo runs from end to end at small size."""

import pytest
import quickstart

pytestmark = [pytest.mark.once, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    figure = tmp_path_factory.mktemp("demo") / "curves.png"
    arguments = ["--epochs", "3", "--train-images", "640", "--num-gradients", "64"]
    return quickstart.main([*arguments, "--figure", str(figure)]), figure


@pytest.mark.jax_defaults
def test_every_optimizer_learns(results):
    training = {r["optimizer"]: r for r in results[0]["training"]}
    assert set(training) == {"SGD + momentum", "Adam", "M-FAC"}
    assert all(r["test_accuracy"] > 0.5 for r in training.values())
    assert training["M-FAC"]["state_mib"] > training["Adam"]["state_mib"]


@pytest.mark.jax_defaults
def test_every_pruner_is_measured_and_mild_pruning_does_little_harm(results):
    dense = results[0]["training"][-1]["test_accuracy"]
    pruned = {(r["method"], r["sparsity"]): r["test_accuracy"] for r in results[0]["pruning"]}
    assert len(pruned) == len(quickstart.PRUNERS) * len(quickstart.SPARSITIES)
    for method in quickstart.PRUNERS:
        assert pruned[method, 0.5] > dense - 0.1


@pytest.mark.jax_defaults
def test_figure_is_a_png(results):
    assert results[1].read_bytes().startswith(b"\x89PNG")
