"""Result files, and the tables that they fill in the documentation.

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` in a Markdown
file. Benchmarks write it; a test compares it with the result file.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """The machine and the date of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def where(environment: dict[str, Any]) -> str:
    """The machine, the version and the date, as one sentence."""
    device = environment["device"]
    if device == "cpu" and "processor" in environment:
        device = f"{environment['processor']}, {environment['cores']} cores"
    return f"{device}, jax {environment['jax']}, {environment['date']}."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def save(name: str, results: dict, folder: Path = RESULTS) -> None:
    """Writes ``NAME.json``, in ``benchmarks/results`` by default."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def load(name: str) -> dict:
    """Reads ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}:begin -->\n)(.*?)(<!-- {name}:end -->)", re.DOTALL)


def read_table(path: Path, name: str) -> str:
    """The text between the markers of ``name``."""
    found = _pattern(name).search(path.read_text())
    if found is None:
        raise ValueError(f"{path} has no markers for {name!r}.")
    return found[2].strip()


def write_table(path: Path, name: str, text: str) -> None:
    """Replaces the text between the markers of ``name``."""
    read_table(path, name)
    replaced = _pattern(name).sub(lambda m: f"{m[1]}{text.strip()}\n{m[3]}", path.read_text())
    path.write_text(replaced)
