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
