"""Every test runs with JAX at its strictest and on several CPU devices."""

import os

# Plots are drawn to files; a test machine has no screen.
os.environ.setdefault("MPLBACKEND", "agg")

import contextlib
from collections.abc import Generator

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property compiles, which takes longer than any deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled() -> Generator[None, None, None]:
    """A process may only map so many pieces of memory, and every program takes a few.

    With those of all files, XLA ran out of them (65,530 on Linux) and crashed as it compiled.
    """
    yield
    jax.clear_caches()


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
