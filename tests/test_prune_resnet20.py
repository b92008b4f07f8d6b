"""The pruning experiment runs from end to end at small size."""

import json
import os
import pickle

import jax
import numpy as np
import parallel
import prune_resnet20
import prune_tables
import pytest
import resnet20
from flax import nnx

pytestmark = [pytest.mark.jax_defaults, pytest.mark.once]


@pytest.mark.slow
def test_every_run_is_measured_and_shown_once(tmp_path, monkeypatch, capsys):
    arguments = ["--smoke", "--out", str(tmp_path)]
    prune_resnet20.main(arguments)
    path = tmp_path / "smoke.json"
    results = json.loads(path.read_text())
    todo = prune_resnet20.runs(prune_resnet20.SMOKE)
    assert {run.part for run in todo} == set(prune_tables.tables(results)) - {"gains"}
    for run in todo:
        assert results[run.part][run.key]["seconds"] > 0
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "tables.md").read_text()
    assert all(method in text for method in [*prune_resnet20.METHODS, prune_tables.DEFAULT])
    assert "2:4" in text
    assert "per example" in text

    lost = results["influence"].popitem()
    path.write_text(json.dumps(results))
    measured = []
    monkeypatch.setattr(
        prune_resnet20, "measure", lambda _, run: measured.append(run.key) or lost[1]
    )
    prune_resnet20.main(arguments)
    assert measured == [lost[0]]
    assert "1 runs to do" in capsys.readouterr().out
    again = json.loads(path.read_text())["influence"]
    times = {key: again[lost[0]][key] for key in ("seconds", "processor_seconds")}
    assert again == results["influence"] | {lost[0]: lost[1] | times}


@pytest.mark.parametrize(("available", "want"), [({4}, [4] * 3), ({7, 2}, [2, 7, 2])])
def test_more_workers_than_cores_share_them(monkeypatch, available, want):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: available, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", None, raising=False)
    assert parallel.cores(3) == want


def test_workers_run_where_they_may_on_a_system_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert parallel.cores(2) == [None, None]


@pytest.mark.slow
def test_runs_of_several_processes_on_one_core(tmp_path, monkeypatch, request):
    if hasattr(os, "sched_getaffinity"):
        own = os.sched_getaffinity(0)
        request.addfinalizer(lambda: os.sched_setaffinity(0, own))
        core = min(own)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {core})
    # Programs that compile quickly are kept as well.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    setup = prune_resnet20.Setup(True, None, None, tmp_path)
    todo = [
        run for run in prune_resnet20.runs(prune_resnet20.SMOKE) if run.key.endswith("magnitude")
    ]
    todo = [run for run in todo if run.part in ("one_shot", "recomputation")]
    arguments = {run: (setup, run) for run in todo}
    cache = tmp_path / "compiled"
    done = dict(parallel.outcomes(prune_resnet20.measure, arguments, cache, 2))
    assert set(done) == set(todo)
    assert len(todo) == 2
    for run, got in done.items():
        want = parallel.timed(prune_resnet20.measure, (setup, run))
        assert got.keys() == want.keys()
        assert got["seconds"] > 0
    assert any((tmp_path / "compiled").iterdir())


def test_full_size_covers_what_is_asked_for():
    todo = {(run.part, run.key) for run in prune_resnet20.runs(prune_resnet20.FULL)}
    assert len(todo) == len(prune_resnet20.runs(prune_resnet20.FULL))
    every = [*prune_resnet20.METHODS, prune_tables.DEFAULT]
    wanted = {("one_shot", f"{seed} {m}") for seed in range(3) for m in every[1:]}
    wanted |= {("one_shot", "0 magnitude")}  # which has no gradients
    compared = [*prune_resnet20.REFERENCES, prune_tables.DEFAULT]
    for method in compared:
        wanted |= {
            ("recomputation", f"8 {sparsity} {seed} {method}")
            for sparsity in (0.8, 0.9)
            for seed in range(3)
        }
        wanted |= {
            ("recomputation", f"{steps} {sparsity} 0 {method}")
            for steps in (4, 16)
            for sparsity in (0.8, 0.9)
        }
        wanted |= {("recomputation", f"8 0.95 0 {method}")}
    for method in ("magnitude", prune_tables.DEFAULT):
        wanted |= {("patterns", f"{name} {method}") for name in ("2:4", "1 x 4")}
        wanted |= {("gradual", f"{sparsity} {method}") for sparsity in (0.75, 0.875, 0.95)}
    for kind in ("batch", "example"):
        wanted |= {("influence", f"{n} {kind} 1e-05 128") for n in (16, 1024)}
    assert wanted <= todo


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"--data-dir DIR with DIR/resnet20.*--smoke"):
        prune_resnet20.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--weights FILE"):
        prune_resnet20.main(["--data-dir", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 in"):
        resnet20.load_cifar10(tmp_path)


def test_a_download_that_fails_is_said(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(resnet20, "CACHE", tmp_path / "cache" / "cifar.tar.gz")
    monkeypatch.setattr(resnet20.urllib.request, "urlretrieve", fail)
    with pytest.raises(OSError, match=r"no network.*--data-dir"):
        resnet20.load_cifar10(None)


def test_batches_of_the_standard_archive_are_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({b"data": images, b"labels": [0, 1, 2, 3]}))
    data = resnet20.load_cifar10(tmp_path)
    assert data.train.shape == (20, 32, 32, 3)
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    # A plane of 1,024 bytes a colour, rows first.
    assert data.test[1, 2, 3].tolist() == [images[1, c * 1024 + 2 * 32 + 3] for c in range(3)]


def test_the_paper_s_weights_are_put_in_their_places(tmp_path):
    rng = np.random.default_rng(0)
    model = resnet20.ResNet(nnx.Rngs(0))
    arrays = {}

    def conv(name, width_in, width, size):
        arrays[f"{name}.weight"] = rng.normal(size=(width, width_in, size, size))

    def norm(name, width):
        for field in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{name}.{field}"] = rng.random(width)

    conv("conv1", 3, 16, 3)
    norm("bn1", 16)
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            name, before = f"layer{stage}.{block}", width // 2 if stage > 1 and not block else width
            conv(f"{name}.conv1", before, width, 3)
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            if before != width:
                conv(f"{name}.downsample.0", before, width, 1)
                norm(f"{name}.downsample.1", width)
    arrays["fc.weight"], arrays["fc.bias"] = rng.normal(size=(10, 64)), rng.random(10)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    resnet20.load_weights(model, tmp_path / "weights.npz")
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in params) == sum(
        a.size for name, a in arrays.items() if "running" not in name
    )
    kernel = model.blocks.layers[4].conv2.kernel.get_value()
    np.testing.assert_array_equal(
        np.transpose(kernel, (3, 2, 0, 1)), arrays["layer2.1.conv2.weight"]
    )
    np.testing.assert_array_equal(
        model.blocks.layers[6].norm3.var.get_value(), arrays["layer3.0.downsample.1.running_var"]
    )
