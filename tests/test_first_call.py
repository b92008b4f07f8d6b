"""How many programs a first call compiles, and that other numbers compile none."""

import first_call


def test_the_first_prune_compiles_few_programs_and_the_next_none():
    figures = first_call.measure_once("guide")
    assert 0 < figures["first"]["programs"] <= first_call.WANTED["guide"]["programs"]
    assert figures["again"]["programs"] == 0


def test_a_training_step_is_compiled_once():
    assert first_call.measure_once("training")["again"]["programs"] == 0


def test_the_guide_begins_with_a_call_of_prune():
    assert "prune(params, loss_fn, batches, 0.5" in first_call.first_example(first_call.GUIDE)


def test_the_table_says_what_is_not_met():
    case = {"first": {"seconds": 9.0, "compilation": 8.0, "programs": 25}}
    case["again"] = {"seconds": 0.5, "compilation": 0.0, "programs": 0}
    results = {
        "environment": {"device": "cpu", "cores": 2, "jax": "0", "date": "today"},
        "repeats": 1,
        "cases": dict.fromkeys(first_call.CASES, case),
    }
    lines = first_call.table(results).splitlines()
    assert [("**not met**" in line) for line in lines[2:5]] == [False, False, True]
