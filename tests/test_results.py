"""The tables in the documentation are those of the result files."""

import compiled
import defaults
import demo
import devices
import first_call
import jax
import launches
import optimizer_results
import plain_call
import plan
import pruning_results
import pruning_step
import pytest
import report
import storages
import swaps
from report import ROOT


@pytest.mark.parametrize(
    ("page", "name", "render"),
    [
        ("README.md", "quickstart", demo.table),
        ("docs/defaults.md", "defaults", defaults.table),
        ("docs/implementations.md", "compiled", compiled.table),
        ("docs/performance.md", "first_call", first_call.table),
        ("docs/implementations.md", "launches", launches.table),
        ("docs/pruning-results.md", "pruning_step", pruning_step.table),
        ("docs/pruning-results.md", "swaps", swaps.table),
    ],
)
def test_table_is_that_of_the_result_file(page, name, render):
    assert report.read_table(ROOT / page, name) == render(report.load(name)).strip()


def test_tables_of_the_pruned_networks_are_those_of_the_result_file():
    results = report.load(pruning_results.NAME)
    assert pruning_results.stale(results) == {}
    for name, table in pruning_results.tables(results).items():
        assert report.read_table(pruning_results.PAGE, name) == table.strip()
    assert report.read_table(ROOT / "README.md", "pruning") == pruning_results.summary(results)
    assert pruning_results.FIGURE.read_bytes().startswith(b"\x89PNG")


def test_table_of_the_plain_call_is_that_of_its_result_file():
    wanted = pruning_results.MISSING
    if (report.RESULTS / f"{plain_call.NAME}.json").exists():
        wanted = plain_call.table(report.load(plain_call.NAME)).strip()
    assert report.read_table(plain_call.PAGE, plain_call.NAME) == wanted


def test_tables_of_the_optimizers_are_those_of_the_result_files():
    made = optimizer_results.tables(report.load("optimizers"))
    made |= optimizer_results.natural_tables(optimizer_results.load("natural_gradients"))
    made |= optimizer_results.direction_tables(optimizer_results.load("directions"))
    for name, table in made.items():
        assert report.read_table(optimizer_results.PAGE, name) == table.strip()
    figure = optimizer_results.ASSETS / optimizer_results.FIGURES["optimizers"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_table_of_the_devices_is_that_of_the_result_file():
    table = devices.table(report.load("devices"))
    assert report.read_table(devices.PAGE, "devices-time") == table.strip()


def test_tables_of_the_storages_are_those_of_the_result_file():
    for name, table in storages.tables(report.load("storages"), storages.accelerators()).items():
        page = storages.PAGES.get(name, storages.PAGE)
        assert report.read_table(page, name) == table.strip()


def test_plans_of_the_storages_are_those_of_the_library():
    results = report.load("storages")
    measured_with = results["memory environment"]["jax"]
    if jax.__version__ != measured_with:
        pytest.skip(f"the table is of jax {measured_with}, and plans differ between versions")
    assert list(storages.memory()) == results["memory"]


def test_plans_are_within_a_tenth_of_what_xla_and_the_process_report():
    results = report.load("plan")
    for name, table in plan.tables(results).items():
        assert report.read_table(plan.PAGE, name) == table.strip()
    for result in [*results["compiled"], *results["process"]]:
        actual = result["XLA"] if "XLA" in result else result["process"]
        assert result["plan"] == pytest.approx(actual, rel=0.1), result


def test_figure_of_the_demo_is_there():
    assert demo.FIGURE.read_bytes().startswith(b"\x89PNG")


def test_a_changed_result_changes_the_table():
    results = report.load("defaults")
    results["rows"][0]["loss"][0] += 1.0
    assert report.read_table(ROOT / "docs/defaults.md", "defaults") != defaults.table(results)


def test_missing_markers_are_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# No table here\n")
    with pytest.raises(ValueError, match="no markers for 'x'"):
        report.write_table(page, "x", "| a |")
