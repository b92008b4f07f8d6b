"""The check of a GPU, on a CPU: interpreted kernels, small sizes, and parts that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_answers
import gpu_check
import gpu_parts
import kernel_cases
import pytest
import report

KERNEL = "xla" if kernel_cases.NO_GPU_INTERPRETER else "interpreted"


def check(output, *options):
    """The exit status of the command, its result file and what it printed."""
    command = [sys.executable, gpu_check.__file__, "--output", str(output), *options]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["JAX_PLATFORMS"] = "cpu"
    # From a folder of its own: the program finds the checkout that it lies in.
    done = subprocess.run(command, cwd=output.parent, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, json.loads(output.read_text()) if output.exists() else None, done.stdout


def assert_all_right(results, parts):
    assert list(results["parts"]) == parts
    for part in results["parts"].values():
        assert part["items"]
        assert not part["left_out"]
        for item in part["items"]:
            assert item.get("ok", True), item
            assert item.get("seconds", 1) > 0
            assert not {"error"} & set(item)


def test_kernels_in_small(tmp_path):
    options = ["--kernel", KERNEL, "--small", "--only", "kernels"]
    status, results, printed = check(tmp_path / "result.json", *options)
    assert status == gpu_check.RIGHT
    assert_all_right(results, ["kernels"])
    assert {item["kernel"] for item in results["parts"]["kernels"]["items"]} == {
        "dots",
        "write_row",
        "combine",
        "update",
    }
    assert "No answer was wrong" in printed


def test_every_kernel_is_checked_in_every_shape():
    names = [name for name, _ in gpu_answers.kernels_part(gpu_parts.Setting("mosaic_gpu", False))]
    cases = [*gpu_answers.LARGE_CASES, *kernel_cases.MOSAIC_GPU]
    assert len(set(names)) == len(names) == len(cases) * len(gpu_answers.KERNELS)


@pytest.mark.slow
def test_all_parts_in_small(tmp_path):
    status, results, printed = check(tmp_path / "result.json", "--kernel", KERNEL, "--small")
    assert status == gpu_check.RIGHT
    assert_all_right(results, list(gpu_check.LIMITS))
    for word in ("read", "of the read bandwidth", "beside the scans", "one product"):
        assert word in printed
    (item,) = results["parts"]["optimizer"]["items"]
    assert item["same_rows"]


def test_without_a_gpu_it_says_so(tmp_path):
    status, results, printed = check(tmp_path / "result.json")
    assert (status, results) == (gpu_check.NO_GPU, None)
    assert "needs an NVIDIA GPU, got cpu" in printed


class Device:
    """Of those that JAX lists."""

    platform, device_kind = "gpu", "some GPU"

    def __init__(self, capability):
        self.compute_capability = capability

    def memory_stats(self):
        return None


@pytest.mark.parametrize(
    ("capability", "fits"), [("8.0", False), ("9.0", True), ("12.0", False), ("gfx942", False)]
)
def test_a_gpu_that_the_kernels_are_not_for(capability, fits, monkeypatch):
    monkeypatch.setattr(gpu_parts.jax, "devices", lambda: [Device(capability)])
    reason = gpu_check._unsupported(json.loads(json.dumps(gpu_parts.environment())))
    assert (reason is None) == fits
    if not fits:
        assert f"got some GPU with {capability}" in reason


def test_the_documentation_needs_a_result_file(tmp_path, capsys):
    output = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        gpu_check.main(["--docs", "--output", str(output)])
    assert f"{output} is not there" in capsys.readouterr().err


def test_some_parts_do_not_replace_the_result_of_all(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "products"])
    assert "--only needs --output" in capsys.readouterr().err


# Stands for gpu_parts in the processes of the parts, which then need not import JAX.
PARTS = """
import os, sys, time, types

def fail():
    raise ValueError("this kernel does not compile")

ITEMS = [
    ("right", lambda: {"ok": True}),
    ("wrong", lambda: {"ok": False, "error_of_allowed": 9.0}),
    ("raises", fail),
    ("crashes", lambda: os._exit(11)),
    ("hangs", lambda: time.sleep(60)),
    ("right again", lambda: {"ok": True}),
]
GPU = {"platform": "gpu", "device": "some GPU", "capability": 9.0, "jax": "0"}
sys.modules["gpu_parts"] = types.SimpleNamespace(
    environment=lambda: GPU,
    Setting=lambda *values: values,
    PARTS={
        "kernels": lambda setting: ITEMS,
        "optimizer": lambda setting: ITEMS[:1],
        "products": lambda setting: time.sleep(60),
        "steps": lambda setting: fail(),
    },
)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Gives the processes of the parts the made-up ones, changed by some code."""
    script = tmp_path / "stand_in.py"
    start = f"import sys\nsys.path.insert(0, {str(Path(gpu_check.__file__).parent)!r})\n"
    end = "import gpu_check\nsys.exit(gpu_check.main())\n"
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    return lambda change: script.write_text(PARTS + change + start + end)


@pytest.fixture
def made_up_parts(stand_in, monkeypatch):
    stand_in("")
    monkeypatch.setattr(gpu_check, "_ITEM_LIMIT", 2)


NO_JAX = 'del sys.modules["gpu_parts"]\nsys.modules["jax"] = None\n'


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ("lambda: time.sleep(60)", "JAX did not name a device within 2 s"),
        ("lambda: os._exit(11)", "JAX does not start: ended with status 11"),
        ("fail", "JAX does not start: ValueError: this kernel does not compile"),
        (f"None\n{NO_JAX}", f"jax is not installed ({sys.executable})"),
    ],
)
def test_a_machine_that_names_no_device(environment, said, stand_in, tmp_path, monkeypatch, capsys):
    stand_in(f'sys.modules["gpu_parts"].environment = {environment}\n')
    monkeypatch.setattr(gpu_check, "_FIRST_LOOK", 2)
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output)]) == gpu_check.NO_GPU
    assert capsys.readouterr().out == f"No GPU to check: {said}.\n"
    assert not output.exists()


def test_an_item_that_fails_costs_no_other(made_up_parts, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--output", str(output), "--only", "kernels", "optimizer"]
    assert gpu_check.main(arguments) == gpu_check.WRONG
    results = json.loads(output.read_text())
    items = {item["name"]: item for item in results["parts"]["kernels"]["items"]}
    assert {name: item["ok"] for name, item in items.items()} == {
        "right": True,
        "wrong": False,
        "raises": False,
        "crashes": False,
        "hangs": False,
        "right again": True,
    }
    assert "this kernel does not compile" in items["raises"]["error"]
    assert "ended with status 11" in items["crashes"]["error"]
    assert "no answer within 2 s" in items["hangs"]["error"]
    assert results["parts"]["optimizer"]["items"] == [{"name": "right", "ok": True}]
    assert "4 wrong, 0 not measured" in capsys.readouterr().out


def test_what_time_is_too_short_for_is_listed(made_up_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_ITEM_LIMIT", 60)
    monkeypatch.setitem(gpu_check.LIMITS, "kernels", 3)
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output), "--only", "kernels"]) == gpu_check.WRONG
    part = json.loads(output.read_text())["parts"]["kernels"]
    assert part["left_out"] == ["hangs", "right again"]


def test_a_part_without_time_to_list_its_items_is_not_wrong(
    made_up_parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu_check, "_ITEM_LIMIT", 60)
    monkeypatch.setitem(gpu_check.LIMITS, "products", 1)
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output), "--only", "products"]) == gpu_check.RIGHT
    part = json.loads(output.read_text())["parts"]["products"]
    assert (part["items"], part["left_out"]) == ([], ["all items"])
    assert "0 wrong, 1 not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "said"), [("steps", "ended with status 1"), ("products", "no answer within 2 s")]
)
def test_a_part_that_cannot_list_its_items_is_wrong(made_up_parts, part, said, tmp_path):
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output), "--only", part]) == gpu_check.WRONG
    (item,) = json.loads(output.read_text())["parts"][part]["items"]
    assert item["error"].endswith(said)


def test_the_whole_takes_eight_minutes():
    assert gpu_check._FIRST_LOOK + sum(gpu_check.LIMITS.values()) <= 8 * 60


def test_the_table_of_the_documentation_is_that_of_the_result_file():
    found = json.loads(gpu_check.OUTPUT.read_text()) if gpu_check.OUTPUT.exists() else None
    assert report.read_table(gpu_check.PAGE, "gpu-check") == gpu_check.table(found)
