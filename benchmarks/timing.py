"""Times programs that do the same, turn by turn in one process."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import memory

Run = Callable[[], Any]

# A measurement is at least this long, so that neither the clock nor the dispatch of a call
# distorts it: a short program is called several times before one wait.
_SHORTEST = 2e-3
_MOST_CALLS = 100

# A program that takes longer is not warmed up: it is already compiled, and its first run counts as
# a measurement. A program that takes much longer runs only once.
_LONG, _VERY_LONG = 5.0, 20.0
_FEWEST_RUNS, _FEWEST_LONG_RUNS, _MOST_RUNS = 5, 3, 30

# The pause between two programs, in which the threads of the first fall asleep.
_PAUSE = 3e-3

# The words of XLA and PyTorch for it.
_OUT_OF_MEMORY = ("resource_exhausted", "out of memory")


def interleave(runs: Mapping[str, Run], seconds: float) -> dict[str, dict[str, Any]]:
    """Times every program in turn: A B C, C B A, A B C and so on.

    Args:
        runs: by name, functions that start the program once and return its results.
        seconds: about how long each program is measured; each runs at least a few times.

    Returns:
        By name: the median, the quartiles (``low``, ``high``) in seconds, and the number of runs;
        or the reason why it was ``left_out``, if it ran out of memory.
    """
    samples: dict[str, list[float]] = {}
    left_out: dict[str, Any] = {}
    calls, turns = {}, {}
    for name, run in runs.items():
        try:
            first = _time(run, 1)
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
                raise
            left_out[name] = {"left_out": "does not fit: ran out of memory"}
            continue
        samples[name] = []
        if first > _LONG:
            samples[name].append(first)
            calls[name] = 1
            turns[name] = 0 if first > _VERY_LONG else _FEWEST_LONG_RUNS - 1
            continue
        warm = _time(run, 1)
        calls[name] = min(max(math.ceil(_SHORTEST / warm), 1), _MOST_CALLS)
        fits = int(seconds / (warm * calls[name]))
        turns[name] = min(max(fits, _FEWEST_RUNS), _MOST_RUNS)
    rounds = max(turns.values(), default=0)
    order = list(samples)
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            # The runs of programs with fewer runs are spread evenly over the rounds.
            if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:
                time.sleep(_PAUSE)
                samples[name].append(_time(runs[name], calls[name]))
    return {name: summary(values) for name, values in samples.items()} | left_out


def in_turn(
    program: Callable[..., Any],
    states: list[Any],
    inputs: Sequence[tuple[Any, ...]],
    donates: bool,
) -> Run:
    """A function that starts the program on the next state and the next inputs.

    Args:
        program: takes a state and inputs and returns a result. If it ``donates`` the state, it
            returns the new state and a result.
        states: the states. They take turns, so that no cache keeps one from run to run; a new
            state replaces the old one.
        inputs: at least one tuple; they also take turns.
        donates: whether the program donates the state.
    """
    turn = itertools.count()

    def run() -> Any:
        i = next(turn)
        k = i % len(states)
        out = program(states[k], *inputs[i % len(inputs)])
        if donates:
            states[k], out = out
        return out

    return run


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of measurements."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": median, "low": low, "high": high, "runs": len(values)}


def _time(run: Run, calls: int) -> float:
    memory.make_room()
    start = time.perf_counter()
    jax.block_until_ready([run() for _ in range(calls)])
    return (time.perf_counter() - start) / calls
