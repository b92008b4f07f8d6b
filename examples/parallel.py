"""Resumable experiments: many independent runs, on all cores, each written down when it ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Key = TypeVar("Key")


def environment() -> dict[str, Any]:
    """The machine and the versions of a measurement."""
    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The name of the processor or the accelerator."""
    device = jax.devices()[0].device_kind
    info = Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu" or not info.exists():
        return device
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "name" in line]
    return next((name for name in names if name), device)


def num_workers() -> int:
    """The number of parallel runs: one for each core on a CPU, otherwise one."""
    if jax.default_backend() == "cpu" and hasattr(os, "sched_setaffinity"):
        return min(len(os.sched_getaffinity(0)), 4)
    return 1


def open_results(path: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """The results so far; new ones begin with the environment and the date.

    Another machine may go on with them: each run has its own.

    Raises:
        SystemExit: the file was made with other versions.
    """
    if not path.exists():
        return {"environment": environment | {"date": time.strftime("%Y-%m-%d")}, "runs": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    there = results["environment"] | {key: environment[key] for key in ("device", "cores")}
    there = {key: there.get(key) for key in environment}
    here = json.loads(json.dumps(environment))
    differ = [key for key in here if there[key] != here[key]]
    if differ:
        expected, got = ({key: of[key] for key in differ} for of in (here, there))
        sys.exit(f"{path} comes from elsewhere: expected {expected}, got {got}.")
    return results


def perform(
    measure: Callable[..., dict[str, Any]],
    todo: dict[str, tuple[Any, ...]],
    results: dict[str, Any],
    path: Path,
    *,
    workers: int = 1,
) -> None:
    """Performs the runs that ``results`` does not hold yet, and writes each to ``path``.

    Args:
        measure: a run from its arguments; importable by other processes.
        todo: the arguments by the keys of the runs.
        results: the results so far; changed in place.
        path: the file of results.
        workers: the number of processes; with 1 the runs happen in this one.
    """
    left = {key: args for key, args in todo.items() if key not in results["runs"]}
    with tqdm(total=len(left), unit="run", disable=None) as bar:
        for key, done in outcomes(measure, left, path.parent / "compiled", workers):
            results["runs"][key] = done
            part = path.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1) + "\n")
            part.replace(path)  # an interruption leaves the file as it was
            bar.update()
            bar.set_description(key)


def outcomes(
    measure: Callable[..., dict[str, Any]],
    todo: dict[Key, tuple[Any, ...]],
    cache: Path,
    workers: int,
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yields the key of every run with its result when it ends.

    Args:
        measure: a run from its arguments; importable by other processes.
        todo: the arguments by the keys of the runs.
        cache: the folder for compiled programs, which all processes share.
        workers: the number of processes; with 1 the runs happen in this one.
    """
    if workers == 1:
        for key, arguments in todo.items():
            yield key, timed(measure, arguments)
        return
    # Large pages (glibc reads this at process start; other libraries ignore it): on a CPU every
    # gradient allocates its memory again, which is slow in small pages.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        idle = []
        for core in cores(workers):
            pool = ProcessPoolExecutor(1, context, _start, (str(cache),))
            idle.append(stack.enter_context(pool))
            with _bound(core):
                pool.submit(int).result()  # starts the process
        waiting, left = {}, list(todo.items())
        while left or waiting:
            # At most as many runs as workers are submitted, so that an interruption is quick.
            while left and idle:
                key, arguments = left.pop(0)
                pool = idle.pop()
                waiting[pool.submit(timed, measure, arguments)] = key, pool
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                key, pool = waiting.pop(future)
                idle.append(pool)
                yield key, future.result()


def timed(measure: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Performs a run and adds its time on the clock and on the processor, and the machine."""
    began, busy = time.perf_counter(), time.process_time()
    done = measure(*arguments)
    return done | {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - busy,
        "device": processor(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main_device(runs: Iterable[dict[str, Any]]) -> str:
    """The machine of most of the runs; only times of one machine can be compared."""
    return Counter(run["device"] for run in runs).most_common(1)[0][0]


def cores(workers: int) -> list[int | None]:
    """A core for each worker. Workers share cores if there are too few; None sets no core."""
    pins = hasattr(os, "sched_setaffinity")
    available = sorted(os.sched_getaffinity(0)) if pins else [None]
    return list(itertools.islice(itertools.cycle(available), workers))


@contextlib.contextmanager
def _bound(core: int | None) -> Iterator[None]:
    """Processes started inside run on this core; None binds nothing.

    They have to inherit it: XLA makes as many threads as a process has cores, and threads that
    share a core wait for one another. A step then took up to twenty times as long.
    """
    if core is None:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _start(cache: str) -> None:
    """Binds a process to the cache of compiled programs that all runs share."""
    jax.config.update("jax_compilation_cache_dir", cache)


def write_up(
    results: dict[str, Any],
    path: Path,
    tables: Callable[[dict[str, Any]], dict[str, str]],
    draw: Callable[[dict[str, Any], Path], None],
    figure: str,
) -> None:
    """Writes the tables and the figure beside the file of results, and prints the tables."""
    text = "\n\n".join(tables(results).values())
    (path.parent / "tables.md").write_text(text + "\n")
    draw(results, path.parent / figure)
    print(text)
    print(f"\nWritten to {path.parent}: {path.name}, tables.md, {figure}")
