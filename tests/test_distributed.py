"""Several processes train and prune as one does, also after one of them was killed."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mfac_jax._processes import _digest

PROGRAM = Path(__file__).parents[1] / "examples" / "distributed.py"


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(folder, processes, devices):
    address = f"localhost:{free_port()}"
    options = {"checkpoint": folder, "steps": 40, "num-gradients": 12}
    options |= {"processes": processes, "devices": devices, "address": address}
    command = [sys.executable, PROGRAM, *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [*command, f"--process={number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(processes)
    ]


def ended(processes):
    """The lines that process 0 prints, once all have ended well."""
    found = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, found, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return found[0][0].splitlines()


@functools.cache
def alone():
    """What one process finds that nothing interrupts."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(ended(start(folder, 1, 1))[-1])


@pytest.mark.slow
def test_four_processes_find_what_one_does(tmp_path):
    *_, got = ended(start(tmp_path, 4, 1))
    assert json.loads(got) == pytest.approx(alone(), rel=1e-3)


# While both train, and while both prune.
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoint 20", "12 gradients"])
def test_a_run_of_which_a_process_was_killed_goes_on_with_others(tmp_path, moment):
    first, second = start(tmp_path, 2, 2)
    while moment not in first.stdout.readline():
        assert first.poll() is None
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = first.communicate(timeout=60)
    second.communicate()
    assert time.monotonic() - killed < 60
    assert first.returncode != 0
    # Gloo loses its peer, or the coordinator misses a heartbeat.
    wanted = "Connection closed by peer", "Connection reset by peer", "heartbeat"
    assert any(text in errors for text in wanted), errors[-2000:]

    *progress, got = ended(start(tmp_path, 4, 1))
    kept = [line.split(",")[0] for line in progress if line.startswith("checkpoint")]
    assert kept == (["checkpoint 40"] if moment == "checkpoint 20" else [])
    assert json.loads(got) == pytest.approx(alone(), rel=1e-3)


def test_a_batch_has_a_digest():
    """It depends on the order, shapes, and numbers of a process; keys and None have one, too."""
    keys = jax.random.split(jax.random.key(0), 3)
    batches = [
        {"x": np.ones((3, 2)), "k": keys, "n": None},
        {"x": np.zeros((3, 2)), "k": keys, "n": None},
        {"x": np.ones((3, 1)), "k": keys, "n": None},
        {"x": np.ones((3, 2)), "k": jax.random.split(jax.random.key(1), 3), "n": None},
    ]
    found = [_digest(batch, 0, True) for batch in batches]
    assert len(set(found)) == len(batches)
    assert found[0] == _digest(dict(batches[0]), 0, True) != _digest(batches[0], 1, True)


DISAGREE = """
import sys
import jax, jax.numpy as jnp, numpy as np
address, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, process)
from mfac_jax import collect_gradients
from mfac_jax.pruning import Gradients, Search, prune
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
params = jax.jit(lambda: jnp.ones(4), out_shardings=jax.NamedSharding(mesh, jax.P()))()
batch = jax.jit(lambda: jnp.ones((2, 4)), out_shardings=jax.NamedSharding(mesh, jax.P("x")))()
for data, count in (
    ([batch], 3 + process),
    ([np.full((2, 4), process, np.float32)], 3),
    ([batch] * (2 + process), 4),
    ([batch, np.ones((2, 4), np.float32)], 4),
):
    try:
        print(collect_gradients(lambda p, x: jnp.mean((x @ p) ** 2), params, data, count).num_rows)
    except ValueError as error:
        print(error)
given = {"gradients": Gradients(2), "progress": False}
weights = jax.jit(lambda: jnp.ones((4, 1)), out_shardings=jax.NamedSharding(mesh, jax.P()))()
def squares(params, x):
    return jnp.mean((x @ params["w"]) ** 2)
for options in (
    {"steps": 1 + process},
    {"search": Search(calibration=[np.full((2, 4), process, np.float32)])},
):
    try:
        prune({"w": weights}, squares, [batch], 0.5, **given, **options)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_processes_that_disagree_say_so():
    command = [sys.executable, "-c", DISAGREE, f"localhost:{free_port()}"]
    both = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    for process in both:
        printed, _ = process.communicate(timeout=120)
        count, first, order, fine, steps, calibration = printed.splitlines()[-6:]
        assert "the same number of gradients, got [3, 4]" in count
        assert "the same batches in the same order; batches [0, 0] of process 0 to 1" in first
        assert "the same batches in the same order; batches [0, 2] of process 0 to 1" in order
        assert fine == "4"
        assert "must have the same steps, settings and descents" in steps
        assert "must have the same calibration batches" in calibration
