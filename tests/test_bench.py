"""The benchmark measures what it says, and its tables are those of its result files."""

import functools
import itertools
import json

import alternatives
import bench
import bench_tables
import figures
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
import report
import small_step
import timing
import training_step
import workloads
from flax import nnx
from oracles import assert_close, inverse
from workloads import DAMPING, Data, Workload

from mfac_jax import incremental

pytestmark = pytest.mark.once

WHOLE = Workload("test", 700, 24)
of_measured_machines = pytest.mark.skipif(
    not bench.result_files(), reason="no machine has been measured"
)
BLOCKS = [Workload("test", 200, 24, block=16), Workload("test", 200, 6, block=16)]


@pytest.mark.slow
@pytest.mark.jax_defaults
def test_quick_run(tmp_path, monkeypatch):
    # As on an accelerator, where XLA is measured beside the kernels.
    monkeypatch.setattr(workloads, "implementations", lambda: ("xla",))
    bench.main(["--quick", "--output", str(tmp_path)])

    (path,) = tmp_path.glob("bench-*.json")
    results = json.loads(path.read_text())
    wanted = [(w.name, op) for w in bench.QUICK.workloads for op in operations.of(w)]
    assert [(r["workload"], r["operation"]) for r in results["operations"]] == wanted
    for record in results["operations"]:
        assert record["bytes"] > 0
        assert record["flops"] > 0
        assert bench_tables.floor_seconds(record, results) > 0
        names = {"library", "plain"}
        if record["operation"] in operations.SCANS:
            names.add("library, xla")
        if record["operation"] in ("static", "push + direction") and record["dtype"] == "float32":
            names |= {"sequential", "PyTorch"}
        assert names <= record["times"].keys()
        for name, time in record["times"].items():
            if name == "PyTorch" and not operations.HAS_TORCH:
                assert time == {"left_out": "not installed"}
            else:
                assert 0 < time["low"] <= time["median"] <= time["high"]
    assert results["left_out"] == []
    rates = ("read_bandwidth", "copy_bandwidth", "matrix_rate")
    assert all(results["machine"][rate] > 0 for rate in rates)
    assert [step["m"] for step in results["small_steps"]] == list(bench.QUICK.sides)
    assert results["training"]["optimizers"].keys() == set(bench.QUICK.optimizers)
    assert len(results["scaling"]["points"]) == len(bench.QUICK.scaling[0])

    tables = (tmp_path / "tables.md").read_text()
    for name, table in bench.TABLES.items():
        assert f"## {name}\n\n{table([results])}" in tables
    assert (tmp_path / f"roofline-{results['slug']}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", bench.TABLES)
def test_table_is_that_of_the_result_files(name):
    assert report.read_table(bench.PAGE, name) == bench.TABLES[name](bench.result_files()).strip()


def test_table_of_the_readme_is_that_of_the_result_files():
    want = bench.TABLES["bench"](bench.result_files()).strip()
    assert report.read_table(bench.README, "bench") == want


def test_every_result_file_has_its_figure():
    for results in filter(figures.has_figure, bench.result_files()):
        figure = bench.ASSETS / f"roofline-{results['slug']}.png"
        assert figure.read_bytes().startswith(b"\x89PNG")


@of_measured_machines
@pytest.mark.parametrize("name", ["bench", "bench-operations"])
def test_a_changed_result_changes_the_table(name):
    files = bench.result_files()
    before = bench.TABLES[name](files)
    for record in files[0]["operations"]:
        if "median" in record["times"]["library"]:
            record["times"]["library"]["median"] *= 2
    assert bench.TABLES[name](files) != before


@of_measured_machines
def test_a_bar_that_is_not_met_says_so():
    results = bench.result_files()[0]
    for record in results["operations"]:
        if record["operation"] == "push + direction" and record["m"] == 512:
            record["times"]["library"]["median"] = 10 * record["times"]["plain"]["median"]
    assert "| 10.00 x (ResNet-20, m = 512) | **not met** |" in bench_tables.bars([results])


@of_measured_machines
@pytest.mark.parametrize("parts", range(1, 6))
def test_a_run_that_is_stopped_has_shorter_tables(parts):
    results = bench.result_files()[0]
    order = ["machine", "training", "scaling", "operations", "small_steps"]
    for name in order[parts:]:
        del results[name]
    texts = {name: table([results]) for name, table in bench.TABLES.items()}
    measured = {"bench-training", "bench-scaling", "bench-operations", "bench-small-steps"}
    assert sum(bool(texts.get(name)) for name in measured) == parts - 1
    if parts < 4:  # no bar asks for the last part on a CPU
        assert "Not measured yet: " in texts["bench"]


@of_measured_machines
@pytest.mark.jax_defaults
def test_a_workload_beyond_memory_is_named(monkeypatch):
    monkeypatch.setattr(workloads.memory, "free_memory", lambda: 1000)
    with pytest.raises(workloads.DoesNotFit) as error:
        Data(WHOLE)
    (results, *_) = bench.result_files()
    results["left_out"] = [{"name": "too large", "block": None, "reason": str(error.value)}]
    (line,) = [x for x in bench_tables.operations([results]).splitlines() if "too large" in x]
    assert line.startswith("| too large | - |")
    assert line.endswith(f"| {error.value} |")


@pytest.mark.jax_defaults
def test_a_window_is_the_same_filled_or_pushed():
    w = Workload("test", 700, 4, "bfloat16")
    pushed, filled = (Data(w._replace(only_steps=steps)).windows[0] for steps in (True, False))
    np.testing.assert_array_equal(pushed.rows.columns(0, 700), filled.rows.columns(0, 700))
    np.testing.assert_allclose(pushed.gram, filled.gram, rtol=1e-6, atol=1e-6)
    assert len(set(pushed.stamps.tolist())) == 4


@pytest.mark.jax_defaults
def test_an_alternative_beyond_memory_is_left_out(monkeypatch):
    data = Data(Workload("test", 700, 4))
    monkeypatch.setattr(workloads.memory, "free_memory", lambda: data.workload.nbytes)
    records = {r["operation"]: r["times"] for r in operations.measure(data.workload, data, 1e9, 0)}
    assert records["dots"]["library"]["median"] > 0
    assert records["dots"]["plain"]["left_out"].startswith("does not fit")


@pytest.mark.jax_defaults
def test_a_sequential_alternative_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(operations, "PRECOMPUTATIONS", ("static",))
    data = Data(Workload("test", 700, 4))
    (*_, record) = operations.measure(data.workload, data, 1.0, 0)
    assert record["times"]["sequential"]["left_out"].startswith("not run")
    assert record["times"]["plain"]["median"] > 0


@functools.cache
def data_of(w):
    """The arrays of a workload; nobody may donate them."""
    data = Data(w)
    data.make_plain()
    return data


def run(operation, w, data, kind):
    """The result of one kind of program."""
    program = {"library": operations.library, "plain": operations.plain}[kind](operation, w)
    state = (data.windows if kind == "library" else data.plain)[0]
    inputs = {"combine": (data.coefficients,), "dots": (data.vectors[0],)}
    if operation == "whiten":
        inputs["whiten"] = (jnp.tril(jnp.asarray(np.random.default_rng(0).normal(size=(24, 24)))),)
    out = jax.jit(program)(state, *inputs.get(operation, ()))
    if (operation, kind, w.block) == ("static", "library", None):
        out, _ = out
    return out.columns(0, w.d) if hasattr(out, "columns") else out


@pytest.mark.jax_defaults
@pytest.mark.parametrize("operation", ["dots", "combine", "gram", "whiten", "diagonal", "static"])
def test_plain_xla_computes_what_the_library_does(operation):
    data = data_of(WHOLE)
    want = run(operation, WHOLE, data, "library")
    got = run(operation, WHOLE, data, "plain")
    assert_close(got, want, length=WHOLE.d, condition=100)


@pytest.mark.jax_defaults
@pytest.mark.parametrize("operation", ["dots", "combine"])
def test_plain_xla_computes_the_same_in_bfloat16(operation):
    w = WHOLE._replace(dtype="bfloat16")
    data = data_of(w)
    want = run(operation, w, data, "library")
    got = run(operation, w, data, "plain")
    # The vector, too, is rounded: XLA takes both operands in one dtype.
    assert_close(got, want, length=1, dtype=jnp.bfloat16)


@pytest.mark.jax_defaults
@pytest.mark.parametrize("w", BLOCKS)
def test_plain_xla_inverts_the_same_blocks(w):
    data = data_of(w)
    want = run("diagonal", w, data, "library")
    assert_close(run("diagonal", w, data, "plain"), want, length=w.m, condition=100)
    root = np.asarray(run("static", w, data, "plain"), np.float64)
    first = inverse(data.plain[0][0][:, : w.block], DAMPING)
    assert_close(root[0].T @ root[0], first, length=w.m, condition=100)
    diagonals = [jnp.ravel(part.diagonal()) for part in run("static", w, data, "library")]
    assert_close(jnp.concatenate(diagonals), want, length=w.m, condition=100)


@pytest.mark.jax_defaults
def test_push_writes_the_same_row():
    data = data_of(WHOLE)
    held, _ = jax.jit(operations.library("push", WHOLE))(data.windows[0], data.vectors[1])
    plain = operations.plain("push", WHOLE)
    (gradients, _, slot), row = jax.jit(plain)(data.plain[0], data.vectors[1])
    assert int(slot) == 1
    np.testing.assert_array_equal(held.rows.columns(0, WHOLE.d), gradients)
    assert_close(row, held.gram[0], length=WHOLE.d)


@pytest.mark.jax_defaults
def test_the_sequential_steps_have_the_direction_of_the_library():
    data = data_of(WHOLE)
    (program,) = operations.sequential("push + direction", WHOLE).values()
    held, state = operations.OptimizerStates(data.windows)[0], data.plain[0]
    for vector in data.vectors[1:]:
        held, want = jax.jit(operations.push_direction)(held, vector)
        state, got = jax.jit(program)(state, vector)
        assert_close(got, want, length=WHOLE.d, condition=1000)


def block_diagonal(vectors, scales, d):
    """``diag(F^-1)`` of the blocks from their recursions; (b, n, B) and (b, n)."""
    vectors, scales = np.asarray(vectors, np.float64), np.asarray(scales, np.float64)
    return (1 / DAMPING - np.sum(vectors**2 / scales[:, :, None], axis=1)).ravel()[:d]


@pytest.mark.jax_defaults
@pytest.mark.parametrize("w", [WHOLE, BLOCKS[0]])
def test_the_sequential_recursions_have_the_diagonal_of_the_library(w):
    data = data_of(w)
    want = run("diagonal", w, data, "library")
    for program in operations.sequential("static", w).values():
        recursion = jax.jit(program)(data.plain[0])
        vectors = recursion.vectors if w.block else recursion.vectors[None]
        scales = recursion.scales if w.block else recursion.scales[None]
        got = block_diagonal(vectors, scales, w.d)
        assert_close(got, want, length=w.m, condition=1000)


@pytest.mark.jax_defaults
@pytest.mark.parametrize("w", [WHOLE, *BLOCKS])
def test_the_recursions_in_pytorch_have_the_diagonal_of_the_library(w):
    pytest.importorskip("torch")
    import torch_recursions

    data = data_of(w)
    gradients = torch_recursions.view(data.plain[0][0])
    if w.block:
        vectors, scales = torch_recursions.blocks(gradients, DAMPING, w.block)
    else:
        vectors, scales = (x[None] for x in torch_recursions.static(gradients, DAMPING))
    want = run("diagonal", w, data, "library")
    got = block_diagonal(vectors.numpy(), scales.numpy(), w.d)
    assert_close(got, want, length=w.m, condition=1000)


@pytest.mark.jax_defaults
def test_the_steps_in_pytorch_have_the_direction_of_the_library():
    torch = pytest.importorskip("torch")
    import torch_recursions

    data = data_of(WHOLE)
    gradients, dots, _ = (torch.tensor(np.array(x)) for x in data.plain[0])
    held = operations.OptimizerStates(data.windows)[0]
    for slot, vector in enumerate(data.vectors[1:]):
        held, want = jax.jit(operations.push_direction)(held, vector)
        tensor = torch_recursions.view(vector)
        got = torch_recursions.push_direction(gradients, dots, slot, tensor, DAMPING)
        assert_close(got.numpy(), want, length=WHOLE.d, condition=1000)
    np.testing.assert_array_equal(gradients.numpy(), held.window.rows.columns(0, WHOLE.d))


@pytest.mark.jax_defaults
@pytest.mark.parametrize("m", [1, 2, 17])
def test_the_updated_factor_is_that_of_the_window(m):
    rng = np.random.default_rng(0)
    gradients = (rng.normal(size=(4 * m, 40)) + rng.normal(size=40)).astype(np.float32) / 8
    gram, shift = jnp.asarray(gradients @ gradients.T), jnp.float32(0.1)
    held = small_step.age(gram[:m, :m], shift)
    step = jax.jit(small_step.update_factor)
    for i in range(m, 4 * m):
        held, got = step(held, gram[i - m + 1 : i + 1, i], shift)
        exact = np.asarray(held.gram, np.float64) + 0.1 * np.eye(m)
        condition = np.linalg.cond(exact)
        np.testing.assert_array_equal(held.gram, gram[i - m + 1 : i + 1, i - m + 1 : i + 1])
        assert_close(held.lower, np.linalg.cholesky(exact), length=i, condition=condition)
        assert_close(got, np.linalg.inv(exact)[-1], length=m, condition=condition)


@pytest.mark.jax_defaults
def test_ten_thousand_updates_leave_the_factor_exact():
    """Errors leave with the gradients that brought them."""
    m = 32
    rng = np.random.default_rng(0)
    gradients = (rng.normal(size=(m, 60)) + rng.normal(size=60)).astype(np.float32) / 8
    gram, shift = jnp.asarray(gradients @ gradients.T), jnp.float32(0.1)
    held, got = small_step.update_factor_steps(10_000)(small_step.age(gram, shift), shift)
    exact = np.asarray(held.gram, np.float64) + 0.1 * np.eye(m)
    condition = np.linalg.cond(exact)
    # As exact as after 3 m steps, in the test above.
    assert_close(held.lower, np.linalg.cholesky(exact), length=4 * m, condition=condition)
    assert_close(got, np.linalg.inv(exact)[-1], length=m, condition=condition)


@pytest.mark.jax_defaults
def test_all_ways_to_the_coefficients_agree():
    data = data_of(WHOLE)
    gram, shift = data.windows[0].gram, jnp.float32(WHOLE.m * DAMPING)
    start = small_step.age(gram, shift)
    _, again = small_step.refactor_steps(5)(gram, shift)
    held, along = small_step.update_factor_steps(5)(start, shift)
    # Slots are in order of age once the oldest is rolled to the front.
    assert_close(along, jnp.roll(again, -5), length=WHOLE.m, condition=100)
    assert_close(held.gram, jnp.roll(gram, (-5, -5), (0, 1)), length=1)
    start = incremental.solve(incremental.empty(WHOLE.m), gram, shift, jnp.ones(WHOLE.m))[1]
    _, _, kept = small_step.update_inverse_steps(4)(
        gram, start, shift
    )  # the last shift is the first
    _, again = small_step.refactor_steps(4)(gram, shift)
    assert_close(kept, again, length=WHOLE.m, condition=100)


@pytest.mark.jax_defaults
def test_the_network_has_the_parameters_of_resnet_20():
    params = nnx.state(training_step.ResNet(nnx.Rngs(0)), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == workloads.RESNET20


def test_programs_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleave(runs, seconds=0)
    assert all(time["runs"] == 5 for time in times.values())
    # Once to warm up and five times measured: A B, A B, B A, A B, B A, A B.
    turns = "".join(name for name, _ in itertools.groupby(calls))
    assert turns == "ab" * 4


def test_a_summary_is_median_and_quartiles():
    summary = timing.summary([3.0, 1.0, 2.0])
    assert summary == {"median": 2.0, "low": 1.5, "high": 2.5, "runs": 3}
    assert timing.summary([4.0]) == {"median": 4.0, "low": 4.0, "high": 4.0, "runs": 1}


@pytest.mark.jax_defaults
def test_states_and_inputs_take_turns_and_new_states_take_their_place():
    states = [10, 20]
    run = timing.in_turn(lambda s, x: (s + x, (s, x)), states, [(1,), (2,), (3,)], True)
    assert [run() for _ in range(4)] == [(10, 1), (20, 2), (11, 3), (22, 1)]
    assert states == [14, 23]


@pytest.mark.jax_defaults
def test_cut_fills_the_last_block_with_zeros():
    blocks = alternatives.cut(jnp.arange(1.0, 11.0).reshape(2, 5), 3)
    np.testing.assert_array_equal(blocks[1], [[4, 5, 0], [9, 10, 0]])


def test_a_program_that_runs_out_of_memory_is_left_out():
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: 28160495616 bytes")

    times = timing.interleave({"large": fail, "small": lambda: None}, seconds=0)
    assert times["small"]["runs"] == 5
    assert times["large"] == {"left_out": "does not fit: ran out of memory"}
    assert timing.interleave({"large": fail}, seconds=0).keys() == {"large"}

    def break_down():
        raise RuntimeError("anything else")

    with pytest.raises(RuntimeError, match="anything else"):
        timing.interleave({"broken": break_down}, seconds=0)
