"""Every test runs with JAX at its strictest and on several CPU devices."""

import os

# Plots are drawn to files; a test machine has no screen.
os.environ.setdefault("MPLBACKEND", "agg")

import contextlib
from collections.abc import Generator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest
import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.cheap()
# NumPy's threads would wait for one another on cores that other workers hold. It reads this as
# it is imported: too late for this process, in time for the workers that it starts.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property compiles, which takes longer than any deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--as-users-compile", action="store_true", help="let XLA optimize as it does by default"
    )
    parser.addoption("--cases", type=int, help="at most so many cases of each parametrized test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what holds on a CPU only, and keeps the chosen number of cases of each test.

    The cases are evenly spaced over all of them.
    """
    if jax.default_backend() != "cpu":
        for item in items:
            if item.get_closest_marker("on_cpu"):
                item.add_marker(pytest.mark.skip(reason="states what holds on a CPU"))
    most = config.getoption("cases")
    if most is None:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {
        id(of_test[i * len(of_test) // min(most, len(of_test))])
        for of_test in cases.values()
        for i in range(min(most, len(of_test)))
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled ahead of time is compiled as on the device."""
    ahead_of_time = all(Path(argument).parent.name == "aot" for argument in config.args)
    if ahead_of_time or config.getoption("as_users_compile"):
        os.environ["XLA_FLAGS"] = xla_flags.as_users_compile()


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled() -> Generator[None, None, None]:
    """Drops compiled programs before they take too much.

    A program maps a few pieces of memory, of which Linux grants a process 65,530 by default:
    near that, XLA crashes as it compiles. An eighth of them holds about 2 GiB.
    Other systems do not say, so there nothing is kept from module to module.
    """
    yield
    maps, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not maps.exists() or 8 * maps.read_bytes().count(b"\n") > int(limit.read_text()):
        jax.clear_caches()


@pytest.fixture
def as_users_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts compile as XLA does by default."""
    monkeypatch.setenv("XLA_FLAGS", xla_flags.as_users_compile())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What the marks ask for holds for a test and for its fixtures."""
    with contextlib.ExitStack() as settings:
        if item.get_closest_marker("x64"):
            settings.enter_context(jax.enable_x64(True))
        # A docstring's example meets JAX as its reader does.
        if item.get_closest_marker("jax_defaults") or isinstance(item, pytest.DoctestItem):
            settings.enter_context(jax.numpy_dtype_promotion("standard"))
            settings.enter_context(jax.numpy_rank_promotion("allow"))
        if item.get_closest_marker("wrong_types"):
            jaxtyping.config.update("jaxtyping_disable", True)
            settings.callback(jaxtyping.config.update, "jaxtyping_disable", False)
        return (yield)
