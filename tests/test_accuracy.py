"""The accuracy table is that of its result file, and the measurement measures."""

import accuracy
import pytest
import report


def test_table_is_that_of_the_result_file():
    results = report.load("accuracy")
    assert report.read_table(accuracy.PAGE, "accuracy") == accuracy.table(results).strip()


def test_a_changed_result_changes_the_table():
    results = report.load("accuracy")
    before = accuracy.table(results)
    results["rows"][3]["identity_2"] *= 2
    assert accuracy.table(results) != before


def test_result_file_is_complete():
    results = report.load("accuracy")
    assert {"date", "device", "jax", "python", "n", "d", "seeds", "rows"} <= results.keys()
    keys = [(row["window"], row["damping"], row["vector"]) for row in results["rows"]]
    assert keys == [
        (name, damping, vector)
        for name in accuracy.WINDOWS
        for damping in accuracy.DAMPINGS
        for vector in accuracy.vectors(2)
    ]
    # The sentence of the page: identity 2 keeps its digits in every row.
    assert max(row["identity_2"] for row in results["rows"]) < 1e-5


@pytest.mark.jax_defaults
def test_measurement_at_small_size():
    results = accuracy.measure(
        n=8, d=300, seeds=(0,), dampings=(1e-3, 1e-5), windows=("correlated", "all times 1e8")
    )
    assert len(results["rows"]) == 8
    for row in results["rows"]:
        assert 0 < row["identity_2"] < 1e-5
        assert 0 < row["refined"] < 1e-5
    cancelled = [row for row in results["rows"] if row["window"] == "all times 1e8"]
    assert max(row["identity_1"] for row in cancelled) > 1
    assert max(row["recursion"] for row in cancelled) > 1
    assert "all times 1e8" in accuracy.table(results)
