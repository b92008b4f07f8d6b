"""The strictness that the other tests rely on is in force, and all ways to run checks agree."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import yaml

from mfac_jax import algebra

ROOT = Path(__file__).parents[1]


def test_shapes_and_dtypes_are_checked_at_run_time():
    with pytest.raises(jaxtyping.TypeCheckError):
        algebra.factor(jnp.zeros(3), jnp.ones(()))


@pytest.mark.wrong_types
def test_wrong_types_mark():
    with pytest.raises(ValueError, match="at least two dimensions"):
        algebra.factor(jnp.zeros(()), jnp.ones(()))


def test_mixed_dtypes_raise():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


@pytest.mark.jax_defaults
def test_jax_defaults_mark():
    total = jnp.ones((2, 2), jnp.float32) + jnp.ones(2, jnp.bfloat16)
    assert total.dtype == jnp.float32


@pytest.mark.x64
def test_x64_mark():
    assert jnp.ones(2).dtype == jnp.float64


def test_single_precision_is_the_default():
    assert jnp.ones(2).dtype == jnp.float32


def test_there_are_several_devices():
    assert len(jax.devices("cpu")) == 4


def prerequisites(target):
    """What a target of the Makefile depends on."""
    rules = re.findall(rf"^{target}:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rules, f"the Makefile has no target {target}"
    return rules[0].split()


def test_the_hooks_run_the_checks_of_make_lint_and_ci():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    commands = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert commands == [f"make {target}" for target in prerequisites("lint")]
    ci = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        prerequisites(command.removeprefix("make "))
        assert re.search(rf"^step \w+ {command}$", ci, re.MULTILINE)


def test_the_hosted_workflow_runs_ci_on_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert workflow["permissions"] == {"contents": "read"}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = [entry.rpartition(" ")[2] for entry in project["classifiers"] if "3." in entry]
    inputs = [step.get("with", {}) for step in job["steps"]]
    pythons = [given["python-version"] for given in inputs if "python-version" in given]
    assert pythons == [supported[-1], supported[0]]
    assert project["requires-python"] == f">={supported[0]}"


def test_the_contributing_page_names_what_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"`make ([\w-]+)`", page):
        prerequisites(target)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = [re.findall(r"\w+", layer) for layer in config["contracts"][0]["layers"]]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    assert [re.findall(r"\w+", row) for row in rows] == floors


def test_the_tests_of_numbers_are_there():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (names,) = re.findall(r"^NUMBERS := (.*)$", makefile, re.MULTILINE)
    assert "window" in names.split()
    assert [n for n in names.split() if not (ROOT / "tests" / f"test_{n}.py").exists()] == []
