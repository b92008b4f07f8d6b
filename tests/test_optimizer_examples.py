"""The examples that compare optimizers, in small."""

import json

import directions
import natural_gradients
import numpy as np
import optimizer_tables
import optimizers
import pytest

pytestmark = [pytest.mark.jax_defaults, pytest.mark.once, pytest.mark.slow]


def test_every_optimizer_is_tuned_trained_and_shown_once(tmp_path, monkeypatch):
    arguments = ["--smoke", "--out", str(tmp_path), "--only", "characters", "sst2"]
    arguments += ["--methods", "AdamW", "mfacw"]
    results = optimizers.main(arguments)
    assert (
        json.loads((tmp_path / "smoke.json").read_text())["runs"].keys() == results["runs"].keys()
    )
    for task in ("characters", "sst2"):
        for method in ("AdamW", "mfacw"):
            runs = [r for k, r in results["runs"].items() if k.startswith(f"{task}, {method}, ")]
            assert len(runs) >= 2
            assert all(np.isfinite(run["validation"]) and run["ms"] > 0 for run in runs)
    made = optimizer_tables.tables(results)
    assert {"characters", "sst2", "ranges", "variants"} == made.keys()
    assert "| bfloat16 window |" in made["variants"]
    assert "| AdamW |" in made["characters"]
    assert (tmp_path / "learning_rates.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(optimizers, "measure", None)  # no run is repeated
    assert optimizers.main(arguments)["runs"] == results["runs"]


def test_missing_data_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"characters: no tinyshakespeare.txt in None"):
        optimizers.main(["--out", str(tmp_path), "--only", "characters"])


def test_natural_gradients(tmp_path, monkeypatch):
    for task in (natural_gradients.Poisson, natural_gradients.Ising):
        chosen = {k: v for k, v in task.contenders.items() if k in ("Adam", "SPRING")}
        monkeypatch.setattr(task, "contenders", chosen)
    results = natural_gradients.main(["--smoke", "--out", str(tmp_path)])
    assert all(np.isfinite(run["final"]) for run in results["runs"].values())
    assert "| Ising ground state | SPRING |" in natural_gradients.table(results)
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_directions(tmp_path):
    results = directions.main(["--smoke", "--out", str(tmp_path), "--only", "mlp"])
    assert all(np.isfinite(run["others"]) for run in results["tasks"]["mlp"])
    assert "| gradient | 1.00 (1.00) |" in directions.table(results)
    again = directions.main(["--smoke", "--out", str(tmp_path), "--only", "mlp"])
    assert again == results


def test_the_key_of_every_run_is_read_again():
    """The names of variants have commas in them."""
    for name in [*optimizers.CONTENDERS, *optimizers.VARIANTS]:
        for share, length in ((1.0, ""), (optimizers.SHORT, "short"), (optimizers.LONG, "long")):
            run = optimizers.Run("mlp", name, 1e-3, 0.1, 7, share)
            (found,) = optimizer_tables.trained({"runs": {run.key: {}}}, "mlp")
            assert found == (name, (1e-3, 0.1), 7, length, {})


@pytest.mark.parametrize(
    ("curve", "want"),
    [
        ([2.0] * 8 + [1.0] * 8, "90"),  # the mean of two points is first at the goal there
        ([2.0] * 4 + [0.9] + [2.0] * 11, "not reached"),  # one lucky point
        ([1.0] * 8 + [2.0] * 8, "not reached"),  # it does not end there
    ],
)
def test_steps_to_a_loss(curve, want):
    run = {"train": curve[-1], "curve": curve, "steps": 144}
    assert optimizer_tables._steps_to([run], 1.0, None) == want
    assert optimizer_tables._steps_to([run | {"train": np.inf}], 1.0, None) == "diverged"
